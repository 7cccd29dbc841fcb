"""MBQInt3Tensor: a linear layer's weight in 3 bits, asymmetric, group-wise; activations stay as they are (W3A16).

    F.linear(x, w, bias) = (x * act_pre_scale) @ dequantize(w).T + bias        one torch.ops.mbq_ao.int3_linear

`act_pre_scale` belongs to the activation, not to the weight: calibration multiplies a column of the weight by s
and, where no earlier layer can take 1 / s, leaves it here. `dequantize()` does not apply it.

Packed data, scale and zero point have the dimension order of the weight, so slicing, sharding and concatenating
are the same on all three. They work on whole tiles, 32 rows or 128 columns (kernels/layout.py), and whole groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import TorchAOBaseTensor

from mbq_ao import int3_shapes
from mbq_ao.kernels import ops  # noqa: F401  (registers torch.ops.mbq_ao)
from mbq_ao.kernels.layout import check_qdata, pack_int3, unpack_int3_rows
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
    if bias and bias[0].shape != (w.shape[1],):
        return _linear(x, w, None) + bias[0]
    return _linear(x, w, bias[0] if bias else None)


@MBQInt3Tensor.implements(aten.embedding.default)
def _embedding(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    w, index = args[:2]
    if not isinstance(w, MBQInt3Tensor) or w.transposed or w.act_pre_scale is not None:
        raise NotImplementedError(f"{func}: needs a table that is not transposed and has no act_pre_scale")
    rows, k = index.reshape(-1), w.shape[1]
    scale, zero_point = w.scale.index_select(0, rows), w.zero_point.index_select(0, rows)  # checks the index, too
    q = unpack_int3_rows(w.qdata, rows, k)
    out = dequantize_affine(q, scale, zero_point, group_size=w.group_size, dtype=w.scale.dtype)
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


@MBQInt3Tensor.implements_torch_function(torch.Tensor.contiguous)
def _contiguous(func: Callable[..., Tensor], types: Any, args: Any, kwargs: Any) -> MBQInt3Tensor:
    return args[0]._apply_fn_to_data(lambda t: t.contiguous())


for _ops, _handler in int3_shapes.HANDLERS:
    MBQInt3Tensor.implements(_ops)(_handler)

torch.serialization.add_safe_globals([MBQInt3Tensor])
