"""MBQInt3Tensor: a linear layer's weight in 3 bits, asymmetric, group-wise; activations stay as they are (W3A16).

    F.linear(x, w, bias) = (x * act_pre_scale) @ dequantize(w).T + bias        one torch.ops.mbq_ao.int3_linear

What it shares with MBQW4A8Tensor is packed_weight.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mbq_ao.kernels import int3_ops  # noqa: F401  (registers torch.ops.mbq_ao)
from mbq_ao.kernels.int3_layout import TILE_K, TILE_N, check_qdata, pack_int3, unpack_int3_rows
from mbq_ao.packed_weight import PackedWeight, check_finite, check_groups, checked_group_size, checked_pre_scale
from mbq_ao.quant_primitives import (
    by_row_slabs,
    choose_qparams_affine,
    dequantize_affine,
    fake_quantize_affine,
    quantize_affine,
)


class MBQInt3Tensor(PackedWeight):
    """A (N, K) weight, packed. Looks to autograd, modules and state dicts like a tensor of scale's dtype.

    Tensor data:
        qdata: int16 (ceil(N / 32), ceil(K / 128), 3, 32, 8), see kernels/int3_layout.py
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
    TILE_N, TILE_K = TILE_N, TILE_K

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
        n, k = reversed(shape) if transposed else shape
        check_qdata(qdata, n, k)
        check_groups("scale", scale, n, k, block_size[1])
        check_groups("zero_point", zero_point, n, k, block_size[1])
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
        """Quantize a (N, K) weight by rounding it to the nearest point of its groups' grids.

        w: bfloat16, float16 or float32; the scales get its dtype.  group_size: 32, 64 or 128 columns share a
        scale; None: one scale a row. N and K are free.  act_pre_scale: (K,), see the class.
        Raises ValueError for anything else, and if w or act_pre_scale holds a NaN or an infinity.
        """
        g = checked_group_size(w, group_size)

        def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scale, zero_point = choose_qparams_affine(x, group_size=g, scale_dtype=w.dtype)
            return pack_int3(quantize_affine(x, scale, zero_point, group_size=g)), scale, zero_point

        qdata, scale, zero_point = by_row_slabs(quantize, w.detach(), TILE_N)
        check_finite(w, scale)
        return cls(qdata, scale, zero_point, [1, g], tuple(w.shape), checked_pre_scale(act_pre_scale, w))

    @staticmethod
    def fake_quantize(w: Tensor, group_size: int | None = 128) -> Tensor:
        """`from_hp(w, group_size).dequantize()` bit for bit, without packing. A NaN stays in its group."""
        return fake_quantize_affine(w.detach(), group_size=checked_group_size(w, group_size))

    def dequantize(self) -> Tensor:
        k = self.shape[0] if self.transposed else self.shape[1]
        w = torch.ops.mbq_ao.int3_dequantize(
            self.qdata, self.scale, self.zero_point, k, self.group_size, self.scale.dtype
        )
        return w.t() if self.transposed else w

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.act_pre_scale is not None:
            x = x * self.act_pre_scale.to(x.dtype)
        return torch.ops.mbq_ao.int3_linear(x, self.qdata, self.scale, self.zero_point, bias, self.group_size)

    def _rows(self, rows: Tensor) -> Tensor:
        scale, zero_point = self.scale.index_select(0, rows), self.zero_point.index_select(0, rows)  # checks rows, too
        q = unpack_int3_rows(self.qdata, rows, self.shape[1])
        return dequantize_affine(q, scale, zero_point, group_size=self.group_size, dtype=scale.dtype)


torch.serialization.add_safe_globals([MBQInt3Tensor])
