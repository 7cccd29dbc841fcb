"""What the shipped kernels become on each GPU generation, without a GPU: instructions a weight, registers, spills.

    python benchmarks/sass_report.py                                            the table of benchmarks/README.md
    python benchmarks/sass_report.py --arch 90 --shape 3584x18944 --rows 1 4    whatever is asked
    python benchmarks/sass_report.py --gate --json                              what test_compile_offline.py reads

Triton compiles for a target that is not there, and ptxas and nvdisasm of the triton wheel do the rest. Counted are all
instructions that a thread of a program executes, its loop as often as it turns, over the weights that it handles:

    i/w      of all kinds        loop      those of the loop alone, where there is one
    ALU/w    of LOP3, SHF and the other kinds that share the one pipe of half the rate
    loads    16-byte loads of packed weights before the first HMMA: how much a warp has in flight

`budget` is what a GPU can issue in the time that its memory delivers a weight: 128 instructions a clock and SM over the
weights in BYTES_PER_CLOCK. A kernel above it is bound by arithmetic. One below may still be slow: run times need a GPU.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from mbq_ao.kernels import int3_gemv, int3_linear
from mbq_ao.kernels.gemv_config import MAX_ROWS, GemvConfig, default_gemv_config, gemv_constants

TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Memory bandwidth a clock and SM. H200: measured by a copy; the others from the maker's figures.
BYTES_PER_CLOCK = {80: 13.1, 89: 3.1, 90: 16.4, 100: 29.0, 120: 4.4}  # A100, RTX 4090, H200, B200, RTX 5090
ARCHS = tuple(BYTES_PER_CLOCK)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ALU = re.compile("P?LOP3|SHF|PRMT|F?SEL|IADD3|VIADD|[IF]SETP|V?IMNMX|FMNMX|LEA|SGXT|BMSK|FLO|POPC|IABS|P2R|R2P")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
LABEL = re.compile(r"^\s*(\.L_x_\d+):")


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel as it is launched for x (rows, k) and a weight (n, k); group_size = k for one scale a row."""

    arch: int
    rows: int = 1
    dtype: str = "fp16"
    group_size: int = 128
    n: int = 4096
    k: int = 4096
    kernel: str = "gemv"
    config: GemvConfig | None = None


GATE = [*[Case(arch, dtype=dtype) for arch in ARCHS for dtype in DTYPES], Case(90, rows=8, k=8192)]
TABLE = [
    *[Case(arch, dtype=dtype) for arch in ARCHS for dtype in DTYPES],
    *[Case(90, dtype=dtype, group_size=group) for group in (64, 32, 4096) for dtype in DTYPES],
    *[Case(90, rows=rows, dtype=dtype) for rows in (2, 4, 8, 16) for dtype in DTYPES],
    *[Case(90, rows=8, dtype=dtype, k=8192) for dtype in DTYPES],
    *[Case(90, dtype=dtype, n=n, k=k) for n, k in ((18944, 3584), (3584, 18944), (512, 3584)) for dtype in DTYPES],
]


