"""MBQ, modality-balanced quantization: the main job, top to bottom. Start reading at `calibrate`.

    find the blocks: the decoder's layers and, before them, what `targets` adds (stacks.py)
    -> for each stack of blocks: run the model once, record how each block is called
       -> find the scale groups -> in the decoder, measure how sensitive the loss is to each modality
       -> for each block and group: search the scale, plan the fold, quantize
    -> check that folding alone leaves the logits unchanged -> put the plan into the model

Source: "MBQ: Modality-Balanced Quantization for Large Vision-Language Models", arXiv 2412.19509.

`calibrate` never changes the model. It returns a Plan, whose `apply` sets all new parameters or none,
so a failure or Ctrl-C at any point leaves the model as it was; with a work_dir the next call goes on from there
(calibration/work_dir.py). Several processes may share the batches (calibration/ranks.py).
The price is that the packed weights lie beside the original ones until the end: 3.25 bits a weight for w3a16 at group
size 128, 4 for w4a8.

Memory beyond the model (and `device`), at the peak at most:

    the packed weights of all blocks
    + 3.5 fp32 copies of one block: it is copied to be probed, and folded or fake-quantized beside that
    + 4.5 times the hidden states of all calibration tokens, 10 times with error propagation: the stream, and the
      inputs, targets and outputs of one group at a time

(measured in test/calibration/test_memory.py). Of several stacks one at a time counts, with its own tokens. The
sensitivity pass needs less: one hidden state a block and the activations of one block for one batch at a time, no
weight gradients; and logits of the answers only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mbq_ao.calibration.batch import CalibrationBatch, collect_batches
from mbq_ao.calibration.block import BlockCalibrator
from mbq_ao.calibration.capture import BlockStream, capture_streams, find_blocks
from mbq_ao.calibration.fold import RowMap, ScaleGroup, Scaling
from mbq_ao.calibration.logits_check import check_logits
from mbq_ao.calibration.plan import Plan
from mbq_ao.calibration.ranks import ALONE, Ranks
from mbq_ao.calibration.report import CalibrationReport, GroupReport
from mbq_ao.calibration.residency import computing_on, resident_on
from mbq_ao.calibration.scale_groups import BlockProber
from mbq_ao.calibration.sensitivity import ModuleName, floor_at_median, modality_sensitivity
from mbq_ao.calibration.settings import CalibrationSettings, Masks, Recipe, Targets
from mbq_ao.calibration.shared_store import SharedStore, agree
from mbq_ao.calibration.stacks import (
    Beside,
    Stack,
    capture_passes,
    find_stacks,
    linears_beside,
    listed_blocks,
    other_weights,
)
from mbq_ao.calibration.validate import check_linears, check_model, owners_of_parameters
from mbq_ao.calibration.work_dir import State, Store, describe_data, describe_run


def calibrate(
    model: nn.Module,
    calib_data: Any,
    settings: CalibrationSettings,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    device: torch.device | None = None,
    progress: bool = True,
    store: Store | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Plan, CalibrationReport]:
    """Find the scales and quantize every selected linear, without changing the model.

    device: where to compute; the blocks (decoder layers) are copied there one at a time. None: where they are.
    store: remembers finished steps, see `open_work_dir`; None: nothing does.
    ranks: who shares the work; rank 0 shows the progress and uses the store.
    """
    begin = time.perf_counter()
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "mbq_config needs gradients of the activations, which torch.inference_mode() rules out; call quantize_ "
            "outside of it (torch.no_grad() is fine)"
        )
    check_model(model)
    layers = find_blocks(model, settings.blocks)
    first_layer = next(iter(layers.values()))
    linears = linears_beside(model, layers, settings.targets, filter_fn)
    decoder = Stack(layers, _selected_linears(layers, settings.targets, filter_fn, linears), step="block_")
    owners = owners_of_parameters(model)
    check_linears({"": linears, **decoder.selected}, owners)
    batches = collect_batches(model, calib_data, device)
    ranks.split([batch.num_tokens for batch in batches])
    progress = progress and ranks.is_first
    store = store or Store()
    store = store if ranks.size == 1 else SharedStore(ranks, store)
    agree(ranks, lambda: dict.fromkeys(linears, ""), "call quantize_ with the same targets and filter_fn on each")
    store.check(lambda: describe_run(model, batches, settings, decoder.selected, progress=progress))

    with evaluating(model), computing_on(device, model, [*layers.values(), *listed_blocks(model, linears).values()]):
        beside = find_stacks(model, linears, first_layer, batches, settings.targets, ranks) if linears else Beside()
        work = _Work(model, batches, settings, owners, device, store, progress)
        for stack in beside.stacks:
            passes = ranks.of_parts(stack.passes)
            work.calibrate(stack, partial(capture_passes, model, stack, batches, first_layer, passes), None, passes)
        work.round({name: linears[name] for name in beside.rounded})
        if any(decoder.selected.values()):
            masks = Masks.of(batches, settings.recipe)
            work.calibrate(decoder, partial(capture_streams, model, layers, ranks.mine(batches)), masks, ranks)
        outputs = [list(stack.blocks)[-1] for stack in beside.stacks]
        seeing = [batch for i, batch in enumerate(batches) if any(stack.passes[i] for stack in beside.stacks)]
        work.report.logits_error = check_logits(model, work.blocks, work.scalings, seeing or batches, outputs)

    plan, report = work.plan, work.report
    report.rounded, report.left_alone = beside.rounded, beside.left_alone
    _summarise(report, plan, work.stacks, work.groups)
    if linears:
        report.stacks = {stack.name: list(stack.blocks) for stack in work.stacks}
    if settings.targets == "decoder+vision":
        report.not_quantized += other_weights(model, layers, beside)
    report.calibration = describe_data(batches)
    report.seconds = time.perf_counter() - begin
    return plan, report


@dataclass
class _Work:
    """What all stacks of one calibration have in common, and what was found for those that are done."""

    model: nn.Module
    batches: list[CalibrationBatch]
    settings: CalibrationSettings
    owners: Mapping[nn.Parameter, list[str]]
    device: torch.device | None
    store: Store
    progress: bool
    plan: Plan = field(default_factory=Plan)
    report: CalibrationReport = field(default_factory=lambda: CalibrationReport(settings={}))
    stacks: list[Stack] = field(default_factory=list)
    blocks: dict[str, nn.Module] = field(default_factory=dict)
    groups: dict[str, list[ScaleGroup]] = field(default_factory=dict)
    scalings: dict[str, list[Scaling]] = field(default_factory=dict)

    def calibrate(
        self, stack: Stack, capture: Callable[[], list[BlockStream]], masks: Masks | None, ranks: Ranks
    ) -> None:
        """Search the scales of a stack and plan its new parameters, block by block.

        masks: of the text's tokens. None beside the decoder: all tokens count alike there, as none is an answer, and
        `scale_groups`, whose names are a decoder layer's, are not meant. ranks: who shares what `capture` returns.
        """
        model, store, blocks, selected = self.model, self.store, stack.blocks, stack.selected
        settings = replace(self.settings, scale_groups=None) if masks is None else self.settings
        # What the search depends on beyond the fingerprint, which knows the decoder's linears only.
        chosen = [] if masks is not None else [{name: list(linears) for name, linears in selected.items()}]
        streams = capture()
        if settings.propagate_error and self.plan.parameters:
            chosen.append({name: list(linears) for done in self.stacks for name, linears in done.selected.items()})
            with self.plan.in_place():
                for stream, behind in zip(streams, capture(), strict=True):
                    stream.start_behind(behind)
        find = partial(find_groups, self.owners, blocks, streams, settings, selected, self.device)
        groups = ranks.on_one(find, keys=[_probing_cost(stream) for stream in streams])
        raw_ratios: dict[ModuleName, float] = {}
        if masks is not None and settings.balance and any(b.vision.any() for b in self.batches):
            inspected = list(dict.fromkeys((name, g.inspect or "") for name, gs in groups.items() for g in gs))
            own, answers = ranks.mine(self.batches), ranks.mine(masks.answer)
            measure = partial(_measure, model, blocks, inspected, own, answers, ranks, self.progress)
            state = store.once("sensitivity", measure, follows_from=inspected)
            raw_ratios = {(block, name): r for block, name, r in state.record}
        ratios = floor_at_median(raw_ratios)

        where = "" if masks is not None else f", {stack.name}"
        bar = tqdm(blocks.items(), desc=f"scale search{where}", disable=not self.progress)
        for index, (name, block) in enumerate(bar):
            block_ratios = {g.inspect or "": ratios.get((name, g.inspect or "")) for g in groups[name]}
            with resident_on(self.device, block):
                worker = BlockCalibrator(
                    name, block, index, streams, masks, settings, block_ratios, selected[name], ranks
                )
                search = partial(_search, worker, groups[name], raw_ratios)
                follows_from = (name, groups[name], block_ratios, *chosen)
                state = store.once(f"{stack.step}{index:04}", search, follows_from=follows_from)
                worker.use(groups[name], state.tensors)
                self.plan.parameters += worker.plan()
                if index + 1 < len(blocks):
                    worker.advance()
            reports = [GroupReport(**record) for record in state.record]
            self.report.num_resumed += state.resumed
            self.report.groups += reports
            self.scalings[name] = worker.scalings
            if reports:
                loss_rtn, loss = (sum(getattr(r, f) for r in reports) for f in ("loss_rtn", "loss"))
                bar.set_postfix_str(f"loss {loss_rtn:.3g} -> {loss:.3g}")
        self.stacks.append(stack)
        self.blocks |= blocks
        self.groups |= groups

    def round(self, linears: Mapping[str, nn.Linear]) -> None:
        """Plan weights by plain rounding."""
        for name, linear in linears.items():
            try:
                weight = self.settings.quantizer.quantize(linear.weight.detach(), None)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            self.plan.parameters.append((linear, "weight", weight))


def _measure(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    inspected: list[ModuleName],
    batches: list[CalibrationBatch],
    answer_masks: list[Tensor],
    ranks: Ranks,
    progress: bool,
) -> State:
    with tqdm(total=len(batches), desc="modality sensitivity", disable=not progress, leave=False) as bar:
        raw = modality_sensitivity(
            model, blocks, inspected, batches, answer_masks=answer_masks, on_batch=bar.update, ranks=ranks
        )
    return State([[block, name, r] for (block, name), r in raw.items()])


def _search(worker: BlockCalibrator, groups: list[ScaleGroup], raw_ratios: Mapping[ModuleName, float]) -> State:
    reports = worker.search(groups)
    for group, report in zip(groups, reports, strict=True):
        report.sensitivity_raw = raw_ratios.get((worker.name, group.inspect or ""))
    return State([asdict(report) for report in reports], [scaling.s for scaling in worker.scalings])


def find_groups(
    owners: Mapping[nn.Parameter, list[str]],
    blocks: Mapping[str, nn.Module],
    streams: list[BlockStream],
    settings: CalibrationSettings,
    selected: Mapping[str, dict[str, nn.Linear]],
    device: torch.device | None,
) -> dict[str, list[ScaleGroup]]:
    """The scale groups of every block; blocks of the same structure are probed once.

    owners: of each parameter of the model. One that other modules own as well is never folded. Raises ValueError
    if a group of `settings.scale_groups` asks for it.
    """
    _check_disjoint(settings.scale_groups or ())
    stream = min(streams, key=_probing_cost)
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
        found = [_unshared(group, name, block, owners, settings.scale_groups is not None) for group in known[signature]]
        result[name] = [
            group
            for group in found
            if _is_scaled(group, block, settings.recipe) and any(n in selected[name] for n in group.linears)
        ]
    return result


def _probing_cost(stream: BlockStream) -> float:
    return stream.hidden.numel() if stream.hidden.shape[-2] > 1 else float("inf")


def _check_disjoint(groups: Sequence[ScaleGroup]) -> None:
    owners: dict[str, ScaleGroup] = {}
    for group in groups:
        for name in group.linears:
            if owners.setdefault(name, group) is not group:
                raise ValueError(f"{name} is in two of scale_groups: {owners[name]} and {group}; put it in one")


def _unshared(
    group: ScaleGroup, block_name: str, block: nn.Module, owners: Mapping[nn.Parameter, list[str]], explicit: bool
) -> ScaleGroup:
    """The group, without its producer if folding would change a parameter that other modules use too."""
    if group.producer is None:
        return group
    for name in (group.producer, *group.linears):
        for parameter in block.get_submodule(name).parameters(recurse=False):
            if len(owners[parameter]) > 1:
                if explicit:
                    raise ValueError(
                        f"{group} of {block_name} cannot be folded: {' and '.join(owners[parameter])} are one "
                        "parameter; untie them, or leave the group out"
                    )
                return replace(group, producer=None, fold=None, row_map=RowMap(), mixes_tokens=False)
    return group


def _is_scaled(group: ScaleGroup, block: nn.Module, recipe: Recipe) -> bool:
    if group.producer is None:
        return recipe.pre_scale_unfolded
    if recipe.norms_only and group.fold == "rows":
        return False
    if recipe.tie_shared_rows or not group.mixes_tokens:
        return True
    # The published code scales o_proj only if v_proj has the very same shape.
    return block.get_submodule(group.producer).weight.shape == block.get_submodule(group.linears[0]).weight.shape


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout), and back to each module's own mode at the end."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _selected_linears(
    blocks: Mapping[str, nn.Module],
    targets: Targets,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    beside: Mapping[str, nn.Linear],
) -> dict[str, dict[str, nn.Linear]]:
    """Block name -> {name in the block: linear to be quantized}.

    Raises ValueError if there is none, and none `beside` the blocks that a filter as `targets` has chosen instead.
    """
    filters = [f for f in (targets, filter_fn) if callable(f)]
    selected = {
        block_name: {
            name: module
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear) and all(f(module, f"{block_name}.{name}") for f in filters)
        }
        for block_name, block in blocks.items()
    }
    if not any(selected.values()) and not (callable(targets) and beside):
        names = [
            f"{b}.{n}" for b, block in blocks.items() for n, m in block.named_modules() if isinstance(m, nn.Linear)
        ]
        raise ValueError(
            f"nothing to quantize: none of the {len(names)} nn.Linear in the {len(blocks)} decoder layers passes "
            f"{'targets and filter_fn' if callable(targets) else 'filter_fn'}; it is given names like {names[0]!r}"
            if names
            else f"nothing to quantize: the {len(blocks)} decoder layers have no nn.Linear; pass blocks=[...]"
        )
    return selected


def _summarise(
    report: CalibrationReport, plan: Plan, stacks: Sequence[Stack], groups: Mapping[str, list[ScaleGroup]]
) -> None:
    for stack in stacks:
        for block_name, block in stack.blocks.items():
            selected = stack.selected[block_name]
            scaled = {name for group in groups[block_name] for name in group.linears}
            report.not_scaled += [f"{block_name}.{n}" for n in selected if n not in scaled]
            report.not_quantized += [
                f"{block_name}.{n}"
                for n, p in block.named_parameters()
                if p.ndim >= 2
                and n.removesuffix(".weight") not in selected
                and f"{block_name}.{n}".removesuffix(".weight") not in report.left_alone
            ]
    quantized = [(m, v) for m, name, v in plan.parameters if name == "weight" and hasattr(v, "quantized_nbytes")]
    report.num_linears = len(quantized)
    report.nbytes_before = sum(m.weight.numel() * m.weight.element_size() for m, _ in quantized)
    report.nbytes_after = sum(v.quantized_nbytes() for _, v in quantized)
