"""torchao's own tensors: from them to ours, and back where one can hold ours exactly.

IntxUnpackedToInt8Tensor   codes of int3, int4, ... and integer zero points       -> w3a16 or w4a8, by its bits
Int4Tensor                 zero points in floating point                          -> w4a8, if they are 0
Int8Tensor                 codes of 8 bits, no zero point                         -> w4a8, if they are in -8..7

MBQInt3Tensor              -> Int8Tensor, weight only
MBQW4A8Tensor              -> Int8Tensor with activations in 8 bits, if it has one scale a row
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    Int4Tensor,
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    PerGroup,
    PerRow,
)
from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

from mbq_ao.config import Int3WeightOnlyConfig, Int8DynamicActivationInt4WeightMBQConfig
from mbq_ao.int3_tensor import MBQInt3Tensor
from mbq_ao.interchange.affine import AffineWeight, InexactError
from mbq_ao.interchange.parts import has_groups_of
from mbq_ao.packed_weight import PackedWeight

STOCK_TENSORS = (IntxUnpackedToInt8Tensor, Int4Tensor, Int8Tensor)


def from_stock(name: str, w: Tensor) -> AffineWeight:
    """One of STOCK_TENSORS, unpacked. Raises InexactError if it is not (codes - zero_point) * scale with integers."""
    if w.dim() != 2:
        raise InexactError(f"{name} is a {type(w).__name__} of shape {tuple(w.shape)}, not a linear's (N, K)")
    if isinstance(w, Int4Tensor):
        # Two codes a byte, the even column low; dimensions of scale and zero point the other way round.
        signed = torch.stack([w.qdata << 4 >> 4, w.qdata >> 4], dim=2).flatten(1)
        bits, scale, zero_point = 4, w.scale.t().contiguous(), w.zero_point.t()
    else:
        signed, scale, zero_point = w.qdata, w.scale, w.zero_point
        bits = int(str(w.target_dtype)[-1]) if isinstance(w, IntxUnpackedToInt8Tensor) else 8
    if zero_point is None:
        zero_point = torch.zeros_like(scale)
    integers = isinstance(w, IntxUnpackedToInt8Tensor) and torch.equal(zero_point, zero_point.round())
    if not integers and zero_point.count_nonzero():
        raise InexactError(f"{name} is a {type(w).__name__} with zero points that are not among its codes")
    middle = 1 << (bits - 1)
    return AffineWeight(
        name=name,
        bits=bits,
        codes=(signed.to(torch.int16) + middle).to(torch.uint8),
        scale=scale,
        zero_point=(zero_point.to(torch.int16) + middle).to(torch.uint8),
        group_of=torch.arange(w.shape[1], device=scale.device) // w.block_size[-1],
        act_pre_scale=getattr(w, "act_pre_scale", None),
    )


def to_stock(name: str, w: PackedWeight) -> Tensor:
    """One of our weights as torchao's Int8Tensor. Raises InexactError where that could not compute the same.

    In W4A8 torchao rounds activations to 1/127.5 of their largest, we to 1/127: there the weights are the same, and the
    activations all but.
    """
    kwargs = None
    if not isinstance(w, MBQInt3Tensor):
        if w.scale.shape[-1] != 1:
            raise InexactError(
                f"{name} has {w.scale.shape[-1]} scales a row, and torchao's int8 activations want one: quantize with "
                "group_size=None"
            )
        kwargs = QuantizeTensorToInt8Kwargs(PerRow())
    return AffineWeight.of(name, w).as_int8(w.dtype, kwargs)


def config_of(w: Tensor, stock: bool, group_size: int | None) -> AOBaseConfig:
    """The torchao config that makes a weight like w, for `quantization_config`.

    w: one of ours, or an Int8Tensor.  stock: of what `to_stock` makes of it.  group_size: preferred, where it fits.
    """
    if not has_groups_of(w, group_size):
        group_size = w.block_size[-1] if w.scale.shape[-1] > 1 else None
    if not stock:
        ours = Int3WeightOnlyConfig if isinstance(w, MBQInt3Tensor) else Int8DynamicActivationInt4WeightMBQConfig
        return ours(group_size=group_size)
    if isinstance(w, MBQInt3Tensor) or (isinstance(w, Int8Tensor) and w.act_quant_kwargs is None):
        return Int8WeightOnlyConfig(granularity=PerRow() if group_size is None else PerGroup(group_size))
    return Int8DynamicActivationInt8WeightConfig()
