"""Every op of this folder in plain torch, fp32: what the kernels must compute, and what tests compare with.

    W3A16    y[m, n] = sum_k x[m, k] * scale[n, k // g] * (q[n, k] - zero_point[n, k // g]) + bias[n]

    W4A8     d[m] = max(max_k |x[m, k] * p[k]|, 1e-5) / 127                   p = act_pre_scale
             xq[m, k] = round(x[m, k] * p[k] / d[m])                          an integer, -127..127
             y[m, n] = sum_j (sum_k xq[m, k] * q[n, k]) * scale[n, j] * d[m] + bias[n]    k over group j

with g = group_size columns a group. Written to be read. The CPU uses it too, so it is not written to be slow.
"""

import math

import torch
from torch import Tensor

from mbq_ao.kernels.int3_layout import unpack_int3
from mbq_ao.kernels.int4_layout import unpack_int4

_MIN_ABSMAX = 1e-5  # of a token, or of a group of weights: zeros keep a usable scale
_MAX = torch.finfo(torch.float32).max


def dequantize_groups(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """(q - zero_point) * scale, computed in fp32, rounded once to `dtype`.

    q: (N, K) integer.  scale, zero_point: (N, ceil(K / group_size)); the last group may be short.
    zero_point=None is 0.
    """
    weight = q.to(torch.float32)
    for columns, groups in group_views(weight, group_size):
        if zero_point is not None:
            columns.sub_(zero_point[:, groups, None])
        columns.mul_(scale[:, groups, None])
    return weight.to(dtype)


def group_views(x: Tensor, group_size: int) -> list[tuple[Tensor, slice]]:
    """Views of (N, K) as (N, groups, columns of a group), each with the groups it covers.

    One view where group_size divides K, else a second one for the short last group.
    """
    k = x.shape[1]
    num_full = k // group_size
    if num_full * group_size == k:
        return [(x.unflatten(1, (num_full, group_size)), slice(0, num_full))]
    short = (x[:, num_full * group_size :].unsqueeze(1), slice(num_full, num_full + 1))
    if num_full == 0:
        return [short]
    full = x[:, : num_full * group_size].unflatten(1, (num_full, group_size))
    return [(full, slice(0, num_full)), short]


def dequantize_reference(
    qdata: Tensor, scale: Tensor, zero_point: Tensor, k: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The (N, k) weight in `dtype`.  qdata: see int3_layout.py.  scale, zero_point: (N, ceil(k / group_size))."""
    q = unpack_int3(qdata, scale.shape[0], k)
    return dequantize_groups(q, scale, zero_point, group_size, dtype)


def int3_linear_reference(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """The linear layer in fp32, whatever the inputs' dtypes.  x: (..., K).  Returns (..., N) fp32."""
    weight = dequantize_reference(qdata, scale, zero_point, x.shape[-1], group_size, torch.float32)
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())


def as_rows(x: Tensor) -> Tensor:
    """x (..., K) as (rows, K). `reshape(-1, K)` cannot, where K is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def quantize_tokens(x: Tensor, act_pre_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Per-token symmetric int8: x (..., K) -> (int8 (..., K), fp32 (..., 1) scale d), computed in fp32.

    A token of zeros has zeros and a positive scale. One that holds a NaN or an infinity has zeros and that, or an
    infinity, as its scale: NaN in its row of a matmul, and nowhere else. Where x * act_pre_scale is beyond fp32, the
    largest number of fp32 stands in for it.
    """
    x = x.to(torch.float32)
    if act_pre_scale is not None:
        products = (x * act_pre_scale.to(torch.float32)).clamp_(-_MAX, _MAX)
        x = torch.where(x.isfinite(), products, x)
    if x.shape[-1] == 0:
        return x.to(torch.int8), x.new_ones((*x.shape[:-1], 1))
    # A tensor, as CUDA multiplies by the reciprocal of a number.
    d = x.abs().amax(-1, keepdim=True).clamp(min=_MIN_ABSMAX) / x.new_full((), 127.0)
    # The division of a finite number by an infinite scale is 0, and of an infinite one is to be so, too.
    return (x / d).round_().nan_to_num_(0.0, 0.0, 0.0).to(torch.int8), d


def int4_dequantize_reference(qdata: Tensor, scale: Tensor, k: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """The (N, k) weight in `dtype`.  qdata: see int4_layout.py.  scale: (N, ceil(k / group_size))."""
    return dequantize_groups(unpack_int4(qdata, scale.shape[0], k), scale, None, group_size, dtype)


def w4a8_linear_reference(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    act_pre_scale: Tensor | None,
    group_size: int,
) -> Tensor:
    """The linear layer in fp32 but for the sums of integers, which are exact.  x: (..., K).  Returns (..., N) fp32."""
    n, k = scale.shape[0], x.shape[-1]
    xq, d = quantize_tokens(as_rows(x), act_pre_scale)
    q = unpack_int4(qdata, n, k)
    y = x.new_zeros((xq.shape[0], n), dtype=torch.float32)
    for group in range(scale.shape[1]):
        columns = slice(group * group_size, (group + 1) * group_size)
        sums = xq[:, columns].double() @ q[:, columns].double().t()  # below 2^53: exact
        y += sums.float() * scale[:, group].float()
    y *= d
    return (y if bias is None else y + bias.float()).view(*x.shape[:-1], n)
