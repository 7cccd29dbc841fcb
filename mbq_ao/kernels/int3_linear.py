# mypy: disable-error-code="no-untyped-def"
# (what a jitted function takes and returns has types only to Triton)
"""Triton kernels: a linear layer over packed 3-bit weights, and the weight unpacked.

    y[m, n] = sum_k x[m, k] * scale[n, k // g] * (q[n, k] - zero_point[n, k // g]) + bias[n]

Up to 16 rows of x (decoding): int3_gemv.py.

Up to 64: `_linear_kernel`, the dot product on tensor cores, weights as operand A straight from the packed fragments,
x as operand B. A program computes 32 rows of the weight, one row tile, for BLOCK_M rows of x; its warps take column
tiles in turn and are summed in a fixed order at the end. The operand is never a dequantized weight:

    fp16   masking gives the exact subnormal q * 2^(p - 24), p = 0, 3, 6 the field's place. One fp32 accumulator
           for each p, joined with 2^-3 and 2^-6; the 2^24 goes into the scale.
    bf16   has 7 bits of mantissa, too few for three places; or-ing in 0x4300 gives 128 + q * 2^p, p = 0, 3, and
           128 * sum(x) is subtracted again.

After each group: acc += scale * (dot - zero_point * sum(x)). The sum of x over the group is a dot with a matrix
of ones, so it arrives in the registers that need it; both sums are fp32, and zero points stay integers.

Many rows, or fp32: `_dequantize_kernel` once, then torch's own matmul, which is at its peak there.

INTERPRETED is for Triton's interpreter, which takes a bf16 dot product of the bit patterns and truncates to bf16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq_ao.kernels.fragments import operand_of_pair, operand_of_slab, unpack_bf16, unpack_fp16
from mbq_ao.kernels.int3_gemv import MAX_ROWS as MAX_GEMV_ROWS
from mbq_ao.kernels.int3_gemv import int3_gemv_triton
from mbq_ao.kernels.launch import interpreted, on_device, with_inner_contiguous
from mbq_ao.kernels.layout import TILE_K, TILE_N

MAX_ROWS = 64  # of x for the fused kernel; beyond, unpacking once and a large matmul cost less


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc)


@triton.jit
def _load_x(x, stride_xm, m, M, k0, K, WARPS: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """Operand B, (WARPS, 4 * WIDTH, BLOCK_M): x[m, k0 + 8 t + e], e < WIDTH, zero outside.

    WIDTH = 8: a pair of slabs. WIDTH = 4: one of them.  k0: (WARPS,).
    """
    t = tl.arange(0, 4)[None, None, :, None]
    e = tl.arange(0, WIDTH)[None, None, None, :]
    k = k0[:, None, None, None] + t * 8
    mask = (m[None, :, None, None] < M) & (k + e < K)
    v = tl.load(x + m[None, :, None, None] * stride_xm + (k + e), mask=mask, other=0.0)
    if WIDTH == 8:
        v = v.reshape(WARPS, BLOCK_M, 4, 2, 2, 2).permute(0, 3, 4, 2, 5, 1)  # warp, slab, hi, t, odd, m
    else:
        v = v.reshape(WARPS, BLOCK_M, 4, 2, 2).permute(0, 3, 2, 4, 1)  # warp, hi, t, odd, m
    return v.reshape(WARPS, 4 * WIDTH, BLOCK_M)


@triton.jit
def _flush(acc, c0, c3, c6, s0, s3, scale, zero, offset, mask, BF16: tl.constexpr):
    """acc + scale * (dot - zero_point * sum(x)) for one group; c*, s* are its dots and sums of x by class."""
    d = tl.load(scale + offset, mask=mask, other=0.0).to(tl.float32)[:, :, None]
    z = tl.load(zero + offset, mask=mask, other=0).to(tl.float32)[:, :, None]
    if BF16:
        return acc + d * ((c0 - 128.0 * s0) + 0.125 * (c3 - 128.0 * s3) - z * (s0 + s3))
    return acc + d * (16777216.0 * (c0 + 0.125 * c3 + 0.015625 * c6) - z * s0)


@triton.jit(do_not_specialize=["M"])  # or every batch size that is 1, or a multiple of 16, compiles anew
def _linear_kernel(
    x, qdata, scale, zero, bias, y, M, N, K, stride_xm, stride_q0, stride_q1, stride_scale, stride_zero,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, WARPS: tl.constexpr, BF16: tl.constexpr,
    HAS_BIAS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y = x @ dequantized(qdata).T + bias for 32 columns of y and BLOCK_M rows.  GROUP = 0: one scale a row."""
    row_tile = tl.program_id(0)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    warp = tl.arange(0, WARPS)
    rows = row_tile * 32 + tl.arange(0, 32)
    num_tiles = tl.cdiv(K, 128)
    DTYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    ones = tl.full([WARPS, 32, 32], 1.0, DTYPE)
    ones_slab = tl.full([WARPS, 32, 16], 1.0, DTYPE)
    none = tl.zeros([WARPS, 32, BLOCK_M], tl.float32)
    acc = none
    words = (
        qdata + row_tile.to(tl.int64) * stride_q0 + tl.arange(0, 32)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    )
    scale += rows.to(tl.int64)[None, :] * stride_scale
    zero += rows.to(tl.int64)[None, :] * stride_zero
    for first in range(0, num_tiles, WARPS):
        tile = first + warp
        at = words + (tile * stride_q1)[:, None, None]
        inside = (tile < num_tiles)[:, None, None]
        a = tl.load(at, mask=inside, other=0)
        b = tl.load(at + 256, mask=inside, other=0)
        c = tl.load(at + 512, mask=inside, other=0)
        f = unpack_bf16(a, b, c, INTERPRETED) if BF16 else unpack_fp16(a, b, c, INTERPRETED)

        k0 = tile * 128
        group = k0 * 0 if GROUP == 0 else k0 // GROUP
        offset = group[:, None]
        mask = (tile < num_tiles)[:, None] & (rows < N)[None, :]
        # A short last tile has fewer groups than 128 // GROUP; the others belong to padding.
        limit = tl.cdiv(K, GROUP) if GROUP != 0 else 1

        x0 = _load_x(x, stride_xm, m, M, k0, K, WARPS, BLOCK_M, 8)
        c0 = _dot(operand_of_pair(f[0], f[1], f[2], f[3], WARPS), x0, none, INTERPRETED)
        s0 = _dot(ones, x0, none, INTERPRETED)
        c3, c6, s3 = none, none, none
        if GROUP == 32:
            acc = _flush(acc, c0, c3, c6, s0, s3, scale, zero, offset, mask, BF16)
            c0, s0 = none, none

        x1 = _load_x(x, stride_xm, m, M, k0 + 32, K, WARPS, BLOCK_M, 8)
        c3 = _dot(operand_of_pair(f[4], f[5], f[6], f[7], WARPS), x1, c3, INTERPRETED)
        if BF16:
            s3 = _dot(ones, x1, s3, INTERPRETED)
        else:
            s0 = _dot(ones, x1, s0, INTERPRETED)
        if GROUP == 32:
            mask1 = mask & (offset + 1 < limit)
            acc = _flush(acc, c0, c3, c6, s0, s3, scale, zero, offset + 1, mask1, BF16)
        if GROUP == 64:
            acc = _flush(acc, c0, c3, c6, s0, s3, scale, zero, offset, mask, BF16)
        if GROUP == 32 or GROUP == 64:
            c0, c3, s0, s3 = none, none, none, none

        x2 = _load_x(x, stride_xm, m, M, k0 + 64, K, WARPS, BLOCK_M, 8)
        if BF16:
            c0 = _dot(operand_of_pair(f[8], f[9], f[10], f[11], WARPS), x2, c0, INTERPRETED)
        else:
            c6 = _dot(operand_of_pair(f[8], f[9], f[10], f[11], WARPS), x2, c6, INTERPRETED)
        s0 = _dot(ones, x2, s0, INTERPRETED)
        if GROUP == 32:
            mask2 = mask & (offset + 2 < limit)
            acc = _flush(acc, c0, c3, c6, s0, s3, scale, zero, offset + 2, mask2, BF16)
            c0, c6, s0 = none, none, none

        x3 = _load_x(x, stride_xm, m, M, k0 + 96, K, WARPS, BLOCK_M, 4)
        x4 = _load_x(x, stride_xm, m, M, k0 + 100, K, WARPS, BLOCK_M, 4)
        if BF16:
            c3 = _dot(operand_of_slab(f[12], f[13], WARPS), x3, c3, INTERPRETED)
            c0 = _dot(operand_of_slab(f[14], f[15], WARPS), x4, c0, INTERPRETED)
            s3 = _dot(ones_slab, x3, s3, INTERPRETED)
        else:
            c0 = _dot(operand_of_slab(f[12], f[13], WARPS), x3, c0, INTERPRETED)
            c3 = _dot(operand_of_slab(f[14], f[15], WARPS), x4, c3, INTERPRETED)
            s0 = _dot(ones_slab, x3, s0, INTERPRETED)
        s0 = _dot(ones_slab, x4, s0, INTERPRETED)
        if GROUP == 32:
            mask3 = mask & (offset + 3 < limit)
            acc = _flush(acc, c0, c3, c6, s0, s3, scale, zero, offset + 3, mask3, BF16)
        elif GROUP == 64:
            mask1 = mask & (offset + 1 < limit)
            acc = _flush(acc, c0, c3, c6, s0, s3, scale, zero, offset + 1, mask1, BF16)
        else:
            acc = _flush(acc, c0, c3, c6, s0, s3, scale, zero, offset, mask, BF16)

    out = tl.sum(acc, 0)
    if HAS_BIAS:
        out += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    at_y = y + m[None, :] * N + rows[:, None]
    tl.store(at_y, out.to(y.dtype.element_ty), mask=(rows < N)[:, None] & (m < M)[None, :])


