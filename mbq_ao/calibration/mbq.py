"""MBQ, modality-balanced quantization: the main job, top to bottom. Start reading at `calibrate`.

    find the blocks: the decoder's layers and, before them, what `targets` adds (stacks.py)
    -> show experts as linears
    -> for each stack of blocks: run the model once, record how each block is called
       -> find the scale groups; where modalities are weighed, measure how sensitive the loss is to each
       -> for each block: search its groups' scales and plan the folds, or fit its weights ("best", "gptq"); quantize
    -> check that folding alone leaves the logits unchanged -> put the plan into the model

Source: "MBQ: Modality-Balanced Quantization for Large Vision-Language Models", arXiv 2412.19509.

`calibrate` never changes the model. It returns a Plan, whose `apply` sets all new parameters or none,
so a failure or Ctrl-C at any point leaves the model as it was; with a work_dir the next call goes on from there
(calibration/work_dir.py). Several processes may share the batches (calibration/ranks.py).
The price is that the packed weights lie beside the original ones until the end: 3.25 bits a weight for w3a16 at group
size 128, 4 for w4a8.

Memory beyond the model, at the peak at most, where everything is computed where it lies (device=None):

    the packed weights of all blocks
    + 3.5 fp32 copies of one block: it is copied to be probed, and folded or fake-quantized beside that
    + 4.5 times the hidden states of all calibration tokens, 10 times with error propagation: the stream, and the
      inputs, targets and outputs of one group at a time
    + in a mixture of experts 3.5 times the inputs of one parameter's experts: tokens, times experts a token, times its
      in_features

(measured in test/calibration/test_memory.py). recipe="best" and "gptq" have no targets and outputs, but hold 16 K^2
bytes, "best" at most 8 K N more, for linears of K inputs and N outputs. Of several stacks one at a time counts, with
its own tokens. The sensitivity pass needs less: one hidden state a block and the activations of one block for one batch
at a time, no weight gradients; and logits of the answers only.

With another `device` all of that lies on the host, and the device holds one block and the activations of one batch or
chunk: its peak depends neither on the number of blocks nor on that of samples. calibration/memory.py has the formula.
"""

from __future__ import annotations

import json
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
from mbq_ao.calibration.experts import ExpertParameter, experts_as_linears, routers_of
from mbq_ao.calibration.fitting import fit_weights
from mbq_ao.calibration.fold import ScaleGroup, Scaling
from mbq_ao.calibration.groups_of_blocks import find_groups, probing_cost
from mbq_ao.calibration.logits_check import check_logits
from mbq_ao.calibration.plan import Plan
from mbq_ao.calibration.ranks import ALONE, Ranks
from mbq_ao.calibration.report import CalibrationReport, ExpertsReport, FitReport, GroupReport
from mbq_ao.calibration.residency import Placement, computing_on, resident_on
from mbq_ao.calibration.selection import linears_beside, selected_linears
from mbq_ao.calibration.sensitivity import ModuleName, floor_at_median, modality_sensitivity
from mbq_ao.calibration.settings import CalibrationSettings, Masks
from mbq_ao.calibration.shared_store import SharedStore, agree
from mbq_ao.calibration.stacks import Beside, Stack, capture_passes, find_stacks, listed_blocks, other_weights
from mbq_ao.calibration.validate import check_linears, check_model, owners_of_parameters
from mbq_ao.calibration.work_dir import State, Store, describe_data, describe_run
from mbq_ao.safetensors_format import flatten_weights, unflatten_weights


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
    check_model(model, device)
    layers = find_blocks(model, settings.blocks)
    placement = Placement.of(model, device)
    batches = collect_batches(model, calib_data, placement.host)
    with evaluating(model), experts_as_linears(model, layers, batches, placement.device) as experts:
        plan, report = _calibrate(
            model, layers, experts, batches, settings, filter_fn, placement, progress, store or Store(), ranks
        )
    report.seconds = time.perf_counter() - begin
    return plan, report


