"""Modality sensitivity: how much a change at a layer's output moves the loss, for vision and for answer tokens.

    |dL| <= |g_v| |D_v| + |g_l| |D_l|        (first order; section 3 of the paper)

g is the gradient of the supervised loss at the output of the module whose error the search compares.
|g_v| and |g_l| are its mean absolute value over the vision and the answer tokens and all channels, for
each sample alone, then averaged over samples; those without an image have no part in it, as the many answer tokens of
a plain text have much smaller gradients and would pass for the answers about images. Only their ratio matters for the
argmin:

    r = |g_v| / |g_l|,   raised to the median of r over the layers where it is below (the floor of the
                          authors' code, not in the paper: late layers have |g_v| near 0 and would let the
                          search forget the vision tokens).

No weight gradient is built (the graph starts at the first block's input and no parameter requires
grad), and every block is checkpointed, so the memory beyond the model is one hidden state a block, which
the placement keeps, and the activations of one block.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from mbq_ao.calibration.batch import IGNORE_INDEX, CalibrationBatch
from mbq_ao.calibration.capture import first_tensor, forward, hooked, takes
from mbq_ao.calibration.ranks import ALONE, Ranks
from mbq_ao.calibration.residency import HERE, Placement

ModuleName = tuple[str, str]  # (block, module whose output is compared, relative to the block)


def modality_sensitivity(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    inspected: list[ModuleName],
    batches: list[CalibrationBatch],
    *,
    answer_masks: list[Tensor],
    on_batch: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
    placement: Placement = HERE,
) -> dict[ModuleName, float]:
    """r = |g_vision| / |g_answer| at the output of every inspected module, before the floor.

    batches: those that this rank runs.
    answer_masks: (B, T) bool for each of them, the answer tokens that count in |g_answer|.
    Raises ValueError if a gradient is not finite.
    """
    found: list[dict[ModuleName, dict[str, list[float]]]] = []  # of each batch, |g| of its samples

    def measure(key: ModuleName, masks: dict[str, Tensor], grad: Tensor) -> None:
        if not torch.isfinite(grad).all():
            raise ValueError(
                f"NaN or inf in the gradient at {'.'.join(filter(None, key))}: check the model and the labels"
            )
        for kind, mask in masks.items():
            per_token = grad.detach().abs().float().mean(-1).reshape(-1, *mask.shape).mean(0).to(mask.device)
            for row, selected, of_image in zip(per_token, mask, masks["vision"], strict=True):
                if selected.any() and of_image.any():
                    found[-1][key][kind].append(row[selected].mean().item())

    with _gradients_of_activations_only(model, blocks, placement):
        for batch, answer in zip(batches, answer_masks, strict=True):
            masks = {"vision": batch.vision, "answer": answer}
            found.append({key: {kind: [] for kind in masks} for key in inspected})

            def watch(key: ModuleName, masks: dict[str, Tensor], module: nn.Module, args: Any, output: Any) -> None:
                output = first_tensor(output)
                if output.requires_grad:
                    output.register_hook(partial(measure, key, masks))

            handles = (
                blocks[block].get_submodule(name).register_forward_hook(partial(watch, (block, name), masks))
                for block, name in inspected
            )
            with hooked(handles):
                _loss(model, batch.on(placement)).backward()
            on_batch()
    found = ranks.gather(found)
    return {key: _ratio(key, *([g for of in found for g in of[key][kind]] for kind in masks)) for key in inspected}


def floor_at_median(ratios: Mapping[ModuleName, float]) -> dict[ModuleName, float]:
    """max(r, median of r over the blocks), apart for each inspected module of a block (attention, MLP).

    Only over blocks that are calibrated: leaving some out (filter_fn, blocks) moves the median.
    """
    by_name: dict[str, list[float]] = {}
    for (_, name), r in ratios.items():
        by_name.setdefault(name, []).append(r)
    # torch.median takes the lower of two middles; the reference takes their mean.
    medians = {name: torch.tensor(v, dtype=torch.float64).quantile(0.5).item() for name, v in by_name.items()}
    return {key: max(r, medians[key[1]]) for key, r in ratios.items()}


def _ratio(key: ModuleName, vision: list[float], answer: list[float]) -> float:
    g_answer = sum(answer) / len(answer) if answer else 0.0
    g_vision = sum(vision) / len(vision) if vision else 0.0
    if g_answer == 0.0:
        warnings.warn(
            f"the loss does not depend on the answer tokens at {'.'.join(filter(None, key))}: both modalities "
            "weigh the same there",
            stacklevel=2,
        )
        return 1.0
    return g_vision / g_answer


def _loss(model: nn.Module, batch: CalibrationBatch) -> Tensor:
    """Sum over the samples of each sample's mean cross-entropy over its answer tokens (labels shifted)."""
    targets = batch.labels[:, 1:]
    counted = targets != IGNORE_INDEX
    if takes(model, "logits_to_keep"):
        # Only the positions that predict an answer: a vocabulary of 150k makes full logits a GB a sample.
        positions = counted.any(0).nonzero().flatten()
        logits = forward(model, batch, logits_to_keep=positions)
        targets = targets[:, positions]
    else:
        logits = forward(model, batch)[:, :-1]
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view(targets.shape)
    # Half-precision gradients of a mean over many tokens underflow; the ratio does not see a common factor.
    scale = 1024.0 if logits.dtype == torch.float16 else 1.0
    return scale * (losses.sum(1) / counted.sum(1).clamp(min=1)).sum()


@contextmanager
def _gradients_of_activations_only(
    model: nn.Module, blocks: Mapping[str, nn.Module], placement: Placement
) -> Iterator[None]:
    """No parameter requires grad, the first block's input does, and every block is checkpointed."""
    required = [p for p in model.parameters() if p.requires_grad]
    own_forward = {b: b.__dict__.get("forward") for b in blocks.values()}

    def begin_graph(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (args[0].detach().requires_grad_(True), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_(True)}

    first = next(iter(blocks.values()))
    try:
        for p in required:
            p.requires_grad_(False)
        for block in own_forward:
            block.forward = partial(_checkpointed, placement, block.forward)
        with torch.enable_grad(), hooked([first.register_forward_pre_hook(begin_graph, with_kwargs=True)]):
            yield
    finally:
        for block, forward_attribute in own_forward.items():
            block.__dict__.pop("forward", None)
            if forward_attribute is not None:
                block.__dict__["forward"] = forward_attribute
        for p in required:
            p.requires_grad_(True)


def _checkpointed(placement: Placement, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The block's output; until the backward pass computes it again, its input is kept by the placement."""

    def again(*args: Any, **kwargs: Any) -> Any:
        return forward(*placement.fetch(args), **placement.fetch(kwargs))

    # Autograd sees both copies. Masks and position embeddings, which all blocks share, stay where they are.
    args, kwargs = tree_map_only(Tensor, lambda t: t.to(placement.host) if t.requires_grad else t, (args, kwargs))
    return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
