# mypy: disable-error-code="no-untyped-def, assignment, operator"
# (what a jitted function takes and returns, and a tuple it grows, has types only to Triton)
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
    unpack,
)
from mbq_ao.kernels.gemv_config import MAX_ROWS, GemvConfig, default_gemv_config, gemv_constants
from mbq_ao.kernels.gemv_loads import load_planes, load_scales, load_x
from mbq_ao.kernels.launch import empty_output, interpreted, linear_arguments, num_sms_of, on_device


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
def _offset(by_block, pair, slab, block):
    """bf16: the constant in the operand, 128, as a multiple of what the value is multiplied by."""
    return 128 * 2.0 ** -place(True, by_block, pair, slab, block)


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc)


@triton.jit
def _pin(INTERPRETED: tl.constexpr):
    if not INTERPRETED:
        tl.inline_asm_elementwise("bar.warp.sync 0xffffffff; mov.u32 $0, 0;", "=r", [], tl.int32, False, 1)


@triton.jit
def _in_accumulator(v0, v1, WARPS: tl.constexpr, SPAN: tl.constexpr):
    """Fp32 (WARPS, 16, 8) from what `load_scales` loaded for rows g and 8 + g of a block."""
    v = tl.join(v0, v1)  # WARPS, g, t, and the column's last bit if there is one, up
    if v.dtype == tl.uint8:  # as an fp16 subnormal, z * 2^-24, which takes fewer instructions
        v = v.to(tl.uint16).to(tl.float16, bitcast=True)
    v = v.to(tl.float32)
    if SPAN == 1:
        return tl.join(v, v).permute(0, 3, 1, 2, 4).reshape(WARPS, 16, 8)
    else:
        return v.permute(0, 4, 1, 2, 3).reshape(WARPS, 16, 8)


@triton.jit
def _add_dot(accumulators, i: tl.constexpr, a, b, INTERPRETED: tl.constexpr):
    before = accumulators[:i]
    before += (_dot(a, b, accumulators[i], INTERPRETED),)
    return before + accumulators[i + 1 :]


