"""What the shipped kernels become on each GPU generation, without a GPU: instructions a weight, registers, spills.

    python benchmarks/sass_report.py                    a table
    python benchmarks/sass_report.py --json --quick     what test/kernels/test_compile_offline.py reads

Triton compiles for a target that is not there, and ptxas and nvdisasm of the triton wheel do the rest. A program's
main loop handles one tile a warp, 128 weights a thread, so its instructions / 128 is the price of a weight. That price
against what a GPU can issue in the time its memory delivers a weight decides whether a kernel at one row of x can
be bound by memory: about 3.2 instructions a weight on an H200, 4.0 on an A100. Run times need a GPU.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from mbq_ao.kernels import int3_linear

TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHS = (80, 89, 90, 100)
WEIGHTS_PER_THREAD = 128
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
LABEL = re.compile(r"^\s*(\.L_x_\d+):")

LINEAR = {"GROUP": 128, "BLOCK_M": 8, "WARPS": 4, "BF16": False, "HAS_BIAS": True, "INTERPRETED": False}
QUICK = [("linear", LINEAR), ("linear", LINEAR | {"BF16": True})]
FULL = [
    *QUICK,
    *[("linear", LINEAR | {"BF16": bf16, "GROUP": group}) for group in (32, 64, 0) for bf16 in (False, True)],
    *[("linear", LINEAR | {"BF16": bf16, "BLOCK_M": rows}) for rows in (16, 32) for bf16 in (False, True)],
    *[("linear", LINEAR | {"BF16": True, "WARPS": warps}) for warps in (8, 16)],
    ("linear", LINEAR | {"BF16": True, "WARPS": 16, "GROUP": 32}),
    ("dequantize", {"GROUP": 128}),
]


def compile_kernel(kind: str, constants: dict, arch: int) -> triton.compiler.CompiledKernel:
    """Compile with every pointer and integer but M divisible by 16, as they are for the usual layer."""
    kernel = getattr(int3_linear, f"_{kind}_kernel")
    float_type = "*bf16" if constants.get("BF16") else "*fp16"
    pointers = {"qdata": "*i16", "zero": "*u8"} | dict.fromkeys(("x", "y", "w", "scale", "bias"), float_type)
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, type_) in enumerate(signature.items())
        if type_ != "constexpr" and name != "M"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": constants.get("WARPS", 4), "num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def disassemble(cubin: bytes) -> tuple[str, dict[str, int]]:
    """The SASS, and registers, stack and local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _output(TOOLS / "nvdisasm", "-c", file.name)
        usage = _output(TOOLS / "cuobjdump", "-res-usage", file.name)
    return sass, {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}


def main_loop(sass: str) -> list[tuple[str, str]]:
    """(opcode, operands) of the longest backward branch, or of all of it where there is no loop."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := INSTRUCTION.search(line):
            opcode, operands = instruction[1], instruction[2]
            code.append((opcode, operands))
            target = re.search(r"\.L_x_\d+", operands)
            if opcode.startswith("BRA") and target and target[0] in labels:
                loops.append((labels[target[0]], len(code)))
    start, end = max(loops, key=lambda loop: loop[1] - loop[0]) if loops else (0, len(code))
    return [item for item in code[start:end] if item[0] != "NOP"]


def report(kind: str, constants: dict, arch: int) -> dict:
    sass, usage = disassemble(compile_kernel(kind, constants, arch).asm["cubin"])
    loop = main_loop(sass)
    opcodes = collections.Counter(opcode for opcode, _ in loop)
    count = sum(opcodes.values())
    every_opcode = {m[1] for m in INSTRUCTION.finditer(sass)}
    return {
        "kernel": kind,
        "arch": arch,
        "constants": constants,
        "instructions": count,
        "per_weight": round(count / WEIGHTS_PER_THREAD, 3) if kind == "linear" else None,
        "registers": usage.get("REG"),
        "stack": usage.get("STACK"),
        "spills": sorted(o for o in every_opcode if o.startswith(("LDL", "STL"))),
        "tensor_core": sum(n for o, n in opcodes.items() if o.startswith("HMMA") or "GMMA" in o),
        "loads_128": sum(n for o, n in opcodes.items() if o.startswith("LDG") and ".128" in o),
        "opcodes": dict(opcodes.most_common()),
    }


def _output(*command: str | pathlib.Path) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with every opcode's count")
    parser.add_argument("--quick", action="store_true", help="one row of x, groups of 128, only")
    arguments = parser.parse_args()
    if not arguments.json:
        print(f"triton {triton.__version__}, instructions of the main loop\n")
        print(f"{'arch':>5} {'kernel':<12}{'i/weight':>9}{'registers':>10}{'stack':>6}{'LDG.128':>8}{'HMMA':>6}")
    for kind, constants in QUICK if arguments.quick else FULL:
        for arch in ARCHS:
            row = report(kind, constants, arch)
            if arguments.json:
                print(json.dumps(row), flush=True)
                continue
            shown = ", ".join(f"{k}={v}" for k, v in constants.items() if k not in ("HAS_BIAS", "INTERPRETED"))
            print(
                f"{arch:>5} {kind:<12}{row['per_weight'] or '-':>9}{row['registers']:>10}{row['stack']:>6}"
                f"{row['loads_128']:>8}{row['tensor_core']:>6}  {shown}",
                flush=True,
            )


if __name__ == "__main__":
    main()
