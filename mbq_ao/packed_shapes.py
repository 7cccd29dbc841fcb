"""Slicing, splitting, joining and transposing a PackedWeight: how it is sharded.

A slice is a view: of whole tiles of the packed data (TILE_N rows or TILE_K columns), and of whole groups of scales.
Where the weight's own size is not a multiple of these, the last slice is short. Everything else raises ValueError
with the rule; only dequantizing could serve it. packed_weight.py registers the handlers below.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import fill_defaults

from mbq_ao.quant_primitives import num_groups

if TYPE_CHECKING:
    from mbq_ao.packed_weight import PackedWeight

aten = torch.ops.aten


def _slice(w: PackedWeight, dim: int, start: int, end: int) -> PackedWeight:
    """Rows or columns start..end of the weight, as views of its data. `dim` is of the tensor as it is seen."""
    size = w.shape[dim]
    if w.transposed:
        dim = 1 - dim
    per_row = dim == 1 and w.group_size >= size  # then every slice of columns has the row's scale
    g, tile = w.group_size, (w.TILE_N, w.TILE_K)[dim]
    unit = tile if dim == 0 or per_row else math.lcm(tile, g)
    if (start % unit and start != size) or (end % unit and end != size):
        raise ValueError(
            f"a slice of an {type(w).__name__} must begin and end at a multiple of {unit} {('rows', 'columns')[dim]} "
            f"or at the end (tiles are {w.TILE_N} x {w.TILE_K}, groups {g}), got {start}:{end} of {size}; "
            "call dequantize() and slice that"
        )
    shape = list(w.shape)
    shape[dim if not w.transposed else 1 - dim] = end - start
    tiles = slice(-(-start // tile), -(-end // tile))
    if dim == 0:
        data = {name: getattr(w, name)[start:end] for name in w.tensor_data_names}
        return w._replace(**{**data, "qdata": w.qdata[tiles]}, shape=shape)
    groups = slice(0, num_groups(end - start, g)) if per_row else slice(num_groups(start, g), num_groups(end, g))
    data = {name: getattr(w, name)[:, groups] for name in w.tensor_data_names}
    return w._replace(
        **{**data, "qdata": w.qdata[:, tiles]},
        act_pre_scale=None if w.act_pre_scale is None else w.act_pre_scale[start:end],
        block_size=[1, end - start] if per_row and 0 < end - start < size else w.block_size,
        shape=shape,
    )


def _wrapped_dim(dim: int) -> int:
    if not -2 <= dim <= 1:
        raise IndexError(f"dimension must be -2..1 for a quantized weight, got {dim}")
    return dim % 2


def slice_weight(func: Any, types: Any, args: Any, kwargs: Any) -> PackedWeight:
    w, dim, start, end, step = fill_defaults(args, 5, [0, None, None, 1])
    dim = _wrapped_dim(dim)
    start, end, _ = slice(start, end).indices(w.shape[dim])
    if step != 1:
        raise ValueError(f"a slice of {w} must have step 1, got {step}; call dequantize() and slice that")
    return return_and_correct_aliasing(func, args, kwargs, _slice(w, dim, start, max(start, end)))


def split_weight(func: Any, types: Any, args: Any, kwargs: Any) -> tuple[PackedWeight, ...]:
    w, sizes = args[:2]
    dim = _wrapped_dim(args[2] if len(args) > 2 else kwargs.get("dim", 0))
    if isinstance(sizes, int):
        bounds = [*range(0, w.shape[dim], sizes), w.shape[dim]]
    else:
        bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    if bounds[-1] != w.shape[dim]:
        raise ValueError(f"split sizes must sum to {w.shape[dim]}, got {sizes}")
    return tuple(_slice(w, dim, start, end) for start, end in pairwise(bounds))


def cat_weights(func: Any, types: Any, args: Any, kwargs: Any) -> PackedWeight:
    parts = args[0]
    dim = _wrapped_dim(args[1] if len(args) > 1 else kwargs.get("dim", 0))
    if not all(type(w) is type(parts[0]) and not w.transposed for w in parts):
        raise NotImplementedError(f"{func}: all tensors must be of one quantized type and none transposed")
    first = parts[0]
    n, k = first.shape
    unit = first.TILE_N if dim == 0 else math.lcm(first.TILE_K, first.group_size)
    if any(w.shape[dim] % unit for w in parts[:-1]) or any(
        w.shape[1 - dim] != first.shape[1 - dim] or w.block_size != first.block_size or w.dtype != first.dtype
        for w in parts
    ):
        raise ValueError(
            f"concatenating {type(first).__name__}s along dimension {dim} needs one group size and dtype, equal other "
            f"dimensions, and every part but the last a multiple of {unit}, got "
            f"{', '.join(w._quantization_type() for w in parts)}"
        )
    scales = [w.act_pre_scale for w in parts]
    act_pre_scale = scales[0]
    if any((s is None) != (act_pre_scale is None) for s in scales):
        raise ValueError(f"cannot concatenate {type(first).__name__}s with and without act_pre_scale")
    if act_pre_scale is not None and dim == 1:
        act_pre_scale = torch.cat(scales)
    elif act_pre_scale is not None and not all(torch.equal(act_pre_scale, s) for s in scales):
        raise ValueError(
            f"cannot concatenate rows of {type(first).__name__}s whose act_pre_scale differ: they share the input"
        )
    shape = [n, k]
    shape[dim] = sum(w.shape[dim] for w in parts)
    data = {name: torch.cat([getattr(w, name) for w in parts], dim) for name in first.tensor_data_names}
    return first._replace(**data, shape=shape, act_pre_scale=act_pre_scale)


def view_weight(func: Any, types: Any, args: Any, kwargs: Any) -> PackedWeight:
    w, size = args
    known = math.prod(s for s in size if s != -1)
    size = [w.numel() // known if s == -1 else s for s in size]
    if size != list(w.shape):
        raise NotImplementedError(f"{func}: an {type(w).__name__} {tuple(w.shape)} has no view of shape {tuple(size)}")
    return return_and_correct_aliasing(func, args, kwargs, w._apply_fn_to_data(aten.alias.default))


def transpose_weight(func: Any, types: Any, args: Any, kwargs: Any) -> PackedWeight:
    w, *dims = args
    order = [_wrapped_dim(d) for d in (dims[0] if func is aten.permute.default else dims)]
    swaps = order == [1, 0] if func is aten.permute.default else not order or order[0] != order[1]
    out = w._apply_fn_to_data(aten.alias.default)
    if swaps:
        out = out._replace(shape=[w.shape[1], w.shape[0]], transposed=not w.transposed)
    return return_and_correct_aliasing(func, args, kwargs, out)


HANDLERS = [
    ([aten.slice.Tensor], slice_weight),
    ([aten.split.Tensor, aten.split_with_sizes.default], split_weight),
    ([aten.cat.default], cat_weights),
    ([aten.view.default, aten._unsafe_view.default, aten.reshape.default], view_weight),
    ([aten.t.default, aten.transpose.int, aten.permute.default], transpose_weight),
]
