"""Several linears of one input by one call, where their weights lie one after the other in memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def linear_group(
    linear: Callable[..., Tensor], data: Sequence[Sequence[Tensor]], bias: Sequence[Tensor], tile_n: int
) -> Tensor:
    """`linear(*data of a weight, bias or None)` of all weights side by side, (..., sum of N), in one call if possible.

    data: qdata, scale, ... with one tensor a weight each.  bias: one a weight, or none at all.  Every weight but the
    last needs a multiple of tile_n rows to be laid together.
    """
    if not any(s.shape[0] % tile_n for s in data[1][:-1]):
        weight = [part for tensors in data if (part := _joined(tensors)) is not None]
        joined_bias = _joined(bias)
        if len(weight) == len(data) and (joined_bias is not None or not bias):
            return linear(*weight, joined_bias)
    biases = bias or [None] * len(data[0])
    return torch.cat([linear(*arguments) for arguments in zip(*data, biases, strict=True)], -1)


def _joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """One view over tensors that follow one another along dimension 0 in one storage, or None if they do not."""
    if not tensors:
        return None
    first, size, end = tensors[0], 0, tensors[0].storage_offset()
    for t in tensors:
        same = (
            t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and t.stride() == first.stride()
            and t.shape[1:] == first.shape[1:]
            and t.dtype == first.dtype
        )
        if not same or t.storage_offset() != end:
            return None
        size, end = size + t.shape[0], end + t.shape[0] * t.stride(0)
    return first.as_strided((size, *first.shape[1:]), first.stride())
