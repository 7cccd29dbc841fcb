"""Mixtures of experts for tests: calibration data, their parts, and what the router itself says."""

from __future__ import annotations

from typing import Any

import torch
from models import build_batch, model_inputs
from torch import Tensor, nn

from mbq_ao.calibration.capture import find_blocks

OPTIONS: dict[str, Any] = {"group_size": 32, "n_grid": 3, "recipe": "mbq"}


def batches_for(family: str) -> list[dict[str, Any]]:
    return [build_batch(family, 12), build_batch(family, 15, seed=2)]


def moe(model: nn.Module, index: int = -1) -> nn.Module:
    """The module with router and experts of a layer."""
    layer = list(find_blocks(model).values())[index]
    return layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp


def router(model: nn.Module, index: int = -1) -> nn.Module:
    found = moe(model, index)
    return found.router if hasattr(found, "router") else found.gate


def routing(model: nn.Module, batch: dict[str, Any], index: int = -1) -> Tensor:
    """(tokens, experts) fp32: the factor on each expert's output, 0 where it is not chosen. From the router itself."""
    seen: list[Any] = []
    handle = router(model, index).register_forward_hook(lambda m, a, y: seen.append(y))
    with torch.no_grad():
        model(**model_inputs(batch))
    handle.remove()
    if len(seen[0]) == 2:  # Llama4: (scores on the inputs, logits)
        return (seen[0][0] != 0).float()
    logits, weights, chosen = seen[0]
    return torch.zeros(logits.shape).scatter(1, chosen, weights.float())
