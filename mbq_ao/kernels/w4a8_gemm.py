# mypy: disable-error-code="no-untyped-def"
# (what a jitted function takes and returns has types only to Triton)
"""The Triton kernels of W4A8: tokens quantized to int8, then a matmul on integer tensor cores, for any number of rows.

    d[m] = max(max_k |x[m, k] * p[k]|, 1e-5) / 127       xq[m, k] = round(x[m, k] * p[k] / d[m])
    y[m, n] = (sum_k xq[m, k] * q[n, k]) * scale[n] * d[m] + bias[n]

The second kernel computes y^T = q xq^T for BLOCK_N rows of the weight and BLOCK_M tokens a program:

    packed words   by cp.async to shared memory, some stages ahead; from there to registers, 16 bytes a lane
    q              16 times a nibble each, three operations for eight (int4_layout.py): operand A, never stored
    xq             by cp.async to shared memory; operand B

Sums are int32 and exact, whatever the cut. Scales, and the factor 16, come in when y is written; with a scale a group,
when the group is done, in fp32. xq is ours, so it ends in zeros up to a whole step of the loop, and nothing in the
loop is masked: rows beyond M or N, and tiles beyond K, repeat the last one.

SLICES > 1: a program's warps take column tiles of their own, summed at the end: for few rows of x, where a program has
few rows of weight. Splits: K in parts for programs of their own, which store fp32; a second kernel adds them in order.
What is chosen by M is w4a8_config.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq_ao.kernels.int4_layout import TILE_K
from mbq_ao.kernels.launch import capability_of, empty_output, group_constant, interpreted, on_device
from mbq_ao.kernels.sums import sum_slices, sum_splits
from mbq_ao.kernels.w4a8_config import W4A8Config, default_w4a8_config, split_of

_MAX_BLOCK = 32768  # columns of a token that stay in registers


@triton.jit
def _quantize_kernel(
    x, pre_scale, xq, d, K, stride_xm, stride_qm,
    BLOCK: tl.constexpr, ONE_PASS: tl.constexpr, HAS_PRE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One token: its scale, and its integers with zeros up to stride_qm.  BLOCK columns at a time."""
    m = tl.program_id(0).to(tl.int64)
    x += m * stride_xm
    xq += m * stride_qm
    k = tl.arange(0, BLOCK)
    v, magnitude = _scaled(x + k, pre_scale, k, K, HAS_PRE)
    top = tl.max(magnitude, 0)
    if not ONE_PASS:
        for start in range(BLOCK, K, BLOCK):
            _, magnitude = _scaled(x + start + k, pre_scale, start + k, K, HAS_PRE)
            top = tl.maximum(top, tl.max(magnitude, 0))
    scale = tl.div_rn(tl.maximum(top, 0x3727C5AC).to(tl.float32, bitcast=True), 127.0)  # at least 1e-5 / 127
    tl.store(d + m, scale)
    if top < 0x7F800000:  # finite
        tl.store(xq + k, _rounded(v, scale, INTERPRETED), mask=k < stride_qm)
        if not ONE_PASS:
            for start in range(BLOCK, stride_qm, BLOCK):
                v, _ = _scaled(x + start + k, pre_scale, start + k, K, HAS_PRE)
                tl.store(xq + start + k, _rounded(v, scale, INTERPRETED), mask=start + k < stride_qm)
    else:
        for start in range(0, stride_qm, BLOCK):
            tl.store(xq + start + k, tl.zeros([BLOCK], tl.int8), mask=start + k < stride_qm)


@triton.jit
def _scale_of_tokens(x, pre_scale, K, ROWS: tl.constexpr, HAS_PRE: tl.constexpr):
    """The scales of tokens, (ROWS,), that begin at the pointers x, (ROWS, 1).

    NaN for a token that is not finite, so that whatever integers it gets, its results are NaN.
    """
    top = tl.full([ROWS], 0x3727C5AC, tl.int32)
    for start in range(0, K, 4096):
        k = start + tl.arange(0, 4096)[None, :]
        _, magnitude = _scaled(x + k, pre_scale, k, K, HAS_PRE)
        top = tl.maximum(top, tl.max(magnitude, 1))
    return tl.where(top < 0x7F800000, tl.div_rn(top.to(tl.float32, bitcast=True), 127.0), float("nan"))


