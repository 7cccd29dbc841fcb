"""PackedWeight: what MBQInt3Tensor and MBQW4A8Tensor have in common, which is all but the bits and the kernel.

A (N, K) weight as packed data and scales, and for some a zero point. They have the dimension order of the weight, so
slicing, sharding and concatenating are the same on all of them; packed_shapes.py does it. They work on whole tiles
(TILE_N rows or TILE_K columns of the packed data) and whole groups. The experts of a mixture are one (E, N, K) weight:
all data have the leading dimension, too, and `w[e]` is expert e.

`act_pre_scale` belongs to the activation, not to the weight: calibration multiplies a column of the weight by s
and, where no earlier layer can take 1 / s, leaves it here. `dequantize()` does not apply it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import TorchAOBaseTensor

from mbq_ao import packed_shapes, packed_shards
from mbq_ao.quant_primitives import by_row_slabs, num_groups

aten = torch.ops.aten

GROUP_SIZES = (32, 64, 128, None)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class _PackedWeightType(type(TorchAOBaseTensor)):  # type: ignore[misc]
    """Lets accelerate offload: of what it moved it makes a parameter by `type(parameter)(value, requires_grad=...)`."""

    def __call__(cls, *args: Any, requires_grad: bool | None = None, **kwargs: Any) -> Any:
        if requires_grad is None:
            return super().__call__(*args, **kwargs)
        return nn.Parameter(*args, requires_grad=requires_grad)


class PackedWeight(TorchAOBaseTensor, metaclass=_PackedWeightType):
    """A (N, K) or (E, N, K) weight, packed. Looks to autograd, modules and state dicts like a tensor of scale's dtype.

    A subclass names its data, checks it in __new__, and has from_hp, _choose_grid, _round, _pack, _unpack, _dequantize,
    _linear, _grouped_mm and _rows.
    """

    tensor_attribute_names = ["block_size", "shape"]  # noqa: RUF012
    optional_tensor_data_names = ["act_pre_scale"]  # noqa: RUF012
    optional_tensor_attribute_names = ["transposed"]  # noqa: RUF012

    NUM_BITS: ClassVar[int]
    TILE_N: ClassVar[int]
    TILE_K: ClassVar[int]

    qdata: Tensor
    scale: Tensor
    block_size: list[int]
    act_pre_scale: Tensor | None
    transposed: bool

    @classmethod
    def from_hp(cls, w: Tensor, group_size: int | None, act_pre_scale: Tensor | None = None) -> Self:
        """Quantize a (N, K) or (E, N, K) weight by rounding it to the nearest point of its grid."""
        raise NotImplementedError

    @classmethod
    def _choose_grid(cls, w: Tensor, group_size: int, scale_dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The grid of every group of a (N, K) weight: what follows qdata in tensor_data_names."""
        raise NotImplementedError

    @staticmethod
    def _round(w: Tensor, grid: tuple[Tensor, ...], group_size: int) -> Tensor:
        """The integers (N, K) of a weight, rounded to the nearest points of this grid."""
        raise NotImplementedError

    @staticmethod
    def _pack(q: Tensor) -> Tensor:
        """The integers (N, K) -> qdata."""
        raise NotImplementedError

    @staticmethod
    def _unpack(qdata: Tensor, n: int, k: int) -> Tensor:
        """qdata of a (n, k) weight -> the integers."""
        raise NotImplementedError

    def _dequantize(self) -> Tensor:
        """The plain (N, K) weight, whether or not it is transposed."""
        raise NotImplementedError

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """F.linear(x, self, bias) of a (N, K) weight, whether or not it is transposed."""
        raise NotImplementedError

    def _grouped_mm(self, x: Tensor, offs: Tensor | None) -> Tensor:
        """Rows of x (S, K) up to offs[e] by expert e of a (E, N, K) weight, see kernels/experts.py."""
        raise NotImplementedError

    def _rows(self, rows: Tensor) -> Tensor:
        """Rows (R,) of a plain (N, K) weight, (R, K); it is not transposed and has no act_pre_scale."""
        raise NotImplementedError

    @classmethod
    def _quantize(cls, w: Tensor, group_size: int) -> tuple[Tensor, ...]:
        """The data of a (N, K) weight, in the order of tensor_data_names."""

        def quantize(x: Tensor) -> tuple[Tensor, ...]:
            grid = cls._choose_grid(x, group_size, w.dtype)
            return cls._pack(cls._round(x, grid, group_size)), *grid

        data = by_row_slabs(quantize, w, cls.TILE_N)
        check_finite(w, data[1])
        return data

    @classmethod
    def _from_grid(
        cls, w: Tensor, grid: tuple[Tensor, ...], group_size: int | None, act_pre_scale: Tensor | None = None
    ) -> Self:
        """A (N, K) weight, rounded to the nearest point of a grid as `_choose_grid` returns."""
        g = checked_group_size(w, group_size)
        act_pre_scale = checked_pre_scale(act_pre_scale, grid[0])
        check_finite(w, grid[0])
        return cls(cls._pack(cls._round(w, grid, g)), *grid, [1, g], tuple(w.shape), act_pre_scale)

    @classmethod
    def _from_hp(cls, w: Tensor, group_size: int | None, act_pre_scale: Tensor | None) -> Self:
        """What from_hp returns. Experts are quantized one by one: beside w it takes what one of them does, and their
        packed data, twice while they are stacked."""
        g = checked_group_size(w, group_size)
        w = w.detach()
        act_pre_scale = checked_pre_scale(act_pre_scale, w)
        if w.dim() == 2:
            data = cls._quantize(w, g)
        else:
            experts = [cls._quantize(expert, g) for expert in w]
            data = tuple(torch.stack(tensors) for tensors in zip(*experts, strict=True))
        return cls(*data, [1] * (w.dim() - 1) + [g], tuple(w.shape), act_pre_scale)

    def dequantize(self) -> Tensor:
        """The plain weight in scale's dtype and of the same shape, transposed or not; without act_pre_scale."""
        if self.dim() == 2:
            w = self._dequantize()
        else:
            w = self.scale.new_empty(plain_shape(self.shape, self.transposed))
            for e, expert in enumerate(self.unbind()):
                w[e] = expert._dequantize()
        return w.mT if self.transposed else w

    @classmethod
    def _wrapper(
        cls, shape: Sequence[int], scale: Tensor, act_pre_scale: Tensor | None, transposed: bool | None
    ) -> Self:
        """What __new__ returns, after it has checked the data of its own."""
        *experts, n, k = plain_shape(shape, transposed)
        if scale.dtype not in _DTYPES:
            raise ValueError(f"scale must be bfloat16, float16 or float32, got {scale.dtype}")
        if act_pre_scale is not None and tuple(act_pre_scale.shape) != (*experts, k):
            raise ValueError(
                f"act_pre_scale must be one factor an input channel, {(*experts, k)}, got {tuple(act_pre_scale.shape)}"
            )
        return torch.Tensor._make_wrapper_subclass(
            cls,
            tuple(shape),
            strides=(n * k,) * len(experts) + ((1, k) if transposed else (k, 1)),
            device=scale.device,
            dtype=scale.dtype,
            requires_grad=False,
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What transformers calls where torch's grouped_mm would not do. By name: the op exists once that is imported.
        if getattr(func, "_qualified_op_name", None) == "transformers::grouped_mm_fallback":
            func = torch.nn.functional.grouped_mm
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in cls._ATEN_OP_TABLE[cls]:
            raise NotImplementedError(f"{func} is not implemented for {cls.__name__}; call dequantize() first")
        return super().__torch_dispatch__(func, types, args, kwargs or {})

    @property
    def group_size(self) -> int:
        """Columns that share a scale; K where a row has one."""
        return self.block_size[-1]

    @property
    def in_features(self) -> int:
        """K, whether or not the weight is transposed."""
        return self.shape[-2 if self.transposed else -1]

    def quantized_nbytes(self) -> int:
        """Bytes of all the data. (`nbytes` is what a plain tensor of this shape and dtype would take.)"""
        names = self.__tensor_flatten__()[0]
        return sum(getattr(self, name).nbytes for name in names)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{type(self).__name__}({self._quantization_type()}, device={self.device})"

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
            f"share_memory_ is not supported by {type(self).__name__}; load the checkpoint in each process instead"
        )

    def is_shared(self) -> bool:
        return False

    def _replace(self, **changes: Any) -> Self:
        """A copy with some constructor arguments changed."""
        names = self.tensor_data_names + self.tensor_attribute_names
        names = names + self.optional_tensor_data_names + self.optional_tensor_attribute_names
        return type(self)(**{name: changes.get(name, getattr(self, name)) for name in names})


