"""W4A8 on a CPU, and on whatever else has no kernel: the weight unpacked, and a matmul of integers.

Sums of integers are exact, so in 16 bits the result does not depend on which way was taken, or on the threads:

    torch._int_mm      int8 x int8 -> int32, on CPUs with instructions for it. On others torch has a plain loop, 36
                       times slower than its fp32 matmul (2048 x 2048, 256 rows, AVX2).
    fp32 matmul        of whole numbers: exact as long as a sum stays below 2^24, so in parts of 16,384 columns

With x in fp32 the rounded x and the rounded weight are multiplied as they are, in fp32: the arithmetic in which the
published code simulates W4A8. Nothing else reproduces its numbers, because a difference in the last bit moves some
value of the next layer to the other side of a rounding, by a whole step of 8 bits, and so on from layer to layer.
"""

import functools

import torch
from torch import Tensor

from mbq_ao.kernels.int4_layout import unpack_int4
from mbq_ao.kernels.reference import as_rows, int4_dequantize_reference, quantize_tokens

_EXACT_COLUMNS = 1 << 14  # 127 * 8 * 2^14 < 2^24


def w4a8_linear_cpu(
    x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, act_pre_scale: Tensor | None, group_size: int
) -> Tensor:
    """`w4a8_ops.w4a8_linear`; arguments as checked there."""
    n, k = scale.shape[0], x.shape[-1]
    xq, d = quantize_tokens(as_rows(x), act_pre_scale)
    if x.dtype == torch.float32 and _fits_fp32(d, scale, k):
        weight = int4_dequantize_reference(qdata, scale, k, group_size, torch.float32)
        y = torch.nn.functional.linear(xq * d, weight, None if bias is None else bias.float())
        return y.view(*x.shape[:-1], n)
    q = unpack_int4(qdata, n, k)
    if scale.shape[1] == 1:
        y = sum_products(xq, q).mul_(scale[:, 0].float())
    else:
        y = xq.new_zeros((xq.shape[0], n), dtype=torch.float32)
        for group in range(scale.shape[1]):
            columns = slice(group * group_size, (group + 1) * group_size)
            y.addcmul_(sum_products(xq[:, columns], q[:, columns]), scale[:, group].float())
    y.mul_(d)
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], n)


def _fits_fp32(d: Tensor, scale: Tensor, k: int) -> bool:
    """Whether finite tokens, dequantized, are finite, and sums of their products with weights, in any order.

    Of all tokens together: beside a token of 1e35 the others are computed in integers, too, and differ in last bits.
    """
    if d.numel() * scale.numel() == 0:
        return False
    largest = 128 * d.double().nan_to_num(0.0, 0.0, 0.0).amax()
    return bool(largest * max(1.0, 8 * k * float(scale.abs().amax())) < torch.finfo(torch.float32).max)


def sum_products(xq: Tensor, q: Tensor) -> Tensor:
    """xq @ q.T of int8 matrices (M, K) and (N, K), |q| <= 8: fp32 (M, N), the exact sums, rounded once."""
    # With one column torch 2.13's integer product is wrong where the CPU has instructions for it (AVX-512).
    if xq.device.type == "cpu" and has_int8_matmul() and xq.shape[1] > 1:
        return torch._int_mm(xq.contiguous(), q.t()).to(torch.float32)
    parts = [
        xq[:, start : start + _EXACT_COLUMNS].float() @ q[:, start : start + _EXACT_COLUMNS].float().t()
        for start in range(0, max(xq.shape[1], 1), _EXACT_COLUMNS)
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts).sum(0, dtype=torch.float64).to(torch.float32)


@functools.cache
def has_int8_matmul() -> bool:
    """Whether torch's int8 matmul is a fast one on this CPU."""
    return bool(torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())
