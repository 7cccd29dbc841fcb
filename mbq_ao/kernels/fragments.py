# mypy: disable-error-code="no-untyped-def, assignment"
# (what a jitted function takes and returns, and a tuple it grows, has types only to Triton)
"""From packed words to operand A of a tensor-core dot product, in Triton: no conversion, no shared memory.

Unpacking 32 weights, one 32-bit word of each plane, is a mask a pair of fields and a shift where a field stands too
high, written in inline assembly, because Triton handles 16-bit integers one at a time. INTERPRETED spells the same
bits in Triton, for its interpreter; both follow from `place`. `operand*_of_*` only rename registers: the order of bits
in int3_layout.py is the order of mma.m16n8k16.

A field's *place* is the power of two that its value comes with: fp16 q * 2^(p - 24), a subnormal, or bf16
128 + q * 2^p, by a magic exponent. Fragments of one place may share an accumulator, so few places make few
accumulators. Where an accumulator is used long enough to pay for more of them, places *by block* need fewer shifts: 3
instead of 5 in fp16, 6 instead of 9 in bf16, and both row blocks differ. n below is 0, 1, 2 in plane a, b, c:

                    f0  f1  f2  f3      f4      R
    fp16             0   3   6   0       3      6
    bf16             0   3   0   0, 3    3, 0   0       the second in pair 3
    fp16 by block    0   3   6   n       3 + n  6
    bf16 by block    0   3   0   3       n      3

Masks (LOP3) and shifts (SHF) share a pipe of half the rate, which would bound the decoding kernel, so there a shift by
s is the upper half of a product with 2^(32 - s), on another pipe, as long as ptxas does not know the factor (`one`).
"""

import triton
import triton.language as tl

from mbq_ao.kernels.int3_layout import FIELDS

_R = 5


@triton.constexpr_function
def place(bf16: bool, by_block: bool, pair: int, slab: int, block: int) -> int:
    """The p of a fragment's values, q * 2^(p - 24) or 128 + q * 2^p."""
    plane, field = FIELDS[pair][slab][block]
    if by_block:
        return ((0, 3, 0, 3, plane, 3) if bf16 else (0, 3, 6, plane, 3 + plane, 6))[field]
    return ((0, 0), (3, 3), (0, 0), (3, 0))[pair][slab] if bf16 else ((0, 0), (3, 3), (6, 6), (0, 3))[pair][slab]


@triton.constexpr_function
def places_of(bf16: bool, by_block: bool, block: int) -> tuple[int, ...]:
    """The distinct places of a row block: the accumulators that it needs."""
    return tuple(sorted({place(bf16, by_block, pair, slab, block) for pair in range(4) for slab in range(2)}))


@triton.constexpr_function
def _pieces(bf16: bool, by_block: bool, i: int) -> tuple[tuple[int, int, int], ...]:
    """Of the i-th fragment, in the order of int3_layout.FIELDS: (plane, shift to the right, mask) of its bits."""
    pair, slab, block = i // 4, i // 2 % 2, i % 2
    plane, field = FIELDS[pair][slab][block]
    p = place(bf16, by_block, pair, slab, block)
    if field == _R:
        return tuple((n, 15 - n - p, 1 << n + p) for n in range(3))
    return ((plane, 3 * field - p, 7 << p),)


@triton.constexpr_function
def _assembly(bf16: bool, by_block: bool, multiply: bool) -> str:
    """PTX for one word of each plane, $16 to $18, and if shifts are to be products the number one, $19."""
    shifted: dict[tuple[int, int], str] = {}
    lines = []
    for i in range(16):
        value = "0x43004300" if bf16 else None
        pieces = _pieces(bf16, by_block, i)
        for plane, shift, mask in pieces:
            word = f"${16 + plane}"
            if shift and (plane, shift) not in shifted:
                shifted[plane, shift] = f"{'abc'[plane]}{shift}"
                if multiply:
                    lines.append(f"shl.b32 m, $19, {32 - shift}; mul.hi.u32 {shifted[plane, shift]}, {word}, m;")
                else:
                    lines.append(f"shr.u32 {shifted[plane, shift]}, {word}, {shift};")
            operands = f"{shifted.get((plane, shift), word)}, 0x{mask:04x}{mask:04x}"
            target = f"${i}" if (plane, shift, mask) == pieces[-1] else "r"
            lines.append(
                f"lop3.b32 {target}, {operands}, {value}, 0xea;" if value else f"and.b32 {target}, {operands};"
            )
            value = "r"
    return "{\n.reg .b32 " + ", ".join([*shifted.values(), "m", "r"]) + ";\n" + "\n".join(lines) + "\n}"