def launch(case: Case) -> tuple[Any, dict[str, Any], dict[str, Any], float, int]:
    """The jitted function, its constants, its options, weights a thread, and turns of its loop."""
    dtype, num_groups = DTYPES[case.dtype], -(-case.k // case.group_size)
    group_size = 0 if num_groups == 1 else case.group_size
    num_tiles = -(-case.k // 128)
    if case.kernel == "gemv":
        config = case.config or default_gemv_config(case.rows, case.n, case.k, case.group_size, dtype)
        constants = gemv_constants(case.rows, case.k, group_size, dtype, config, num_groups, num_groups)
        constants |= {"HAS_BIAS": config.split_k == 1, "INTERPRETED": False}
        options = {"num_warps": config.num_warps, "maxnreg": config.max_registers}
        per_turn = config.split_k * config.num_warps * config.col_tiles
        weights = config.row_tiles * case.k / (config.split_k * config.num_warps)
        return int3_gemv._gemv_kernel, constants, options, weights, -(-num_tiles // per_turn)
    return int3_linear._dequantize_kernel, {"GROUP": group_size}, {"num_warps": 4}, 32, 1


def compile_case(case: Case) -> tuple[triton.compiler.CompiledKernel, float, int]:
    """Compiled for pointers that are divisible by 16, as torch's are, and integers that are where they are."""
    kernel, constants, options, weights, turns = launch(case)
    float_type = "*" + case.dtype
    types = {"qdata": "*i16", "zero": "*u8"} | dict.fromkeys(("x", "y", "w", "scale", "bias"), float_type)
    if constants.get("SPLIT_K", 1) > 1:
        types["y"] = "*fp32"
    num_groups = -(-case.k // case.group_size)
    values = {"N": case.n, "K": case.k, "stride_xm": case.k, "stride_q0": -(-case.k // 128) * 768, "stride_q1": 768}
    values |= {"stride_scale": num_groups, "stride_zero": num_groups}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, type_) in enumerate(signature.items())
        if type_.startswith("*") or (type_ != "constexpr" and values.get(name, 1) % 16 == 0)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {name: value for name, value in options.items() if value is not None}
    options |= {"num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options), weights, turns


def disassemble(cubin: bytes) -> tuple[str, dict[str, int]]:
    """The SASS, and registers, stack and local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _output(TOOLS / "nvdisasm", "-c", file.name)
        usage = _output(TOOLS / "cuobjdump", "-res-usage", file.name)
    return sass, {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}


def parse(sass: str) -> tuple[list[tuple[str, str]], list[tuple[int, int]]]:
    """(opcode, operands) of every instruction but NOPs, and (first, one past the last) of every backward branch."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif (instruction := INSTRUCTION.search(line)) and instruction[1] != "NOP":
            code.append((instruction[1], instruction[2]))
            target = re.search(r"\.L_x_\d+", instruction[2])
            if instruction[1].startswith("BRA") and target and target[0] in labels:
                loops.append((labels[target[0]], len(code)))
    return code, loops


def program_and_loop(sass: str) -> tuple[list[str], list[str]]:
    """Opcodes of the whole program up to its end, and of the longest backward branch."""
    instructions, loops = parse(sass)
    code = [opcode for opcode, _ in instructions]
    end = max(i for i, opcode in enumerate(code) if opcode.startswith("EXIT")) + 1
    start, stop = max((loop for loop in loops if loop[1] <= end), key=lambda loop: loop[1] - loop[0], default=(0, 0))
    return code[:end], code[start:stop]


def report(case: Case) -> dict[str, Any]:
    compiled, weights, turns = compile_case(case)
    sass, usage = disassemble(compiled.asm["cubin"])
    code, loop = program_and_loop(sass)
    if bool(loop) != (turns > 1):
        raise RuntimeError(
            f"{case}: {turns} turns of a loop of {len(loop)} instructions; this report is wrong about it"
        )

    def executed(kind: re.Pattern[str]) -> float:
        once, again = (sum(bool(kind.fullmatch(o.partition(".")[0])) for o in part) for part in (code, loop))
        return (once + (turns - 1) * again) / weights

    first_dot = next((i for i, opcode in enumerate(code) if opcode.startswith("HMMA")), len(code))
    bits = 3 + 24 * -(-case.k // case.group_size) / case.k  # 16 of the scale and 8 of the zero point a group
    is_weight = re.compile(r"LDG.*\.EF\..*128" if case.kernel == "gemv" else r"LDG.*\.128")
    return dataclasses.asdict(case) | {
        "config": str(case.config),
        "per_weight": round(executed(re.compile(".*")), 3),
        "loop": round(len(loop) * turns / weights, 3) if loop else None,
        "alu": round(executed(ALU), 3),
        "budget": round(128 / (BYTES_PER_CLOCK[case.arch] * 8 / bits), 2),
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "spills": sum(opcode.startswith(("LDL", "STL")) for opcode in code),
        "loads": sum(bool(is_weight.match(opcode)) for opcode in code[:first_dot]),
        "tensor_core": sum(opcode.startswith("HMMA") for opcode in code),
        # Scales and sums may pass through shared memory at the end; nothing may before the last dot.
        "shared_before_last_dot": sum(
            opcode.startswith(("LDS", "STS", "LDSM", "STSM"))
            for opcode in code[: max((i for i, o in enumerate(code) if o.startswith("HMMA")), default=0)]
        ),
        "opcodes": dict(collections.Counter(opcode.partition(".")[0] for opcode in code).most_common()),
    }


def _output(*command: str | pathlib.Path) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def _cases(arguments: argparse.Namespace) -> list[Case]:
    if arguments.gate:
        return GATE
    asked = (arguments.arch, arguments.rows, arguments.dtype, arguments.group, arguments.shape)
    if not any(asked):
        return TABLE
    chosen = (arguments.arch or ARCHS, arguments.rows or [1], arguments.dtype or list(DTYPES), arguments.group or [128])
    cases = []
    for arch, rows, dtype, group, shape in itertools.product(*chosen, arguments.shape or ["4096x4096"]):
        n, k = (int(size) for size in shape.split("x"))
        if rows > MAX_ROWS and not arguments.kernel:
            raise SystemExit(f"{rows} rows of x are served by another kernel: see gemm_sass_report.py")
        kernel = arguments.kernel or "gemv"
        cases.append(Case(arch, rows, dtype, min(group, k), n, k, kernel))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with every opcode's count")
    parser.add_argument("--gate", action="store_true", help="the cases that the test asserts")
    parser.add_argument("--kernel", choices=("gemv", "dequantize"), help="not the one for these rows of x")
    parser.add_argument("--arch", nargs="*", type=int, choices=ARCHS)
    parser.add_argument("--rows", nargs="*", type=int, help="of x")
    parser.add_argument("--dtype", nargs="*", choices=tuple(DTYPES))
    parser.add_argument("--group", nargs="*", type=int, help="group size; K or more for one scale a row")
    parser.add_argument("--shape", nargs="*", help="of the weight, NxK")
    arguments = parser.parse_args()
    if not arguments.json:
        print(f"triton {triton.__version__}\n")
        print(
            "| kernel | arch | M | dtype | group | N x K | i/w | loop | ALU/w | budget | registers | spills | loads |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    cases = _cases(arguments)
    # Most of the time is Triton's own, on one core.
    with concurrent.futures.ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for case, row in zip(cases, pool.map(report, cases), strict=True):
            _show(case, row, as_json=arguments.json)


def _show(case: Case, row: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(row), flush=True)
        return
    group = "row" if case.group_size >= case.k else case.group_size
    loop = "" if row["loop"] is None else f"{row['loop']:.2f}"
    print(
        f"| {case.kernel} | {case.arch} | {case.rows} | {case.dtype} | {group} | {case.n} x {case.k} | "
        f"{row['per_weight']:.2f} | {loop} | {row['alu']:.2f} | {row['budget']} | "
        f"{row['registers']} | {row['spills']} | {row['loads']} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