@triton.jit
def _sums(
    dense, like, PHASE: tl.constexpr, SPAN: tl.constexpr, WARPS: tl.constexpr, BF16: tl.constexpr,
    BY_BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """What to subtract from the dots of row blocks 0 and 1, and the sum of x, each for every column: (WARPS, 16, 8).

    dense: operand B of a set before masking.  like: words of the weight.  PHASE: the place of its first unit in a tile.
    The sum is times 2^24 for bf16, as zero points and, for fp16, dots are times 2^-24.
    """
    PAIRS: tl.constexpr = len(dense) // 2
    none = tl.zeros([WARPS, 16, 8], tl.float32)
    if BF16:
        # Rows 0..7 and 8..15 of one product: the offsets of both blocks if they differ, else offset and sum.
        both = none
        for phase in tl.static_range(PHASE, min(PHASE + SPAN, 4 // PAIRS)):
            part = none
            for i in tl.static_range(2 * PAIRS):
                halves = operand_of_halves(
                    like,
                    _offset(BY_BLOCK, phase * PAIRS + i // 2, i % 2, 0),
                    _offset(BY_BLOCK, phase * PAIRS + i // 2, i % 2, 1) if BY_BLOCK else 16777216.0,
                    WARPS,
                    INTERPRETED,
                )
                part = _dot(halves, dense[i], part, INTERPRETED)
            own = (PHASE + tl.arange(0, 8)[None, None, :] % SPAN) % (4 // PAIRS) == phase
            both = tl.where(own, part, both) if SPAN > 1 and PAIRS < 4 else part
        offset0, offset1 = _halves(both, WARPS)
    if BF16 and not BY_BLOCK:
        return offset0, offset0, offset1
    else:
        ones = tl.full([WARPS, 16, 16], 16777216.0 if BF16 else 1.0, tl.bfloat16 if BF16 else tl.float16)
        total = none
        for i in tl.static_range(2 * PAIRS):
            total = _dot(ones, dense[i], total, INTERPRETED)
        if BF16:
            return offset0, offset1, total
        else:
            return none, none, total


@triton.jit
def _flush(
    acc, dots, dense, like, scales, SET: tl.constexpr, SETS: tl.constexpr, PHASE: tl.constexpr,
    SPAN: tl.constexpr, WARPS: tl.constexpr, BF16: tl.constexpr, BY_BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """acc + scale * (dot - zero_point * sum(x)) of a set, for each row block and each 8 columns.

    dense: operand B before masking.  PHASE: the place of its first unit in a tile.
    """
    BLOCKS: tl.constexpr = len(scales) // (4 * SETS)
    HALVES: tl.constexpr = len(acc) // BLOCKS
    SLABS: tl.constexpr = len(dense) // HALVES
    SLOTS: tl.constexpr = _num_slots(BF16, BY_BLOCK)
    new = ()
    for half in tl.static_range(HALVES):
        offset0, offset1, total = _sums(
            dense[half * SLABS : (half + 1) * SLABS], like, PHASE, SPAN, WARPS, BF16, BY_BLOCK, INTERPRETED
        )
        for block in tl.static_range(BLOCKS):
            d = _in_accumulator(scales[4 * block * SETS + SET], scales[(4 * block + 2) * SETS + SET], WARPS, SPAN)
            z = _in_accumulator(scales[(4 * block + 1) * SETS + SET], scales[(4 * block + 3) * SETS + SET], WARPS, SPAN)
            dot = _weighed(dots, (half * BLOCKS + block) // 2 * SLOTS, block % 2, BF16, BY_BLOCK)
            if BF16:
                dot -= offset1 if block % 2 else offset0
            new += (acc[half * BLOCKS + block] + d * (dot - z * total),)
    return new


@triton.jit
def _halves(v, WARPS: tl.constexpr):
    """Rows 0..7 of (WARPS, 16, 8) twice, and rows 8..15 twice."""
    low, high = tl.split(v.reshape(WARPS, 2, 8, 8).permute(0, 2, 3, 1))
    return (
        tl.join(low, low).permute(0, 3, 1, 2).reshape(WARPS, 16, 8),
        tl.join(high, high).permute(0, 3, 1, 2).reshape(WARPS, 16, 8),
    )


@triton.jit
def _weighed(dots, BASE: tl.constexpr, BLOCK: tl.constexpr, BF16: tl.constexpr, BY_BLOCK: tl.constexpr):
    first: tl.constexpr = BASE + _first_slot(BF16, BY_BLOCK, BLOCK)
    dot = dots[first]
    for i in tl.static_range(1, len(places_of(BF16, BY_BLOCK, BLOCK))):
        dot += dots[first + i] * _factor(BF16, BY_BLOCK, BLOCK, i)
    return dot


# M, or every batch size that is 1, or a multiple of 16, compiles anew; `one`, 1, for fragments.py.
@triton.jit(do_not_specialize=["M", "one"])
def _gemv_kernel(
    x, qdata, scale, zero, bias, y, M, N, K, stride_xm, stride_q0, stride_scale, stride_zero, one,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, ROW_TILES: tl.constexpr, COL_TILES: tl.constexpr,
    SPLIT_K: tl.constexpr, BF16: tl.constexpr, BY_BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
    ONE_CHUNK: tl.constexpr, VECTOR: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """32 * ROW_TILES columns of y, or their part of program_id(1) in a fp32 y of (SPLIT_K, M, N).

    GROUP = 0: one scale a row.  ROWS: rows of x, 1, 2, 4, 8 or 16, at least M.  BY_BLOCK: see fragments.py.
    EVEN: chunks end with K.  ONE_CHUNK: a warp has no second one.  VECTOR: scales to load at a time, 1, 2 or, if
    SPAN = 1, 4.
    """
    SPAN: tl.constexpr = 8 // ROWS if ROWS < 8 else 1
    HALVES: tl.constexpr = 2 if ROWS == 16 else 1
    UNIT: tl.constexpr = GROUP if GROUP == 32 or GROUP == 64 else 128
    UNITS: tl.constexpr = 128 // UNIT
    PAIRS: tl.constexpr = UNIT // 32
    COL_UNITS: tl.constexpr = COL_TILES * UNITS
    SETS: tl.constexpr = (COL_UNITS + SPAN - 1) // SPAN
    SLOTS: tl.constexpr = _num_slots(BF16, BY_BLOCK)
    num_tiles = tl.cdiv(K, 128)
    num_chunks = 1 if ONE_CHUNK else tl.cdiv(num_tiles, SPLIT_K * WARPS * COL_TILES)
    split = tl.program_id(1) if SPLIT_K > 1 else 0
    chunk = split * num_chunks * WARPS  # the first warp's

    words = ()
    scales = ()
    zeros = ()
    rows = ()
    for r in tl.static_range(ROW_TILES):
        row_tile = tl.program_id(0) * ROW_TILES + r
        if ROW_TILES > 1:
            row_tile = tl.minimum(row_tile, tl.cdiv(N, 32) - 1)
        words += (qdata + row_tile.to(tl.int64) * stride_q0 + tl.arange(0, 256)[None, :],)
        scales += (scale + (row_tile * 32).to(tl.int64) * stride_scale,)
        zeros += (zero + (row_tile * 32).to(tl.int64) * stride_zero,)
        for octet in tl.static_range(4):
            rows += (tl.minimum(octet * 8 + tl.arange(0, WARPS * 32) // 4 % 8, N - 1 - row_tile * 32),)

    none = tl.zeros([WARPS, 16, 8], tl.float32)
    column = (tl.arange(0, 8)[None, None, :] % SPAN).to(tl.int16)
    acc = ()
    for _ in tl.static_range(HALVES * 2 * ROW_TILES):
        acc += (none,)
    for _ in range(num_chunks):
        planes = load_planes(words, chunk, num_tiles, WARPS, COL_TILES, EVEN)
        _pin(INTERPRETED)
        these = load_scales(
            scales, zeros, rows, chunk, K, stride_scale, stride_zero, WARPS, GROUP, UNIT, SPAN, COL_UNITS, EVEN, VECTOR
        )
        xs = ()
        for s in tl.static_range(1, SETS):
            xs = xs + load_x(x, chunk, M, K, stride_xm, WARPS, ROWS, UNIT, COL_UNITS, s, EVEN)
        # Every dot waits for the load of x below, hence comes after this, so ptxas cannot push the loads above back to
        # where they are used, which is what it does to save registers.
        _pin(INTERPRETED)
        xs = load_x(x, chunk, M, K, stride_xm, WARPS, ROWS, UNIT, COL_UNITS, 0, EVEN) + xs
        dense = ()
        dots = ()
        fields = ()
        for unit in tl.static_range(COL_UNITS):
            if unit % SPAN == 0:
                dense = ()
                for pair in tl.static_range(HALVES * PAIRS):
                    dense += operands_of_x(xs[unit // SPAN * HALVES * PAIRS + pair], WARPS)
                dots = ()
                for _ in tl.static_range(HALVES * ROW_TILES * SLOTS):
                    dots += (none,)
            if unit % UNITS == 0:
                fields = ()
                for at in tl.static_range(unit // UNITS * ROW_TILES, (unit // UNITS + 1) * ROW_TILES):
                    fields += (
                        unpack(
                            planes[3 * at], planes[3 * at + 1], planes[3 * at + 2], one, BF16, BY_BLOCK, INTERPRETED
                        ),
                    )
            for i in tl.static_range(2 * PAIRS):
                kept = dense[i :: 2 * PAIRS]  # one for each eight rows of x
                if SPAN > 1:
                    kept = (keep_where(kept[0], column, unit % SPAN, INTERPRETED),)
                for block in tl.static_range(2 * ROW_TILES):
                    a = operand_of_block(fields[block // 2][2 * (unit % UNITS * 2 * PAIRS + i) + block % 2], WARPS)
                    for half in tl.static_range(HALVES):
                        dots = _add_dot(
                            dots,
                            (half * ROW_TILES + block // 2) * SLOTS
                            + _slot(BF16, BY_BLOCK, unit % UNITS * PAIRS + i // 2, i % 2, block % 2),
                            a,
                            kept[half],
                            INTERPRETED,
                        )
            if unit % SPAN == SPAN - 1 or unit == COL_UNITS - 1:
                acc = _flush(
                    acc, dots, dense, planes[0], these, unit // SPAN, SETS, unit // SPAN * SPAN % UNITS,
                    SPAN, WARPS, BF16, BY_BLOCK, INTERPRETED,
                )  # fmt: skip
        chunk += WARPS

    OWN_ROWS: tl.constexpr = 8 // SPAN
    for half in tl.static_range(HALVES):
        m = (half * 8 + tl.arange(0, OWN_ROWS))[None, :]
        for r in tl.static_range(ROW_TILES):
            v = tl.join(acc[2 * (half * ROW_TILES + r)], acc[2 * (half * ROW_TILES + r) + 1]).reshape(
                WARPS, 16, OWN_ROWS, SPAN, 2
            )
            v = v.permute(0, 4, 1, 2, 3).reshape(WARPS, 32, OWN_ROWS, SPAN)
            out = tl.sum(tl.sum(v, 3), 0)
            if not BF16:
                out *= 16777216.0
            n = (tl.program_id(0) * ROW_TILES + r) * 32 + tl.arange(0, 32)
            if HAS_BIAS:
                out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
            out = out.to(y.dtype.element_ty)
            if ROWS == 1:
                tl.store(y + (split * N + n)[:, None], out, mask=(n < N)[:, None])
            else:
                at = y + (split * M + m).to(tl.int64) * N + n[:, None]
                tl.store(at, out, mask=(n < N)[:, None] & (m < M))


@triton.jit
def _add_splits_kernel(parts, bias, y, M, N, SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """y = the sum of (SPLIT_K, M, N) fp32 parts, in their order, + bias, for one row and BLOCK columns."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(1).to(tl.int64) * N + n
    out = tl.load(parts + at, mask=n < N, other=0.0)
    for split in tl.static_range(1, SPLIT_K):
        out += tl.load(parts + at + split * M.to(tl.int64) * N, mask=n < N, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=n < N)


def int3_gemv_triton(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    group_size: int,
    config: GemvConfig | None = None,
) -> Tensor:
    """`int3_ops.int3_linear` for 1 to MAX_ROWS rows of fp16 or bf16 x; arguments as checked there.

    config: None for `default_gemv_config`. Raises ValueError for more rows. Safe to capture in a CUDA graph.
    """
    n, k = scale.shape[0], x.shape[-1]
    rows, qdata, scale, zero_point, some_bias, group = linear_arguments(x, qdata, scale, zero_point, bias, group_size)
    num_rows = rows.shape[0]
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"this kernel takes 1 to {MAX_ROWS} rows of x, got {num_rows}; call int3_linear_triton")
    if qdata.shape[1] > 1 and qdata.stride(1) != 768:
        qdata = qdata.contiguous()
    if config is None:
        config = default_gemv_config(num_rows, n, k, group_size, x.dtype, num_sms=num_sms_of(x.device))
    y = empty_output((num_rows, n), x.dtype, x.device)
    parts = y
    if config.split_k > 1:
        parts = torch.empty((config.split_k, num_rows, n), device=x.device, dtype=torch.float32)
    constants = gemv_constants(num_rows, k, group, x.dtype, config, scale.stride(0), zero_point.stride(0))
    with on_device(x):
        _gemv_kernel[(-(-qdata.shape[0] // config.row_tiles), config.split_k)](
            rows,
            qdata,
            scale,
            zero_point,
            some_bias,
            parts,
            num_rows,
            n,
            k,
            rows.stride(0),
            qdata.stride(0),
            scale.stride(0),
            zero_point.stride(0),
            1,
            **constants,
            HAS_BIAS=bias is not None and config.split_k == 1,
            INTERPRETED=interpreted(),
            num_warps=config.num_warps,
            num_stages=1,
            maxnreg=config.max_registers,
            enable_fp_fusion=True,
        )
        if config.split_k > 1:
            _add_splits_kernel[(-(-n // 256), num_rows)](
                parts, some_bias, y, num_rows, n, SPLIT_K=config.split_k, HAS_BIAS=bias is not None, BLOCK=256
            )
    return y.to(x.dtype).view(*x.shape[:-1], n)