@triton.jit
def unpack(a, b, c, one, BF16: tl.constexpr, BY_BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """The 16 fields of words a, b, c at their places, in the order of int3_layout.FIELDS.

    one: the number, as an argument of the kernel (int32), or None for plain shifts.
    """
    if INTERPRETED:
        planes = (a.to(tl.uint16, bitcast=True), b.to(tl.uint16, bitcast=True), c.to(tl.uint16, bitcast=True))
        fields = ()
        for i in tl.static_range(16):
            PIECES: tl.constexpr = _pieces(BF16, BY_BLOCK, i)
            bits = (planes[PIECES[0][0]] >> PIECES[0][1]) & PIECES[0][2]
            for j in tl.static_range(1, len(PIECES)):
                bits |= (planes[PIECES[j][0]] >> PIECES[j][1]) & PIECES[j][2]
            if BF16:
                bits |= 0x4300
            fields += (bits.to(tl.bfloat16 if BF16 else tl.float16, bitcast=True),)
        return fields
    elif one is None:
        return tl.inline_asm_elementwise(
            _assembly(BF16, BY_BLOCK, False),
            "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r,r",
            [a, b, c],
            dtype=(tl.bfloat16 if BF16 else tl.float16,) * 16,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            _assembly(BF16, BY_BLOCK, True),
            "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r",
            [a, b, c, one],
            dtype=(tl.bfloat16 if BF16 else tl.float16,) * 16,
            is_pure=True,
            pack=2,
        )


@triton.jit
def operand_of_block(v, WARPS: tl.constexpr):
    """Operand A of one slab and row block, (WARPS, 16 rows, 16 columns), from (WARPS, lane, half) order."""
    v = v.reshape(WARPS, 8, 4, 2, 2, 2)  # warp, g, t, hi, up, odd
    return v.permute(0, 4, 1, 3, 2, 5).reshape(WARPS, 16, 16)


@triton.constexpr_function
def _moves(low: float, high: float) -> str:
    """PTX for the halves (hi, up, odd) of a lane: the bf16 `low` where up is 0, else `high`; powers of two."""
    bits = []
    for value in (low, high):
        exponent = 127
        while value >= 2.0:
            value, exponent = value / 2.0, exponent + 1
        while value < 1.0:
            value, exponent = value * 2.0, exponent - 1
        bits.append(exponent << 7)
    return " ".join(f"mov.b32 ${i}, 0x{bits[i % 2]:04x}{bits[i % 2]:04x};" for i in range(4))


@triton.jit
def operand_of_halves(like, LOW: tl.constexpr, HIGH: tl.constexpr, WARPS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Operand A, bf16 (WARPS, 16, 16), with LOW in rows 0..7 and HIGH in rows 8..15.

    like: words of the weight, (WARPS, 32, 8). Of constants alone Triton does not know where they are wanted, and sends
    them through shared memory.
    """
    if INTERPRETED:
        up = tl.arange(0, 8)[None, None, :] // 2 % 2 + (like & 0)
        v = tl.where(up == 0, LOW, HIGH).to(tl.bfloat16)
    else:
        v = tl.inline_asm_elementwise(
            _moves(LOW, HIGH), "=r,=r,=r,=r,r,r,r,r", [like], dtype=tl.bfloat16, is_pure=True, pack=8
        )
    return operand_of_block(v, WARPS)


@triton.jit
def operands_of_x(v, WARPS: tl.constexpr):
    """Operand B, (WARPS, 16, 8), of both slabs of a pair, from (WARPS, column, t, 8): v[w, n, t, e] is
    x[32 pair + 8 t + e] of column n."""
    v = v.reshape(WARPS, 8, 4, 2, 2, 2)  # warp, column, t, slab, hi, odd
    v0, v1 = tl.split(v.permute(0, 4, 2, 5, 1, 3))
    return v0.reshape(WARPS, 16, 8), v1.reshape(WARPS, 16, 8)


@triton.jit
def keep_where(v, column, kept, INTERPRETED: tl.constexpr):
    """v, of 16 bits, where `column` (int16, the same for neighbours in a register) is `kept`, and zero elsewhere.

    By an integer product: exact, and away from the pipe that unpacking keeps busy.
    """
    if INTERPRETED:
        return tl.where(column == kept, v, 0.0)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred p; .reg .b32 k;
            setp.eq.u32 p, $2, $3; selp.u32 k, 1, 0, p; mul.lo.u32 $0, $1, k;
            }""",
            "=r,r,r,r",
            [v, column, tl.full(v.shape, kept, tl.int16)],
            dtype=v.dtype,
            is_pure=True,
            pack=2,
        )