@triton.jit
def _prefetch(at, LINES: tl.constexpr, INTERPRETED: tl.constexpr):
    """Ask for LINES times 128 bytes at the pointers `at`, (n, 1), to be brought to the L2 cache."""
    if not INTERPRETED:
        at += tl.arange(0, LINES)[None, :] * 128
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _scaled(x, pre_scale, k, K, HAS_PRE: tl.constexpr):
    """What is at the pointers x, columns k, times pre_scale in fp32, and its magnitude as an integer.

    As integers, magnitudes have the order of the numbers, and infinity and NaN, which `max` would lose, come last.
    """
    v = tl.load(x, mask=k < K, other=0.0).to(tl.float32)
    magnitude = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if HAS_PRE:
        finite = magnitude < 0x7F800000
        LARGEST: tl.constexpr = 3.4028234663852886e38  # stands in for a product beyond it
        v *= tl.load(pre_scale + k, mask=k < K, other=0.0).to(tl.float32)
        ALL: tl.constexpr = tl.PropagateNan.ALL
        v = tl.minimum(tl.maximum(v, -LARGEST, propagate_nan=ALL), LARGEST, propagate_nan=ALL)
        magnitude = tl.where(finite, v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, magnitude)
    return v, magnitude


@triton.jit
def _rounded(v, scale, INTERPRETED: tl.constexpr):
    """round(v / scale) as int8; bit for bit what a correctly rounded division gives."""
    if INTERPRETED:
        q = tl.div_rn(v, scale)
    else:
        # With a correctly rounded reciprocal, one correction by the remainder rounds the quotient correctly (Markstein,
        # "Computation of elementary functions on the IBM RISC System/6000", 1990), in three instructions an element.
        inverse = tl.div_rn(1.0, scale)
        q = v * inverse
        q = tl.fma(tl.fma(-q, scale, v), inverse, q)
    # Adding 1.5 * 2^23 rounds to the nearest whole number, ties to even, and leaves it in the lowest bits.
    return (q + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _nibbles(packed, INTERPRETED: tl.constexpr):
    """16 times the low and the high nibbles of int8, as int8."""
    if INTERPRETED:
        return packed << 4, packed & -16
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 s; shl.b32 s, $2, 4; and.b32 $0, s, 0xf0f0f0f0; and.b32 $1, $2, 0xf0f0f0f0; }",
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )


@triton.jit
def _operand(v):
    """32 columns of operand A, (slices, rows, 32), from (slices, tiles, lane, byte): registers get other names."""
    SLICES: tl.constexpr = v.shape[0]
    TILES: tl.constexpr = v.shape[1]
    v = v.reshape(SLICES, TILES, 8, 4, 2, 2, 4)  # slice, tile, g, t, hi, up, i
    return v.permute(0, 1, 5, 2, 4, 3, 6).reshape(SLICES, TILES * 16, 32)


@triton.jit
def _side_by_side(u, v):
    """Columns of v after those of u."""
    return tl.join(u, v).permute(0, 1, 3, 2).reshape(u.shape[0], u.shape[1], u.shape[2] * 2)


@triton.jit
def _add_product(total, a, b, row_scale, group, GROUP: tl.constexpr):
    """total + a b^T of some columns: int32, or with a scale a group scaled fp32.

    a: int8 (slices, rows, columns).  b: int8 (slices, tokens, columns), or two-dimensional if there is one slice.
    """
    if len(b.shape) == 2:
        a, b = a.reshape(a.shape[1], a.shape[2]), b.trans()
    else:
        b = b.permute(0, 2, 1)
    if GROUP == 0:
        return tl.dot(a, b, total, out_dtype=tl.int32)
    else:
        part = tl.dot(a, b, tl.zeros(total.shape, tl.int32), out_dtype=tl.int32)
        s = tl.load(row_scale + group[:, None]).to(tl.float32) * 0.0625  # (slices, rows)
        s = s.reshape(s.shape[1]) if len(total.shape) == 2 else s
        return total + part.to(tl.float32) * tl.expand_dims(s, -1)


