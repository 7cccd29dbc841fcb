"""MBQ, modality-balanced quantization: the main job, top to bottom. Start reading at `calibrate`.

    find the blocks -> show experts as linears -> run the model once, record how each block is called
    -> find the scale groups -> measure how sensitive the loss is to each modality
    -> for each block and group: search the scale, plan the fold, quantize
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

(measured in test/calibration/test_memory.py). The sensitivity pass needs less: one hidden state a block and the
activations of one block for one batch at a time, no weight gradients; and logits of the answers only.

With another `device` all of that lies on the host, and the device holds one block and the activations of one batch or
chunk: its peak depends neither on the number of blocks nor on that of samples. calibration/memory.py has the formula.
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
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from tqdm.auto import tqdm

from mbq_ao.calibration.batch import CalibrationBatch, collect_batches
from mbq_ao.calibration.block import BlockCalibrator
from mbq_ao.calibration.capture import BlockStream, capture_streams, find_blocks
from mbq_ao.calibration.experts import ExpertParameter, experts_as_linears, routers_of
from mbq_ao.calibration.fold import RowMap, ScaleGroup, Scaling
from mbq_ao.calibration.logits_check import check_logits
from mbq_ao.calibration.ranks import ALONE, Ranks
from mbq_ao.calibration.report import CalibrationReport, ExpertsReport, GroupReport
from mbq_ao.calibration.residency import Placement, computing_on, resident_on
from mbq_ao.calibration.scale_groups import BlockProber
from mbq_ao.calibration.sensitivity import ModuleName, floor_at_median, modality_sensitivity
from mbq_ao.calibration.settings import CalibrationSettings, Masks, Recipe
from mbq_ao.calibration.shared_store import SharedStore, agree
from mbq_ao.calibration.validate import check_linears, check_model, holders_of_matrices, owners_of_parameters
from mbq_ao.calibration.work_dir import State, Store, describe_data, describe_run, tensor_text


@dataclass
class Plan:
    """New parameters for some modules, to be set all at once."""

    parameters: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)

    def apply(self, model: nn.Module, device: torch.device | None = None, ranks: Ranks = ALONE) -> None:
        """Set every parameter and move the model to `device` (None: leave it where it is), on all ranks, or do nothing.

        An exception in between (out of memory, Ctrl-C) puts the old parameters back, where they were.
        Raises ValueError if other ranks have other parameters.
        """
        names = {module: name for name, module in model.named_modules()}
        agree(
            ranks,
            lambda: {f"{names[module]}.{name}": tensor_text(value) for module, name, value in self.parameters},
            "their devices or options differ (`vision`?); nothing was set",
        )
        homes = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
        tables = [(table, dict(table)) for m in model.modules() for table in (m._parameters, m._buffers)]
        try:
            for module, name, value in self.parameters:
                before = module._parameters[name]
                if before is not None:
                    value = value.to(before.device)
                trainable = before is not None and before.requires_grad and not is_traceable_wrapper_subclass(value)
                module._parameters[name] = nn.Parameter(value, requires_grad=trainable)
            if device is not None:
                model.to(device)
            ranks.each(None)  # raises unless all have come this far
        except BaseException:
            for table, entries in tables:
                table.update(entries)
            for tensor, data in homes:
                if not is_traceable_wrapper_subclass(tensor):  # `Module.to` makes new parameters of those
                    tensor.data = data
            raise


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
    """Find the scales and quantize every selected linear of the decoder, without changing the model.

    device: where to compute; the decoder layers are copied there one at a time. None: where they are.
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
    blocks = find_blocks(model, settings.blocks)
    placement = Placement.of(model, device)
    batches = collect_batches(model, calib_data, placement.host)
    with evaluating(model), experts_as_linears(model, blocks, batches, placement.device) as experts:
        plan, report = _calibrate(
            model, blocks, experts, batches, settings, filter_fn, placement, progress, store or Store(), ranks
        )
    report.seconds = time.perf_counter() - begin
    return plan, report


