# mypy: disable-error-code="no-untyped-def"
# (what a jitted function takes and returns has types only to Triton)
"""Decoding: a linear layer over packed 3-bit weights for 1 to 16 rows of x, on tensor cores from one row up.

    y[m, n] = sum_k x[m, k] * scale[n, k // g] * (q[n, k] - zero_point[n, k // g]) + bias[n]

Such a layer is bound by memory only if a weight costs few instructions: a GPU that loads 3.2 bits in the time of
three instructions must not spend four on them. Here they are about 1.2 (benchmarks/README.md), because:

    Weights are operand A straight from one 16-byte load a lane and plane. A mask leaves fp16 subnormals q * 2^(p - 24)
    or bf16 128 + q * 2^p, p the field's place, and each place has an accumulator of its own (fragments.py).

    A fragment of x has eight columns. With fewer rows of x than that they are scale groups: column n of operand B
    holds x of group n and zeros elsewhere, so one accumulator collects up to eight groups, and scales and zero
    points are applied once, on what would else be eight copies of one column. x is loaded once for all of them,
    dense, and each group's zeros are made in registers. The sum of x over a group, which its zero point
    multiplies, is a product of the dense operand with ones.

        rows of x         1    2    3, 4    5..8          9..16
        groups a column   8    4    2       1 (a row)     1, two accumulators

    All weights that a warp will need next are on their way before it waits for the first, and nothing but the
    last sum over warps passes through shared memory.

Words: a *unit* is a scale group or 128 columns, whichever is less; a *set* is the units that share an accumulator; a
*chunk* is the `col_tiles` tiles of 128 columns that a warp has in flight. Warps take chunks in turn; they, and the
programs that split K, are summed in a fixed order, so a result does not depend on chance.

    acc += scale * (dot - zero_point * sum(x)) after each set: integer zero points, all sums in fp32.

INTERPRETED is for Triton's interpreter, which knows no assembly and truncates to bf16.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq_ao.kernels.fragments import (
    keep_where,
    operand_of_block,
    operand_of_halves,
    operands_of_x,
    place,
    places_of,
    unpack_bf16_by_block,
    unpack_fp16,
    unpack_fp16_by_block,
)

MAX_ROWS = 16


@triton.constexpr_function
def _num_slots(bf16, by_block):
    """Accumulators of a row tile: one for each place of row block 0, then one for each of block 1."""
    return len(places_of(bf16, by_block, 0)) + len(places_of(bf16, by_block, 1))


@triton.constexpr_function
def _first_slot(bf16, by_block, block):
    return len(places_of(bf16, by_block, 0)) if block else 0


@triton.constexpr_function
def _slot(bf16, by_block, pair, slab, block):
    own = places_of(bf16, by_block, block).index(place(bf16, by_block, pair, slab, block))
    return own + (len(places_of(bf16, by_block, 0)) if block else 0)


@triton.constexpr_function
def _factor(bf16, by_block, block, i):
    """What the i-th accumulator of a block is multiplied by."""
    return 2.0 ** -places_of(bf16, by_block, block)[i]


@triton.constexpr_function
def _offset(pair, slab, block):
    """bf16: the constant in the operand, 128, as a multiple of what the value is multiplied by."""
    return 128 * 2.0 ** -place(True, True, pair, slab, block)


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc)


@triton.jit
def _unpack(a, b, c, BF16: tl.constexpr, BY_BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    if BF16:
        return unpack_bf16_by_block(a, b, c, INTERPRETED)
    elif BY_BLOCK:
        return unpack_fp16_by_block(a, b, c, INTERPRETED)
    else:
        return unpack_fp16(a, b, c, INTERPRETED)


@triton.jit
def _load_tile(words, tile, num_tiles, needed, EVEN: tl.constexpr):
    """The three planes of one tile a warp.  tile: (WARPS,).  needed: a mask, or None.

    A tile beyond the last is the last one again: its x is zero.
    """
    at = words + ((tile if EVEN else tl.minimum(tile, num_tiles - 1)) * 768)[:, None, None]
    return (
        tl.load(at, mask=needed, eviction_policy="evict_first"),
        tl.load(at + 256, mask=needed, eviction_policy="evict_first"),
        tl.load(at + 512, mask=needed, eviction_policy="evict_first"),
    )


@triton.jit
def _load_x(
    x, first, M, K, stride_xm,
    ROWS: tl.constexpr, UNIT: tl.constexpr, COL_UNITS: tl.constexpr, SET: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Operand B of a set before masking, one (WARPS, COLUMNS, 4, 8) for each 32 columns of a unit.

    Column n is row n // SPAN of x and unit n % SPAN of the set.  first: the chunk's first unit, (WARPS,).
    """
    COLUMNS: tl.constexpr = max(8, ROWS)
    SPAN: tl.constexpr = COLUMNS // ROWS
    n = tl.arange(0, COLUMNS)[None, :, None, None]
    e = tl.arange(0, 8)[None, None, None, :]
    unit = SET * SPAN + n % SPAN
    k = (first[:, None, None, None] + unit) * UNIT + tl.arange(0, 4)[None, None, :, None] * 8
    at = x + k + e
    if ROWS > 1:
        at += tl.minimum(n // SPAN, M - 1).to(tl.int64) * stride_xm
    loaded = ()
    for pair in tl.static_range(UNIT // 32):
        if EVEN and (SET + 1) * SPAN <= COL_UNITS:
            loaded = loaded + (tl.load(at + 32 * pair),)
        else:
            inside = (k + 32 * pair + e < K) & (unit < COL_UNITS)
            loaded = loaded + (tl.load(at + 32 * pair, mask=inside, other=0.0),)
    return loaded


@triton.jit
def _load_scales(
    scales, zeros, rows, first, K, stride_scale, stride_zero,
    GROUP: tl.constexpr, UNIT: tl.constexpr, SPAN: tl.constexpr, SET: tl.constexpr, EVEN: tl.constexpr,
    PAIRED: tl.constexpr,
):  # fmt: skip
    """Scales and zero points of a set, each as the lane (g, t) needs it: for rows 8 i + g of every row tile.

    SPAN = 1, a column is a row of x: (WARPS, 8, 4), the same for all t. Else (WARPS, 8, 4, 2), for columns 2 t, 2 t + 1.
    """
    unit = first[:, None, None] + (SET * SPAN + tl.arange(0, 4)[None, None, :] * 2 % SPAN)
    group = _group(unit, K, GROUP, UNIT, EVEN)
    group1 = _group(unit + 1, K, GROUP, UNIT, EVEN)
    if PAIRED:
        stride_scale = stride_scale // 2 * 2
        stride_zero = stride_zero // 2 * 2
    loaded = ()
    for i in tl.static_range(len(rows)):
        row = rows[i][None, :, None]
        loaded = loaded + (
            _load_pair(scales[i // 4] + row * stride_scale, group, group1, SPAN, PAIRED),
            _load_pair(zeros[i // 4] + row * stride_zero, group, group1, SPAN, PAIRED),
        )
    return loaded


@triton.jit
def _group(unit, K, GROUP: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr):
    if GROUP == 0:
        return unit * 0
    group = unit if GROUP == UNIT else unit // (GROUP // UNIT)
    return group if EVEN else tl.minimum(group, (K - 1) // GROUP)


@triton.jit
def _load_pair(at, group, group1, SPAN: tl.constexpr, PAIRED: tl.constexpr):
    if SPAN == 1:
        return tl.load(at + group)
    elif PAIRED:
        return tl.load((at + group)[:, :, :, None] + tl.arange(0, 2)[None, None, None, :])
    else:
        return tl.join(tl.load(at + group), tl.load(at + group1))


@triton.jit
def _in_accumulator(v0, v1, WARPS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr):
    """Fp32 (WARPS, 16, COLUMNS) from what `_load_scales` loaded for rows g and 8 + g of a block."""
    v = tl.join(v0, v1)
    if v.dtype == tl.uint8:  # as an fp16 subnormal, z * 2^-24, which takes fewer instructions
        v = v.to(tl.uint16).to(tl.float16, bitcast=True)
    v = v.to(tl.float32)
    if SPAN == 1:
        v = v.permute(0, 3, 1, 2).reshape(WARPS, 2, 8, 1, 4, 1)
        return v.broadcast_to(WARPS, 2, 8, COLUMNS // 8, 4, 2).reshape(WARPS, 16, COLUMNS)
    else:
        return v.permute(0, 4, 1, 2, 3).reshape(WARPS, 16, COLUMNS)


@triton.jit
def _add_dot(accumulators, i: tl.constexpr, a, b, INTERPRETED: tl.constexpr):
    return accumulators[:i] + (_dot(a, b, accumulators[i], INTERPRETED),) + accumulators[i + 1 :]


@triton.jit
def _flush(
    acc, dots, dense, scales, PHASE: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, BF16: tl.constexpr, BY_BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """acc + scale * (dot - zero_point * sum(x)) of a set, for each row block.

    dense: operand B before masking.  PHASE: the place of the last unit in its tile.
    """
    COLUMNS: tl.constexpr = max(8, ROWS)
    SPAN: tl.constexpr = COLUMNS // ROWS
    PAIRS: tl.constexpr = len(dense)
    none = tl.zeros([WARPS, 16, COLUMNS], tl.float32)
    xs = ()
    for pair in tl.static_range(PAIRS):
        xs = xs + operands_of_x(dense[pair], WARPS, COLUMNS)
    # 2^24 is what fp16 dots and zero points want of it; dots of bf16 are as they should be.
    ones = tl.full([WARPS, 16, 16], 16777216.0 if BF16 else 1.0, tl.bfloat16 if BF16 else tl.float16)
    total = none
    for i in tl.static_range(2 * PAIRS):
        total = _dot(ones, xs[i], total, INTERPRETED)
    if BF16:
        offset = none
        for phase in tl.static_range(4 // PAIRS):
            if SPAN > 1 or phase == PHASE:
                part = none
                for i in tl.static_range(2 * PAIRS):
                    part = _dot(
                        operand_of_halves(
                            _offset(phase * PAIRS + i // 2, i % 2, 0), _offset(phase * PAIRS + i // 2, i % 2, 1), WARPS
                        ),
                        xs[i],
                        part,
                        INTERPRETED,
                    )
                own = tl.arange(0, COLUMNS)[None, None, :] % (4 // PAIRS) == phase
                offset = tl.where(own, part, offset) if SPAN > 1 else part
        offsets = tl.split(offset.reshape(WARPS, 2, 8, COLUMNS).permute(0, 2, 3, 1))
    new = ()
    for block in tl.static_range(len(acc)):
        d = _in_accumulator(scales[4 * block], scales[4 * block + 2], WARPS, COLUMNS, SPAN)
        z = _in_accumulator(scales[4 * block + 1], scales[4 * block + 3], WARPS, COLUMNS, SPAN)
        dot = _weighed(dots, block // 2 * _num_slots(BF16, BY_BLOCK), block % 2, BF16, BY_BLOCK)
        if BF16:
            rows = offsets[block % 2][:, None, :, :].broadcast_to(WARPS, 2, 8, COLUMNS)
            dot -= rows.reshape(WARPS, 16, COLUMNS)
        new = new + (acc[block] + d * (dot - z * total),)
    return new


@triton.jit
def _weighed(dots, BASE: tl.constexpr, BLOCK: tl.constexpr, BF16: tl.constexpr, BY_BLOCK: tl.constexpr):
    first: tl.constexpr = BASE + _first_slot(BF16, BY_BLOCK, BLOCK)
    dot = dots[first]
    for i in tl.static_range(1, len(places_of(BF16, BY_BLOCK, BLOCK))):
        dot += dots[first + i] * _factor(BF16, BY_BLOCK, BLOCK, i)
    return dot


@triton.jit(do_not_specialize=["M"])  # or every batch size that is 1, or a multiple of 16, compiles anew
def _gemv_kernel(
    x, qdata, scale, zero, bias, y, M, N, K, stride_xm, stride_q0, stride_scale, stride_zero,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, ROW_TILES: tl.constexpr, COL_TILES: tl.constexpr,
    SPLIT_K: tl.constexpr, BF16: tl.constexpr, BY_BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
    ONE_CHUNK: tl.constexpr, PAIRED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """32 * ROW_TILES columns of y, or their part of program_id(1) in a fp32 y of (SPLIT_K, M, N).

    GROUP = 0: one scale a row.  ROWS: rows of x, 1, 2, 4, 8 or 16, at least M.  BY_BLOCK: see fragments.py.
    EVEN: chunks end with K.  ONE_CHUNK: a warp has no second one.  PAIRED: scales may be loaded two at a time.
    """
    COLUMNS: tl.constexpr = max(8, ROWS)
    SPAN: tl.constexpr = COLUMNS // ROWS
    UNIT: tl.constexpr = GROUP if GROUP == 32 or GROUP == 64 else 128
    UNITS: tl.constexpr = 128 // UNIT
    PAIRS: tl.constexpr = UNIT // 32
    COL_UNITS: tl.constexpr = COL_TILES * UNITS
    NUM_SETS: tl.constexpr = (COL_UNITS + SPAN - 1) // SPAN
    SLOTS: tl.constexpr = _num_slots(BF16, BY_BLOCK)
    num_tiles = tl.cdiv(K, 128)
    num_chunks = 1 if ONE_CHUNK else tl.cdiv(num_tiles, SPLIT_K * WARPS * COL_TILES)
    chunk = tl.program_id(1) * num_chunks * WARPS + tl.arange(0, WARPS)

    words = ()
    scales = ()
    zeros = ()
    rows = ()
    for r in tl.static_range(ROW_TILES):
        row_tile = tl.program_id(0) * ROW_TILES + r
        if ROW_TILES > 1:
            row_tile = tl.minimum(row_tile, tl.cdiv(N, 32) - 1)
        words = words + (
            qdata
            + row_tile.to(tl.int64) * stride_q0
            + (tl.arange(0, 32)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]),
        )
        scales = scales + (scale + (row_tile * 32).to(tl.int64) * stride_scale,)
        zeros = zeros + (zero + (row_tile * 32).to(tl.int64) * stride_zero,)
        for octet in tl.static_range(4):
            rows = rows + (tl.minimum(octet * 8 + tl.arange(0, 8), N - 1 - row_tile * 32),)

    ring = ()
    for j in tl.static_range(COL_TILES):
        for r in tl.static_range(ROW_TILES):
            ring = ring + _load_tile(words[r], chunk * COL_TILES + j, num_tiles, None, EVEN)
    # Whatever needs x comes after this, so ptxas cannot push a load of weights back to where it is used.
    tl.debug_barrier()
    first = chunk * COL_UNITS
    next_x = _load_x(x, first, M, K, stride_xm, ROWS, UNIT, COL_UNITS, 0, EVEN)
    next_scales = _load_scales(
        scales, zeros, rows, first, K, stride_scale, stride_zero, GROUP, UNIT, SPAN, 0, EVEN, PAIRED
    )

    none = tl.zeros([WARPS, 16, COLUMNS], tl.float32)
    column = (tl.arange(0, COLUMNS)[None, None, :] % SPAN).to(tl.int16)
    acc = ()
    for _ in tl.static_range(2 * ROW_TILES):
        acc = acc + (none,)
    for i in range(num_chunks):
        more = (tl.arange(0, WARPS) * 0 + i + 1 < num_chunks)[:, None, None]
        next_chunk = tl.where(i + 1 < num_chunks, chunk + WARPS, chunk)
        this_x = next_x
        this_scales = next_scales
        dots = ()
        fields = ()
        for unit in tl.static_range(COL_UNITS):
            if unit % SPAN == 0:
                this_x = next_x
                this_scales = next_scales
                if unit + SPAN < COL_UNITS:
                    first = chunk * COL_UNITS
                    next_x = _load_x(x, first, M, K, stride_xm, ROWS, UNIT, COL_UNITS, unit // SPAN + 1, EVEN)
                    if GROUP != 0:
                        next_scales = _load_scales(
                            scales, zeros, rows, first, K, stride_scale, stride_zero,
                            GROUP, UNIT, SPAN, unit // SPAN + 1, EVEN, PAIRED,
                        )  # fmt: skip
                elif not ONE_CHUNK:
                    first = next_chunk * COL_UNITS
                    next_x = _load_x(x, first, M, K, stride_xm, ROWS, UNIT, COL_UNITS, 0, EVEN)
                    if GROUP != 0:
                        next_scales = _load_scales(
                            scales, zeros, rows, first, K, stride_scale, stride_zero,
                            GROUP, UNIT, SPAN, 0, EVEN, PAIRED,
                        )  # fmt: skip
                dots = ()
                for _ in tl.static_range(SLOTS * ROW_TILES):
                    dots = dots + (none,)
            if unit % UNITS == 0:
                fields = ()
                for at in tl.static_range(unit // UNITS * ROW_TILES, (unit // UNITS + 1) * ROW_TILES):
                    fields = fields + (
                        _unpack(ring[3 * at], ring[3 * at + 1], ring[3 * at + 2], BF16, BY_BLOCK, INTERPRETED),
                    )
                    if not ONE_CHUNK:
                        tile = next_chunk * COL_TILES + unit // UNITS
                        ring = (
                            ring[: 3 * at]
                            + _load_tile(words[at % ROW_TILES], tile, num_tiles, more, EVEN)
                            + ring[3 * at + 3 :]
                        )
            for pair in tl.static_range(PAIRS):
                operands = operands_of_x(this_x[pair], WARPS, COLUMNS)
                for slab in tl.static_range(2):
                    b = operands[slab]
                    if SPAN > 1:
                        b = keep_where(b, column, unit % SPAN, INTERPRETED)
                    for block in tl.static_range(2 * ROW_TILES):
                        a = fields[block // 2][4 * (unit % UNITS * PAIRS + pair) + 2 * slab + block % 2]
                        dots = _add_dot(
                            dots,
                            block // 2 * SLOTS + _slot(BF16, BY_BLOCK, unit % UNITS * PAIRS + pair, slab, block % 2),
                            operand_of_block(a, WARPS),
                            b,
                            INTERPRETED,
                        )
            if unit % SPAN == SPAN - 1 or unit == COL_UNITS - 1:
                acc = _flush(
                    acc, dots, this_x, this_scales, unit % UNITS, ROWS, WARPS, BF16, BY_BLOCK, INTERPRETED
                )  # fmt: skip
        chunk = next_chunk

    m = tl.arange(0, ROWS)[None, :]
    for r in tl.static_range(ROW_TILES):
        v = tl.join(acc[2 * r], acc[2 * r + 1]).reshape(WARPS, 16, ROWS, SPAN, 2)
        out = tl.sum(v.permute(4, 1, 2, 0, 3).reshape(32, ROWS, WARPS * SPAN), 2)
        if not BF16:
            out *= 16777216.0
        n = (tl.program_id(0) * ROW_TILES + r) * 32 + tl.arange(0, 32)
        if HAS_BIAS:
            out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        at = y + (tl.program_id(1) * M + m).to(tl.int64) * N + n[:, None]
        tl.store(at, out.to(y.dtype.element_ty), mask=(n < N)[:, None] & (m < M))
