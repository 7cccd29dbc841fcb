"""The inline assembly of the unpacking, run by a few lines of Python: the interpreter and compilers do not run it."""

import inspect
import itertools
import re

import pytest
import torch

pytest.importorskip("triton")

from mbq_ao.kernels import fragments
from mbq_ao.kernels.int3_layout import pack_int3


def run_ptx(program: str, words: dict[str, int]) -> dict[str, int]:
    """Execute what the kernels use of PTX on 32-bit registers; lop3.b32 with 0xea is (a & b) | c."""
    registers = dict(words)

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for statement in re.findall(r"([a-z]\w+\.[\w.]+) ([^;]+);", program):
        opcode, operands = statement[0], [operand.strip() for operand in statement[1].split(",")]
        target, *sources = operands
        if opcode == "shr.u32":
            registers[target] = value(sources[0]) >> value(sources[1])
        elif opcode == "and.b32":
            registers[target] = value(sources[0]) & value(sources[1])
        elif opcode == "setp.eq.u32":
            registers[target] = value(sources[0]) == value(sources[1])
        elif opcode == "selp.u32":
            registers[target] = value(sources[0]) if value(sources[2]) else value(sources[1])
        elif opcode == "shl.b32":
            registers[target] = value(sources[0]) << value(sources[1]) & 0xFFFFFFFF
        elif opcode == "mul.lo.u32":
            registers[target] = value(sources[0]) * value(sources[1]) & 0xFFFFFFFF
        elif opcode == "mul.hi.u32":
            registers[target] = value(sources[0]) * value(sources[1]) >> 32
        else:
            assert (opcode, sources[3]) == ("lop3.b32", "0xea")
            registers[target] = (value(sources[0]) & value(sources[1])) | value(sources[2])
    return registers


@pytest.mark.parametrize("multiply", [False, True], ids=["shifts", "products"])
@pytest.mark.parametrize("by_block", [False, True], ids=["shared", "by_block"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_assembly_gives_the_values_that_were_packed(dtype: torch.dtype, by_block: bool, multiply: bool) -> None:
    source = fragments._assembly(dtype == torch.bfloat16, by_block, multiply)
    declared, program = re.fullmatch(r"\{\s*\.reg \.b32 ([^;]*);(.*)\}", source, re.DOTALL).groups()
    assert set(re.findall(r"[a-z]\d*\b", re.sub(r"[a-z]\w+[.\w]+|0x\w+", "", program))) <= set(declared.split(", "))
    q = torch.randint(0, 8, (32, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    planes = pack_int3(q)[0, 0].view(torch.int32)  # plane, lane, pair of halves
    for lane, hi, up in itertools.product((0, 1, 13, 31), range(2), range(2)):
        words = {f"${16 + p}": planes[p, lane, 2 * hi + up].item() & 0xFFFFFFFF for p in range(3)} | {"$19": 1}
        registers = run_ptx(program, words)
        for pair, slab, block in itertools.product(range(4), range(2), range(2)):
            row = 16 * block + 8 * up + lane // 4
            column = 32 * pair + 8 * (lane % 4) + 4 * slab + 2 * hi
            shift = fragments.place(dtype == torch.bfloat16, by_block, pair, slab, block)
            even, odd = (value << shift for value in q[row, column : column + 2].tolist())
            expected = even | odd << 16
            if dtype == torch.bfloat16:
                expected |= 0x43004300
            assert registers[f"${4 * pair + 2 * slab + block}"] == expected


def test_assembly_keeps_one_column() -> None:
    source = inspect.getsource(fragments.keep_where.fn)
    (program,) = re.findall(r'"""\{\s*\.reg [^;]*; \.reg [^;]*;(.*?)\}"""', source, re.DOTALL)
    for column, kept in itertools.product(range(8), range(8)):
        words = {"$1": 0xFC01_7BFF, "$2": column * 0x00010001, "$3": kept * 0x00010001}
        assert run_ptx(program, words)["$0"] == (0xFC01_7BFF if column == kept else 0)


def test_operations_a_word_of_each_plane() -> None:
    """What is in fragments.py's table: 18 masks, and a shift or a product for each of so many."""
    for (bf16, by_block), shifts in {(False, False): 5, (False, True): 3, (True, False): 9, (True, True): 6}.items():
        for multiply, kind in ((False, "shr"), (True, "mul.hi")):
            source = fragments._assembly(bf16, by_block, multiply)
            assert len(re.findall(r"(lop3|and)\.b32", source)) == 18
            assert source.count(kind + ".u32") == len(re.findall(r"(shr|mul)\.", source)) == shifts


def test_places() -> None:
    # fp16: ten bits of mantissa. bf16: seven, of which the magic exponent leaves the seventh to 128.
    for bf16, by_block, places in (
        (False, False, ((0, 3, 6), (0, 3, 6))),
        (True, False, ((0, 3), (0, 3))),
        (False, True, ((0, 3, 6), (0, 1, 2, 3, 4, 5, 6))),
        (True, True, ((0, 3), (0, 1, 2, 3))),
    ):
        assert tuple(fragments.places_of(bf16, by_block, block) for block in range(2)) == places
        for pair, slab in itertools.product(range(4), range(2)):
            own = [fragments.place(bf16, by_block, pair, slab, block) for block in range(2)]
            assert by_block or own[0] == own[1]  # accumulators of 32 rows rest on this


def test_the_bits_are_the_numbers_they_are_said_to_be() -> None:
    q = torch.arange(8, dtype=torch.int16)
    for p in range(7):
        assert torch.equal((q << p).view(torch.float16).double(), q.double() * 2.0 ** (p - 24))
    for p in range(4):
        assert torch.equal((q << p | 0x4300).view(torch.bfloat16).double(), 128 + q.double() * 2**p)