def _calibrate(
    model: nn.Module,
    layers: dict[str, nn.Module],
    experts: Mapping[str, list[ExpertParameter]],
    batches: list[CalibrationBatch],
    settings: CalibrationSettings,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    placement: Placement,
    progress: bool,
    store: Store,
    ranks: Ranks,
) -> tuple[Plan, CalibrationReport]:
    first_layer, targets = next(iter(layers.values())), settings.targets
    linears = linears_beside(model, layers, targets, filter_fn)
    routers = {name: routers_of(block, experts[name]) for name, block in layers.items()}
    selected = selected_linears(layers, experts, routers, targets, filter_fn, linears)
    decoder = Stack(layers, selected, step="block_", experts=experts, routers=routers)
    owners = owners_of_parameters(model)
    check_linears({"": linears, **selected}, owners)
    ranks.split([batch.num_tokens for batch in batches])
    progress = progress and ranks.is_first
    store = store if ranks.size == 1 else SharedStore(ranks, store)
    agree(ranks, lambda: dict.fromkeys(linears, ""), "call quantize_ with the same targets and filter_fn on each")
    store.check(lambda: describe_run(model, batches, settings, selected, device=placement.device, progress=progress))

    work, beside = _Work(model, batches, settings, owners, placement, store, progress), Beside()
    report = work.report
    with computing_on(placement.device, model, [*layers.values(), *listed_blocks(model, linears).values()]):
        if linears:
            beside = find_stacks(model, linears, first_layer, batches, targets, ranks, placement)
        for stack in beside.stacks:
            passes = ranks.of_parts(stack.passes)
            capture = partial(capture_passes, model, stack, batches, first_layer, passes, placement)
            work.calibrate(stack, capture, None, passes)
        work.round({name: linears[name] for name in beside.rounded})
        if any(selected.values()):
            capture = partial(capture_streams, model, layers, ranks.mine(batches), placement)
            work.calibrate(decoder, capture, Masks.of(batches, settings.recipe), ranks)
        outputs = [list(stack.blocks)[-1] for stack in beside.stacks]
        seeing = [batch for i, batch in enumerate(batches) if any(stack.passes[i] for stack in beside.stacks)]
        with report.timed("logits check"):
            report.logits_error = check_logits(model, work.blocks, work.scalings, seeing or batches, placement, outputs)

    report.rounded, report.left_alone = beside.rounded, beside.left_alone
    _summarise(report, work.plan, work.stacks, work.groups, work.fitted)
    if linears:
        report.stacks = {stack.name: list(stack.blocks) for stack in work.stacks}
    if targets == "decoder+vision":
        report.not_quantized += other_weights(model, layers, beside)
    report.calibration = describe_data(batches)
    return work.plan, report