@triton.jit
def _tokens(
    x, d, pre_scale, offsets, k, K, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, HAS_PRE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Columns k of the tokens, int8 (slices, BLOCK_M, columns): as they were quantized before, or quantized here.

    The latter with ROWS > 0 tokens, of scales d, (ROWS,); they are repeated up to BLOCK_M.
    """
    if ROWS == 0:
        return tl.load(x + offsets)
    else:
        v, _ = _scaled(x + offsets, pre_scale, k, K, HAS_PRE)
        q = _rounded(v, d[None, :, None], INTERPRETED)
        q = q[:, None, :, :].broadcast_to(q.shape[0], BLOCK_M // ROWS, ROWS, q.shape[2])
        return q.reshape(q.shape[0], BLOCK_M, q.shape[3])


@triton.jit(do_not_specialize=["M", "split_tiles"])
def _w4a8_kernel(
    x, d, pre_scale, qdata, scale, bias, y, M, N, K, stride_xm, stride_q0, stride_q1, stride_scale, split_tiles,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
    ROWS: tl.constexpr, HAS_PRE: tl.constexpr, HAS_BIAS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y for BLOCK_N columns and BLOCK_M tokens, over split_tiles column tiles from those of program_id(2) on.

    GROUP = 0: one scale a row. BLOCK_K: columns a slice and step, 64 or 128. ROWS = 0: x and d are what the kernel
    above made of the tokens; else x are the tokens, at most ROWS, d is not read, and SLICES > 1.
    """
    TILES: tl.constexpr = BLOCK_N // 16
    COL_TILES: tl.constexpr = BLOCK_K // 64
    m0 = tl.program_id(1) * BLOCK_M
    m = tl.minimum(tl.arange(0, BLOCK_M if ROWS == 0 else ROWS), M - 1 - m0).to(tl.int64)
    slices = tl.arange(0, SLICES)
    x += m0.to(tl.int64) * stride_xm
    columns = tl.arange(0, 32 if GROUP == 32 else BLOCK_K)
    offsets = m[:, None] * stride_xm + columns[None, :]
    if SLICES > 1:  # else two dimensions, so that wgmma reads what was loaded where it lies
        offsets = offsets[None, :, :] + slices[:, None, None] * BLOCK_K

    num_col_tiles = tl.cdiv(K, 64)
    # In two dimensions, for what gemv_loads.py says of loads.
    both = tl.arange(0, SLICES * TILES)
    row_tile = tl.minimum(tl.program_id(0) * TILES + both % TILES, tl.cdiv(N, 16) - 1)
    first_words = qdata + (row_tile.to(tl.int64) * stride_q0)[:, None]
    words = first_words + tl.arange(0, 512)[None, :]

    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_scale = scale + tl.minimum(n, N - 1).to(tl.int64)[None, :] * stride_scale
    start = tl.program_id(2) * split_tiles
    end = tl.minimum(start + split_tiles, num_col_tiles)

    if ROWS > 0:
        # Weights of the first steps come nearer meanwhile.
        for i in tl.static_range(4):
            tile = tl.minimum(start + i * SLICES * COL_TILES + both // TILES * COL_TILES, num_col_tiles - 1)
            _prefetch(first_words + (tile.to(tl.int64) * stride_q1)[:, None], COL_TILES * 4, INTERPRETED)
        d = _scale_of_tokens(x + m[:, None] * stride_xm, pre_scale, K, ROWS, HAS_PRE)

    DTYPE: tl.constexpr = tl.int32 if GROUP == 0 else tl.float32
    total = tl.zeros([SLICES, BLOCK_N, BLOCK_M] if SLICES > 1 else [BLOCK_N, BLOCK_M], DTYPE)
    for first in range(start, end, SLICES * COL_TILES):
        tile = first + both // TILES * COL_TILES
        at = words + (tl.minimum(tile, num_col_tiles - 1).to(tl.int64) * stride_q1)[:, None]
        low, high = _nibbles(tl.load(at).reshape(SLICES, TILES, 32, 16), INTERPRETED)
        low, high = _operand(low), _operand(high)
        column = (
            first * 64 + slices[:, None, None] * BLOCK_K + columns[None, None, :]
        )  # where tokens are quantized here
        # The scales of a tile beyond the last are those of the last.
        k = tl.minimum((first + slices * COL_TILES) * 64, K - 1)
        group = k // GROUP if GROUP > 0 else k
        if GROUP == 32:
            b = _tokens(x, d, pre_scale, first * 64 + offsets, column, K, ROWS, BLOCK_M, HAS_PRE, INTERPRETED)
            total = _add_product(total, low, b, row_scale, group, GROUP)
            group = tl.minimum(group + 1, (K - 1) // GROUP)
            at, column = first * 64 + 32 + offsets, column + 32
            b = _tokens(x, d, pre_scale, at, column, K, ROWS, BLOCK_M, HAS_PRE, INTERPRETED)
            total = _add_product(total, high, b, row_scale, group, GROUP)
        else:
            a = _side_by_side(low, high)
            if COL_TILES == 2:
                at = words + (tl.minimum(tile + 1, num_col_tiles - 1).to(tl.int64) * stride_q1)[:, None]
                low, high = _nibbles(tl.load(at).reshape(SLICES, TILES, 32, 16), INTERPRETED)
                a = _side_by_side(a, _side_by_side(_operand(low), _operand(high)))
            b = _tokens(x, d, pre_scale, first * 64 + offsets, column, K, ROWS, BLOCK_M, HAS_PRE, INTERPRETED)
            total = _add_product(total, a, b, row_scale, group, GROUP)

    if SLICES > 1:
        total = sum_slices(total)
    m = m0 + tl.arange(0, BLOCK_M)
    out = total.to(tl.float32)
    if GROUP == 0:
        s = tl.load(row_scale).to(tl.float32).reshape(BLOCK_N)
        out = out * 0.0625 * s[:, None]
    if ROWS == 0:
        out *= tl.load(d + m, mask=m < M, other=0.0)[None, :]
    else:
        out *= d[None, :].broadcast_to(BLOCK_M // ROWS, ROWS).reshape(BLOCK_M)[None, :]
    if HAS_BIAS:
        out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    y += tl.program_id(2).to(tl.int64) * M * N
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], out.trans().to(y.dtype.element_ty), mask=mask)


def quantize_tokens_triton(x: Tensor, act_pre_scale: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """`reference.quantize_tokens` of x (M, K): int8 (M, width), zeros from K on, and fp32 (M,)."""
    num_rows, k = x.shape
    xq = torch.empty((num_rows, width), device=x.device, dtype=torch.int8)
    d = torch.empty((num_rows,), device=x.device, dtype=torch.float32)
    block = min(triton.next_power_of_2(max(width, 128)), _MAX_BLOCK)
    with on_device(x):
        _quantize_kernel[(num_rows,)](
            x,
            x if act_pre_scale is None else act_pre_scale,
            xq,
            d,
            k,
            x.stride(0),
            width,
            BLOCK=block,
            ONE_PASS=width <= block,
            HAS_PRE=act_pre_scale is not None,
            INTERPRETED=interpreted(),
            num_warps=min(16, max(1, block // 512)),
        )
    return xq, d


def w4a8_linear_triton(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    act_pre_scale: Tensor | None,
    group_size: int,
    config: W4A8Config | None = None,
) -> Tensor:
    """`w4a8_ops.w4a8_linear` by the Triton kernels; arguments as checked there. config: None for the default."""
    n, k = scale.shape[0], x.shape[-1]
    rows = x.reshape(-1, k)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    num_rows = rows.shape[0]
    if num_rows == 0 or n == 0:
        return x.new_empty((*x.shape[:-1], n))
    group = group_constant(scale, group_size)
    if config is None:
        config = default_w4a8_config(num_rows, n, k, group, capability_of(x.device))
    if group and group % config.block_k and (group, config.block_k) != (32, 64):
        raise ValueError(f"block_k={config.block_k} does not go with groups of {group}; take 64")
    split_tiles, num_splits = split_of(config, k)
    pre_scale = None if act_pre_scale is None else act_pre_scale.contiguous()
    if not config.serves(num_rows):
        raise ValueError(f"a fused config serves at most block_m={config.block_m} tokens, got {num_rows}")
    if config.fused:
        tokens, d = rows, rows  # d is not read
    else:
        tokens, d = quantize_tokens_triton(rows, pre_scale, split_tiles * num_splits * TILE_K)
    qdata = qdata if qdata.stride()[2:] == (16, 1) else qdata.contiguous()
    scale = scale if scale.stride(1) == 1 else scale.contiguous()
    some_bias = scale if bias is None else bias.contiguous()  # Triton wants a tensor there, used or not
    y = empty_output((num_rows, n), x.dtype, x.device)
    split = num_splits > 1
    parts = torch.empty((num_splits * num_rows, n), device=x.device, dtype=torch.float32) if split else y
    with on_device(x):
        _w4a8_kernel[(triton.cdiv(n, config.block_n), triton.cdiv(num_rows, config.block_m), num_splits)](
            tokens,
            d,
            tokens if pre_scale is None else pre_scale,  # Triton wants a pointer there, read or not
            qdata,
            scale,
            some_bias,
            parts,
            num_rows,
            n,
            k,
            tokens.stride(0),
            qdata.stride(0),
            qdata.stride(1),
            scale.stride(0),
            split_tiles,
            GROUP=group,
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
            SLICES=config.slices,
            ROWS=triton.next_power_of_2(num_rows) if config.fused else 0,
            HAS_PRE=config.fused and pre_scale is not None,
            HAS_BIAS=bias is not None and not split,
            INTERPRETED=interpreted(),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if split:
            sum_splits(parts, num_splits, bias, y)
    return y.to(x.dtype).view(*x.shape[:-1], n)
