"""Shards of a PackedWeight that no view can serve, and how they travel: what DTensor asks of a weight.

A part that begins within a tile is unpacked and packed again: the same values, in memory of its own. One that begins
within a group gets smaller groups, of a half or a quarter of the columns, that share a scale. So any rows, and any
columns from a multiple of 32 on, can be a shard. packed_weight.py registers the handlers below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed
from torch import Tensor

if TYPE_CHECKING:
    from mbq_ao.packed_weight import PackedWeight


def repacked_parts(w: PackedWeight, dim: int, bounds: Sequence[int]) -> tuple[PackedWeight, ...]:
    """The rows or columns between every two neighbours of `bounds`, copied. `dim` is of the tensor as it is seen.

    Raises ValueError if a part would begin within the smallest group there can be.
    """
    if w.transposed:
        return tuple(
            part.transpose(-1, -2) for part in repacked_parts(w.transpose(-1, -2), 2 * w.dim() - 3 - dim, bounds)
        )
    if w.dim() == 3:
        experts = zip(*(repacked_parts(expert, dim - 1, bounds) for expert in w.unbind()), strict=True)
        return tuple(torch.stack(parts) for parts in experts)
    values = w._unpack(w.qdata, *w.shape)
    of_groups = [name for name in w.tensor_data_names if name != "qdata"]
    if dim == 0:
        return tuple(
            w._replace(
                qdata=w._pack(values[start:end]),
                shape=(end - start, w.shape[1]),
                **{name: getattr(w, name)[start:end].clone() for name in of_groups},
            )
            for start, end in pairwise(bounds)
        )
    g = _group_size_of_parts(w, bounds)
    parts = []
    for start, end in pairwise(bounds):
        groups = torch.arange(start, end, g or end - start, device=w.device) // w.group_size
        parts.append(
            w._replace(
                qdata=w._pack(values[:, start:end]),
                block_size=[1, g or end - start],
                shape=(w.shape[0], end - start),
                act_pre_scale=None if w.act_pre_scale is None else w.act_pre_scale[start:end].clone(),
                **{name: getattr(w, name).index_select(1, groups) for name in of_groups},
            )
        )
    return tuple(parts)


def repacked_rows(parts: Sequence[PackedWeight]) -> Tensor:
    """qdata of the rows of all parts, one after the other, wherever a part ends within a tile."""
    first = parts[0]
    if first.dim() == 3:
        return torch.stack([repacked_rows(experts) for experts in zip(*(w.unbind() for w in parts), strict=True)])
    return first._pack(torch.cat([w._unpack(w.qdata, *w.shape) for w in parts]))


def _group_size_of_parts(w: PackedWeight, bounds: Sequence[int]) -> int | None:
    """The largest group size with which every part begins at a group; None where a row has one scale."""
    if w.group_size >= w.shape[1]:
        return None
    common = math.gcd(w.group_size, *bounds[:-1])
    g = next((g for g in (w.group_size, 128, 64, 32) if common % g == 0), None)
    if g is None:
        raise ValueError(
            f"cannot split {w} into parts of {', '.join(str(end - start) for start, end in pairwise(bounds))} columns: "
            "a part must begin at a multiple of 32, or all of a row have one scale; take another number of ranks, "
            "quantize with group_size=None, or leave this linear out of the plan"
        )
    return g


def _no_padding(func: Any, types: Any, args: Any, kwargs: Any) -> NoReturn:
    raise NotImplementedError(
        f"{func}: {args[0]} cannot be padded, as DTensor does to scatter shards of different sizes; have every rank "
        "hold the weight and cut out its own: parallelize_module(..., src_data_rank=None)"
    )


def _scatter(func: Any, types: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    (output,), inputs, *rest = args
    for part in inputs[0] if inputs else ():
        if part.__tensor_flatten__() != output.__tensor_flatten__():
            raise ValueError(f"{func}: what is scattered must be alike, got {part} and {output}")
    return args[0], _each(
        output, lambda name: func([_bytes(output, name)], [[_bytes(p, name) for p in ps] for ps in inputs], *rest)[1]
    )


def _broadcast(func: Any, types: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    (w,), *rest = args
    return args[0], _each(w, lambda name: func([_bytes(w, name)], *rest)[1])


def _each(w: PackedWeight, send: Callable[[str], Any]) -> Any:
    """`send` all data; the last one's Work, when the others are done."""
    *names, last = w.__tensor_flatten__()[0]
    for name in names:
        send(name).wait()
    return send(last)


def _bytes(w: PackedWeight, name: str) -> Tensor:
    return getattr(w, name).view(torch.uint8)  # backends do not know int16


HANDLERS: list[tuple[list[Any], Callable[..., Any]]] = [([torch.ops.aten.constant_pad_nd.default], _no_padding)]
if torch.distributed.is_available():
    HANDLERS += [
        ([torch.ops.c10d.scatter_.default], _scatter),
        ([torch.ops.c10d.broadcast_.default], _broadcast),
    ]
