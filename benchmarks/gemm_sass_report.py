"""What the fused kernel for many rows of x becomes on each GPU generation, without a GPU.

    python benchmarks/gemm_sass_report.py                    a table
    python benchmarks/gemm_sass_report.py --json --quick     what test/kernels/test_int3_gemm_offline.py reads

As sass_report.py: instructions of the main loop, registers, spills, and what passes through shared memory. Of a
warp, a step of the loop takes 128 columns of one tile, 128 weights a thread. `wide stores` are the 128-bit ones to
shared memory: x, permuted, on Hopper; none where mma.sync takes x as it lies. Operand A, the weights, would add 16.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[1]), str(pathlib.Path(__file__).resolve().parent)]
from sass_report import disassemble, parse  # noqa: E402

from mbq_ao.kernels.gemm_config import GemmConfig, cuts  # noqa: E402
from mbq_ao.kernels.int3_gemm import _gemm_kernel  # noqa: E402

ARCHS = (80, 89, 90, 100, 120)
WEIGHTS_PER_THREAD = 128
CASE = {"GROUP": 128, "BF16": True, "EVEN_K": True, "fp32_scale": False}
QUICK = [(0, CASE), (2, CASE), (-1, CASE | {"BF16": False, "EVEN_K": False, "GROUP": 32})]
FULL = [
    (cut, {"GROUP": group, "BF16": bf16, "EVEN_K": even, "fp32_scale": fp32_scale})
    for cut in range(-1, 3)
    for group in (128, 0, 64, 32)
    for bf16 in (True, False)
    for even in (True, False)
    for fp32_scale in (False, True)
]


def compile_gemm(config: GemmConfig, case: dict, arch: int) -> triton.compiler.CompiledKernel:
    """Compile with every pointer and stride divisible by 16, as they are for the usual layer."""
    constants = {
        **{name: case[name] for name in ("GROUP", "BF16", "EVEN_K")},
        **{name.upper(): getattr(config, name) for name in ("block_n", "block_m", "block_k", "slices")},
        "HAS_BIAS": True,
        "INTERPRETED": False,
    }
    float_type = "*bf16" if case["BF16"] else "*fp16"
    pointers = {"qdata": "*i16", "zero": "*u8", "scale": "*fp32" if case["fp32_scale"] else float_type}
    pointers |= dict.fromkeys(("x", "y", "bias"), float_type)
    names = _gemm_kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in constants and name not in ("M", "split_tiles")
    }
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.max_registers,
        "enable_fp_fusion": True,
    }
    source = ASTSource(fn=_gemm_kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def report(cut: int, case: dict, arch: int) -> dict:
    config = cuts(divmod(arch, 10))[cut]
    kernel = compile_gemm(config, case, arch)
    sass, usage = disassemble(kernel.asm["cubin"])
    code, loops = parse(sass)
    start, end = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, len(code)))
    loop = code[start:end]
    opcodes = collections.Counter(opcode for opcode, _ in loop)
    every_opcode = set(re.findall(r"\b(?:LDL|STL)\b[\w.]*", sass))
    tensor = {name: sum(n for o, n in opcodes.items() if o.startswith(name)) for name in ("HMMA", "HGMMA", "UTCHMMA")}
    return {
        "arch": arch,
        "cut": cut,
        "case": case,
        "config": dataclasses.asdict(config),
        "per_weight": round(sum(opcodes.values()) / WEIGHTS_PER_THREAD, 2),
        "dequantize": round(sum(opcodes[o] for o in opcodes if o.startswith(_DEQUANTIZE)) / WEIGHTS_PER_THREAD, 2),
        "registers": usage.get("REG"),
        "stack": usage.get("STACK"),
        "spills": sorted(every_opcode),
        "shared": kernel.metadata.shared,
        "tensor_core": {name: count for name, count in tensor.items() if count},
        "weights_in_registers": all(re.match(r"\s*R\d+, R\d+, gdesc", a) for o, a in loop if o.startswith("HGMMA")),
        "loads": {o: n for o, n in opcodes.items() if o.startswith("LDGSTS")},
        "wide_stores": sum(n for o, n in opcodes.items() if re.match(r"STS\.(64|128)|STSM.*\.4$", o)),
    }


_DEQUANTIZE = ("LOP3", "SHF", "HFMA2", "HMUL2", "HADD2")  # unpacking, then two for each pair of weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="three cases for each architecture, only")
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHS)
    arguments = parser.parse_args()
    if not arguments.json:
        print(f"triton {triton.__version__}, main loop; i/w: instructions a weight and thread\n")
        print(
            f"{'arch':>5}{'rows x rows':>13}{'i/w':>6}{'unpack':>8}{'regs':>6}{'stack':>6}{'shared':>8}{'wide STS':>9}"
        )
    asked = [(cut, case, arch) for cut, case in (QUICK if arguments.quick else FULL) for arch in arguments.archs]
    # Most of the time is Triton's own, on one core.
    with concurrent.futures.ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for row in pool.map(report, *zip(*asked, strict=True)):
            if arguments.json:
                print(json.dumps(row), flush=True)
                continue
            shape = f"{row['config']['block_n']} x {row['config']['block_m']}"
            print(
                f"{row['arch']:>5}{shape:>13}{row['per_weight']:>6}{row['dequantize']:>8}{row['registers']:>6}"
                f"{row['stack']:>6}{row['shared']:>8}{row['wide_stores']:>9}  {row['tensor_core']} "
                + ", ".join(f"{name}={value}" for name, value in row["case"].items()),
                flush=True,
            )


if __name__ == "__main__":
    main()
