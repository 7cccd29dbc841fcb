"""MBQ, modality-balanced quantization: the main job, top to bottom. Start reading at `calibrate`.

    find the blocks -> run the model once, record how each block is called
    -> find the scale groups -> measure how sensitive the loss is to each modality
    -> for each block and group: search the scale, plan the fold, quantize
    -> check that folding alone leaves the logits unchanged -> put the plan into the model

Source: "MBQ: Modality-Balanced Quantization for Large Vision-Language Models", arXiv 2412.19509.

`calibrate` never changes the model. It returns a Plan, whose `apply` sets all new parameters or none,
so a failure or Ctrl-C at any point leaves the model as it was. The price is that the packed weights
lie beside the original ones until the end: 3.25 bits a weight at group size 128.

Memory beyond the model (and `device`): those packed weights; the hidden states of all calibration
tokens (twice with error propagation); the inputs and targets of one group at a time; an fp32 copy of
one block while its groups are looked for; in the sensitivity pass one hidden state a block and the
activations of one block for one batch at a time; in the check of the logits a few fp32 copies of the smallest
batch's logits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mbq_ao.calibration.batch import CalibrationBatch, collect_batches
from mbq_ao.calibration.capture import (
    BlockStream,
    ModuleCall,
    capture_streams,
    find_blocks,
    first_tensor,
    forward,
    hooked,
)
from mbq_ao.calibration.fold import ScaleGroup, Scaling, activation_scales, folded_parameters
from mbq_ao.calibration.report import CalibrationReport, GroupReport
from mbq_ao.calibration.residency import computing_on, resident_on
from mbq_ao.calibration.scale_groups import BlockProber
from mbq_ao.calibration.scale_search import Example, Loss, search_scale, token_weights
from mbq_ao.calibration.sensitivity import ModuleName, floor_at_median, modality_sensitivity
from mbq_ao.calibration.validate import check_linears, check_model


class WeightQuantizer(Protocol):
    """How one weight is quantized; the search and the final model go through the same object."""

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """What the quantized weight stands for, as a plain tensor."""

    def quantize(self, weight: Tensor, act_pre_scale: Tensor | None) -> Tensor:
        """The tensor that will serve."""


@dataclass(frozen=True)
class Recipe:
    """Where the published code and what we hold to be right differ. See RECIPES."""

    count_padding: bool  # padding takes part in mean|x| and in the unbalanced loss
    shift_answers: bool  # count the positions that predict an answer token, not the answer's own
    tie_shared_rows: bool  # scale o_proj under grouped-query attention, one s for all heads of a value head
    pre_scale_unfolded: bool  # where nothing takes 1/s, keep it as act_pre_scale instead of not scaling


RECIPES = {
    "paper": Recipe(count_padding=True, shift_answers=False, tie_shared_rows=False, pre_scale_unfolded=False),
    "best": Recipe(count_padding=False, shift_answers=True, tie_shared_rows=True, pre_scale_unfolded=True),
}


@dataclass(frozen=True)
class CalibrationSettings:
    """What `mbq_config` asks for; validated there."""

    recipe: Recipe
    balance: bool
    loss: Loss
    propagate_error: bool
    n_grid: int
    quantizer: WeightQuantizer
    scale_groups: Sequence[ScaleGroup] | None = None
    blocks: Sequence[nn.Module] | None = None


@dataclass
class Plan:
    """New parameters for some modules, to be set all at once."""

    parameters: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)

    def apply(self) -> None:
        """Set every parameter, or none: an exception in between (Ctrl-C too) puts the old ones back."""
        old = [(module, name, module._parameters[name]) for module, name, _ in self.parameters]
        try:
            for (module, name, value), (_, _, before) in zip(self.parameters, old, strict=True):
                trainable = before is not None and before.requires_grad and not hasattr(value, "quantized_nbytes")
                module._parameters[name] = nn.Parameter(value, requires_grad=trainable)
        except BaseException:
            for module, name, parameter in old:
                module._parameters[name] = parameter
            raise


def calibrate(
    model: nn.Module,
    calib_data: Any,
    settings: CalibrationSettings,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    device: torch.device | None = None,
    progress: bool = True,
) -> tuple[Plan, CalibrationReport]:
    """Find the scales and quantize every selected linear of the decoder, without changing the model.

    device: where to compute; the decoder layers are copied there one at a time. None: where they are.
    """
    begin = time.perf_counter()
    check_model(model)
    blocks = find_blocks(model, settings.blocks)
    selected = _selected_linears(blocks, filter_fn)
    check_linears(model, selected)
    batches = collect_batches(model, calib_data, device)

    with evaluating(model), computing_on(device, model, blocks.values()):
        streams = capture_streams(model, blocks, batches)
        groups = find_groups(blocks, streams, settings, selected, device)
        masks = Masks.of(batches, settings.recipe)
        balance = settings.balance and any(b.vision.any() for b in batches)
        raw_ratios: dict[ModuleName, float] = {}
        if balance:
            inspected = list(dict.fromkeys((name, g.inspect or "") for name, gs in groups.items() for g in gs))
            with tqdm(total=len(batches), desc="modality sensitivity", disable=not progress, leave=False) as bar:
                raw_ratios = modality_sensitivity(
                    model, blocks, inspected, batches, answer_masks=masks.answer, on_batch=bar.update
                )
        ratios = floor_at_median(raw_ratios)

        plan, report = Plan(), CalibrationReport(settings={})
        all_scalings: dict[str, list[Scaling]] = {}
        bar = tqdm(blocks.items(), desc="scale search", disable=not progress)
        for index, (name, block) in enumerate(bar):
            block_ratios = {g.inspect or "": ratios.get((name, g.inspect or "")) for g in groups[name]}
            with resident_on(device, block):
                worker = BlockCalibrator(name, block, index, streams, masks, settings, block_ratios, selected[name])
                reports = worker.search(groups[name])
                plan.parameters += worker.plan()
                if index + 1 < len(blocks):
                    worker.advance()
            for group, group_report in zip(groups[name], reports, strict=True):
                group_report.sensitivity_raw = raw_ratios.get((name, group.inspect or ""))
            report.groups += reports
            all_scalings[name] = worker.scalings
            if reports:
                loss_rtn, loss = (sum(getattr(r, f) for r in reports) for f in ("loss_rtn", "loss"))
                bar.set_postfix_str(f"loss {loss_rtn:.3g} -> {loss:.3g}")
        report.logits_error = check_logits(model, blocks, all_scalings, batches)

    _summarise(report, plan, blocks, groups, selected, settings)
    report.seconds = time.perf_counter() - begin
    return plan, report


@dataclass
class Masks:
    """Which tokens count as what, one (B, T) bool tensor a batch."""

    counted: list[Tensor]
    answer: list[Tensor]
    vision: list[Tensor]

    @classmethod
    def of(cls, batches: list[CalibrationBatch], recipe: Recipe) -> Masks:
        return cls(
            counted=[torch.ones_like(b.valid) if recipe.count_padding else b.valid for b in batches],
            answer=[b.predicts_answer() if recipe.shift_answers else b.answer for b in batches],
            vision=[b.vision for b in batches],
        )


def find_groups(
    blocks: Mapping[str, nn.Module],
    streams: list[BlockStream],
    settings: CalibrationSettings,
    selected: Mapping[str, dict[str, nn.Linear]],
    device: torch.device | None,
) -> dict[str, list[ScaleGroup]]:
    """The scale groups of every block; blocks of the same structure are probed once."""
    stream = min(streams, key=lambda s: s.hidden.numel() if s.hidden.shape[-2] > 1 else float("inf"))
    known: dict[tuple[Any, ...], list[ScaleGroup]] = {}
    result = {}
    for index, (name, block) in enumerate(blocks.items()):
        signature = (
            type(block),
            tuple((n, type(m), getattr(getattr(m, "weight", None), "shape", None)) for n, m in block.named_modules()),
        )
        if signature not in known:
            call = stream.call(index, stream.between(index, stream.hidden))
            with resident_on(device, block):
                prober = BlockProber(block, call)
            given = settings.scale_groups
            known[signature] = prober.find_all() if given is None else [prober.complete(group) for group in given]
        result[name] = [
            group
            for group in known[signature]
            if _is_scaled(group, block, settings.recipe) and any(n in selected[name] for n in group.linears)
        ]
    return result


def _is_scaled(group: ScaleGroup, block: nn.Module, recipe: Recipe) -> bool:
    if group.producer is None:
        return recipe.pre_scale_unfolded
    if recipe.tie_shared_rows or not group.mixes_tokens:
        return True
    # The published code scales o_proj only if v_proj has the very same shape.
    return block.get_submodule(group.producer).weight.shape == block.get_submodule(group.linears[0]).weight.shape


class BlockCalibrator:
    """Searches the groups of one block on the streams at its input. The block is not changed."""

    def __init__(
        self,
        name: str,
        block: nn.Module,
        index: int,
        streams: list[BlockStream],
        masks: Masks,
        settings: CalibrationSettings,
        ratios: Mapping[str, float | None],
        linears: dict[str, nn.Linear],
    ) -> None:
        self.name, self.block, self.index, self.streams = name, block, index, streams
        self.masks, self.settings, self.ratios, self.linears = masks, settings, ratios, linears
        self.scalings: list[Scaling] = []

    def search(self, groups: list[ScaleGroup]) -> list[GroupReport]:
        """Find one scale a group. All groups are searched on original weights, in order."""
        return [self._search_group(group) for group in groups]

    @torch.no_grad()
    def _search_group(self, group: ScaleGroup) -> GroupReport:
        inspect = group.inspect or ""
        module = self.block.get_submodule(inspect)
        ratio = self.ratios[inspect]
        clean = self._capture(group, {}, distorted=False)
        calls = clean
        if self.settings.propagate_error:
            # The first group sees the unquantized block on the distorted stream, the others the block quantized so far.
            calls = self._capture(group, self.served_parameters() if self.scalings else {}, distorted=True)
        weights = token_weights(
            self.masks.counted,
            self.masks.answer,
            self.masks.vision,
            ratio=ratio,
            loss=self.settings.loss,
            num_channels=clean[0].output.shape[-1],
        )
        examples = [
            Example(seen.call, target.output, weight)
            for seen, target, weight in zip(calls, clean, weights, strict=True)
        ]
        statistic = group.row_map.tie(mean_abs([seen.x for seen in calls], self.masks.counted))
        prefix = f"{inspect}." if inspect else ""
        originals = {n.removeprefix(prefix) if n != inspect else "": self.block.get_submodule(n) for n in group.linears}
        candidates = {f"{n}.weight" if n else "weight": m.weight for n, m in originals.items() if self._is_selected(m)}

        def candidate(s: Tensor) -> dict[str, Tensor]:
            return {n: self._stand_in(w, s) / s.to(w.dtype) for n, w in candidates.items()}

        try:
            found = search_scale(
                module, examples, statistic, candidate, loss=self.settings.loss, n_grid=self.settings.n_grid
            )
        except ValueError as error:
            raise ValueError(f"{self.name}, group {', '.join(group.linears)}: {error}") from error
        self.scalings.append(Scaling(group, found.s))
        return GroupReport(
            block=self.name,
            producer=group.producer,
            linears=list(group.linears),
            fold=group.fold or "act_pre_scale",
            alpha=found.alpha,
            losses=found.losses,
            loss_rtn=found.losses[0],
            loss=found.losses[found.index],
            sensitivity=ratio,
        )

    def _is_selected(self, module: nn.Module) -> bool:
        return any(module is linear for linear in self.linears.values())

    def _stand_in(self, weight: Tensor, s: Tensor) -> Tensor:
        return self.settings.quantizer.fake_quantize((weight.float() * s).to(weight.dtype))

    def _capture(self, group: ScaleGroup, parameters: dict[str, Tensor], *, distorted: bool) -> list[Seen]:
        """Run the block on every batch and record the call of the compared module and the group's input."""
        seen = []
        for stream in self.streams:
            recorder = Seen()
            inspected = self.block.get_submodule(group.inspect or "")
            linear = self.block.get_submodule(group.linears[0])
            handles = [
                inspected.register_forward_hook(recorder.record_call, with_kwargs=True),
                linear.register_forward_hook(recorder.record_input),
            ]
            with hooked(handles):
                self._call(stream, distorted).run(self.block, parameters)
            seen.append(recorder)
        return seen

    def _call(self, stream: BlockStream, distorted: bool) -> ModuleCall:
        hidden = stream.distorted if distorted and stream.distorted is not None else stream.hidden
        return stream.call(self.index, hidden)

    @torch.no_grad()
    def served_parameters(self) -> dict[str, Tensor]:
        """The block's parameters as it will serve, in high precision: folded so far, and fake-quantized."""
        parameters = folded_parameters(self.block, self.scalings)
        pre_scaled = activation_scales(self.scalings)
        for name, linear in self.linears.items():
            weight = parameters.get(f"{name}.weight", linear.weight)
            if name in pre_scaled:
                s = pre_scaled[name]
                parameters[f"{name}.weight"] = self._stand_in(weight, s) / s.to(weight.dtype)
            else:
                parameters[f"{name}.weight"] = self.settings.quantizer.fake_quantize(weight)
        return parameters

    @torch.no_grad()
    def plan(self) -> list[tuple[nn.Module, str, Tensor]]:
        """The block's new parameters: folded producers and quantized weights."""
        folded = folded_parameters(self.block, self.scalings)
        pre_scaled = activation_scales(self.scalings)
        result = []
        for name, linear in self.linears.items():
            weight, pre_scale = folded.pop(f"{name}.weight", linear.weight.detach()), None
            if name in pre_scaled:
                s = pre_scaled[name]
                weight, pre_scale = (weight.float() * s).to(weight.dtype), (1 / s).to(weight.dtype)
            try:
                result.append((linear, "weight", self.settings.quantizer.quantize(weight, pre_scale)))
            except ValueError as error:
                raise ValueError(f"{self.name}.{name}: {error}") from error
        for name, value in folded.items():
            module, _, parameter = name.rpartition(".")
            result.append((self.block.get_submodule(module), parameter, value))
        return result

    @torch.no_grad()
    def advance(self) -> None:
        """Move the streams to the next block's input."""
        served = self.served_parameters() if self.settings.propagate_error else {}
        for stream in self.streams:
            if self.settings.propagate_error:
                distorted = self._call(stream, distorted=True).run(self.block, served)
                stream.distorted = stream.between(self.index + 1, distorted)
            stream.hidden = stream.between(self.index + 1, self._call(stream, distorted=False).run(self.block))


