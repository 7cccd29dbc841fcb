"""Every op of this folder in plain torch, fp32: what the kernels must compute, and what tests compare with.

    y[m, n] = sum_k x[m, k] * scale[n, k // g] * (q[n, k] - zero_point[n, k // g]) + bias[n],    g = group_size

Written to be read. The CPU uses `dequantize_reference` too, so it is not written to be slow.
"""

import torch
from torch import Tensor

from mbq_ao.kernels.layout import unpack_int3


def dequantize_groups(q: Tensor, scale: Tensor, zero_point: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """(q - zero_point) * scale, computed in fp32, rounded once to `dtype`.

    q: (N, K) integer.  scale, zero_point: (N, ceil(K / group_size)); the last group may be short.
    """
    weight = q.to(torch.float32)
    for columns, groups in group_views(weight, group_size):
        columns.sub_(zero_point[:, groups, None]).mul_(scale[:, groups, None])
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
    """The (N, k) weight in `dtype`.  qdata: see layout.py.  scale, zero_point: (N, ceil(k / group_size))."""
    q = unpack_int3(qdata, scale.shape[0], k)
    return dequantize_groups(q, scale, zero_point, group_size, dtype)


def int3_linear_reference(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """The linear layer in fp32, whatever the inputs' dtypes.  x: (..., K).  Returns (..., N) fp32."""
    weight = dequantize_reference(qdata, scale, zero_point, x.shape[-1], group_size, torch.float32)
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
