"""MBQW4A8Tensor: a linear layer's weight in 4 bits, symmetric; activations are quantized to 8 bits on the way (W4A8).

    F.linear(x, w, bias) = int8(x * act_pre_scale) @ dequantize(w).T + bias        one torch.ops.mbq_ao.w4a8_linear

An activation has one scale a token, chosen as it comes. What this shares with MBQInt3Tensor is packed_weight.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mbq_ao import packed_products  # noqa: F401  (registers them for PackedWeight)
from mbq_ao.kernels import expert_ops, w4a8_ops  # noqa: F401  (registers torch.ops.mbq_ao)
from mbq_ao.kernels.int4_layout import TILE_K, TILE_N, check_int4_qdata, pack_int4, unpack_int4, unpack_int4_rows
from mbq_ao.packed_weight import PackedWeight, check_groups, plain_shape
from mbq_ao.quant_primitives import choose_scale_symmetric, dequantize_affine, quantize_symmetric


class MBQW4A8Tensor(PackedWeight):
    """A (N, K) or (E, N, K) weight, packed. Looks to autograd, modules and state dicts like a tensor of scale's dtype.

    Tensor data, with (E, ...) before each shape where there are experts:
        qdata: int8 (ceil(N / 16), ceil(K / 64), 32, 16), see kernels/int4_layout.py
        scale: (N, ceil(K / group_size)), bfloat16 | float16 | float32
    Attributes:
        block_size: [1, group_size], or [1, 1, group_size] with experts; group_size is K where a row has one scale
        shape: (N, K) or (E, N, K); (K, N) or (E, K, N) where transposed
    Optional tensor data:
        act_pre_scale: (K,) or (E, K) in scale's dtype, multiplies the activation before it is quantized
    Optional attributes:
        transposed: whether this is the `.mT` of a weight; the data is not
    """

    NUM_BITS = 4
    tensor_data_names = ["qdata", "scale"]  # noqa: RUF012
    TILE_N, TILE_K = TILE_N, TILE_K
    _pack, _unpack = staticmethod(pack_int4), staticmethod(unpack_int4)

    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor,
        block_size: Sequence[int],
        shape: Sequence[int],
        act_pre_scale: Tensor | None = None,
        transposed: bool | None = None,
    ) -> MBQW4A8Tensor:
        data_shape = plain_shape(shape, transposed)
        check_int4_qdata(qdata, *data_shape)
        check_groups("scale", scale, data_shape, block_size[-1])
        return cls._wrapper(shape, scale, act_pre_scale, transposed)

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor,
        block_size: Sequence[int],
        shape: Sequence[int],
        act_pre_scale: Tensor | None = None,
        transposed: bool | None = None,
    ) -> None:
        super().__init__()
        self.qdata, self.scale = qdata, scale
        self.block_size = list(block_size)
        self.act_pre_scale = act_pre_scale
        self.transposed = bool(transposed)

    @classmethod
    def from_hp(cls, w: Tensor, group_size: int | None = None, act_pre_scale: Tensor | None = None) -> MBQW4A8Tensor:
        """Quantize a (N, K) or (E, N, K) weight by rounding it to the nearest point of its groups' grids.

        w: bfloat16, float16 or float32; the scales get its dtype.  group_size: 32, 64 or 128 columns share a
        scale; None: one scale a row, which is less work. E, N and K are free.  act_pre_scale: (K,) or (E, K), see the
        class. Raises ValueError for anything else, and if w or act_pre_scale holds a NaN or an infinity.
        """
        return cls._from_hp(w, group_size, act_pre_scale)

    @classmethod
    def _choose_grid(cls, w: Tensor, group_size: int, scale_dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (choose_scale_symmetric(w, group_size=group_size, scale_dtype=scale_dtype),)

    @staticmethod
    def _round(w: Tensor, grid: tuple[Tensor, ...], group_size: int) -> Tensor:
        return quantize_symmetric(w, *grid, group_size=group_size)

    def _dequantize(self) -> Tensor:
        return torch.ops.mbq_ao.int4_dequantize(
            self.qdata, self.scale, self.in_features, self.group_size, self.scale.dtype
        )

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mbq_ao.w4a8_linear(x, self.qdata, self.scale, bias, self.act_pre_scale, self.group_size)

    def _grouped_mm(self, x: Tensor, offs: Tensor | None) -> Tensor:
        return torch.ops.mbq_ao.w4a8_grouped_mm(x, self.qdata, self.scale, self.act_pre_scale, self.group_size, offs)

    def _rows(self, rows: Tensor) -> Tensor:
        scale = self.scale.index_select(0, rows)  # checks rows, too
        q = unpack_int4_rows(self.qdata, rows, self.shape[1])
        return dequantize_affine(q, scale, None, group_size=self.group_size, dtype=scale.dtype)


torch.serialization.add_safe_globals([MBQW4A8Tensor])
