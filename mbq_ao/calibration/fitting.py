"""Fit a block's quantized weights to their inputs: grids, and rounding that makes up for its own errors.

The linears are taken in the order in which they run, those together that read the same x. Each set sees its inputs as
it will at serving time: behind the quantized blocks before and the linears of this block that were fitted before it.
What a weight needs to know of them is one matrix (error_compensation.py),

    H = sum_t w_t x_t x_t^T            w_t: r on a vision token, 1 on a text token, 0 on padding

for an expert over its own tokens. With corrects_drift it is fitted to what the unquantized model computes from its own
inputs x', not from x: before it is rounded it becomes the nearest weight that makes up for the difference,

    argmin_V  sum_t w_t |W x'_t - V x_t|^2 + d |W - V|^2  =  W (sum_t w_t x'_t x_t^T + d) (H + d)^-1

Where the output is added to a residual stream (residual.py), corrects_residual takes the sum for what the unquantized
model computes: the weight also makes up for what has changed in the other part of the sum, as far as x tells. That part
is nearly all of the error that reaches a later layer, and each linear takes a few percent off it. A token's w_t is then
divided by its mean square in that sum, as by a norm.

n tokens seem to have channels in common that the next n will not have: what is fitted to them errs on others the more,
the fewer tokens there are for K channels. With discounts_chance, H has (1 + K / n) times its diagonal, in all of this.
(On held-out tokens of the bed "digits" of benchmarks/ that share was about the best of several, with 3,700 tokens and
with 15,000, for 576 channels and for 1536.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mbq_ao.calibration.block import BlockCalibrator
from mbq_ao.calibration.capture import hooked, inputs_in
from mbq_ao.calibration.error_compensation import Grid, GridOf, compensate, damped
from mbq_ao.calibration.fold import activation_scales, folded_parameters
from mbq_ao.calibration.ranks import Ranks
from mbq_ao.calibration.refinement import refine
from mbq_ao.calibration.report import FitReport
from mbq_ao.calibration.residency import Placement
from mbq_ao.calibration.residual import place_of_sum
from mbq_ao.calibration.routing import ExpertRows, common, expert_rows
from mbq_ao.calibration.sensitivity import ModuleName
from mbq_ao.calibration.settings import Recipe

# Of each batch that this rank runs: x (n, in_features); its drift x' - x, or what that does to the outputs
# (`_narrowed`) or to the sum that they enter (n, out_features), or nothing (n, 0); w (n,) fp32.
Inputs = list[tuple[Tensor, Tensor, Tensor]]
Errors = tuple[float, float]  # of plain rounding, and of the fitted weights
_SLAB = 1024  # rows of H that are in double precision at a time
_RIDGE = 0.01  # d, as a share of the mean of H's diagonal


@torch.no_grad()
def fit_weights(
    worker: BlockCalibrator, measured_at: Mapping[str, str], raw_ratios: Mapping[ModuleName, float]
) -> tuple[dict[str, Tensor], list[FitReport]]:
    """The quantized weights of a block's linears whose inputs are seen, by name; the block is not changed.

    worker: with its scales found.  measured_at: linear -> where its sensitivity was measured.  raw_ratios: that
    sensitivity before the median floor, for the report.
    """
    recipe, quantizer = worker.settings.recipe, worker.settings.quantizer
    folded = folded_parameters(worker.block, worker.scalings)
    pre_scaled = activation_scales(worker.scalings)
    fitted: dict[str, Tensor] = {}
    served = dict(folded)
    reports = []
    for names in worker.ranks.on_one(lambda: _reading_together(worker)):
        at = measured_at.get(names[0], "")
        ratio = worker.ratios.get(at)
        vision = 1.0 if ratio is None else ratio**recipe.sensitivity_power
        errors: list[Errors] = []
        for readers, inputs, of_outputs in _inputs(worker, names, folded, served, vision):
            weights = [folded.get(f"{n}.weight", worker.linears[n].weight.detach()) for n in readers]
            if recipe.corrects_drift and not of_outputs:
                inputs, of_outputs = _narrowed(inputs, weights, worker.placement)
            moments, number = _moments(inputs, worker.ranks, worker.placement)
            if not number:
                continue  # an expert that no token was sent to
            if recipe.discounts_chance:
                moments[0].diagonal().mul_(1 + len(moments[0]) / number)
            try:
                fit = partial(_fit, recipe, errors, moments, of_outputs)
                found = quantizer.fit(weights, pre_scaled.get(readers[0]), fit)
            except ValueError as error:
                raise ValueError(f"{worker.name}, {', '.join(readers)}: {error}") from error
            fitted |= dict(zip(readers, found, strict=True))
            served |= {f"{name}.weight": quantizer.while_fitting(w) for name, w in zip(readers, found, strict=True)}
        if errors:
            loss_rtn, loss = map(sum, zip(*errors, strict=True))
            shown = worker.shown([name for name in names if name in fitted])
            sensitivity = (None, None) if ratio is None else (vision, raw_ratios.get((worker.name, at)))
            reports.append(FitReport(worker.name, shown, loss_rtn, loss, *sensitivity))
    return fitted, reports


def _fit(
    recipe: Recipe,
    errors: list[Errors],
    moments: list[Tensor],
    of_outputs: bool,
    weight: Tensor,
    s: Tensor | None,
    choose: Callable[[Tensor], Grid],
    num_bits: int,
    group_size: int,
) -> tuple[Tensor, Grid]:
    """moments: emptied, as they may be the most of what the device holds.  of_outputs: whether the drift is."""
    drift, hessian = moments.pop(), moments.pop()
    if s is not None:
        hessian.div_(s[:, None]).div_(s)
        drift.div_(s)
        if not of_outputs:
            drift.div_(s[:, None])
    if recipe.corrects_drift:
        weight = weight + _correction(drift if of_outputs else weight @ drift, hessian)
    del drift
    grid_of, plain = GridOf(choose, num_bits, group_size, recipe.search_grid), GridOf(choose, num_bits, group_size)
    diagonal = hessian.diagonal().clone()
    loss_rtn = _error(weight - plain.rounded(weight, plain.of(weight, diagonal)), hessian)
    if recipe.compensated:
        rounded, grid = compensate(weight, hessian, grid_of, act_order=recipe.act_order)
        hessian.diagonal().copy_(diagonal)
    else:
        grid = grid_of.of(weight, diagonal)
        rounded = grid_of.rounded(weight, grid)
    if recipe.refining_rounds:
        rounded, grid = refine(weight, rounded, grid, hessian, grid_of, recipe.refining_rounds)
    errors.append((loss_rtn, _error(weight - rounded, hessian)))
    return rounded, grid


def _error(lost: Tensor, hessian: Tensor) -> float:
    """sum_t w_t |(W - Q) x_t|^2.  lost: W - Q (N, K)."""
    return float(torch.linalg.vecdot(lost @ hessian, lost).sum())


def _reading_together(worker: BlockCalibrator) -> list[list[str]]:
    """The linears in the order of their first calls: those together that read the same x, and all experts of a
    parameter."""
    of_parameter = [[n for n in e.linear_names() if n in worker.linears] for e in worker.experts.values()]
    experts = {name: names for names in of_parameter for name in names}
    read: list[tuple[Tensor, list[str]]] = []
    seen: set[str] = set()

    def record(name: str, module: nn.Module, args: Any) -> None:
        if name in seen:
            return
        if name in experts:
            read.append((args[0], experts[name]))
        elif read and args[0] is read[-1][0] and read[-1][1][0] not in experts:
            read[-1][1].append(name)
        else:
            read.append((args[0], [name]))
        seen.update(read[-1][1])

    hooks = (module.register_forward_pre_hook(partial(record, name)) for name, module in worker.linears.items())
    with hooked(hooks):
        worker.call(worker.streams[0], distorted=False).run(worker.block)
    return [names for _, names in read]


def _inputs(
    worker: BlockCalibrator, names: list[str], folded: dict[str, Tensor], served: dict[str, Tensor], vision: float
) -> Iterator[tuple[list[str], Inputs, bool]]:
    """What linears that are fitted together read, all of them the same, or each expert of a parameter its own; and
    whether the drift is that of outputs.

    folded, served: the block's parameters, unquantized and as far as they are fitted. vision: weight of a vision token.
    """
    keep, drifts = worker.placement.keep, worker.settings.recipe.corrects_drift
    parameter = next((e for e in worker.experts.values() if names[0] in e.linear_names()), None)
    inputs: Inputs = []
    if parameter is None:
        place = _residual_behind(worker, names, served) if drifts else None
        for i, stream in enumerate(worker.streams):
            now, original = worker.call(stream, distorted=True), worker.call(stream, distorted=False)
            x, *of_sum = inputs_in(now, worker.block, names[:1] if place is None else [names[0], place], served)
            drift, weights = x.new_empty(len(x), 0), _token_weights(worker, i, vision, x)
            if place is not None:
                (wanted,) = inputs_in(original, worker.block, [place], folded)
                drift = wanted - of_sum[0]
                weights = weights * _as_a_norm_sees(wanted)
            elif drifts:
                drift = inputs_in(original, worker.block, names[:1], folded)[0] - x
            inputs.append(keep((x, drift, weights)))
        yield names, inputs, place is not None
        return
    record = partial(expert_rows, worker.block, experts=list(worker.experts.values()), wanted=parameter)
    rows: list[tuple[ExpertRows, ExpertRows] | None] = []
    for stream in worker.streams:
        seen = record(worker.call(stream, distorted=True), served, with_shares=False)
        clean = record(worker.call(stream, distorted=False), folded, with_shares=False) if drifts else seen
        if clean is None or seen is None:
            rows.append(None)
            continue
        clean, seen = common(clean, seen) if drifts else (clean, seen)
        rows.append((clean.kept(worker.placement), seen.kept(worker.placement)))
    if any(r is None for r in worker.ranks.gather([of_batch and 0 for of_batch in rows])):
        return  # it cannot be told whose the rows are
    told = [of_batch for of_batch in rows if of_batch is not None]
    for e, name in enumerate(parameter.linear_names()):
        if name not in names:
            continue
        for i, (clean, seen) in enumerate(told):
            x = seen.x[e]
            drift = clean.x[e] - x if drifts else x.new_empty(len(x), 0)
            inputs.append(keep((x, drift, _token_weights(worker, i, vision, x, seen.tokens[e]))))
        yield [name], inputs, False
        inputs = []


def _token_weights(worker: BlockCalibrator, i: int, vision: float, x: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Of each row of x (n, K), (n,) fp32.  i: which of this rank's batches.  tokens: (n,) the rows' tokens."""
    if worker.masks is None:
        return torch.ones(len(x), device=x.device)
    counted, is_vision = (worker.ranks.mine(m)[i].flatten() for m in (worker.masks.counted, worker.masks.vision))
    weight = torch.where(is_vision, vision, counted.float()).to(x.device)
    if tokens is not None:
        return weight[tokens]
    # Of another sequence than the text (the image that cross-attention reads) every token counts.
    return weight if len(weight) == len(x) else torch.ones(len(x), device=x.device)