@dataclass
class _Work:
    """What all stacks of one calibration have in common, and what was found for those that are done."""

    model: nn.Module
    batches: list[CalibrationBatch]
    settings: CalibrationSettings
    owners: Mapping[nn.Parameter, list[str]]
    placement: Placement
    store: Store
    progress: bool
    plan: Plan = field(default_factory=Plan)
    report: CalibrationReport = field(default_factory=lambda: CalibrationReport(settings={}))
    stacks: list[Stack] = field(default_factory=list)
    blocks: dict[str, nn.Module] = field(default_factory=dict)
    groups: dict[str, list[ScaleGroup]] = field(default_factory=dict)
    scalings: dict[str, list[Scaling]] = field(default_factory=dict)
    fitted: dict[str, list[str]] = field(default_factory=dict)

    def calibrate(
        self, stack: Stack, capture: Callable[[], list[BlockStream]], masks: Masks | None, ranks: Ranks
    ) -> None:
        """Search the scales of a stack and plan its new parameters, block by block.

        masks: of the text's tokens. None beside the decoder: all tokens count alike there, as none is an answer, and
        `scale_groups`, whose names are a decoder layer's, are not meant. ranks: who shares what `capture` returns.
        """
        model, blocks, selected, report = self.model, stack.blocks, stack.selected, self.report
        store, placement, progress = self.store, self.placement, self.progress
        settings = replace(self.settings, scale_groups=None) if masks is None else self.settings
        # What the search depends on beyond the fingerprint, which knows the decoder's linears only.
        chosen = [] if masks is not None else [{name: list(linears) for name, linears in selected.items()}]
        with report.timed("capture"):
            streams = capture()
            if settings.follows_error and self.plan.parameters:
                chosen.append({name: list(linears) for done in self.stacks for name, linears in done.selected.items()})
                with self.plan.in_place():
                    for stream, behind in zip(streams, capture(), strict=True):
                        stream.start_behind(behind)
        with report.timed("scale groups"):
            find = partial(find_groups, self.owners, blocks, streams, settings, selected)
            groups, not_called, measured_at = ranks.on_one(find, keys=[probing_cost(stream) for stream in streams])
        selected = {b: {n: m for n, m in ms.items() if n not in not_called[b]} for b, ms in selected.items()}
        stack = replace(stack, selected=selected)
        raw_ratios: dict[ModuleName, float] = {}
        if masks is not None and settings.balance and any(b.vision.any() for b in self.batches):
            inspected = list(dict.fromkeys((name, at) for name, of in measured_at.items() for at in of.values()))
            own, answers = ranks.mine(self.batches), ranks.mine(masks.answer)
            measure = partial(_measure, model, blocks, inspected, own, answers, ranks, placement, progress)
            with report.timed("sensitivity"):
                state = store.once("sensitivity", measure, follows_from=inspected)
            raw_ratios = {(block, name): r for block, name, r in state.record}
        ratios = floor_at_median(raw_ratios) if settings.recipe.floored else raw_ratios

        where = "" if masks is not None else f", {stack.name}"
        doing = "scale search" if settings.recipe.scaled else "fitting weights"
        bar = tqdm(blocks.items(), desc=f"{doing}{where}", disable=not progress)
        for index, (name, block) in enumerate(bar):
            block_began = time.perf_counter()
            block_ratios = {at: ratios.get((name, at)) for at in measured_at[name].values()}
            with resident_on(placement.device, block):
                worker = BlockCalibrator(
                    name,
                    block,
                    index,
                    streams,
                    masks,
                    settings,
                    block_ratios,
                    selected[name],
                    stack.experts.get(name, []),
                    ranks,
                    placement,
                )
                search = partial(_search, worker, groups[name], raw_ratios, measured_at[name])
                follows_from = (name, groups[name], block_ratios, *chosen)
                state = store.once(f"{stack.step}{index:04}", search, follows_from=follows_from)
                worker.use(groups[name], *_found(state, len(groups[name])))
                self.plan.parameters += [(module, n, placement.keep(value)) for module, n, value in worker.plan()]
                if index + 1 < len(blocks):
                    worker.advance()
            self.fitted[name] = list(worker.fitted)
            reports = [GroupReport(**record) for record in state.record["groups"]]
            report.experts += [ExpertsReport(**record) for record in state.record["experts"]]
            report.num_resumed += state.resumed
            fits = [FitReport(**record) for record in state.record.get("fits", [])]
            report.groups += reports
            report.fits += fits
            report.block_seconds[name] = time.perf_counter() - block_began
            self.scalings[name] = [Scaling(scaling.group, placement.keep(scaling.s)) for scaling in worker.scalings]
            if reports or fits:
                loss_rtn, loss = (sum(getattr(r, f) for r in fits or reports) for f in ("loss_rtn", "loss"))
                bar.set_postfix_str(f"loss {loss_rtn:.3g} -> {loss:.3g}")
        self.stacks.append(stack)
        self.blocks |= blocks
        self.groups |= groups

    def round(self, linears: Mapping[str, nn.Linear]) -> None:
        """Plan weights by plain rounding."""
        for name, linear in linears.items():
            with resident_on(self.placement.device, linear):
                try:
                    weight = self.settings.quantizer.quantize(linear.weight.detach(), None)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
            self.plan.parameters.append((linear, "weight", self.placement.keep(weight)))
            self.report.num_linears += 1
            self.report.nbytes_before += linear.weight.numel() * linear.weight.element_size()


