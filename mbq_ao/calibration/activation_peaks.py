"""How large the inputs of a linear are, channel by channel, over all calibration tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mbq_ao.calibration.ranks import ALONE, Ranks
from mbq_ao.calibration.residency import HERE, Placement


def mean_abs(inputs: list[Tensor], counted: list[Tensor], ranks: Ranks = ALONE, placement: Placement = HERE) -> Tensor:
    """(in_features,) fp32: mean |x| of every channel over the counted tokens of all batches.

    inputs, counted: of the batches that this rank runs.
    """
    selected = _counted_tokens(inputs, counted, placement)
    found = ranks.gather([(x.abs().sum(0, dtype=torch.float32), len(x)) for x in selected])
    return torch.stack([total for total, _ in found]).sum(0) / sum(number for _, number in found)


def max_abs(inputs: list[Tensor], counted: list[Tensor], ranks: Ranks = ALONE, placement: Placement = HERE) -> Tensor:
    """(in_features,) fp32: max |x| of every channel over the counted tokens of all batches, as `mean_abs`."""
    selected = _counted_tokens(inputs, counted, placement)
    found = ranks.gather([x.abs().amax(0) if len(x) else x.new_zeros(x.shape[-1]) for x in selected])
    return torch.stack(found).amax(0).float()


def _counted_tokens(inputs: list[Tensor], counted: list[Tensor], placement: Placement) -> Iterator[Tensor]:
    """(tokens, in_features) a batch, where it is computed with.

    Of another sequence than the text (the image that cross-attention reads) every token counts.
    """
    for x, mask in zip(inputs, counted, strict=True):
        x, mask = placement.fetch((x, mask))
        yield x.flatten(0, -2)[mask.flatten()] if x[..., 0].numel() == mask.numel() else x.flatten(0, -2)