@triton.jit
def _dequantize_kernel(
    qdata, scale, zero, w, N, K, stride_q0, stride_q1, stride_scale, stride_zero, GROUP: tl.constexpr
):  # fmt: skip
    """w = (q - zero_point) * scale for one 32 x 128 tile.  GROUP = 0: one scale a row."""
    row = tl.arange(0, 32)[:, None]
    col = tl.arange(0, 128)[None, :]
    pair, t, slab, hi, odd = col // 32, col // 8 % 4, col // 4 % 2, col // 2 % 2, col % 2
    block, up, g = row // 16, row // 8 % 2, row % 8
    # layout.FIELDS in closed form; field 5 is R.
    own_plane = (slab == 0) | (pair == 3)
    plane = tl.where(own_plane, block, 2)
    field = tl.where(slab == 0, pair, tl.where(pair == 3, 4, pair + 3 * block))
    word = (
        qdata
        + tl.program_id(0).to(tl.int64) * stride_q0
        + tl.program_id(1).to(tl.int64) * stride_q1
        + (4 * g + t) * 8
        + (4 * hi + 2 * up + odd)
    )
    value = tl.load(word + plane * 256).to(tl.int32) & 0xFFFF
    ra = tl.load(word, mask=field == 5, other=0).to(tl.int32)
    rb = tl.load(word + 256, mask=field == 5, other=0).to(tl.int32)
    r = ((ra >> 15) & 1) | ((rb >> 14) & 2) | ((value >> 13) & 4)
    q = tl.where(field == 5, r, (value >> (3 * field)) & 7)

    n = tl.program_id(0) * 32 + row
    k = tl.program_id(1) * 128 + col
    mask = (n < N) & (k < K)
    group = k * 0 if GROUP == 0 else k // GROUP
    d = tl.load(scale + n.to(tl.int64) * stride_scale + group, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(zero + n.to(tl.int64) * stride_zero + group, mask=mask, other=0).to(tl.float32)
    out = (q.to(tl.float32) - z) * d
    tl.store(w + n.to(tl.int64) * K + k, out.to(w.dtype.element_ty), mask=mask)


def int3_linear_triton(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """`ops.int3_linear` by the Triton kernels; arguments as checked there."""
    k, n = x.shape[-1], scale.shape[0]
    rows = x.reshape(-1, k)
    num_rows = rows.shape[0]
    if num_rows == 0 or n == 0:
        return x.new_empty((*x.shape[:-1], n))
    if x.dtype == torch.float32 or num_rows > MAX_ROWS:
        weight = int3_dequantize_triton(qdata, scale, zero_point, k, group_size, x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if num_rows <= MAX_GEMV_ROWS:
        return int3_gemv_triton(x, qdata, scale, zero_point, bias, group_size)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    qdata, scale, zero_point = with_inner_contiguous(qdata, scale, zero_point)
    y = torch.empty((num_rows, n), device=x.device, dtype=torch.float32 if interpreted() else x.dtype)
    warps = min(4, triton.next_power_of_2(qdata.shape[1]))
    with on_device(x):
        _linear_kernel[(qdata.shape[0], triton.cdiv(num_rows, 32))](
            rows,
            qdata,
            scale,
            zero_point,
            scale if bias is None else bias.contiguous(),
            y,
            num_rows,
            n,
            k,
            rows.stride(0),
            qdata.stride(0),
            qdata.stride(1),
            scale.stride(0),
            zero_point.stride(0),
            GROUP=0 if scale.shape[1] == 1 else group_size,
            BLOCK_M=32,
            WARPS=warps,
            BF16=x.dtype == torch.bfloat16,
            HAS_BIAS=bias is not None,
            INTERPRETED=interpreted(),
            num_warps=warps,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return y.to(x.dtype).view(*x.shape[:-1], n)


def int3_dequantize_triton(
    qdata: Tensor, scale: Tensor, zero_point: Tensor, k: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """`ops.int3_dequantize` by the Triton kernel; arguments as checked there."""
    qdata, scale, zero_point = with_inner_contiguous(qdata, scale, zero_point)
    n = scale.shape[0]
    w = torch.empty((n, k), device=qdata.device, dtype=torch.float32 if interpreted() else dtype)
    if w.numel():
        with on_device(qdata):
            _dequantize_kernel[(-(-n // TILE_N), -(-k // TILE_K))](
                qdata,
                scale,
                zero_point,
                w,
                n,
                k,
                qdata.stride(0),
                qdata.stride(1),
                scale.stride(0),
                zero_point.stride(0),
                GROUP=0 if scale.shape[1] == 1 else group_size,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return w.to(dtype)