def plain_shape(shape: Sequence[int], transposed: bool | None) -> tuple[int, ...]:
    """(N, K) or (E, N, K) of a weight that has this shape; ValueError for other numbers of dimensions."""
    if len(shape) not in (2, 3):
        raise ValueError(f"a quantized weight has two dimensions, or three with experts, got shape {tuple(shape)}")
    return (*shape[:-2], shape[-1], shape[-2]) if transposed else tuple(shape)


def check_groups(name: str, values: Tensor, shape: Sequence[int], group_size: int) -> None:
    """Raise ValueError unless there is one of `values`, the scales or zero points, a row and group of (.., N, K)."""
    expected = (*shape[:-1], num_groups(shape[-1], group_size))
    if tuple(values.shape) != expected:
        raise ValueError(
            f"{name} of a {' x '.join(map(str, shape))} weight, group_size {group_size}, must be {expected}, got "
            f"{tuple(values.shape)}"
        )


def checked_group_size(w: Tensor, group_size: int | None) -> int:
    """The group size with None resolved to K, after checking it and the weight."""
    if w.dim() not in (2, 3) or w.dtype not in _DTYPES:
        raise ValueError(
            f"a weight must be (N, K) or, with experts, (E, N, K) in bfloat16, float16 or float32, got {w.dtype} of "
            f"shape {tuple(w.shape)}"
        )
    if w.numel() == 0:
        raise ValueError(f"a weight must have rows and columns, got shape {tuple(w.shape)}")
    return check_group_size(group_size) or w.shape[-1]