def _calibrate(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    experts: Mapping[str, list[ExpertParameter]],
    batches: list[CalibrationBatch],
    settings: CalibrationSettings,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    placement: Placement,
    progress: bool,
    store: Store,
    ranks: Ranks,
) -> tuple[Plan, CalibrationReport]:
    routers = {name: routers_of(block, experts[name]) for name, block in blocks.items()}
    selected = _selected_linears(blocks, experts, routers, filter_fn)
    owners = owners_of_parameters(model)
    check_linears(selected, owners)
    ranks.split([batch.num_tokens for batch in batches])
    own, progress = ranks.mine(batches), progress and ranks.is_first
    store = store if ranks.size == 1 else SharedStore(ranks, store)
    store.check(lambda: describe_run(model, batches, settings, selected, device=placement.device, progress=progress))

    plan, report = Plan(), CalibrationReport(settings={})
    with computing_on(placement.device, model, blocks.values()):
        with report.timed("capture"):
            streams = capture_streams(model, blocks, own, placement)
        with report.timed("scale groups"):
            find = partial(find_groups, owners, blocks, streams, settings, selected)
            groups, not_called = ranks.on_one(find, keys=[_probing_cost(stream) for stream in streams])
        selected = {b: {n: m for n, m in ms.items() if n not in not_called[b]} for b, ms in selected.items()}
        masks = Masks.of(batches, settings.recipe)
        balance = settings.balance and any(b.vision.any() for b in batches)
        raw_ratios: dict[ModuleName, float] = {}
        if balance:
            inspected = list(dict.fromkeys((name, g.measured_at) for name, gs in groups.items() for g in gs))
            measure = partial(
                _measure, model, blocks, inspected, own, ranks.mine(masks.answer), ranks, placement, progress
            )
            with report.timed("sensitivity"):
                state = store.once("sensitivity", measure, follows_from=inspected)
            raw_ratios = {(block, name): r for block, name, r in state.record}
        ratios = floor_at_median(raw_ratios)

        all_scalings: dict[str, list[Scaling]] = {}
        bar = tqdm(blocks.items(), desc="scale search", disable=not progress)
        for index, (name, block) in enumerate(bar):
            block_began = time.perf_counter()
            block_ratios = {g.measured_at: ratios.get((name, g.measured_at)) for g in groups[name]}
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
                    experts[name],
                    ranks,
                    placement,
                )
                search = partial(_search, worker, groups[name], raw_ratios)
                state = store.once(f"block_{index:04}", search, follows_from=(name, groups[name], block_ratios))
                worker.use(groups[name], state.tensors)
                plan.parameters += [(module, n, placement.keep(value)) for module, n, value in worker.plan()]
                if index + 1 < len(blocks):
                    worker.advance()
            reports = [GroupReport(**record) for record in state.record["groups"]]
            report.experts += [ExpertsReport(**record) for record in state.record["experts"]]
            report.num_resumed += state.resumed
            report.groups += reports
            report.block_seconds[name] = time.perf_counter() - block_began
            all_scalings[name] = [Scaling(scaling.group, placement.keep(scaling.s)) for scaling in worker.scalings]
            if reports:
                loss_rtn, loss = (sum(getattr(r, f) for r in reports) for f in ("loss_rtn", "loss"))
                bar.set_postfix_str(f"loss {loss_rtn:.3g} -> {loss:.3g}")
        with report.timed("logits check"):
            report.logits_error = check_logits(model, blocks, all_scalings, batches, placement)

    _summarise(report, plan, blocks, experts, routers, groups, selected)
    report.calibration = describe_data(batches)
    return plan, report


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


def _search(worker: BlockCalibrator, groups: list[ScaleGroup], raw_ratios: Mapping[ModuleName, float]) -> State:
    reports = worker.search(groups)
    for group, report in zip(groups, reports, strict=True):
        report.sensitivity_raw = raw_ratios.get((worker.name, group.measured_at))
    record = {"groups": [asdict(r) for r in reports], "experts": [asdict(r) for r in worker.experts_reports()]}
    return State(record, [scaling.s for scaling in worker.scalings])


