"""MBQInt3Tensor: a linear layer's weight in 3 bits, asymmetric, group-wise; activations stay as they are (W3A16).

    F.linear(x, w, bias) = (x * act_pre_scale) @ dequantize(w).T + bias        one torch.ops.mbq_ao.int3_linear

What it shares with MBQW4A8Tensor is packed_weight.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mbq_ao import packed_products  # noqa: F401  (registers them for PackedWeight)
from mbq_ao.kernels import expert_ops, int3_ops  # noqa: F401  (registers torch.ops.mbq_ao)
from mbq_ao.kernels.int3_layout import TILE_K, TILE_N, check_qdata, pack_int3, unpack_int3, unpack_int3_rows
from mbq_ao.packed_weight import PackedWeight, check_groups, checked_group_size, plain_shape
from mbq_ao.quant_primitives import (
    choose_qparams_affine,
    dequantize_affine,
    fake_quantize_affine,
    quantize_affine,
)


class MBQInt3Tensor(PackedWeight):
    """A (N, K) or (E, N, K) weight, packed. Looks to autograd, modules and state dicts like a tensor of scale's dtype.

    Tensor data, with (E, ...) before each shape where there are experts:
        qdata: int16 (ceil(N / 32), ceil(K / 128), 3, 32, 8), see kernels/int3_layout.py
        scale: (N, ceil(K / group_size)), bfloat16 | float16 | float32
        zero_point: uint8, the shape of scale
    Attributes:
        block_size: [1, group_size], or [1, 1, group_size] with experts; group_size is K where a row has one scale
        shape: (N, K) or (E, N, K); (K, N) or (E, K, N) where transposed
    Optional tensor data:
        act_pre_scale: (K,) or (E, K) in scale's dtype, multiplies the activation
    Optional attributes:
        transposed: whether this is the `.mT` of a weight; the data is not
    """

    NUM_BITS = 3
    tensor_data_names = ["qdata", "scale", "zero_point"]  # noqa: RUF012
    TILE_N, TILE_K = TILE_N, TILE_K
    _pack, _unpack = staticmethod(pack_int3), staticmethod(unpack_int3)

    zero_point: Tensor

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
        data_shape = plain_shape(shape, transposed)
        check_qdata(qdata, *data_shape)
        check_groups("scale", scale, data_shape, block_size[-1])
        check_groups("zero_point", zero_point, data_shape, block_size[-1])
        if zero_point.dtype != torch.uint8:
            raise ValueError(f"zero_point must be uint8, got {zero_point.dtype}")
        return cls._wrapper(shape, scale, act_pre_scale, transposed)

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
    def from_hp(cls, w: Tensor, group_size: int | None = 128, act_pre_scale: Tensor | None = None) -> MBQInt3Tensor:
        """Quantize a (N, K) or (E, N, K) weight by rounding it to the nearest point of its groups' grids.

        w: bfloat16, float16 or float32; the scales get its dtype.  group_size: 32, 64 or 128 columns share a
        scale; None: one scale a row. E, N and K are free.  act_pre_scale: (K,) or (E, K), see the class.
        Raises ValueError for anything else, and if w or act_pre_scale holds a NaN or an infinity.
        """
        return cls._from_hp(w, group_size, act_pre_scale)

    @classmethod
    def _choose_grid(cls, w: Tensor, group_size: int, scale_dtype: torch.dtype) -> tuple[Tensor, ...]:
        return choose_qparams_affine(w, group_size=group_size, scale_dtype=scale_dtype)

    @staticmethod
    def _round(w: Tensor, grid: tuple[Tensor, ...], group_size: int) -> Tensor:
        return quantize_affine(w, *grid, group_size=group_size)

    @staticmethod
    def fake_quantize(w: Tensor, group_size: int | None = 128) -> Tensor:
        """`from_hp(w, group_size).dequantize()` bit for bit, without packing. A NaN stays in its group."""
        g, w = checked_group_size(w, group_size), w.detach()
        if w.dim() == 2:
            return fake_quantize_affine(w, group_size=g)
        return torch.stack([fake_quantize_affine(expert, group_size=g) for expert in w])

    def _dequantize(self) -> Tensor:
        return torch.ops.mbq_ao.int3_dequantize(
            self.qdata, self.scale, self.zero_point, self.in_features, self.group_size, self.scale.dtype
        )

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.act_pre_scale is not None:
            x = x * self.act_pre_scale.to(x.dtype)
        return torch.ops.mbq_ao.int3_linear(x, self.qdata, self.scale, self.zero_point, bias, self.group_size)

    def _grouped_mm(self, x: Tensor, offs: Tensor | None) -> Tensor:
        return torch.ops.mbq_ao.int3_grouped_mm(
            x, self.qdata, self.scale, self.zero_point, self.act_pre_scale, self.group_size, offs
        )

    def _rows(self, rows: Tensor) -> Tensor:
        scale, zero_point = self.scale.index_select(0, rows), self.zero_point.index_select(0, rows)  # checks rows, too
        q = unpack_int3_rows(self.qdata, rows, self.shape[1])
        return dequantize_affine(q, scale, zero_point, group_size=self.group_size, dtype=scale.dtype)


torch.serialization.add_safe_globals([MBQInt3Tensor])
