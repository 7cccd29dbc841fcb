"""Search the channel scale s of one group: the scales to try, and the modality-balanced loss.

    argmin_s  sum_t  w_t * | W x_t - Q(W s) s^-1 x_t |_p        (equation 5 of the paper; p = 1, "mae")

where W4A8 rounds s^-1 x_t too, with a weight w_t for every token:

    balanced "mae"   answer: 1 / ((n_a + n_v) C)      vision: r / ((n_a + n_v) C)
    balanced "mse"   answer: 1 / (n_a C)              vision: r / (n_v C)
    not balanced     1 / (n C) for every counted token (AWQ-like)

n_a, n_v: number of answer and vision tokens, C: channels of the compared output. All three are one
weighted sum, so there is one loss function. In the balanced losses prompt text and padding have w = 0.

The grid: s = mean|x|^(k / n_grid), normalised by sqrt(max s * min s), k = 0 .. n_grid - 1. k = 0 is
s = 1, plain rounding; an equal loss does not replace an earlier one, so s = 1 stays where nothing is better.

Every scale is tried on all tokens. To leave a scale once its sum exceeds the best one's would choose the same, but on
the demo model it would spare 12% of the forwards (W4A8: 21%), less what waiting for every sum and fewer losses cost.

SmoothQuant (Xiao et al., arXiv 2211.10438) does not search: s = max|x|^alpha / max|W|^(1 - alpha), by channel. It goes
the same way with two scales to try, s = 1 and its own, of which the last is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mbq_ao.calibration.capture import ModuleCall
from mbq_ao.calibration.ranks import ALONE, Ranks
from mbq_ao.calibration.residency import HERE, Placement

Loss = Literal["mae", "mse"]
CHUNK_TOKENS = 8192  # tokens a tokenwise module gets at once: bounds its activations at any calibration size


@dataclass(frozen=True)
class Example:
    """What one batch contributes: the call whose output is compared, the target, and the tokens' weights.

    target: output of the unquantized module on the unquantized stream. weight: (B, T) fp32.
    """

    call: ModuleCall
    target: Tensor
    weight: Tensor

    def on(self, placement: Placement) -> Example:
        """The example where it is computed with."""
        return Example(self.call.map_tensors(placement.fetch), *placement.fetch((self.target, self.weight)))


@dataclass(frozen=True)
class SearchResult:
    """s: (in_features,) the scale taken. losses: one per scale tried; losses[0] is that of s = 1."""

    s: Tensor
    alpha: float
    losses: list[float]
    index: int


def token_weights(
    counted: list[Tensor],
    answer: list[Tensor],
    vision: list[Tensor],
    *,
    ratio: float | None,
    loss: Loss,
    num_channels: int,
) -> list[Tensor]:
    """The weight of every token, one (B, T) fp32 tensor a batch. ratio=None is the unbalanced loss over `counted`."""
    if ratio is None:
        n = max(_count(counted), 1)
        return [mask.float() / (n * num_channels) for mask in counted]
    n_answer, n_vision = _count(answer), _count(vision)
    if loss == "mae":
        n_answer = n_vision = n_answer + n_vision
    per_answer = 1.0 / (max(n_answer, 1) * num_channels)
    per_vision = ratio / (max(n_vision, 1) * num_channels)
    return [a.float() * per_answer + v.float() * per_vision for a, v in zip(answer, vision, strict=True)]


def _count(masks: list[Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks)


@torch.no_grad()
def search_scale(
    module: nn.Module,
    examples: list[Example],
    scales: Sequence[tuple[float, Tensor]],
    candidate: Callable[[Tensor], dict[str, Tensor]],
    *,
    loss: Loss,
    choose: bool = True,
    ranks: Ranks = ALONE,
    placement: Placement = HERE,
    at_once: int = 1,
) -> SearchResult:
    """Try every scale and keep the best, or with choose=False the last. The module is not changed.

    module: whose output is compared. scales: (alpha, s of shape (in_features,)) to try, s = 1 first.
    candidate: s -> the module's parameters (name -> value) that stand for the quantized ones.
    placement: keeps the examples.  at_once: scales that are tried on an example before the next one is fetched; the
    losses do not depend on it.
    Raises ValueError if the loss is not finite for s = 1.
    """
    chunks = _as_chunks(module, examples, ranks, placement)
    tried: list[Tensor] = []  # a scale: the loss of each batch
    for start in range(0, len(scales), at_once):
        candidates = [candidate(s) for _, s in scales[start : start + at_once]]
        found: list[list[Tensor]] = [[] for _ in candidates]
        for of_batch in chunks:
            here = [chunk.on(placement) for chunk in of_batch]
            for parameters, losses_of_batches in zip(candidates, found, strict=True):
                losses_of_batches.append(_loss_of(here, module, parameters, loss))
        tried += map(torch.stack, found)
    # One transfer to the host. Batch by batch: that sum does not depend on the number of ranks.
    by_batch = ranks.gather(torch.stack(tried, 1).tolist())
    losses = [math.fsum(of_batches) for of_batches in zip(*by_batch, strict=True)]
    if not math.isfinite(losses[0]):
        raise ValueError("the search loss is not finite: NaN or inf in the activations or weights")
    best = min(range(len(losses)), key=losses.__getitem__) if choose else len(losses) - 1
    alpha, s = scales[best]
    return SearchResult(s, alpha, losses, best)


def grid_scales(statistic: Tensor, n_grid: int) -> list[tuple[float, Tensor]]:
    """(alpha, s) for every point of the grid.  statistic: (in_features,) mean |x| per channel."""
    return [(k / n_grid, scale_at(statistic, k / n_grid)) for k in range(n_grid)]


def smooth_scales(peak: Tensor, weights: Sequence[Tensor], alpha: float) -> list[tuple[float, Tensor]]:
    """(0, s = 1) and (alpha, SmoothQuant's s), as published, clamps included.

    peak: (in_features,) fp32, max |x| per channel.  weights: (out_features, in_features) each, of those linears that
    read x and are to be quantized.
    """
    weight_peak = torch.stack([w.abs().amax(0).float() for w in weights]).amax(0).clamp(min=1e-5)
    s = (peak.pow(alpha) / weight_peak.pow(1 - alpha)).clamp(min=1e-5)
    return [(0.0, torch.ones_like(s)), (alpha, s)]


def scale_at(statistic: Tensor, alpha: float) -> Tensor:
    """s = clamp(statistic^alpha, 1e-4) / sqrt(max * min); alpha = 0 gives exactly 1."""
    s = statistic.pow(alpha).clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


def _loss_of(examples: list[Example], module: nn.Module, parameters: dict[str, Tensor], loss: Loss) -> Tensor:
    errors = [_weighted_error(e, e.call.run(module, parameters), loss) for e in examples]
    return torch.stack(errors).sum()


def _weighted_error(example: Example, output: Tensor, loss: Loss) -> Tensor:
    error = (example.target - output).float()
    error = error.abs() if loss == "mae" else error.square()
    per_token, weight = error.sum(-1), example.weight
    if per_token.numel() == weight.numel():  # else (A, B, T): Gemma 3n's layers have several hidden states a token
        per_token = per_token.reshape(weight.shape)
    return (per_token * weight).sum()


def _as_chunks(
    module: nn.Module, examples: list[Example], ranks: Ranks = ALONE, placement: Placement = HERE
) -> list[list[Example]]:
    """What to run for each batch: if the module treats every token alone, no tokens of weight 0 and not all at once.

    Whether it does is tried out on the longest example, not inferred from its class. Joining short batches was
    rejected: a matmul of more rows rounds differently, and who has which batches is not to be seen in the result.
    """
    longest = max(examples, key=lambda e: e.call.hidden.numel())
    sizes = [-e.call.hidden.numel() for e in examples]
    if not ranks.on_one(lambda: _is_tokenwise(module, longest.on(placement)), keys=sizes):
        return [[e] for e in examples]
    return [_chunks(e) for e in examples]


def _chunks(example: Example) -> list[Example]:
    selected = example.weight.flatten() != 0
    # One empty chunk stays if none is selected: zero is its loss.
    hidden, target = (x.flatten(0, -2)[selected].split(CHUNK_TOKENS) for x in (example.call.hidden, example.target))
    weight = example.weight.flatten()[selected].split(CHUNK_TOKENS)
    call = example.call
    return [
        Example(call.with_hidden(_like(call.hidden, h)), t, w) for h, t, w in zip(hidden, target, weight, strict=True)
    ]


def _like(hidden: Tensor, tokens: Tensor) -> Tensor:
    """(n, C) -> (1, n, C), or as many leading ones as `hidden` has dimensions: modules unpack the shape."""
    return tokens.reshape(*(1,) * (hidden.ndim - 2), *tokens.shape)


def _is_tokenwise(module: nn.Module, example: Example) -> bool:
    call = example.call
    if sum(isinstance(leaf, Tensor) for leaf in tree_leaves((call.args, call.kwargs))) > 1:
        return False  # masks, position embeddings: tied to the positions of the batch
    if isinstance(module, nn.Linear):
        return True
    tokens = call.hidden.flatten(0, -2)
    if tokens.shape[0] < 2:
        return False  # a lone token cannot show whether it reads others
    together = call.run(module).flatten(0, -2)
    tolerance = 1e-4 if tokens.dtype == torch.float32 else 2e-2
    for start in (0, 1):  # the even ones alone, then the odd ones: of two tokens a causal module shows it at the second
        some = torch.arange(start, tokens.shape[0], 2, device=tokens.device)
        try:
            alone = call.with_hidden(_like(call.hidden, tokens[some])).run(module).flatten(0, -2)
        except (RuntimeError, ValueError, IndexError):  # the module wants this very (B, T, C)
            return False
        expected = together[some] if together.shape[0] == tokens.shape[0] else together
        if alone.shape != expected.shape or (alone - expected).norm() > tolerance * expected.norm():
            return False
    return True
