"""One decoder layer: search the scales of its groups, plan its new parameters, move the streams past it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from mbq_ao.calibration.activation_peaks import max_abs, mean_abs
from mbq_ao.calibration.capture import BlockStream, ModuleCall, first_tensor, hooked
from mbq_ao.calibration.experts import ExpertLinear, ExpertParameter
from mbq_ao.calibration.fold import ScaleGroup, Scaling, activation_scales, folded_parameters
from mbq_ao.calibration.ranks import ALONE, Ranks
from mbq_ao.calibration.report import ExpertsReport, GroupReport
from mbq_ao.calibration.residency import HERE, Placement
from mbq_ao.calibration.routing import ExpertRows, common, expert_rows
from mbq_ao.calibration.scale_search import (
    Example,
    SearchResult,
    grid_scales,
    search_scale,
    smooth_scales,
    token_weights,
)
from mbq_ao.calibration.settings import CalibrationSettings, Masks

FEWEST_TOKENS = 1  # an expert that fewer tokens weigh in for is rounded plainly


class BlockCalibrator:
    """Searches the groups of one block on the streams at its input. The block is not changed.

    streams: of the batches that this rank runs. masks: of all batches; None where all tokens count alike, which is not
    a matter of the text's tokens (a vision tower).
    """

    def __init__(
        self,
        name: str,
        block: nn.Module,
        index: int,
        streams: list[BlockStream],
        masks: Masks | None,
        settings: CalibrationSettings,
        ratios: Mapping[str, float | None],
        linears: dict[str, nn.Linear],
        experts: list[ExpertParameter],
        ranks: Ranks = ALONE,
        placement: Placement = HERE,
    ) -> None:
        self.name, self.block, self.index, self.streams = name, block, index, streams
        self.masks, self.settings, self.ratios, self.linears = masks, settings, ratios, linears
        self.experts = {e.name: e for e in experts}
        self.num_tokens: dict[str, list[int]] = {}  # of a module with experts, that weigh in each expert's own search
        self.ranks, self.placement, self.scalings = ranks, placement, list[Scaling]()
        self.fitted: dict[str, Tensor] = {}  # linears whose weights are found, not just rounded

    def search(self, groups: list[ScaleGroup]) -> list[GroupReport]:
        """Find one scale a group. All groups are searched on original weights, in order."""
        reports: list[GroupReport] = []
        for parameter, of_parameter in groupby(groups, key=self._expert_parameter):
            if parameter is None:
                reports += [self._search_group(group) for group in of_parameter]
            else:
                reports += self._search_experts(self.experts[parameter], list(of_parameter))
        return reports

    def _expert_parameter(self, group: ScaleGroup) -> str | None:
        """The parameter in which the group's only linear is an expert."""
        parameter = group.linears[0].rpartition(".")[0]
        return parameter if len(group.linears) == 1 and parameter in self.experts else None

    def use(self, groups: list[ScaleGroup], scales: list[Tensor], fitted: Mapping[str, Tensor]) -> None:
        """Go on with these scales, one a group, (in_features,) each, and weights: those of `search` and
        `fit_weights`, or of an earlier one."""
        self.scalings = [
            Scaling(group, s.to(self.block.get_submodule(group.linears[0]).weight.device))
            for group, s in zip(groups, scales, strict=True)
        ]
        self.fitted = {name: w.to(self.linears[name].weight.device) for name, w in fitted.items()}

    @torch.no_grad()
    def _search_group(self, group: ScaleGroup) -> GroupReport:
        calls = self._capture(group, {}, distorted=False)
        targets = [seen.output for seen in calls]
        if self.settings.propagate_error:
            del calls  # before the next ones are recorded
            # The first group sees the unquantized block on the distorted stream, the others the block quantized so far.
            calls = self._capture(group, self._served_so_far(), distorted=True)
        masks = self.masks
        if masks is None:
            masks = Masks.even(self.ranks.gather([target.shape[:-1] for target in targets]), targets[0].device)
        weights = token_weights(
            masks.counted,
            masks.answer,
            masks.vision,
            ratio=self.ratios[group.measured_at],
            loss=self.settings.loss,
            num_channels=targets[0].shape[-1],
        )
        examples = [
            Example(seen.call, target, weight)
            for seen, target, weight in zip(calls, targets, self.ranks.mine(weights), strict=True)
        ]
        return self._search_on(group, examples, [seen.x for seen in calls], self.ranks.mine(masks.counted))

    @torch.no_grad()
    def _search_experts(self, parameter: ExpertParameter, groups: list[ScaleGroup]) -> list[GroupReport]:
        """Groups of one expert each: their inputs are recorded together."""
        rows, tokens = self._expert_rows(parameter)
        self._count_tokens(parameter, tokens)
        reports = []
        for group in groups:
            e = int(group.linears[0].rpartition(".")[2])
            linear = parameter.linears[e]
            counted, weights = self._expert_weights(parameter, tokens, e, self.ratios[group.measured_at])
            if (num_tokens := _num_weighed(weights)) >= FEWEST_TOKENS:
                own = self.ranks.mine(weights)
                if self.settings.route_weighted:
                    power = 1 if self.settings.loss == "mae" else 2
                    own = [w * clean.share[e].abs() ** power for w, (clean, _) in zip(own, rows, strict=True)]
                examples = [
                    Example(ModuleCall((seen.x[e],), {}), self._kept_output(linear, clean.x[e]), weight)
                    for (clean, seen), weight in zip(rows, own, strict=True)
                ]
                report = self._search_on(group, examples, [seen.x[e] for _, seen in rows], self.ranks.mine(counted))
            else:
                plain = torch.ones(linear.in_features, device=linear.weight.device)
                report = self._report(group, SearchResult(plain, 0.0, [0.0], 0))
            reports.append(replace(report, num_tokens=num_tokens))
        return reports

    def _expert_rows(
        self, parameter: ExpertParameter
    ) -> tuple[list[tuple[ExpertRows, ExpertRows]], list[list[Tensor]]]:
        """Of each batch that this rank runs (what the target is computed from, what the candidates get), row by row the
        same tokens; and of all batches the numbers of each expert's tokens.

        Empty lists if it cannot be told which tokens the experts get.
        """
        rows: list[tuple[ExpertRows, ExpertRows] | None] = []
        served = self._served_so_far() if self.settings.propagate_error else {}
        record = partial(expert_rows, self.block, experts=list(self.experts.values()), wanted=parameter)
        for stream in self.streams:
            clean = record(self.call(stream, distorted=False), {}, with_shares=self.settings.route_weighted)
            clean = clean and clean.kept(self.placement)
            seen = clean
            if self.settings.propagate_error:
                # Errors before the router send some tokens elsewhere; those have no target.
                seen = record(self.call(stream, distorted=True), served, with_shares=False)
                seen = seen and seen.kept(self.placement)
            if clean is None or seen is None:
                rows.append(None)
            else:
                rows.append((clean, seen) if seen is clean else common(clean, seen))
        tokens = self.ranks.gather([of_batch and of_batch[0].tokens for of_batch in rows])
        if any(of_batch is None for of_batch in tokens):
            return [], []
        return [r for r in rows if r is not None], [t for t in tokens if t is not None]

    def _kept_output(self, linear: nn.Module, x: Tensor) -> Tensor:
        return self.placement.keep(linear(self.placement.fetch(x)))

    def _expert_weights(
        self, parameter: ExpertParameter, tokens: list[list[Tensor]], e: int, ratio: float | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of all batches: which tokens of expert e are counted, and their weights in the loss, (n,) fp32."""

        assert self.masks is not None  # experts are looked for in the decoder alone

        def of_expert(masks: list[Tensor]) -> list[Tensor]:
            return [mask.flatten()[of_batch[e]] for mask, of_batch in zip(masks, tokens, strict=bool(tokens))]

        counted = of_expert(self.masks.counted)
        weights = token_weights(
            counted,
            of_expert(self.masks.answer),
            of_expert(self.masks.vision),
            ratio=ratio,
            loss=self.settings.loss,
            num_channels=parameter.linears[e].out_features,
        )
        return counted, weights

    def _count_tokens(self, parameter: ExpertParameter, tokens: list[list[Tensor]]) -> None:
        ratio = next((r for r in self.ratios.values() if r is not None), None)
        weights = [self._expert_weights(parameter, tokens, e, ratio)[1] for e in range(len(parameter.linears))]
        self.num_tokens[parameter.owner_name] = [_num_weighed(w) for w in weights] if tokens else []

    def experts_reports(self) -> list[ExpertsReport]:
        """One for each module of experts of which something is quantized."""
        selected = {name.rpartition(".")[0] for name in self.linears}
        for parameter in self.experts.values():
            if parameter.name in selected and parameter.owner_name not in self.num_tokens:
                self._count_tokens(parameter, self._expert_rows(parameter)[1])
        return [ExpertsReport(self.name, name, tokens) for name, tokens in self.num_tokens.items()]

    def _search_on(
        self, group: ScaleGroup, examples: list[Example], inputs: list[Tensor], counted: list[Tensor]
    ) -> GroupReport:
        """inputs: x of the group, one a batch, and counted: which of its tokens make the statistic."""
        inspect = group.inspect or ""
        prefix = f"{inspect}." if inspect else ""
        originals = {n.removeprefix(prefix) if n != inspect else "": self.block.get_submodule(n) for n in group.linears}
        candidates = {f"{n}.weight" if n else "weight": m.weight for n, m in originals.items() if self._is_selected(m)}

        def candidate(s: Tensor) -> dict[str, Tensor]:
            return {n: self.settings.quantizer.stand_in(w, s) for n, w in candidates.items()}

        alpha = self.settings.recipe.smooth_alpha
        if alpha is None:
            statistic = group.row_map.tie(mean_abs(inputs, counted, self.ranks, self.placement))
            scales = grid_scales(statistic, self.settings.n_grid)
        else:
            peak = max_abs(inputs, counted, self.ranks, self.placement)
            scales = smooth_scales(peak, list(candidates.values()), alpha)
        module = self.block.get_submodule(inspect)
        try:
            found = search_scale(
                module,
                examples,
                scales,
                candidate,
                loss=self.settings.loss,
                choose=alpha is None,
                ranks=self.ranks,
                placement=self.placement,
                at_once=self._scales_at_once(list(candidates.values())),
            )
        except ValueError as error:
            raise ValueError(f"{self.name}, group {', '.join(group.linears)}: {error}") from error
        return self._report(group, found)

    def _report(self, group: ScaleGroup, found: SearchResult) -> GroupReport:
        self.scalings.append(Scaling(group, found.s))
        return GroupReport(
            block=self.name,
            producer=group.producer,
            linears=self.shown(group.linears),
            fold=group.fold or "act_pre_scale",
            alpha=found.alpha,
            losses=found.losses,
            loss_rtn=found.losses[0],
            loss=found.losses[found.index],
            sensitivity=self.ratios[group.measured_at],
        )

    def _scales_at_once(self, weights: list[Tensor]) -> int:
        """How many scales are tried on one example: while examples come from the host, as many as two blocks hold."""
        if self.placement.device is None:
            return 1
        return max(1, 2 * sum(p.nbytes for p in self.block.parameters()) // sum(w.nbytes for w in weights))

    def shown(self, linears: Sequence[str]) -> list[str]:
        """All experts of a parameter by its name."""
        together = {n: e.name for e in self.experts.values() for n in e.linear_names()} if len(linears) > 1 else {}
        return list(dict.fromkeys(together.get(name, name) for name in linears))

    def _is_selected(self, module: nn.Module) -> bool:
        return any(module is linear for linear in self.linears.values())

    def _capture(self, group: ScaleGroup, parameters: dict[str, Tensor], *, distorted: bool) -> list[Seen]:
        """Run the block on every batch and record the call of the compared module and the group's input."""
        seen = []
        for stream in self.streams:
            recorder = Seen()
            inspected = self.block.get_submodule(group.inspect or "")
            reader = self.block.get_submodule(group.linears[0])
            record_x = recorder.record_input
            if isinstance(reader, ExpertLinear):  # which reads a part of what its producer returns
                reader, record_x = self.block.get_submodule(group.producer or ""), recorder.record_output
            handles = (
                module.register_forward_hook(hook, with_kwargs=with_kwargs)
                for module, hook, with_kwargs in (
                    (inspected, recorder.record_call, True),
                    (reader, record_x, False),
                )
            )
            with hooked(handles):
                self.call(stream, distorted).run(self.block, parameters)
            seen.append(recorder.kept(self.placement))
        return seen

    def call(self, stream: BlockStream, distorted: bool) -> ModuleCall:
        """The block's call on a stream; distorted: with what the blocks before got wrong, if the stream carries it."""
        if distorted and stream.distorted is not None:
            return (stream.behind or stream).call(self.index, stream.distorted)
        return stream.call(self.index, stream.hidden)

    def _served_so_far(self) -> dict[str, Tensor]:
        return self.served_parameters() if self.scalings else {}

    @torch.no_grad()
    def served_parameters(self) -> dict[str, Tensor]:
        """The block's parameters as it will serve: folded so far, and stand-ins for all its quantized weights."""
        parameters = folded_parameters(self.block, self.scalings)
        pre_scaled = activation_scales(self.scalings)
        for name, linear in self.linears.items():
            weight = parameters.get(f"{name}.weight", linear.weight)
            found = self.fitted.get(name)
            parameters[f"{name}.weight"] = (
                self.settings.quantizer.stand_in(weight, pre_scaled.get(name)) if found is None else found
            )
        return parameters

    @torch.no_grad()
    def plan(self) -> list[tuple[nn.Module, str, Tensor]]:
        """The block's new parameters: folded producers and quantized weights."""
        folded = folded_parameters(self.block, self.scalings)
        pre_scaled = activation_scales(self.scalings)
        values = {}
        for name, linear in self.linears.items():
            weight = folded.pop(f"{name}.weight", linear.weight.detach())
            if name in self.fitted:
                values[f"{name}.weight"] = self.fitted[name]
                continue
            try:
                values[f"{name}.weight"] = self.settings.quantizer.quantize(weight, pre_scaled.get(name))
            except ValueError as error:
                raise ValueError(f"{self.name}.{name}: {error}") from error
        values |= folded
        result = []
        for expert in self.experts.values():
            names = [f"{name}.weight" for name in expert.linear_names()]
            if any(name in values for name in names):
                matrices = [
                    values.pop(n, linear.weight.detach()) for n, linear in zip(names, expert.linears, strict=True)
                ]
                result.append((expert.owner, expert.name.rpartition(".")[2], expert.linears.joined(matrices)))
        for name, value in values.items():
            module, _, parameter = name.rpartition(".")
            result.append((self.block.get_submodule(module), parameter, value))
        return result

    @torch.no_grad()
    def advance(self) -> None:
        """Move the streams to the next block's input."""
        served = self.served_parameters() if self.settings.follows_error else {}
        for stream in self.streams:
            if self.settings.follows_error:
                distorted = self.call(stream, distorted=True).run(self.block, served)
                distorted = (stream.behind or stream).between(self.index + 1, distorted)
                stream.distorted = self.placement.keep(distorted)
            hidden = stream.between(self.index + 1, self.call(stream, distorted=False).run(self.block))
            stream.hidden = self.placement.keep(hidden)


class Seen:
    """One call of a compared module, its output, and the input of the group's linears."""

    call: ModuleCall
    output: Tensor
    x: Tensor

    def record_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.call, self.output = ModuleCall.record(args, kwargs), first_tensor(output)

    def record_input(self, module: nn.Module, args: Any, output: Any) -> None:
        self.x = args[0]

    def record_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self.x = output

    def kept(self, placement: Placement) -> Seen:
        self.call = self.call.map_tensors(placement.keep)
        self.output, self.x = placement.keep((self.output, self.x))
        return self


def _num_weighed(weights: list[Tensor]) -> int:
    return sum(int((w != 0).sum()) for w in weights)
