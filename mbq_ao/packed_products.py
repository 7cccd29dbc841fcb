"""Products with a PackedWeight: the linear layer, matmuls with a transpose, and those of experts.

    F.linear(x, w), x @ w.mT, w @ x.mT                                  one linear op
    the same of experts (E, N, K) and x (E, T, K), torch.bmm            one grouped op, see kernels/expert_ops.py
    torch.nn.functional.grouped_mm(x, w.mT, offs=offs)                  as well; the rows of x are sorted by expert

Handlers are registered for what is called, so that gradients reach x by the backward of our own ops, and for what torch
makes of other calls. The modules of both kinds of weight import this one.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from mbq_ao.packed_weight import PackedWeight

aten = torch.ops.aten


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _check_width(x: Tensor, w: PackedWeight) -> None:
    if x.dim() and x.shape[-1] != w.in_features:  # the ops know the weight's width up to a tile only
        raise ValueError(
            f"the last dimension of x must be {w.in_features}, as {w} has it, got x of shape {tuple(x.shape)}"
        )


def _linear(x: Tensor, w: PackedWeight, bias: Tensor | None) -> Tensor:
    """F.linear(x, w, bias) of a 2-D w, whether or not it is transposed."""
    x = _autocast(x)
    _check_width(x, w)
    return w._linear(x, bias)


def _batched(x: Tensor, w: PackedWeight) -> Tensor:
    """Rows x (E, T, K) of each expert of a 3-D w, whether or not it is transposed: (E, T, N)."""
    if x.dim() != 3 or x.shape[0] != w.shape[0]:
        raise ValueError(
            f"x must have three dimensions, the first for the {w.shape[0]} experts of {w}, got shape {tuple(x.shape)}"
        )
    x = _autocast(x)
    _check_width(x, w)
    return w._grouped_mm(x.flatten(0, 1), None).unflatten(0, x.shape[:2])


def _product(x: Tensor, w: PackedWeight) -> Tensor:
    return _linear(x, w, None) if w.dim() == 2 else _batched(x, w)


def _no_product(func: Any) -> NoReturn:
    raise NotImplementedError(
        f"{func.__name__}: a quantized weight w can be in x @ w.mT and w @ x.mT only; call dequantize() first"
    )


def _arguments(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Positional and named arguments in order, without options left at None."""
    return (*args, *(value for value in kwargs.values() if value is not None))


@PackedWeight.implements(aten.linear.default)
@PackedWeight.implements_torch_function(torch.nn.functional.linear)
def _aten_linear(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not isinstance(weight, PackedWeight) or weight.transposed or weight.dim() != 2:
            raise NotImplementedError(
                f"{func.__name__}: only the weight, 2-D and not transposed, can be quantized; call dequantize() first"
            )
        return _linear(input, weight, bias)

    return linear(*args, **kwargs)


@PackedWeight.implements([aten.mm.default, aten.bmm.default])
@PackedWeight.implements_torch_function([torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__])
@PackedWeight.implements_torch_function([torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm])
def _matmul(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    a, b = _arguments(args, kwargs)
    if isinstance(a, PackedWeight) == isinstance(b, PackedWeight):
        _no_product(func)
    if isinstance(a, PackedWeight) and not a.transposed and b.dim() > 1:
        return _product(b.mT, a).mT
    if isinstance(b, PackedWeight) and b.transposed:
        return _product(a, b)
    _no_product(func)


@PackedWeight.implements(aten.addmm.default)
def _addmm(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    bias, x, w = args
    if isinstance(x, PackedWeight) or not isinstance(w, PackedWeight) or not w.transposed:
        _no_product(func)
    if any(kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        raise NotImplementedError(f"{func}: alpha and beta must be 1 for {w}; call dequantize() first")
    if bias.shape != (w.shape[1],):
        return _linear(x, w, None) + bias
    return _linear(x, w, bias)


@PackedWeight.implements(aten._grouped_mm.default)
@PackedWeight.implements_torch_function([torch._grouped_mm, torch.nn.functional.grouped_mm])
def _grouped_mm(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    def grouped_mm(
        x: Tensor, w: Tensor, offs: Tensor | None = None, bias: None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        if isinstance(x, PackedWeight) or not isinstance(w, PackedWeight) or not w.transposed or w.dim() != 3:
            _no_product(func)
        if bias is not None or out_dtype not in (None, x.dtype):
            raise NotImplementedError(f"{func.__name__}: bias must be None and the output in x's dtype for {w}")
        if offs is None:
            return _batched(x, w)
        _check_width(x, w)
        return w._grouped_mm(x, offs)

    return grouped_mm(*args, **kwargs)


@PackedWeight.implements(aten.embedding.default)
def _embedding(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    w, index = args[:2]
    if not isinstance(w, PackedWeight) or w.dim() != 2 or w.transposed or w.act_pre_scale is not None:
        raise NotImplementedError(f"{func}: needs a 2-D table that is not transposed and has no act_pre_scale")
    return w._rows(index.reshape(-1)).view(*index.shape, w.shape[1])
