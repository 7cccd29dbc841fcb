"""GPTQ's packing, as AutoGPTQ, GPTQModel and transformers write them.

A linear of N outputs and K inputs has, instead of its weight,

    qweight   int32 (K * bits / 32, N)         codes, see bits.py
    qzeros    int32 (groups, N * bits / 32)    zero points: minus one in the format "gptq", as they are in "gptq_v2"
    scales    (groups, N), float16 as a rule
    g_idx     int32 (K,), the group of each column; may be absent

In the format "gptq" one is added as in GPTQModel: to a field, mod 8, with 3 bits, and to all of a word at once,
with carries, with 4. Only where a zero point is 0, for which that format has no proper place, does that make a
difference; other readers differ there from each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mbq_ao.interchange.affine import AffineWeight, InexactError
from mbq_ao.interchange.bits import pack_bits, unpack_bits
from mbq_ao.interchange.parts import check_bits, check_group_size, check_part, check_parts, check_whole_words

_MINUS_ONE = {"gptq": True, "gptq_v2": False}  # whether zero points are stored so
_ONES = 0x11111111  # in a word of 4-bit fields


class GPTQFormat:
    """How the weights of one checkpoint are packed.

    settings: its quantization_config, or quantize_config.json.
    Raises ValueError, naming the field, for what cannot be imported.
    """

    method = "gptq"
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.bits = check_bits(settings.get("bits"), (3, 4))
        self.group_size = check_group_size(settings.get("group_size", 128))
        name = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
        if settings.get("is_marlin_format"):  # as AutoGPTQ called it
            name = "marlin"
        if name not in _MINUS_ONE:
            raise ValueError(
                f"checkpoint_format {name!r} cannot be imported, only gptq and gptq_v2: others are laid out for one "
                "kernel, or unknown here. Save the model as gptq_v2 with the library that wrote it"
            )
        if settings.get("pack_dtype") not in (None, "int32"):
            raise ValueError(f"pack_dtype must be int32, got {settings['pack_dtype']!r}; pack the model again")
        self.minus_one = _MINUS_ONE[name]
        self.mixed = bool(settings.get("dynamic"))  # GPTQModel: some layers may have other bits

    def unpack(self, name: str, parts: Mapping[str, Tensor], n: int, k: int) -> AffineWeight:
        """The (n, k) weight called `name`. Raises ValueError naming the part that is missing or does not fit."""
        check_parts(name, parts, ("qweight", "qzeros", "scales"))
        qweight, qzeros, scales = (parts[part] for part in ("qweight", "qzeros", "scales"))
        bits = check_bits(qweight.shape[0] * 32 // k, (3, 4), name) if self.mixed else self.bits
        check_whole_words(name, bits, out_features=n, in_features=k)
        groups = len(scales)
        check_part(name, "qweight", qweight, "int32", (k * bits // 32, n))
        check_part(name, "qzeros", qzeros, "int32", (groups, n * bits // 32))
        check_part(name, "scales", scales, "float", (groups, n))
        group_of = parts.get("g_idx")
        if group_of is None:
            group_of = torch.arange(k, dtype=torch.int32, device=scales.device) // (self.group_size or k)
        check_part(name, "g_idx", group_of, "int32", (k,))
        lowest, highest = (int(group) for group in group_of.aminmax())
        if lowest < 0 or highest >= groups:
            raise ValueError(
                f"{name} has scales for {groups} groups, but columns of the groups {lowest} to {highest}; the "
                "checkpoint is damaged, or its group_size is another"
            )
        return AffineWeight(
            name=name,
            bits=bits,
            codes=unpack_bits(qweight, bits).t().contiguous(),
            scale=scales.t().contiguous(),
            zero_point=self._zero_points(qzeros.t(), bits),
            group_of=group_of.to(torch.int64),
        )

    def _zero_points(self, qzeros: Tensor, bits: int) -> Tensor:
        """uint8 (N, groups) from the words (N * bits / 32, groups)."""
        if not self.minus_one:
            return unpack_bits(qzeros, bits)
        if bits == 4:
            return unpack_bits(qzeros.to(torch.int64) + _ONES, bits)
        return (unpack_bits(qzeros, bits) + 1) & (2**bits - 1)


def pack_gptq_v2(weight: AffineWeight) -> dict[str, Tensor]:
    """The parts of a weight. Raises InexactError, naming it, if it has no exact form there."""
    check_whole_words(weight.name, weight.bits, out_features=len(weight.codes), in_features=len(weight.group_of))
    if weight.act_pre_scale is not None:
        raise InexactError(f"{weight.name} has an act_pre_scale, for which GPTQ has no place")
    scales = weight.scale.to(torch.float16)
    if not torch.equal(scales.to(weight.scale.dtype), weight.scale):
        raise InexactError(
            f"the scales of {weight.name} are {weight.scale.dtype}, and float16 does not hold them exactly; "
            "quantize the model in float16 or bfloat16"
        )
    return {
        "qweight": pack_bits(weight.codes.t(), weight.bits).contiguous(),
        "qzeros": pack_bits(weight.zero_point, weight.bits).t().contiguous(),
        "scales": scales.t().contiguous(),
        "g_idx": weight.group_of.to(torch.int32),
    }