def _moments(inputs: Inputs, ranks: Ranks, placement: Placement) -> tuple[list[Tensor], int]:
    """H = sum_t w_t x_t x_t^T, fp32, (in_features, in_features), and the same of the drift: (in_features or
    out_features, in_features), or (0, in_features) where it is not recorded; and n, the number of tokens. Nothing if
    that is 0.

    A batch's sum is rounded to a fixed point that all batches have in common, and those are added as integers: however
    they are shared out among ranks, the result is the same to the last bit.
    """
    largest, number = 0.0, 0
    for of_largest, of_number in ranks.gather([_extent(*placement.fetch(of_batch)) for of_batch in inputs]):
        largest, number = largest + of_largest, number + of_number
    if not number:
        return [], 0
    if not math.isfinite(largest):
        raise ValueError("NaN or infinite values in the activations")
    exponent = 61 - math.frexp(largest)[1]  # no entry exceeds the sum of the batches' largest
    (x, drift, _), *_ = inputs
    total = torch.zeros(x.shape[1] + drift.shape[1], x.shape[1], dtype=torch.long, device=placement.device or x.device)
    for of_batch in ranks.own(inputs):
        x, drift, weight = placement.fetch(of_batch)
        rows, x = torch.cat([x, drift], 1).float().T * weight, x.float()
        # Slab by slab, as H may be a large part of what the device holds.
        for slab, sums in zip(rows.split(_SLAB), total.split(_SLAB), strict=True):
            sums += (slab @ x).double().ldexp_(torch.tensor(exponent, device=x.device)).round_().long()
    total = ranks.add_up(total)
    unit = torch.tensor(-exponent, device=total.device)
    k = total.shape[1]
    found = []
    for sums in (total[:k], total[k:]):
        found.append(torch.empty(sums.shape, device=total.device))
        for rows, slab in zip(found[-1].split(_SLAB), sums.split(_SLAB), strict=True):
            rows.copy_(slab.double().ldexp_(unit))
    return found, number


