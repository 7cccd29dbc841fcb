"""MBQInt3Tensor: a linear layer's weight in 3 bits, asymmetric, group-wise; activations stay as they are (W3A16).

    F.linear(x, w, bias) = (x * act_pre_scale) @ dequantize(w).T + bias        one torch.ops.mbq_ao.int3_linear

`act_pre_scale` belongs to the activation, not to the weight: calibration multiplies a column of the weight by s
and, where no earlier layer can take 1 / s, leaves it here. `dequantize()` does not apply it.

Packed data, scale and zero point have the dimension order of the weight, so slicing, sharding and concatenating
are the same on all three. They work on whole tiles, 32 rows or 128 columns (kernels/layout.py), and whole groups.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import TorchAOBaseTensor, fill_defaults

from mbq_ao.kernels import ops  # noqa: F401  (registers torch.ops.mbq_ao)
from mbq_ao.kernels.layout import TILE_K, TILE_N, check_qdata, pack_int3, unpack_int3_rows
from mbq_ao.quant_primitives import (
    choose_qparams_affine,
    dequantize_affine,
    fake_quantize_affine,
    num_groups,
    quantize_affine,
)

aten = torch.ops.aten

GROUP_SIZES = (32, 64, 128, None)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class MBQInt3Tensor(TorchAOBaseTensor):
    """A (N, K) weight, packed. Looks to autograd, modules and state dicts like a tensor of scale's dtype.

    Tensor data:
        qdata: int16 (ceil(N / 32), ceil(K / 128), 3, 32, 8), see kernels/layout.py
        scale: (N, ceil(K / group_size)), bfloat16 | float16 | float32
        zero_point: uint8, the shape of scale
    Attributes:
        block_size: [1, group_size]; group_size is K where a row has one scale
        shape: (N, K), or (K, N) where transposed
    Optional tensor data:
        act_pre_scale: (K,) in scale's dtype, multiplies the activation
    Optional attributes:
        transposed: whether this is the `.t()` of a weight; the data is not
    """

    tensor_data_names = ["qdata", "scale", "zero_point"]  # noqa: RUF012
    tensor_attribute_names = ["block_size", "shape"]  # noqa: RUF012
    optional_tensor_data_names = ["act_pre_scale"]  # noqa: RUF012
    optional_tensor_attribute_names = ["transposed"]  # noqa: RUF012

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor
    block_size: list[int]
    act_pre_scale: Tensor | None
    transposed: bool

    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        block_size: Sequence[int],
        shape: Sequence[int],
        act_pre_scale: Tensor | None = None,
        transposed: bool | None = None,
    ) -> MBQInt3Tensor:
        n, k = reversed(shape) if transposed else shape
        check_qdata(qdata, n, k)
        expected = (n, num_groups(k, block_size[1]))
        if tuple(scale.shape) != expected or tuple(zero_point.shape) != expected or zero_point.dtype != torch.uint8:
            raise ValueError(
                f"scale and uint8 zero_point of a {n} x {k} weight, group_size {block_size[1]}, must be {expected}, "
                f"got {tuple(scale.shape)} and {zero_point.dtype} {tuple(zero_point.shape)}"
            )
        if act_pre_scale is not None and tuple(act_pre_scale.shape) != (k,):
            raise ValueError(
                f"act_pre_scale must be one factor an input channel, ({k},), got {tuple(act_pre_scale.shape)}"
            )
        return torch.Tensor._make_wrapper_subclass(
            cls,
            tuple(shape),
            strides=(1, k) if transposed else (k, 1),
            device=qdata.device,
            dtype=scale.dtype,
            requires_grad=False,
        )

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        block_size: Sequence[int],
        shape: Sequence[int],
        act_pre_scale: Tensor | None = None,
        transposed: bool | None = None,
    ) -> None:
        super().__init__()
        self.qdata, self.scale, self.zero_point = qdata, scale, zero_point
        self.block_size = list(block_size)
        self.act_pre_scale = act_pre_scale
        self.transposed = bool(transposed)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in cls._ATEN_OP_TABLE[cls]:
            raise NotImplementedError(f"{func} is not implemented for MBQInt3Tensor; call dequantize() first")
        return super().__torch_dispatch__(func, types, args, kwargs or {})

    @classmethod
    def from_hp(cls, w: Tensor, group_size: int | None = 128, act_pre_scale: Tensor | None = None) -> MBQInt3Tensor:
        """Quantize a (N, K) weight by rounding it to the nearest point of its groups' grids.

        w: bfloat16, float16 or float32; the scales get its dtype.  group_size: 32, 64 or 128 columns share a
        scale; None: one scale a row. N and K are free.  act_pre_scale: (K,), see the class.
        Raises ValueError for anything else, and if w or act_pre_scale holds a NaN or an infinity.
        """
        g = _checked_group_size(w, group_size)
        w = w.detach()
        n, k = w.shape
        scale, zero_point = choose_qparams_affine(w, group_size=g)
        if not scale.isfinite().all():  # min and max carry a NaN or infinity of w into the scale
            raise ValueError(f"the {n} x {k} weight to quantize holds NaN or infinite values; it must be finite")
        if act_pre_scale is not None:
            act_pre_scale = act_pre_scale.detach().to(device=w.device, dtype=w.dtype)
            if not act_pre_scale.isfinite().all():
                raise ValueError(f"act_pre_scale holds values that are NaN or infinite in {w.dtype}; it must be finite")
        q = quantize_affine(w, scale, zero_point, group_size=g)
        return cls(pack_int3(q), scale, zero_point, [1, g], (n, k), act_pre_scale)

    @staticmethod
    def fake_quantize(w: Tensor, group_size: int | None = 128) -> Tensor:
        """`from_hp(w, group_size).dequantize()` bit for bit, without packing. A NaN stays in its group."""
        return fake_quantize_affine(w.detach(), group_size=_checked_group_size(w, group_size))

    def dequantize(self) -> Tensor:
        """The plain weight in scale's dtype, (N, K), or (K, N) where transposed; without act_pre_scale."""
        k = self.shape[0] if self.transposed else self.shape[1]
        w = torch.ops.mbq_ao.int3_dequantize(
            self.qdata, self.scale, self.zero_point, k, self.group_size, self.scale.dtype
        )
        return w.t() if self.transposed else w

    @property
    def group_size(self) -> int:
        """Columns that share a scale; K where a row has one."""
        return self.block_size[1]

    def quantized_nbytes(self) -> int:
        """Bytes of all the data. (`nbytes` is what a plain tensor of this shape and dtype would take.)"""
        names = self.__tensor_flatten__()[0]
        return sum(getattr(self, name).nbytes for name in names)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"MBQInt3Tensor({self._quantization_type()}, device={self.device})"

    def _quantization_type(self) -> str:
        """Shown by torchao in `extra_repr` of a quantized linear."""
        parts = [f"shape={tuple(self.shape)}", f"group_size={self.group_size}", f"dtype={self.dtype}"]
        if self.act_pre_scale is not None:
            parts.append("act_pre_scale")
        if self.transposed:
            parts.append("transposed")
        return ", ".join(parts)

    def _stable_hash_for_caching(self) -> str:
        """What torch.compile keys its cache on: everything but the values."""
        names, attributes = self.__tensor_flatten__()
        tensors = [(t.shape, t.stride(), t.dtype, t.device) for t in (getattr(self, name) for name in names)]
        key = (type(self).__qualname__, names, tensors, sorted(attributes.items()))
        return hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()

    def share_memory_(self) -> NoReturn:
        raise NotImplementedError(
            "share_memory_ is not supported by MBQInt3Tensor; load the checkpoint in each process instead"
        )

    def is_shared(self) -> bool:
        return False

    def _replace(self, **changes: Any) -> MBQInt3Tensor:
        """A copy with some constructor arguments changed."""
        names = self.tensor_data_names + self.tensor_attribute_names
        names = names + self.optional_tensor_data_names + self.optional_tensor_attribute_names
        return type(self)(**{name: changes.get(name, getattr(self, name)) for name in names})


