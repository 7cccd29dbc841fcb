# mypy: disable-error-code="no-untyped-def"
# (what a jitted function takes and returns has types only to Triton)
"""From packed words to operand A of a tensor-core dot product, in Triton: no conversion, no shared memory.

Unpacking 32 weights, one 32-bit word of each plane, is 18 LOP3 and 5 shifts in fp16, 18 and 9 in bf16, in inline
assembly, because Triton handles 16-bit integers one at a time. INTERPRETED spells the same bits in Triton, for its
interpreter. `operand*_of_*` only rename registers: the order of bits in layout.py is the order of mma.m16n8k16.

A field's *place* is the power of two that its value comes with. Fragments of one place may share an accumulator, so
few places make few accumulators. Where an accumulator is used long enough to pay for more of them, the functions
`*_by_block` shift less: 3 shifts instead of 5 in fp16, 6 instead of 9 in bf16, and both row blocks differ.
"""

import triton
import triton.language as tl

from mbq_ao.kernels.layout import FIELDS


@triton.jit
def unpack_fp16(a, b, c, INTERPRETED: tl.constexpr):
    """The 16 fields of words a, b, c as fp16 q * 2^(p - 24), in the order of layout.FIELDS.

    p = 0 in pair 0 and slab 0 of pair 3, p = 3 in pair 1 and slab 1 of pair 3, p = 6 in pair 2.
    """
    if not INTERPRETED:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a9, b9, c9, b8, c7, r;
            shr.u32 a9, $16, 9; shr.u32 b9, $17, 9; shr.u32 c9, $18, 9;
            shr.u32 b8, $17, 8; shr.u32 c7, $18, 7;
            and.b32 $0, $16, 0x00070007; and.b32 $1, $17, 0x00070007;
            and.b32 $2, $18, 0x00070007; and.b32 $3, c9, 0x00070007;
            and.b32 $4, $16, 0x00380038; and.b32 $5, $17, 0x00380038;
            and.b32 $6, $18, 0x00380038; and.b32 $7, c9, 0x00380038;
            and.b32 $8, $16, 0x01c001c0; and.b32 $9, $17, 0x01c001c0;
            and.b32 $10, $18, 0x01c001c0;
            and.b32 r, a9, 0x00400040;
            lop3.b32 r, b8, 0x00800080, r, 0xea;
            lop3.b32 $11, c7, 0x01000100, r, 0xea;
            and.b32 $12, a9, 0x00070007; and.b32 $13, b9, 0x00070007;
            and.b32 $14, a9, 0x00380038; and.b32 $15, b9, 0x00380038;
            }""",
            "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r,r",
            [a, b, c],
            dtype=(tl.float16,) * 16,
            is_pure=True,
            pack=2,
        )
    else:
        a = a.to(tl.uint16, bitcast=True)
        b = b.to(tl.uint16, bitcast=True)
        c = c.to(tl.uint16, bitcast=True)
        r = ((a >> 9) & 0x40) | ((b >> 8) & 0x80) | ((c >> 7) & 0x100)
        return (
            (a & 0x7).to(tl.float16, bitcast=True),
            (b & 0x7).to(tl.float16, bitcast=True),
            (c & 0x7).to(tl.float16, bitcast=True),
            ((c >> 9) & 0x7).to(tl.float16, bitcast=True),
            (a & 0x38).to(tl.float16, bitcast=True),
            (b & 0x38).to(tl.float16, bitcast=True),
            (c & 0x38).to(tl.float16, bitcast=True),
            ((c >> 9) & 0x38).to(tl.float16, bitcast=True),
            (a & 0x1C0).to(tl.float16, bitcast=True),
            (b & 0x1C0).to(tl.float16, bitcast=True),
            (c & 0x1C0).to(tl.float16, bitcast=True),
            r.to(tl.float16, bitcast=True),
            ((a >> 9) & 0x7).to(tl.float16, bitcast=True),
            ((b >> 9) & 0x7).to(tl.float16, bitcast=True),
            ((a >> 9) & 0x38).to(tl.float16, bitcast=True),
            ((b >> 9) & 0x38).to(tl.float16, bitcast=True),
        )


@triton.jit
def unpack_bf16(a, b, c, INTERPRETED: tl.constexpr):
    """The 16 fields as bf16 128 + q * 2^p: p = 3 in pair 1 and slab 0 of pair 3, p = 0 elsewhere."""
    if not INTERPRETED:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a6, b6, c6, a12, b12, c9, a15, b14, c13, r;
            shr.u32 a6, $16, 6; shr.u32 b6, $17, 6; shr.u32 c6, $18, 6;
            shr.u32 a12, $16, 12; shr.u32 b12, $17, 12; shr.u32 c9, $18, 9;
            shr.u32 a15, $16, 15; shr.u32 b14, $17, 14; shr.u32 c13, $18, 13;
            lop3.b32 $0, $16, 0x00070007, 0x43004300, 0xea; lop3.b32 $1, $17, 0x00070007, 0x43004300, 0xea;
            lop3.b32 $2, $18, 0x00070007, 0x43004300, 0xea; lop3.b32 $3, c9, 0x00070007, 0x43004300, 0xea;
            lop3.b32 $4, $16, 0x00380038, 0x43004300, 0xea; lop3.b32 $5, $17, 0x00380038, 0x43004300, 0xea;
            lop3.b32 $6, $18, 0x00380038, 0x43004300, 0xea; lop3.b32 $7, c9, 0x00380038, 0x43004300, 0xea;
            lop3.b32 $8, a6, 0x00070007, 0x43004300, 0xea; lop3.b32 $9, b6, 0x00070007, 0x43004300, 0xea;
            lop3.b32 $10, c6, 0x00070007, 0x43004300, 0xea;
            lop3.b32 r, a15, 0x00010001, 0x43004300, 0xea;
            lop3.b32 r, b14, 0x00020002, r, 0xea;
            lop3.b32 $11, c13, 0x00040004, r, 0xea;
            lop3.b32 $12, a6, 0x00380038, 0x43004300, 0xea; lop3.b32 $13, b6, 0x00380038, 0x43004300, 0xea;
            lop3.b32 $14, a12, 0x00070007, 0x43004300, 0xea; lop3.b32 $15, b12, 0x00070007, 0x43004300, 0xea;
            }""",
            "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r,r",
            [a, b, c],
            dtype=(tl.bfloat16,) * 16,
            is_pure=True,
            pack=2,
        )
    else:
        a = a.to(tl.uint16, bitcast=True)
        b = b.to(tl.uint16, bitcast=True)
        c = c.to(tl.uint16, bitcast=True)
        r = ((a >> 15) & 0x1) | ((b >> 14) & 0x2) | ((c >> 13) & 0x4)
        return (
            ((a & 0x7) | 0x4300).to(tl.bfloat16, bitcast=True),
            ((b & 0x7) | 0x4300).to(tl.bfloat16, bitcast=True),
            ((c & 0x7) | 0x4300).to(tl.bfloat16, bitcast=True),
            (((c >> 9) & 0x7) | 0x4300).to(tl.bfloat16, bitcast=True),
            ((a & 0x38) | 0x4300).to(tl.bfloat16, bitcast=True),
            ((b & 0x38) | 0x4300).to(tl.bfloat16, bitcast=True),
            ((c & 0x38) | 0x4300).to(tl.bfloat16, bitcast=True),
            (((c >> 9) & 0x38) | 0x4300).to(tl.bfloat16, bitcast=True),
            (((a >> 6) & 0x7) | 0x4300).to(tl.bfloat16, bitcast=True),
            (((b >> 6) & 0x7) | 0x4300).to(tl.bfloat16, bitcast=True),
            (((c >> 6) & 0x7) | 0x4300).to(tl.bfloat16, bitcast=True),
            (r | 0x4300).to(tl.bfloat16, bitcast=True),
            (((a >> 6) & 0x38) | 0x4300).to(tl.bfloat16, bitcast=True),
            (((b >> 6) & 0x38) | 0x4300).to(tl.bfloat16, bitcast=True),
            (((a >> 12) & 0x7) | 0x4300).to(tl.bfloat16, bitcast=True),
            (((b >> 12) & 0x7) | 0x4300).to(tl.bfloat16, bitcast=True),
        )


