"""AWQ checkpoints in AutoAWQ's layout "gemm".

A linear of N outputs and K inputs has, instead of its weight,

    qweight   int32 (K, N / 8)         codes of 4 bits, eight a word: of outputs 0, 2, 4, 6, 1, 3, 5, 7
    qzeros    int32 (groups, N / 8)    zero points, in the same order
    scales    float16 (groups, N)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mbq_ao.interchange.affine import AffineWeight
from mbq_ao.interchange.bits import unpack_bits
from mbq_ao.interchange.parts import check_bits, check_group_size, check_part, check_parts, check_whole_words

_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # in the word, of outputs 0..7


class AWQFormat:
    """How the weights of one checkpoint are packed.

    settings: its quantization_config, or quant_config.json.
    Raises ValueError, naming the field, for what cannot be imported.
    """

    method = "awq"
    parts = ("qweight", "qzeros", "scales")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.bits = check_bits(settings.get("bits", settings.get("w_bit", 4)), (4,))
        self.group_size = check_group_size(settings.get("group_size", settings.get("q_group_size", 128)))
        names = (settings.get(key) for key in ("version", "format", "checkpoint_format"))
        name = str(next(filter(None, names), "gemm")).lower()
        if settings.get("backend") == "llm-awq":
            name = "llm-awq"
        if name != "gemm":
            raise ValueError(
                f"version {name!r} cannot be imported, only gemm: others are laid out for one kernel, or unknown here. "
                "Save the model as gemm with the library that wrote it"
            )
        if not settings.get("zero_point", True):
            raise ValueError("zero_point must be true, got false: such a checkpoint has no qzeros, and no known writer")

    def unpack(self, name: str, parts: Mapping[str, Tensor], n: int, k: int) -> AffineWeight:
        """The (n, k) weight called `name`. Raises ValueError naming the part that is missing or does not fit."""
        check_parts(name, parts, self.parts)
        check_whole_words(name, self.bits, out_features=n)
        qweight, qzeros, scales = (parts[part] for part in self.parts)
        size = self.group_size or k
        groups = -(-k // size)
        check_part(name, "qweight", qweight, "int32", (k, n // 8))
        check_part(name, "qzeros", qzeros, "int32", (groups, n // 8))
        check_part(name, "scales", scales, "float", (groups, n))
        return AffineWeight(
            name=name,
            bits=self.bits,
            codes=_outputs_first(qweight),
            scale=scales.t().contiguous(),
            zero_point=_outputs_first(qzeros),
            group_of=torch.arange(k, device=scales.device) // size,
        )


def _outputs_first(words: Tensor) -> Tensor:
    """int32 (rows, N / 8) -> uint8 (N, rows)."""
    return unpack_bits(words.t(), 4).unflatten(0, (-1, 8))[:, _PLACES].flatten(0, 1).contiguous()