class Seen:
    """One call of a compared module, its output, and the input of the group's linears."""

    call: ModuleCall
    output: Tensor
    x: Tensor

    def record_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.call, self.output = ModuleCall.record(args, kwargs), first_tensor(output)

    def record_input(self, module: nn.Module, args: Any, output: Any) -> None:
        self.x = args[0]


def mean_abs(inputs: list[Tensor], counted: list[Tensor]) -> Tensor:
    """(in_features,) fp32: mean |x| of every channel over the counted tokens of all batches.

    Of another sequence than the text (the image that cross-attention reads) every token counts.
    """
    selected = [
        x.flatten(0, -2)[mask.flatten()] if x[..., 0].numel() == mask.numel() else x.flatten(0, -2)
        for x, mask in zip(inputs, counted, strict=True)
    ]
    total = torch.stack([x.abs().sum(0, dtype=torch.float32) for x in selected]).sum(0)
    return total / sum(x.shape[0] for x in selected)


@torch.no_grad()
def check_logits(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    scalings: Mapping[str, list[Scaling]],
    batches: list[CalibrationBatch],
) -> float:
    """Relative change of the logits on the smallest batch when every block is folded but not quantized.

    Raises RuntimeError if folding changes what the model computes: a value that a fold touches is
    read somewhere the block's own output does not show.
    """
    batch = min(batches, key=lambda b: b.num_tokens)
    before = forward(model, batch).float()

    def fold(block: nn.Module, scalings: list[Scaling], module: nn.Module, args: Any) -> None:
        for name, value in folded_parameters(block, scalings).items():
            parameter = block.get_parameter(name)
            originals.append((parameter, parameter.data))
            parameter.data = value

    def unfold(module: nn.Module, args: Any, output: Any) -> None:
        while originals:
            parameter, data = originals.pop()
            parameter.data = data

    originals: list[tuple[nn.Parameter, Tensor]] = []
    handles = [b.register_forward_pre_hook(partial(fold, b, scalings[n])) for n, b in blocks.items()]
    handles += [b.register_forward_hook(unfold) for b in blocks.values()]
    try:
        with hooked(handles):
            after = forward(model, batch).float()
    finally:
        unfold(model, None, None)
    error = ((after - before).norm() / before.norm().clamp(min=1e-30)).item()
    precise = all(p.dtype == torch.float32 for b in blocks.values() for p in b.parameters())
    limit = 1e-3 if precise else 0.1  # half precision: rounding W s once more, through all layers
    if not error <= limit:
        raise RuntimeError(
            f"folding the scales changes the logits by {error:.2g} (relative, limit {limit:g}): the model reads a "
            "folded value outside its block. Pass scale_groups=[...] without the group at fault, or "
            "report the architecture"
        )
    return error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout), and back to each module's own mode at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _selected_linears(
    blocks: Mapping[str, nn.Module], filter_fn: Callable[[nn.Module, str], bool] | None
) -> dict[str, dict[str, nn.Linear]]:
    """Block name -> {name in the block: linear to be quantized}."""
    selected = {
        block_name: {
            name: module
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear) and (filter_fn is None or filter_fn(module, f"{block_name}.{name}"))
        }
        for block_name, block in blocks.items()
    }
    if not any(selected.values()):
        names = [
            f"{b}.{n}" for b, block in blocks.items() for n, m in block.named_modules() if isinstance(m, nn.Linear)
        ]
        raise ValueError(
            f"nothing to quantize: none of the {len(names)} nn.Linear in the {len(blocks)} decoder layers passes "
            f"filter_fn; it is given names like {names[0]!r}"
            if names
            else f"nothing to quantize: the {len(blocks)} decoder layers have no nn.Linear; pass blocks=[...]"
        )
    return selected


def _summarise(
    report: CalibrationReport,
    plan: Plan,
    blocks: Mapping[str, nn.Module],
    groups: Mapping[str, list[ScaleGroup]],
    selected: Mapping[str, dict[str, nn.Linear]],
    settings: CalibrationSettings,
) -> None:
    for block_name, block in blocks.items():
        scaled = {name for group in groups[block_name] for name in group.linears}
        report.not_scaled += [f"{block_name}.{n}" for n in selected[block_name] if n not in scaled]
        report.not_quantized += [
            f"{block_name}.{n}"
            for n, p in block.named_parameters()
            if p.ndim >= 2 and n.removesuffix(".weight") not in selected[block_name]
        ]
    quantized = [(m, v) for m, name, v in plan.parameters if name == "weight" and hasattr(v, "quantized_nbytes")]
    report.num_linears = len(quantized)
    report.nbytes_before = sum(m.weight.numel() * m.weight.element_size() for m, _ in quantized)
    report.nbytes_after = sum(v.quantized_nbytes() for _, v in quantized)
