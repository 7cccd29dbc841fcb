# mypy: disable-error-code="no-untyped-def"
# (what a jitted function takes and returns has types only to Triton)
"""The linear layer over packed 3-bit weights on a GPU, whichever kernel serves it, and the weight unpacked.

    y[m, n] = sum_k x[m, k] * scale[n, k // g] * (q[n, k] - zero_point[n, k // g]) + bias[n]

    int3_gemv.py     few rows of x, decoding: the operand is never a dequantized weight
    int3_gemm.py     more rows, prefill: dequantized in registers
    here             many rows, and fp32: dequantized once, in parts of TRANSIENT_BYTES, then torch's own matmul,
                     which is at its peak there; no second copy of the weight is kept

choice.py says which.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq_ao.kernels.choice import Choice, choose
from mbq_ao.kernels.gemm_config import GemmConfig
from mbq_ao.kernels.gemv_config import GemvConfig
from mbq_ao.kernels.int3_gemm import int3_gemm_triton
from mbq_ao.kernels.int3_gemv import int3_gemv_triton
from mbq_ao.kernels.int3_layout import TILE_K, TILE_N
from mbq_ao.kernels.launch import empty_output, group_constant, on_device, with_inner_contiguous

TRANSIENT_BYTES = 128 << 20  # of dequantized weight at a time


@triton.jit
def _dequantize_kernel(
    qdata, scale, zero, w, N, K, stride_q0, stride_q1, stride_scale, stride_zero, GROUP: tl.constexpr
):  # fmt: skip
    """w = (q - zero_point) * scale for one 32 x 128 tile.  GROUP = 0: one scale a row."""
    row = tl.arange(0, 32)[:, None]
    col = tl.arange(0, 128)[None, :]
    pair, t, slab, hi, odd = col // 32, col // 8 % 4, col // 4 % 2, col // 2 % 2, col % 2
    block, up, g = row // 16, row // 8 % 2, row % 8
    # int3_layout.FIELDS in closed form; field 5 is R.
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
    """`int3_ops.int3_linear` by the Triton kernels; arguments as checked there."""
    k, n = x.shape[-1], scale.shape[0]
    num_rows = x.numel() // k if k else 0
    if num_rows == 0 or n == 0:
        return x.new_empty((*x.shape[:-1], n))
    if x.dtype == torch.float32:
        return _dequantize_and_matmul(x, qdata, scale, zero_point, bias, group_size)
    choice = choose(num_rows, n, k, group_size, x.dtype, x.device)
    return run_choice(choice, x, qdata, scale, zero_point, bias, group_size)


def run_choice(
    choice: Choice, x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """The linear layer by the kernel and configuration that `choice` names, for at least one row of fp16 or bf16 x."""
    if isinstance(choice, GemvConfig):
        return int3_gemv_triton(x, qdata, scale, zero_point, bias, group_size, choice)
    if isinstance(choice, GemmConfig):
        return int3_gemm_triton(x, qdata, scale, zero_point, bias, group_size, choice)
    return _dequantize_and_matmul(x, qdata, scale, zero_point, bias, group_size)


def _dequantize_and_matmul(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """The weight dequantized in x's dtype, TRANSIENT_BYTES of it at a time, and torch's own matmul."""
    k, n = x.shape[-1], scale.shape[0]
    bias = None if bias is None else bias.to(x.dtype)
    num_tiles = qdata.shape[0]
    tiles = max(1, TRANSIENT_BYTES // (TILE_N * k * x.element_size()))
    if tiles >= num_tiles:
        weight = int3_dequantize_triton(qdata, scale, zero_point, k, group_size, x.dtype)
        return torch.nn.functional.linear(x, weight, bias)
    rows = x.reshape(-1, k)
    y = x.new_empty((rows.shape[0], n))
    tiles = -(-num_tiles // -(-num_tiles // tiles))  # parts of one size
    for tile in range(0, num_tiles, tiles):
        part = slice(tile * TILE_N, (tile + tiles) * TILE_N)
        weight = int3_dequantize_triton(
            qdata[tile : tile + tiles], scale[part], zero_point[part], k, group_size, x.dtype
        )
        if bias is None:
            torch.mm(rows, weight.t(), out=y[:, part])
        else:
            torch.addmm(bias[part], rows, weight.t(), out=y[:, part])
        del weight  # or the next part would be written beside it
    return y.view(*x.shape[:-1], n)


def int3_dequantize_triton(
    qdata: Tensor, scale: Tensor, zero_point: Tensor, k: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """`int3_ops.int3_dequantize` by the Triton kernel; arguments as checked there."""
    qdata, scale, zero_point = with_inner_contiguous(qdata, scale, zero_point)
    n = scale.shape[0]
    w = empty_output((n, k), dtype, qdata.device)
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
                GROUP=group_constant(scale, group_size),
                num_warps=4,
                enable_fp_fusion=True,
            )
    return w.to(dtype)
