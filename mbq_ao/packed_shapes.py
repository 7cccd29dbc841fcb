"""Slicing, splitting, joining and transposing a PackedWeight: how it is sharded; and picking experts out of a 3-D one.

A slice is a view: of whole tiles of the packed data (TILE_N rows or TILE_K columns), and of whole groups of scales.
Where the weight's own size is not a multiple of these, the last slice is short. Every other slice raises ValueError
with the rule, and split copies (packed_shards.py). Experts are entries of their own in all data, so along them any
slice and any index will do. packed_weight.py registers the handlers below.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import fill_defaults

from mbq_ao.packed_shards import repacked_parts, repacked_rows
from mbq_ao.quant_primitives import num_groups

if TYPE_CHECKING:
    from mbq_ao.packed_weight import PackedWeight

aten = torch.ops.aten


def _wrapped_dim(w: PackedWeight, dim: int) -> int:
    if not -w.dim() <= dim < w.dim():
        raise IndexError(f"dimension must be {-w.dim()}..{w.dim() - 1} for {w}, got {dim}")
    return dim % w.dim()


def _slice_unit(w: PackedWeight, dim: int) -> int:
    """A view begins and ends at multiples of so many experts, rows or columns. `dim` is of the tensor as it is seen."""
    rows, columns = (w.dim() - 1, w.dim() - 2) if w.transposed else (w.dim() - 2, w.dim() - 1)
    if dim == rows:
        return w.TILE_N
    if dim == columns:
        return w.TILE_K if w.group_size >= w.in_features else math.lcm(w.TILE_K, w.group_size)
    return 1


def _slice(w: PackedWeight, dim: int, start: int, end: int) -> PackedWeight:
    """Experts, rows or columns start..end, as views of the data. `dim` is of the tensor as it is seen."""
    size, shape = w.shape[dim], list(w.shape)
    shape[dim] = end - start
    rows, columns = w.dim() - 2, w.dim() - 1
    if dim < rows:
        return _experts(w, slice(start, end))
    unit, g = _slice_unit(w, dim), w.group_size
    if w.transposed:
        dim = rows + columns - dim
    per_row = dim == columns and g >= size  # then every slice of columns has the row's scale
    tile = w.TILE_N if dim == rows else w.TILE_K
    if (start % unit and start != size) or (end % unit and end != size):
        raise ValueError(
            f"a slice of an {type(w).__name__} must begin and end at a multiple of {unit} "
            f"{'rows' if dim == rows else 'columns'} or at the end (tiles are {w.TILE_N} x {w.TILE_K}, groups {g}), "
            f"got {start}:{end} of {size}; call dequantize() and slice that"
        )

    def part(name: str, first: int, last: int) -> Tensor:
        return getattr(w, name).narrow(dim, first, last - first)

    tiles = -(-start // tile), -(-end // tile)
    if dim == rows:
        data = {name: part(name, start, end) for name in w.tensor_data_names if name != "qdata"}
        return w._replace(**data, qdata=part("qdata", *tiles), shape=shape)
    groups = (0, num_groups(end - start, g)) if per_row else (num_groups(start, g), num_groups(end, g))
    data = {name: part(name, *groups) for name in w.tensor_data_names if name != "qdata"}
    return w._replace(
        **data,
        qdata=part("qdata", *tiles),
        act_pre_scale=None if w.act_pre_scale is None else w.act_pre_scale[..., start:end],
        block_size=[*w.block_size[:-1], end - start] if per_row and 0 < end - start < size else w.block_size,
        shape=shape,
    )


def _experts(w: PackedWeight, index: Any) -> PackedWeight:
    """The experts `index` of a 3-D weight, whatever can index their dimension; one of them is 2-D."""
    out = {name: getattr(w, name)[index] for name in w.__tensor_flatten__()[0]}
    experts = out["scale"].shape[:-2]
    return w._replace(**out, block_size=[1] * (1 + len(experts)) + [w.group_size], shape=[*experts, *w.shape[-2:]])


def _check_experts(func: Any, w: PackedWeight, dim: int) -> None:
    if w.dim() != 3 or dim != 0:
        raise NotImplementedError(
            f"{func}: of a quantized weight only experts can be picked, along dimension 0 of three, got dimension "
            f"{dim} of {w}; call dequantize() first"
        )


def slice_weight(func: Any, types: Any, args: Any, kwargs: Any) -> PackedWeight:
    w, dim, start, end, step = fill_defaults(args, 5, [0, None, None, 1])
    dim = _wrapped_dim(w, dim)
    start, end, _ = slice(start, end).indices(w.shape[dim])
    if w.dim() == 3 and dim == 0:
        return return_and_correct_aliasing(func, args, kwargs, _experts(w, slice(start, end, step)))
    if step != 1:
        raise ValueError(f"a slice of {w} must have step 1, got {step}; call dequantize() and slice that")
    return return_and_correct_aliasing(func, args, kwargs, _slice(w, dim, start, max(start, end)))


def split_weight(func: Any, types: Any, args: Any, kwargs: Any) -> tuple[PackedWeight, ...]:
    w, sizes = args[:2]
    dim = _wrapped_dim(w, args[2] if len(args) > 2 else kwargs.get("dim", 0))
    if isinstance(sizes, int):
        bounds = [*range(0, w.shape[dim], sizes), w.shape[dim]]
    else:
        bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    if bounds[-1] != w.shape[dim]:
        raise ValueError(f"split sizes must sum to {w.shape[dim]}, got {sizes}")
    unit = _slice_unit(w, dim)
    if any(bound % unit for bound in bounds if bound != w.shape[dim]):
        return repacked_parts(w, dim, bounds)
    return tuple(_slice(w, dim, start, end) for start, end in pairwise(bounds))


def select_expert(func: Any, types: Any, args: Any, kwargs: Any) -> PackedWeight:
    w, dim, index = args
    dim = _wrapped_dim(w, dim)
    _check_experts(func, w, dim)
    return return_and_correct_aliasing(func, args, kwargs, _experts(w, index))


def unbind_experts(func: Any, types: Any, args: Any, kwargs: Any) -> tuple[PackedWeight, ...]:
    w, dim = fill_defaults(args, 2, [0])
    _check_experts(func, w, _wrapped_dim(w, dim))
    return tuple(_experts(w, index) for index in range(w.shape[0]))


def index_experts(func: Any, types: Any, args: Any, kwargs: Any) -> PackedWeight:
    """Copies, as an index with a tensor does."""
    w, index = args[0], args[-1]
    where = index if func is aten.index.Tensor else [None] * _wrapped_dim(w, args[1]) + [index]
    _check_experts(func, w, next((i for i, indices in enumerate(where) if indices is not None), 0))
    index = where[0]
    if len(where) > 1 or index.dim() > 1:
        raise NotImplementedError(
            f"{func}: the index of experts must be a scalar or 1-D, and nothing beside it, got "
            f"{[None if i is None else tuple(i.shape) for i in where]} for {w}"
        )
    return _experts(w, index)


def stack_weights(func: Any, types: Any, args: Any, kwargs: Any) -> PackedWeight:
    parts = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    _check_one_kind(func, parts)
    first = parts[0]
    if dim not in (0, -first.dim() - 1) or first.dim() != 2:
        raise NotImplementedError(
            f"{func}: only 2-D weights can be stacked, along dimension 0, got dimension {dim} of {first}"
        )
    if any(w.shape != first.shape or w.block_size != first.block_size or w.dtype != first.dtype for w in parts):
        raise ValueError(
            f"stacking {type(first).__name__}s needs one shape, group size and dtype, got "
            f"{', '.join(w._quantization_type() for w in parts)}"
        )
    data = {name: torch.stack([getattr(w, name) for w in parts]) for name in first.__tensor_flatten__()[0]}
    return first._replace(**data, block_size=[1, *first.block_size], shape=[len(parts), *first.shape])


def cat_weights(func: Any, types: Any, args: Any, kwargs: Any) -> PackedWeight:
    parts = args[0]
    _check_one_kind(func, parts)
    first = parts[0]
    dim = _wrapped_dim(first, args[1] if len(args) > 1 else kwargs.get("dim", 0))
    rows, columns = first.dim() - 2, first.dim() - 1
    unit = math.lcm(first.TILE_K, first.group_size) if dim == columns else 1
    if any(w.shape[dim] % unit for w in parts[:-1]) or any(
        _without(w.shape, dim) != _without(first.shape, dim)
        or w.block_size != first.block_size
        or w.dtype != first.dtype
        for w in parts
    ):
        whole = f", and every part but the last a multiple of {unit}" if unit > 1 else ""
        raise ValueError(
            f"concatenating {type(first).__name__}s along dimension {dim} needs one group size and dtype, equal other "
            f"dimensions{whole}, got {', '.join(w._quantization_type() for w in parts)}"
        )
    scales = [w.act_pre_scale for w in parts]
    act_pre_scale = scales[0]
    if act_pre_scale is not None and dim != rows:
        act_pre_scale = torch.cat(scales, dim=0 if dim < rows else -1)
    elif act_pre_scale is not None and not all(torch.equal(act_pre_scale, s) for s in scales):
        raise ValueError(
            f"cannot concatenate rows of {type(first).__name__}s whose act_pre_scale differ: they share the input"
        )
    shape = list(first.shape)
    shape[dim] = sum(w.shape[dim] for w in parts)
    names = first.tensor_data_names
    data = {}
    if dim == rows and any(w.shape[dim] % first.TILE_N for w in parts[:-1]):
        data, names = {"qdata": repacked_rows(parts)}, [name for name in names if name != "qdata"]
    data |= {name: torch.cat([getattr(w, name) for w in parts], dim) for name in names}
    return first._replace(**data, shape=shape, act_pre_scale=act_pre_scale)


def _without(shape: torch.Size, dim: int) -> torch.Size:
    return shape[:dim] + shape[dim + 1 :]


def _check_one_kind(func: Any, parts: list[PackedWeight]) -> None:
    first = parts[0]
    if not all(type(w) is type(first) and not w.transposed for w in parts):
        raise NotImplementedError(f"{func}: all tensors must be of one quantized type and none transposed")
    if any((w.act_pre_scale is None) != (first.act_pre_scale is None) for w in parts):
        verb = "stack" if func is aten.stack.default else "concatenate"
        raise ValueError(f"cannot {verb} {type(first).__name__}s with and without act_pre_scale")


def view_weight(func: Any, types: Any, args: Any, kwargs: Any) -> PackedWeight:
    w, size = args
    size = list(size)
    if func is aten.expand.default:
        size = [w.shape[i] if s == -1 and len(size) == w.dim() else s for i, s in enumerate(size)]
    elif -1 in size:
        size[size.index(-1)] = w.numel() // math.prod(s for s in size if s != -1)
    if size != list(w.shape):
        raise NotImplementedError(f"{func}: an {type(w).__name__} {tuple(w.shape)} has no view of shape {tuple(size)}")
    return return_and_correct_aliasing(func, args, kwargs, w._apply_fn_to_data(aten.alias.default))


def transpose_weight(func: Any, types: Any, args: Any, kwargs: Any) -> PackedWeight:
    w, *dims = args
    order = list(range(w.dim()))
    if func is aten.permute.default:
        order = [_wrapped_dim(w, dim) for dim in dims[0]]
    else:
        a, b = (_wrapped_dim(w, dim) for dim in dims or (0, 1))
        order[a], order[b] = order[b], order[a]
    last_two = [*range(w.dim() - 2), w.dim() - 1, w.dim() - 2]
    if order not in (list(range(w.dim())), last_two):
        raise NotImplementedError(f"{func}: only the last two dimensions of {w} can be swapped, got the order {order}")
    out = w._apply_fn_to_data(aten.alias.default)
    if order == last_two:
        out = out._replace(shape=[w.shape[dim] for dim in order], transposed=not w.transposed)
    return return_and_correct_aliasing(func, args, kwargs, out)


HANDLERS = [
    ([aten.slice.Tensor], slice_weight),
    ([aten.split.Tensor, aten.split_with_sizes.default], split_weight),
    ([aten.select.int], select_expert),
    ([aten.unbind.int], unbind_experts),
    ([aten.index.Tensor, aten.index_select.default], index_experts),
    ([aten.stack.default], stack_weights),
    ([aten.cat.default], cat_weights),
    ([aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default], view_weight),
    ([aten.t.default, aten.transpose.int, aten.permute.default], transpose_weight),
]