@triton.constexpr_function
def place(bf16: bool, by_block: bool, pair: int, slab: int, block: int) -> int:
    """The p of a fragment's values, q * 2^(p - 24) or 128 + q * 2^p, as the unpacking functions leave them."""
    plane, field = FIELDS[pair][slab][block]
    if by_block:
        return ((0, 3, 0, 3, plane, 3) if bf16 else (0, 3, 6, plane, 3 + plane, 6))[field]
    return ((0, 0), (3, 3), (0, 0), (3, 0))[pair][slab] if bf16 else ((0, 0), (3, 3), (6, 6), (0, 3))[pair][slab]


@triton.constexpr_function
def places_of(bf16: bool, by_block: bool, block: int) -> tuple[int, ...]:
    """The distinct places of a row block: the accumulators that it needs."""
    return tuple(sorted({place(bf16, by_block, pair, slab, block) for pair in range(4) for slab in range(2)}))


@triton.jit
def unpack_fp16_by_block(a, b, c, INTERPRETED: tl.constexpr):
    """`unpack_fp16` with two shifts less, at the price of four more places in row block 1.

    Shifted by 9, 8 and 7, the planes' spare bits already lie at bits 6, 7 and 8 of R.
    """
    if not INTERPRETED:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a9, b8, c7, r;
            shr.u32 a9, $16, 9; shr.u32 b8, $17, 8; shr.u32 c7, $18, 7;
            and.b32 $0, $16, 0x00070007; and.b32 $1, $17, 0x00070007;
            and.b32 $2, $18, 0x00070007; and.b32 $3, c7, 0x001c001c;
            and.b32 $4, $16, 0x00380038; and.b32 $5, $17, 0x00380038;
            and.b32 $6, $18, 0x00380038; and.b32 $7, c7, 0x00e000e0;
            and.b32 $8, $16, 0x01c001c0; and.b32 $9, $17, 0x01c001c0;
            and.b32 $10, $18, 0x01c001c0;
            and.b32 r, a9, 0x00400040;
            lop3.b32 r, b8, 0x00800080, r, 0xea;
            lop3.b32 $11, c7, 0x01000100, r, 0xea;
            and.b32 $12, a9, 0x00070007; and.b32 $13, b8, 0x000e000e;
            and.b32 $14, a9, 0x00380038; and.b32 $15, b8, 0x00700070;
            }""",
            "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r,r",
            [a, b, c],
            dtype=(tl.float16,) * 16,
            is_pure=True,
            pack=2,
        )
    else:
        a = a.to(tl.uint16, bitcast=True)
        b = b.to(tl.uint16, bitcast=True)
        c = c.to(tl.uint16, bitcast=True)
        return (
            (a & 0x7).to(tl.float16, bitcast=True),
            (b & 0x7).to(tl.float16, bitcast=True),
            (c & 0x7).to(tl.float16, bitcast=True),
            ((c >> 7) & 0x1C).to(tl.float16, bitcast=True),
            (a & 0x38).to(tl.float16, bitcast=True),
            (b & 0x38).to(tl.float16, bitcast=True),
            (c & 0x38).to(tl.float16, bitcast=True),
            ((c >> 7) & 0xE0).to(tl.float16, bitcast=True),
            (a & 0x1C0).to(tl.float16, bitcast=True),
            (b & 0x1C0).to(tl.float16, bitcast=True),
            (c & 0x1C0).to(tl.float16, bitcast=True),
            (((a >> 9) & 0x40) | ((b >> 8) & 0x80) | ((c >> 7) & 0x100)).to(tl.float16, bitcast=True),
            ((a >> 9) & 0x7).to(tl.float16, bitcast=True),
            ((b >> 8) & 0xE).to(tl.float16, bitcast=True),
            ((a >> 9) & 0x38).to(tl.float16, bitcast=True),
            ((b >> 8) & 0x70).to(tl.float16, bitcast=True),
        )


@triton.jit
def unpack_bf16_by_block(a, b, c, INTERPRETED: tl.constexpr):
    """`unpack_bf16` with three shifts less, at the price of two more places in row block 1.

    Shifted by 12, 11 and 10, the planes' spare bits lie at bits 3, 4 and 5 of R, whose place is 3.
    """
    if not INTERPRETED:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a6, b6, c6, a12, b11, c10, r;
            shr.u32 a6, $16, 6; shr.u32 b6, $17, 6; shr.u32 c6, $18, 6;
            shr.u32 a12, $16, 12; shr.u32 b11, $17, 11; shr.u32 c10, $18, 10;
            lop3.b32 $0, $16, 0x00070007, 0x43004300, 0xea; lop3.b32 $1, $17, 0x00070007, 0x43004300, 0xea;
            lop3.b32 $2, $18, 0x00070007, 0x43004300, 0xea; lop3.b32 $3, c6, 0x00380038, 0x43004300, 0xea;
            lop3.b32 $4, $16, 0x00380038, 0x43004300, 0xea; lop3.b32 $5, $17, 0x00380038, 0x43004300, 0xea;
            lop3.b32 $6, $18, 0x00380038, 0x43004300, 0xea; lop3.b32 $7, c10, 0x001c001c, 0x43004300, 0xea;
            lop3.b32 $8, a6, 0x00070007, 0x43004300, 0xea; lop3.b32 $9, b6, 0x00070007, 0x43004300, 0xea;
            lop3.b32 $10, c6, 0x00070007, 0x43004300, 0xea;
            lop3.b32 r, a12, 0x00080008, 0x43004300, 0xea;
            lop3.b32 r, b11, 0x00100010, r, 0xea;
            lop3.b32 $11, c10, 0x00200020, r, 0xea;
            lop3.b32 $12, a6, 0x00380038, 0x43004300, 0xea; lop3.b32 $13, b6, 0x00380038, 0x43004300, 0xea;
            lop3.b32 $14, a12, 0x00070007, 0x43004300, 0xea; lop3.b32 $15, b11, 0x000e000e, 0x43004300, 0xea;
            }""",
            "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r,r",
            [a, b, c],
            dtype=(tl.bfloat16,) * 16,
            is_pure=True,
            pack=2,
        )
    else:
        a = a.to(tl.uint16, bitcast=True)
        b = b.to(tl.uint16, bitcast=True)
        c = c.to(tl.uint16, bitcast=True)
        r = ((a >> 12) & 0x8) | ((b >> 11) & 0x10) | ((c >> 10) & 0x20)
        return (
            ((a & 0x7) | 0x4300).to(tl.bfloat16, bitcast=True),
            ((b & 0x7) | 0x4300).to(tl.bfloat16, bitcast=True),
            ((c & 0x7) | 0x4300).to(tl.bfloat16, bitcast=True),
            (((c >> 6) & 0x38) | 0x4300).to(tl.bfloat16, bitcast=True),
            ((a & 0x38) | 0x4300).to(tl.bfloat16, bitcast=True),
            ((b & 0x38) | 0x4300).to(tl.bfloat16, bitcast=True),
            ((c & 0x38) | 0x4300).to(tl.bfloat16, bitcast=True),
            (((c >> 10) & 0x1C) | 0x4300).to(tl.bfloat16, bitcast=True),
            (((a >> 6) & 0x7) | 0x4300).to(tl.bfloat16, bitcast=True),
            (((b >> 6) & 0x7) | 0x4300).to(tl.bfloat16, bitcast=True),
            (((c >> 6) & 0x7) | 0x4300).to(tl.bfloat16, bitcast=True),
            (r | 0x4300).to(tl.bfloat16, bitcast=True),
            (((a >> 6) & 0x38) | 0x4300).to(tl.bfloat16, bitcast=True),
            (((b >> 6) & 0x38) | 0x4300).to(tl.bfloat16, bitcast=True),
            (((a >> 12) & 0x7) | 0x4300).to(tl.bfloat16, bitcast=True),
            (((b >> 11) & 0xE) | 0x4300).to(tl.bfloat16, bitcast=True),
        )


@triton.jit
def operand_of_block(v, WARPS: tl.constexpr):
    """Operand A of one slab and row block, (WARPS, 16 rows, 16 columns), from (WARPS, lane, half) order."""
    v = v.reshape(WARPS, 8, 4, 2, 2, 2)  # warp, g, t, hi, up, odd
    return v.permute(0, 4, 1, 3, 2, 5).reshape(WARPS, 16, 16)


@triton.jit
def operand_of_halves(LOW: tl.constexpr, HIGH: tl.constexpr, WARPS: tl.constexpr):
    """Operand A, bf16 (WARPS, 16, 16), with LOW in rows 0..7 and HIGH in rows 8..15."""
    v = tl.join(tl.full([WARPS, 8, 4], LOW, tl.bfloat16), tl.full([WARPS, 8, 4], HIGH, tl.bfloat16))
    v = tl.join(v, v)
    return tl.join(v, v).permute(0, 3, 1, 4, 2, 5).reshape(WARPS, 16, 16)


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