def find_groups(
    owners: Mapping[nn.Parameter, list[str]],
    blocks: Mapping[str, nn.Module],
    streams: list[BlockStream],
    settings: CalibrationSettings,
    selected: Mapping[str, dict[str, nn.Linear]],
) -> tuple[dict[str, list[ScaleGroup]], dict[str, list[str]]]:
    """The scale groups of every block, and its linears that cannot be quantized as they are not called.

    Blocks of the same structure are probed once.
    owners: of each parameter of the model. One that other modules own as well is never folded. Raises ValueError
    if a group of `settings.scale_groups` asks for it.
    """
    _check_disjoint(settings.scale_groups or ())
    stream = min(streams, key=_probing_cost)
    known: dict[tuple[Any, ...], tuple[list[ScaleGroup], list[str]]] = {}
    result, not_called = {}, {}
    for index, (name, block) in enumerate(blocks.items()):
        signature = (
            type(block),
            tuple((n, type(m), getattr(getattr(m, "weight", None), "shape", None)) for n, m in block.named_modules()),
        )
        if signature not in known:
            prober = BlockProber(block, stream.call(index, stream.between(index, stream.hidden)))
            given = settings.scale_groups
            found = prober.find_all() if given is None else [prober.complete(group) for group in given]
            known[signature] = found, prober.read_past_forward()
        groups, not_called[name] = known[signature]
        found = [_unshared(group, name, block, owners, settings.scale_groups is not None) for group in groups]
        result[name] = [
            group
            for group in found
            if _is_scaled(group, block, settings.recipe) and any(n in selected[name] for n in group.linears)
        ]
    return result, not_called


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
    experts: Mapping[str, list[ExpertParameter]],
    routers: Mapping[str, list[str]],
    filter_fn: Callable[[nn.Module, str], bool] | None,
) -> dict[str, dict[str, nn.Linear]]:
    """Block name -> {name in the block: linear to be quantized}.

    Of experts in one parameter all or none: filter_fn gets the first of them, and the parameter's name.
    """
    passing: dict[str, dict[str, nn.Linear]] = {name: {} for name in blocks}
    names = []
    for block_name, block in blocks.items():
        parameter_of = {n: e.name for e in experts[block_name] for n in e.linear_names()}
        passes: dict[str, bool] = {}
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and name not in routers[block_name]:
                shown = parameter_of.get(name, name)
                if shown not in passes:
                    names.append(f"{block_name}.{shown}")
                    passes[shown] = filter_fn is None or filter_fn(module, names[-1])
                if passes[shown]:
                    passing[block_name][name] = module
    if not any(passing.values()):
        raise ValueError(
            f"nothing to quantize: none of the {len(names)} nn.Linear in the {len(blocks)} decoder layers passes "
            f"filter_fn; it is given names like {names[0]!r}"
            if names
            else f"nothing to quantize: the {len(blocks)} decoder layers have no nn.Linear, but "
            f"{holders_of_matrices(blocks)}; replace those by nn.Linear, or pass blocks=[...] with other layers"
        )
    return passing


def _summarise(
    report: CalibrationReport,
    plan: Plan,
    blocks: Mapping[str, nn.Module],
    experts: Mapping[str, list[ExpertParameter]],
    routers: Mapping[str, list[str]],
    groups: Mapping[str, list[ScaleGroup]],
    selected: Mapping[str, dict[str, nn.Linear]],
) -> None:
    report.nbytes_after = sum(v.quantized_nbytes() for _, _, v in plan.parameters if hasattr(v, "quantized_nbytes"))
    for block_name, block in blocks.items():
        parameter_of = {n: e.name for e in experts[block_name] for n in e.linear_names()}
        weights = {name.removesuffix(".weight"): p for name, p in block.named_parameters() if p.ndim >= 2}
        scaled = {name for group in groups[block_name] for name in group.linears}
        left = {
            "not_scaled": [n for n in selected[block_name] if n not in scaled],
            "not_quantized": [n for n in weights if n not in selected[block_name] and n not in routers[block_name]],
            "routers": routers[block_name],
        }
        for field_name, names in left.items():
            shown = dict.fromkeys(parameter_of.get(n, n) for n in names)
            getattr(report, field_name).extend(f"{block_name}.{n}" for n in shown)
        report.num_linears += len(selected[block_name])
        report.nbytes_before += sum(m.weight.numel() * m.weight.element_size() for m in selected[block_name].values())