def _extent(x: Tensor, drift: Tensor, weight: Tensor) -> tuple[float, int]:
    """What no entry of the batch's moments exceeds, and how many tokens have a weight."""
    number = int(weight.count_nonzero())
    if not number:
        return 0.0, 0
    columns = torch.cat([x, drift], 1).float().square_().mul_(weight[:, None]).sum(0)
    return float(columns.max()), number


def _narrowed(inputs: Inputs, weights: Sequence[Tensor], placement: Placement) -> tuple[Inputs, bool]:
    """Of linears with fewer outputs than inputs, what the drift does to the outputs: (n, N) instead of (n, K).  Whether
    it is that."""
    if sum(map(len, weights)) >= weights[0].shape[1]:
        return inputs, False
    found = []
    for x, drift, token_weights in inputs:
        drift = placement.fetch(drift).float()
        of_outputs = torch.cat([drift @ w.to(drift.device).float().T for w in weights], 1)
        found.append((x, placement.keep(of_outputs), token_weights))
    return found, True


def _as_a_norm_sees(stream: Tensor) -> Tensor:
    """How much a squared error on a token of the residual stream weighs, (n,) fp32: a norm that reads it divides the
    token by its size. Some tokens, often the first, are a hundred times as large as the others.

    stream: (n, channels).
    """
    size = stream.float().square().mean(-1)
    least = (1e-6 * size.mean()).clamp(min=torch.finfo(size.dtype).tiny)  # none shall count for all others together
    return 1 / size.clamp(min=least)


def _residual_behind(worker: BlockCalibrator, names: list[str], served: dict[str, Tensor]) -> str | None:
    """Where the output of a linear, which shares its inputs with no other, is read with the residual."""
    if len(names) > 1 or not worker.settings.recipe.corrects_residual:
        return None

    def find() -> str | None:
        return place_of_sum(worker.call(worker.streams[0], distorted=True), worker.block, names[0], served)

    return worker.ranks.on_one(find)


def _correction(of_outputs: Tensor, hessian: Tensor) -> Tensor:
    """What makes up for the drift of the inputs, to be added to the weight.

    of_outputs: (N, K) sum_t w_t W (x'_t - x_t) x_t^T.
    """
    h = hessian.clone()
    ridge = (_RIDGE * h.diagonal().mean()).clamp(min=torch.finfo(h.dtype).tiny)
    return torch.cholesky_solve(of_outputs.T, damped(h, ridge, torch.linalg.cholesky_ex)).T
