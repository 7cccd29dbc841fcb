"""The inline assembly of the unpacking, run by a few lines of Python: the interpreter and compilers do not run it."""

import inspect
import itertools
import re

import pytest
import torch

pytest.importorskip("triton")

from mbq_ao.kernels import fragments
from mbq_ao.kernels.layout import FIELDS, pack_int3

SOURCES = {torch.float16: fragments.unpack_fp16, torch.bfloat16: fragments.unpack_bf16}


def run_ptx(program: str, words: dict[str, int]) -> dict[str, int]:
    """Execute shr.u32, and.b32 and lop3.b32 with 0xea, (a & b) | c, on 32-bit registers."""
    registers = dict(words)

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for statement in re.findall(r"(\w+\.\w+) ([^;]+);", program):
        opcode, operands = statement[0], [operand.strip() for operand in statement[1].split(",")]
        target, *sources = operands
        if opcode == "shr.u32":
            registers[target] = value(sources[0]) >> value(sources[1])
        elif opcode == "and.b32":
            registers[target] = value(sources[0]) & value(sources[1])
        else:
            assert (opcode, sources[3]) == ("lop3.b32", "0xea")
            registers[target] = (value(sources[0]) & value(sources[1])) | value(sources[2])
    return registers


def place(dtype: torch.dtype, pair: int, slab: int, field: int) -> int:
    """The power of two that the value is multiplied by."""
    if dtype == torch.bfloat16:
        return 3 if (pair, slab) in ((1, 0), (1, 1), (3, 0)) else 0
    return 6 if field == 5 else 3 * (field % 3)


@pytest.mark.parametrize("dtype", SOURCES, ids=str)
def test_assembly_gives_the_values_that_were_packed(dtype: torch.dtype) -> None:
    (program,) = re.findall(r'"""\{\s*\.reg [^;]*;(.*?)\}"""', inspect.getsource(SOURCES[dtype].fn), re.DOTALL)
    q = torch.randint(0, 8, (32, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    planes = pack_int3(q)[0, 0].view(torch.int32)  # plane, lane, pair of halves
    for lane, hi, up in itertools.product((0, 1, 13, 31), range(2), range(2)):
        words = {f"${16 + p}": planes[p, lane, 2 * hi + up].item() & 0xFFFFFFFF for p in range(3)}
        registers = run_ptx(program, words)
        for pair, slab, block in itertools.product(range(4), range(2), range(2)):
            row = 16 * block + 8 * up + lane // 4
            column = 32 * pair + 8 * (lane % 4) + 4 * slab + 2 * hi
            shift = place(dtype, pair, slab, FIELDS[pair][slab][block][1])
            even, odd = (value << shift for value in q[row, column : column + 2].tolist())
            expected = even | odd << 16
            if dtype == torch.bfloat16:
                expected |= 0x43004300
            assert registers[f"${4 * pair + 2 * slab + block}"] == expected


def test_the_bits_are_the_numbers_they_are_said_to_be() -> None:
    q = torch.arange(8, dtype=torch.int16)
    for p in (0, 3, 6):
        assert torch.equal((q << p).view(torch.float16).double(), q.double() * 2.0 ** (p - 24))
    for p in (0, 3):
        assert torch.equal((q << p | 0x4300).view(torch.bfloat16).double(), 128 + q.double() * 2**p)
