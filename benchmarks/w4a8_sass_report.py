"""What the W4A8 kernel becomes on each GPU generation, without a GPU.

    python benchmarks/w4a8_sass_report.py                    a table: every cut of w4a8_config.py, one scale a row
    python benchmarks/w4a8_sass_report.py --group 128        with groups
    python benchmarks/w4a8_sass_report.py --json --quick     what test/kernels/test_w4a8_offline.py reads

As sass_report.py: instructions of the main loop over the weights a thread handles in it, beside what a GPU can issue
while its memory delivers a weight (`budget`; it binds where there are few tokens, and the packed weight is what takes
time). `wide stores` are the 128-bit ones to shared memory in the loop: nothing of operand A or B should pass there.
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
from sass_report import ARCHS, BYTES_PER_CLOCK, disassemble, parse  # noqa: E402

from mbq_ao.kernels.w4a8_config import (  # noqa: E402
    FEW,
    FEW_SMALL,
    FUSED,
    FUSED_SMALL,
    MANY,
    MOST,
    SOME,
    W4A8Config,
    cuts_for,
)
from mbq_ao.kernels.w4a8_gemm import _quantize_kernel, _w4a8_kernel  # noqa: E402

TENSOR = ("IMMA", "IGMMA", "UTCIMMA")
QUICK = [(cut, 0) for cut in (FEW_SMALL, FEW, FUSED, FUSED_SMALL, SOME, MANY, MOST)]
QUICK += [(FEW_SMALL, 128), (FUSED, 128), (dataclasses.replace(SOME, block_k=64), 32)]


def compile_w4a8(config: W4A8Config, group: int, arch: int, rows: int = 1) -> triton.compiler.CompiledKernel:
    """Compiled for bf16, pointers and strides divisible by 16, as they are for the usual layer.

    rows: the tokens of a fused config; one or 8 make no difference to its loop.
    """
    constants = {name.upper(): getattr(config, name) for name in ("block_n", "block_m", "block_k", "slices")}
    constants |= {"GROUP": group, "HAS_BIAS": True, "HAS_PRE": False, "INTERPRETED": False}
    constants["ROWS"] = rows if config.fused else 0
    types = {"x": "*bf16" if config.fused else "*i8", "qdata": "*i8", "d": "*fp32"}
    types |= dict.fromkeys(("pre_scale", "scale", "bias", "y"), "*bf16")
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return _compile(_w4a8_kernel, constants, types, ("M", "split_tiles"), options, arch)


def compile_quantize(block: int, arch: int) -> triton.compiler.CompiledKernel:
    constants = {"BLOCK": block, "ONE_PASS": True, "HAS_PRE": True, "INTERPRETED": False}
    types = {"x": "*bf16", "pre_scale": "*bf16", "xq": "*i8", "d": "*fp32"}
    return _compile(_quantize_kernel, constants, types, (), {"num_warps": min(16, max(1, block // 512))}, arch)


def _compile(
    kernel: triton.runtime.JITFunction,
    constants: dict,
    types: dict[str, str],
    unaligned: tuple[str, ...],
    options: dict,
    arch: int,
) -> triton.compiler.CompiledKernel:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in constants and name not in unaligned
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def report(config: W4A8Config, group: int, arch: int) -> dict:
    kernel = compile_w4a8(config, group, arch)
    sass, usage = disassemble(kernel.asm["cubin"])
    code, loops = parse(sass)
    # The smallest loop around a dot product: waits for it are loops of their own.
    bodies = [code[start:end] for start, end in loops]
    loop = min((body for body in bodies if any(o.startswith(TENSOR) for o, _ in body)), key=len)
    opcodes = collections.Counter(opcode for opcode, _ in loop)
    weights = config.block_n * config.block_k * config.slices / (32 * config.num_warps)
    bits = 4 + (16 / group if group else 0)
    tensor = {name: sum(n for o, n in opcodes.items() if o.startswith(name)) for name in TENSOR}
    return {
        "arch": arch,
        "group": group,
        "config": dataclasses.asdict(config),
        "per_weight": round(len(loop) / weights, 2),
        "unpack": round(sum(n for o, n in opcodes.items() if o.startswith(("LOP3", "SHF"))) / weights, 2),
        "budget": round(128 / (BYTES_PER_CLOCK[arch] * 8 / bits), 2),
        "registers": usage.get("REG"),
        "stack": usage.get("STACK"),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": kernel.metadata.shared,
        "tensor_core": {name: count for name, count in tensor.items() if count},
        "weights_in_registers": all(re.match(r"\s*R\d+, R\d+, gdesc", a) for o, a in loop if o.startswith("IGMMA")),
        "loads": {o: n for o, n in opcodes.items() if o.startswith("LDGSTS")},
        "wide_stores": sum(n for o, n in opcodes.items() if re.match(r"STS\.(64|128)|STSM.*\.4$", o)),
    }


def report_quantize(arch: int, block: int = 4096) -> dict:
    """Of a token of 4096 columns: instructions an element, which is what it costs beside the 3 bytes it moves."""
    sass, usage = disassemble(compile_quantize(block, arch).asm["cubin"])
    code, _ = parse(sass)
    opcodes = collections.Counter(opcode for opcode, _ in code)
    return {
        "arch": arch,
        "quantize": block,
        "per_element": round(len(code) * min(16, max(1, block // 512)) * 32 / block, 2),
        "registers": usage.get("REG"),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "loads": {o: n for o, n in opcodes.items() if o.startswith("LDG")},
        "stores": {o: n for o, n in opcodes.items() if o.startswith("STG")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="the cases that the test asserts")
    parser.add_argument("--group", type=int, default=0, help="columns of a group; 0: one scale a row")
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHS)
    arguments = parser.parse_args()
    cases = QUICK if arguments.quick else [(cut, arguments.group) for cut in cuts_for(arguments.group)]
    asked = [(cut, group, arch) for cut, group in cases for arch in arguments.archs]
    with concurrent.futures.ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        rows = pool.map(report, *zip(*asked, strict=True))
        tokens = pool.map(report_quantize, arguments.archs)
        if arguments.json:
            for row in (*rows, *tokens):
                print(json.dumps(row), flush=True)
            return
        print(f"triton {triton.__version__}, bf16, main loop; i/w: instructions a weight and thread\n")
        print("| arch | rows x tokens | slices | group | i/w | unpack | budget | registers | spills | shared | dots |")
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for row in rows:
            config = row["config"]
            print(
                f"| {row['arch']} | {config['block_n']} x {config['block_m']}{' fused' * config['fused']} | "
                f"{config['slices']} | "
                f"{row['group'] or 'row'} | {row['per_weight']} | {row['unpack']} | {row['budget']} | "
                f"{row['registers']} | {row['spills']} | {row['shared']} | {row['tensor_core']} |",
                flush=True,
            )
        for row in tokens:
            print(
                f"\nquantizing tokens, sm_{row['arch']}: {row['per_element']} instructions an element, {row['loads']}"
            )


if __name__ == "__main__":
    main()