def _measure(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    inspected: list[ModuleName],
    batches: list[CalibrationBatch],
    answer_masks: list[Tensor],
    ranks: Ranks,
    placement: Placement,
    progress: bool,
) -> State:
    with tqdm(total=len(batches), desc="modality sensitivity", disable=not progress, leave=False) as bar:
        raw = modality_sensitivity(
            model,
            blocks,
            inspected,
            batches,
            answer_masks=answer_masks,
            on_batch=bar.update,
            ranks=ranks,
            placement=placement,
        )
    return State([[block, name, r] for (block, name), r in raw.items()])


def _search(
    worker: BlockCalibrator,
    groups: list[ScaleGroup],
    raw_ratios: Mapping[ModuleName, float],
    measured_at: Mapping[str, str],
) -> State:
    reports = worker.search(groups)
    for group, report in zip(groups, reports, strict=True):
        report.sensitivity_raw = raw_ratios.get((worker.name, group.measured_at))
    record: dict[str, Any] = {
        "groups": [asdict(r) for r in reports],
        "experts": [asdict(r) for r in worker.experts_reports()],
    }
    scales = [scaling.s for scaling in worker.scalings]
    if not worker.settings.recipe.fits_weights:
        return State(record, scales)
    fitted, fits = fit_weights(worker, measured_at, raw_ratios)
    plain, metadata = flatten_weights(fitted)
    record |= {"fits": [asdict(fit) for fit in fits], "fitted": [list(plain), metadata["mbq_weights"]]}
    return State(record, [*scales, *plain.values()])


def _found(state: State, num_groups: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Scales, one a group, and fitted weights by the linear's name: what `_search` put together."""
    names, weights = state.record.get("fitted", ([], "{}"))
    plain = dict(zip(names, state.tensors[num_groups:], strict=True))
    return state.tensors[:num_groups], unflatten_weights(plain, json.loads(weights), "work_dir")


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


def _summarise(
    report: CalibrationReport,
    plan: Plan,
    stacks: Sequence[Stack],
    groups: Mapping[str, list[ScaleGroup]],
    fitted: Mapping[str, Sequence[str]],
) -> None:
    report.nbytes_after = sum(v.quantized_nbytes() for _, _, v in plan.parameters if hasattr(v, "quantized_nbytes"))
    for stack, block_name in [(of, name) for of in stacks for name in of.blocks]:
        block = stack.blocks[block_name]
        selected, routers = stack.selected[block_name], stack.routers.get(block_name, [])
        parameter_of = {n: e.name for e in stack.experts.get(block_name, ()) for n in e.linear_names()}
        weights = {name.removesuffix(".weight"): p for name, p in block.named_parameters() if p.ndim >= 2}
        scaled = {name for group in groups[block_name] for name in group.linears}
        done = {parameter_of.get(name, name) for name in fitted[block_name]}  # an expert without tokens is told apart
        named = {*selected, *routers, *(n.removeprefix(f"{block_name}.") for n in report.left_alone)}
        left = {
            "not_scaled": [n for n in selected if n not in scaled and parameter_of.get(n, n) not in done],
            "not_quantized": [n for n in weights if n not in named],
            "routers": routers,
        }
        for field_name, names in left.items():
            shown = dict.fromkeys(parameter_of.get(n, n) for n in names)
            getattr(report, field_name).extend(f"{block_name}.{n}" for n in shown)
        report.num_linears += len(selected)
        report.nbytes_before += sum(m.weight.numel() * m.weight.element_size() for m in selected.values())