def check_group_size(group_size: int | None) -> int | None:
    """The group size, None for one scale a row (also called -1); ValueError if it is none of GROUP_SIZES."""
    if group_size == -1:
        return None
    if group_size not in GROUP_SIZES or isinstance(group_size, bool):
        raise ValueError(f"group_size must be 32, 64, 128 or None (one scale a row), got {group_size!r}")
    return group_size


def check_finite(w: Tensor, scale: Tensor) -> None:
    """Raise ValueError where w holds a NaN or an infinity: the scales, from its minima and maxima, carry it."""
    if not scale.isfinite().all():
        n, k = w.shape
        raise ValueError(f"the {n} x {k} weight to quantize holds NaN or infinite values; it must be finite")


def checked_pre_scale(act_pre_scale: Tensor | None, w: Tensor) -> Tensor | None:
    """act_pre_scale in w's dtype and on its device; ValueError if it is not finite there."""
    if act_pre_scale is None:
        return None
    act_pre_scale = act_pre_scale.detach().to(device=w.device, dtype=w.dtype)
    if not act_pre_scale.isfinite().all():
        raise ValueError(f"act_pre_scale holds values that are NaN or infinite in {w.dtype}; it must be finite")
    return act_pre_scale


def parameter_nbytes(model: nn.Module) -> int:
    """Bytes of all parameters of a model, quantized or not; tied ones count once."""
    return sum(
        p.quantized_nbytes() if isinstance(p, PackedWeight) else p.numel() * p.element_size()
        for p in model.parameters()
    )


# --- copies and conversions -------------------------------------------------------------------------------------


@PackedWeight.implements(aten._to_copy.default)
def _to_copy(func: Any, types: Any, args: Any, kwargs: Any) -> PackedWeight:
    w = args[0]
    to = w._get_to_kwargs(*args[1:], **kwargs)
    _check_dtype(w, to["dtype"])

    def convert(t: Tensor) -> Tensor:
        dtype = to["dtype"] if t.is_floating_point() else t.dtype
        return t.to(device=to["device"], dtype=dtype, non_blocking=to.get("non_blocking") or False, copy=True)

    return return_and_correct_aliasing(func, args, kwargs, w._apply_fn_to_data(convert))


@PackedWeight.implements(aten.copy_.default)
def _copy_(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    dst, src = args[:2]
    if not isinstance(dst, PackedWeight):
        if src.act_pre_scale is not None:
            raise ValueError(
                f"cannot copy {src} into a plain tensor, which has no act_pre_scale; load a state dict with assign=True"
            )
        return dst.copy_(src.dequantize())
    if type(src) is not type(dst):
        packed = isinstance(src, PackedWeight)
        kind = f"an {type(src).__name__}" if packed else f"a plain {src.dtype} tensor"
        it = "its dequantize()" if packed else "it"
        raise ValueError(f"cannot copy {kind} into {dst}; quantize {it} first with {type(dst).__name__}.from_hp")
    (names, attributes), (src_names, src_attributes) = dst.__tensor_flatten__(), src.__tensor_flatten__()
    if names != src_names or attributes != src_attributes:
        raise ValueError(f"cannot copy {src} into {dst}: shape, group size and act_pre_scale must agree")
    for name in names:
        getattr(dst, name).copy_(getattr(src, name))
    return dst


@PackedWeight.implements([aten.empty_like.default, aten.zeros_like.default])
def _like(func: Any, types: Any, args: Any, kwargs: Any) -> PackedWeight:
    dtype = kwargs.pop("dtype", None) or args[0].dtype
    _check_dtype(args[0], dtype)
    kwargs.pop("memory_format", None)
    return args[0]._apply_fn_to_data(lambda t: func(t, **kwargs, dtype=dtype if t.is_floating_point() else t.dtype))


def _check_dtype(w: PackedWeight, dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise ValueError(
            f"an {type(w).__name__} can be bfloat16, float16 or float32, got {dtype}; call dequantize() first"
        )


@PackedWeight.implements_torch_function(torch.Tensor.contiguous)
def _contiguous(func: Callable[..., Tensor], types: Any, args: Any, kwargs: Any) -> PackedWeight:
    return args[0]._apply_fn_to_data(lambda t: t.contiguous())


for _ops, _handler in packed_shapes.HANDLERS + packed_shards.HANDLERS:
    PackedWeight.implements(_ops)(_handler)