def _checked_group_size(w: Tensor, group_size: int | None) -> int:
    """The group size with None resolved to K, after checking it and the weight."""
    if w.dim() != 2 or w.dtype not in _DTYPES:
        raise ValueError(
            f"a weight must be (N, K) in bfloat16, float16 or float32, got {w.dtype} of shape {tuple(w.shape)}"
        )
    if w.numel() == 0:
        raise ValueError(f"a weight must have rows and columns, got shape {tuple(w.shape)}")
    if group_size in (None, -1):
        return w.shape[1]
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be 32, 64, 128 or None (one scale a row), got {group_size!r}")
    return group_size


# --- the linear layer -------------------------------------------------------------------------------------------


def _linear(x: Tensor, w: MBQInt3Tensor, bias: Tensor | None) -> Tensor:
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if w.act_pre_scale is not None:
        x = x * w.act_pre_scale.to(x.dtype)
    return torch.ops.mbq_ao.int3_linear(x, w.qdata, w.scale, w.zero_point, bias, w.group_size)


@MBQInt3Tensor.implements(aten.linear.default)
@MBQInt3Tensor.implements_torch_function(torch.nn.functional.linear)
def _aten_linear(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not isinstance(weight, MBQInt3Tensor) or weight.transposed:
            raise NotImplementedError(
                f"{func}: only the weight, and not its transpose, can be an MBQInt3Tensor; call dequantize() first"
            )
        return _linear(input, weight, bias)

    return linear(*args, **kwargs)


@MBQInt3Tensor.implements([aten.mm.default, aten.addmm.default])
def _mm(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    *bias, x, w = args
    if isinstance(x, MBQInt3Tensor) or not isinstance(w, MBQInt3Tensor) or not w.transposed:
        raise NotImplementedError(
            f"{func}: only x @ w.t() is supported for an MBQInt3Tensor w; call dequantize() first"
        )
    if any(kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        raise NotImplementedError(f"{func}: alpha and beta must be 1 for an MBQInt3Tensor; call dequantize() first")
    if bias and bias[0].dim() != 1:
        return _linear(x, w, None) + bias[0]
    return _linear(x, w, bias[0] if bias else None)


@MBQInt3Tensor.implements(aten.embedding.default)
def _embedding(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    w, index = args[:2]
    if not isinstance(w, MBQInt3Tensor) or w.transposed or w.act_pre_scale is not None:
        raise NotImplementedError(f"{func}: needs a table that is not transposed and has no act_pre_scale")
    rows, (n, k) = index.reshape(-1), w.shape
    if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < n):
        raise IndexError(
            f"embedding index out of range: the table has {n} rows, got {int(rows.min())}..{int(rows.max())}"
        )
    q = unpack_int3_rows(w.qdata, rows, k)
    out = dequantize_affine(q, w.scale[rows], w.zero_point[rows], group_size=w.group_size, dtype=w.scale.dtype)
    return out.view(*index.shape, k)


# --- copies and conversions -------------------------------------------------------------------------------------


@MBQInt3Tensor.implements(aten._to_copy.default)
def _to_copy(func: Any, types: Any, args: Any, kwargs: Any) -> MBQInt3Tensor:
    w = args[0]
    to = w._get_to_kwargs(*args[1:], **kwargs)
    if to["dtype"] not in _DTYPES:
        raise ValueError(
            f"an MBQInt3Tensor can be bfloat16, float16 or float32, got {to['dtype']}; call dequantize() first"
        )

    def convert(t: Tensor) -> Tensor:
        dtype = to["dtype"] if t.is_floating_point() else t.dtype
        return t.to(device=to["device"], dtype=dtype, non_blocking=to.get("non_blocking") or False, copy=True)

    return return_and_correct_aliasing(func, args, kwargs, w._apply_fn_to_data(convert))


@MBQInt3Tensor.implements(aten.copy_.default)
def _copy_(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    dst, src = args[:2]
    if not isinstance(dst, MBQInt3Tensor):
        return dst.copy_(src.dequantize())
    if not isinstance(src, MBQInt3Tensor):
        raise ValueError(
            f"cannot copy a plain {src.dtype} tensor into {dst}; quantize it first with MBQInt3Tensor.from_hp"
        )
    (names, attributes), (src_names, src_attributes) = dst.__tensor_flatten__(), src.__tensor_flatten__()
    if names != src_names or attributes != src_attributes:
        raise ValueError(f"cannot copy {src} into {dst}: shape, group size and act_pre_scale must agree")
    for name in names:
        getattr(dst, name).copy_(getattr(src, name))
    return dst


@MBQInt3Tensor.implements([aten.empty_like.default, aten.zeros_like.default])
def _like(func: Any, types: Any, args: Any, kwargs: Any) -> MBQInt3Tensor:
    dtype = kwargs.pop("dtype", None) or args[0].dtype
    if dtype not in _DTYPES:
        raise ValueError(f"an MBQInt3Tensor can be bfloat16, float16 or float32, got {dtype}")
    kwargs.pop("memory_format", None)
    return args[0]._apply_fn_to_data(lambda t: func(t, **kwargs, dtype=dtype if t.is_floating_point() else t.dtype))


# --- shapes -----------------------------------------------------------------------------------------------------


def _slice(w: MBQInt3Tensor, dim: int, start: int, end: int) -> MBQInt3Tensor:
    """Rows or columns start..end of the weight, as views of its data. `dim` is of the tensor as it is seen."""
    size = w.shape[dim]
    if w.transposed:
        dim = 1 - dim
    per_row = dim == 1 and w.group_size >= size
    g = w.group_size
    unit = TILE_N if dim == 0 else TILE_K if per_row else math.lcm(TILE_K, g)
    if start % unit or (end % unit and end != size):
        raise ValueError(
            f"a slice of an MBQInt3Tensor must begin and end at a multiple of {unit} {('rows', 'columns')[dim]} or at "
            f"the end (tiles are {TILE_N} x {TILE_K}, groups {g}), got {start}:{end} of {size}; "
            "call dequantize() and slice that"
        )
    shape = list(w.shape)
    shape[dim if not w.transposed else 1 - dim] = end - start
    if dim == 0:
        rows = slice(start, end)
        tiles = slice(start // TILE_N, -(-end // TILE_N))
        return w._replace(qdata=w.qdata[tiles], scale=w.scale[rows], zero_point=w.zero_point[rows], shape=shape)
    tiles = slice(start // TILE_K, -(-end // TILE_K))
    groups = slice(0, 1) if per_row else slice(start // g, num_groups(end, g))
    return w._replace(
        qdata=w.qdata[:, tiles],
        scale=w.scale[:, groups],
        zero_point=w.zero_point[:, groups],
        act_pre_scale=None if w.act_pre_scale is None else w.act_pre_scale[start:end],
        block_size=[1, end - start] if per_row else w.block_size,
        shape=shape,
    )


def _wrapped_dim(dim: int) -> int:
    if not -2 <= dim <= 1:
        raise IndexError(f"dimension must be -2..1 for an MBQInt3Tensor, got {dim}")
    return dim % 2


@MBQInt3Tensor.implements(aten.slice.Tensor)
def _aten_slice(func: Any, types: Any, args: Any, kwargs: Any) -> MBQInt3Tensor:
    w, dim, start, end, step = fill_defaults(args, 5, [0, None, None, 1])
    dim = _wrapped_dim(dim)
    start, end, _ = slice(start, end).indices(w.shape[dim])
    if step != 1:
        raise ValueError(f"a slice of an MBQInt3Tensor must have step 1, got {step}; call dequantize() and slice that")
    return return_and_correct_aliasing(func, args, kwargs, _slice(w, dim, start, max(start, end)))


@MBQInt3Tensor.implements([aten.split.Tensor, aten.split_with_sizes.default])
def _split(func: Any, types: Any, args: Any, kwargs: Any) -> tuple[MBQInt3Tensor, ...]:
    w, sizes = args[:2]
    dim = _wrapped_dim(args[2] if len(args) > 2 else kwargs.get("dim", 0))
    if isinstance(sizes, int):
        bounds = [*range(0, w.shape[dim], sizes), w.shape[dim]]
    else:
        bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    if bounds[-1] != w.shape[dim]:
        raise ValueError(f"split sizes must sum to {w.shape[dim]}, got {sizes}")
    return tuple(_slice(w, dim, start, end) for start, end in pairwise(bounds))


@MBQInt3Tensor.implements(aten.cat.default)
def _cat(func: Any, types: Any, args: Any, kwargs: Any) -> MBQInt3Tensor:
    parts = args[0]
    dim = _wrapped_dim(args[1] if len(args) > 1 else kwargs.get("dim", 0))
    if not all(isinstance(w, MBQInt3Tensor) and not w.transposed for w in parts):
        raise NotImplementedError(f"{func}: all tensors must be MBQInt3Tensor and none transposed")
    first = parts[0]
    n, k = first.shape
    unit = TILE_N if dim == 0 else math.lcm(TILE_K, first.group_size)
    if any(w.shape[dim] % unit for w in parts[:-1]) or any(
        w.shape[1 - dim] != first.shape[1 - dim] or w.block_size != first.block_size or w.dtype != first.dtype
        for w in parts
    ):
        raise ValueError(
            f"concatenating MBQInt3Tensors along dimension {dim} needs one group size and dtype, equal other "
            f"dimensions, and every part but the last a multiple of {unit}, got "
            f"{', '.join(w._quantization_type() for w in parts)}"
        )
    scales = [w.act_pre_scale for w in parts]
    act_pre_scale = scales[0]
    if any((s is None) != (act_pre_scale is None) for s in scales):
        raise ValueError("cannot concatenate MBQInt3Tensors with and without act_pre_scale")
    if act_pre_scale is not None and dim == 1:
        act_pre_scale = torch.cat(scales)
    elif act_pre_scale is not None and not all(torch.equal(act_pre_scale, s) for s in scales):
        raise ValueError("cannot concatenate rows of MBQInt3Tensors whose act_pre_scale differ: they share the input")
    shape = [n, k]
    shape[dim] = sum(w.shape[dim] for w in parts)
    data = {name: torch.cat([getattr(w, name) for w in parts], dim) for name in first.tensor_data_names}
    return first._replace(**data, shape=shape, act_pre_scale=act_pre_scale)


@MBQInt3Tensor.implements([aten.view.default, aten._unsafe_view.default, aten.reshape.default])
def _view(func: Any, types: Any, args: Any, kwargs: Any) -> MBQInt3Tensor:
    w, size = args
    known = math.prod(s for s in size if s != -1)
    size = [w.numel() // known if s == -1 else s for s in size]
    if size != list(w.shape):
        raise NotImplementedError(f"{func}: an MBQInt3Tensor {tuple(w.shape)} has no view of shape {tuple(size)}")
    return return_and_correct_aliasing(func, args, kwargs, w._apply_fn_to_data(aten.alias.default))


@MBQInt3Tensor.implements([aten.t.default, aten.transpose.int, aten.permute.default])
def _transpose(func: Any, types: Any, args: Any, kwargs: Any) -> MBQInt3Tensor:
    w, *dims = args
    order = [_wrapped_dim(d) for d in (dims[0] if func is aten.permute.default else dims)]
    swaps = order == [1, 0] if func is aten.permute.default else not order or order[0] != order[1]
    out = w._apply_fn_to_data(aten.alias.default)
    if swaps:
        out = out._replace(shape=[w.shape[1], w.shape[0]], transposed=not w.transposed)
    return return_and_correct_aliasing(func, args, kwargs, out)


@MBQInt3Tensor.implements_torch_function(torch.Tensor.contiguous)
def _contiguous(func: Callable[..., Tensor], types: Any, args: Any, kwargs: Any) -> MBQInt3Tensor:
    return args[0]._apply_fn_to_data(lambda t: t.contiguous())


torch.serialization.add_safe_globals([MBQInt3Tensor])
