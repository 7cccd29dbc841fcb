"""AffineWeight: a weight of some checkpoint, unpacked. What every format comes to, and every format is made of.

    w[n, k] = (codes[n, k] - zero_point[n, j]) * scale[n, j]        j = group_of[k]

and what it can become:

    "w3a16"      MBQInt3Tensor, exactly, if the codes have 3 bits
    "w4a8"       MBQW4A8Tensor; the weight exactly, if all codes - zero_point are in -8..7
    "torchao"    torchao's Int8Tensor, weight only: exactly, at 8 bits a weight
    "plain"      a plain tensor, which calibration can then take

No code is rounded on the way unless the caller asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchao.quantization import Int8Tensor

from mbq_ao.int3_tensor import MBQInt3Tensor
from mbq_ao.kernels.int3_layout import pack_int3, unpack_int3
from mbq_ao.kernels.int4_layout import pack_int4, unpack_int4
from mbq_ao.packed_weight import GROUP_SIZES, PackedWeight
from mbq_ao.w4a8_tensor import MBQW4A8Tensor

PRECISIONS = ("w3a16", "w4a8", "torchao", "plain")


class InexactError(ValueError):
    """The weight has no exact form in the precision that was asked for."""


@dataclass(frozen=True)
class AffineWeight:
    """A (N, K) weight.

    name: in the model, for messages.  bits: of a code.
    codes: uint8 (N, K), 0..2^bits - 1.
    scale: (N, groups), bfloat16, float16 or float32.
    zero_point: uint8 (N, groups).
    group_of: int64 (K,), the group of each column.
    act_pre_scale: (K,), multiplies the activation; None: there is none.
    """

    name: str
    bits: int
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    group_of: Tensor
    act_pre_scale: Tensor | None = None

    @classmethod
    def of(cls, name: str, w: PackedWeight) -> AffineWeight:
        """One of our weights, unpacked. Raises InexactError for experts and transposed weights."""
        if w.dim() != 2 or w.transposed:
            raise InexactError(f"{name} holds the experts of a mixture, or is transposed, which no other format can")
        n, k = w.shape
        if isinstance(w, MBQInt3Tensor):
            bits, codes, zero_point = 3, unpack_int3(w.qdata, n, k), w.zero_point
        else:
            bits, codes = 4, (unpack_int4(w.qdata, n, k) + 8).to(torch.uint8)
            zero_point = torch.full_like(w.scale, 8, dtype=torch.uint8)
        group_of = torch.arange(k, device=w.device) // w.group_size
        return cls(name, bits, codes, w.scale, zero_point, group_of, w.act_pre_scale)

    def convert(self, precision: str, dtype: torch.dtype, requantize: bool = False) -> Tensor:
        """The weight in one of PRECISIONS.

        dtype: that a plain or torchao weight shall have; ours have their scale's.  requantize: round it anew where it
        has no exact form. Raises InexactError where it has none otherwise.
        """
        if precision in ("w3a16", "w4a8"):
            try:
                return self.as_int3() if precision == "w3a16" else self.as_w4a8()
            except InexactError:
                if not requantize:
                    raise
            kind: type[PackedWeight] = MBQInt3Tensor if precision == "w3a16" else MBQW4A8Tensor
            return kind.from_hp(self.dequantize(self.scale.dtype), self._group_size_anew(), self.act_pre_scale)
        return self.as_int8(dtype) if precision == "torchao" else self.as_plain(dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """(N, K), without act_pre_scale: computed in fp32, exactly if scales have 16 bits, and rounded once."""
        return (self.signed().to(torch.float32) * self.scale.to(torch.float32)[:, self.group_of]).to(dtype)

    def signed(self) -> Tensor:
        """codes - zero_point, int8 (N, K)."""
        return self.codes.to(torch.int8) - self.zero_point.to(torch.int8)[:, self.group_of]

    def as_int3(self) -> MBQInt3Tensor:
        if self.bits != 3:
            raise InexactError(f"{self.name} has {self.bits} bits, and w3a16 has 3")
        g, scale, zero_point = self.contiguous_groups()
        return MBQInt3Tensor(
            pack_int3(self.codes), scale, zero_point, [1, g], tuple(self.codes.shape), self.act_pre_scale
        )

    def as_w4a8(self) -> MBQW4A8Tensor:
        signed = self.signed()
        low, high = (int(value) for value in signed.aminmax())
        if low < -8 or high > 7:
            raise InexactError(
                f"{self.name} is not symmetric: its codes lie in {low}..{high} about the zero point, and those of w4a8 "
                "in -8..7"
            )
        g, scale, _ = self.contiguous_groups()
        return MBQW4A8Tensor(pack_int4(signed), scale, [1, g], tuple(signed.shape), self.act_pre_scale)

    def as_int8(self, dtype: torch.dtype, act_quant_kwargs: Any = None) -> Tensor:
        """torchao's Int8Tensor, as `Int8WeightOnlyConfig` makes it, or for `Int8DynamicActivationInt8WeightConfig`."""
        signed = self.signed()
        g, scale, _ = self.contiguous_groups()
        if signed.shape[1] % g:
            raise InexactError(f"{self.name} has {signed.shape[1]} columns, and torchao wants whole groups of {g}")
        return Int8Tensor(
            signed,
            scale.to(torch.float32),
            [1, g],
            dtype,
            zero_point=torch.zeros_like(scale, dtype=torch.int8),
            act_pre_scale=self.act_pre_scale,
            act_quant_kwargs=act_quant_kwargs,
        )

    def as_plain(self, dtype: torch.dtype) -> Tensor:
        if self.act_pre_scale is not None:
            raise InexactError(f"{self.name} has an act_pre_scale, which a plain weight has no place for")
        return self.dequantize(dtype)

    def contiguous_groups(self) -> tuple[int, Tensor, Tensor]:
        """(group size, scale, zero point) for groups of that many columns in a row: K, 128, 64 or 32.

        A group of another size becomes several that repeat its scale. Raises InexactError if even 32 columns in a row
        are of several groups.
        """
        k = self.group_of.numel()
        for g in (k, 128, 64, 32):
            first = self.group_of[::g]
            if torch.equal(first.repeat_interleave(g)[:k], self.group_of):
                return g, self.scale[:, first].contiguous(), self.zero_point[:, first].contiguous()
        raise InexactError(
            f"the columns of {self.name} are grouped in another order than they lie in (desc_act without "
            "static_groups), or in groups of a size that is no multiple of 32"
        )

    def _group_size_anew(self) -> int | None:
        """The group size to round with: that of the checkpoint where we have it, else the finest."""
        try:
            g = self.contiguous_groups()[0]
        except InexactError:
            return 32
        return g if g in GROUP_SIZES else None
