"""One decoder layer: search the scales of its groups, plan its new parameters, move the streams past it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mbq_ao.calibration.capture import BlockStream, ModuleCall, first_tensor, hooked
from mbq_ao.calibration.fold import ScaleGroup, Scaling, activation_scales, folded_parameters
from mbq_ao.calibration.ranks import ALONE, Ranks
from mbq_ao.calibration.report import GroupReport
from mbq_ao.calibration.scale_search import Example, grid_scales, search_scale, smooth_scales, token_weights
from mbq_ao.calibration.settings import CalibrationSettings, Masks


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
        ranks: Ranks = ALONE,
    ) -> None:
        self.name, self.block, self.index, self.streams = name, block, index, streams
        self.masks, self.settings, self.ratios, self.linears = masks, settings, ratios, linears
        self.ranks, self.scalings = ranks, list[Scaling]()

    def search(self, groups: list[ScaleGroup]) -> list[GroupReport]:
        """Find one scale a group. All groups are searched on original weights, in order."""
        return [self._search_group(group) for group in groups]

    def use(self, groups: list[ScaleGroup], scales: list[Tensor]) -> None:
        """Go on with these scales, one a group, (in_features,) each: those of `search`, or of an earlier one."""
        self.scalings = [
            Scaling(group, s.to(self.block.get_submodule(group.linears[0]).weight.device))
            for group, s in zip(groups, scales, strict=True)
        ]

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
        masks = self.masks
        if masks is None:
            shapes = self.ranks.gather([target.output.shape[:-1] for target in clean])
            masks = Masks.even(shapes, clean[0].output.device)
        weights = token_weights(
            masks.counted,
            masks.answer,
            masks.vision,
            ratio=ratio,
            loss=self.settings.loss,
            num_channels=clean[0].output.shape[-1],
        )
        examples = [
            Example(seen.call, target.output, weight)
            for seen, target, weight in zip(calls, clean, self.ranks.mine(weights), strict=True)
        ]
        prefix = f"{inspect}." if inspect else ""
        originals = {n.removeprefix(prefix) if n != inspect else "": self.block.get_submodule(n) for n in group.linears}
        candidates = {f"{n}.weight" if n else "weight": m.weight for n, m in originals.items() if self._is_selected(m)}

        def candidate(s: Tensor) -> dict[str, Tensor]:
            return {n: self.settings.quantizer.stand_in(w, s) for n, w in candidates.items()}

        inputs, alpha = [seen.x for seen in calls], self.settings.recipe.smooth_alpha
        counted = self.ranks.mine(masks.counted)
        if alpha is None:
            statistic = group.row_map.tie(mean_abs(inputs, counted, self.ranks))
            scales = grid_scales(statistic, self.settings.n_grid)
        else:
            scales = smooth_scales(max_abs(inputs, counted, self.ranks), list(candidates.values()), alpha)
        try:
            found = search_scale(
                module, examples, scales, candidate, loss=self.settings.loss, choose=alpha is None, ranks=self.ranks
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

    def _capture(self, group: ScaleGroup, parameters: dict[str, Tensor], *, distorted: bool) -> list[Seen]:
        """Run the block on every batch and record the call of the compared module and the group's input."""
        seen = []
        for stream in self.streams:
            recorder = Seen()
            inspected = self.block.get_submodule(group.inspect or "")
            linear = self.block.get_submodule(group.linears[0])
            handles = (
                module.register_forward_hook(hook, with_kwargs=with_kwargs)
                for module, hook, with_kwargs in (
                    (inspected, recorder.record_call, True),
                    (linear, recorder.record_input, False),
                )
            )
            with hooked(handles):
                self._call(stream, distorted).run(self.block, parameters)
            seen.append(recorder)
        return seen

    def _call(self, stream: BlockStream, distorted: bool) -> ModuleCall:
        if distorted and stream.distorted is not None:
            return (stream.behind or stream).call(self.index, stream.distorted)
        return stream.call(self.index, stream.hidden)

    @torch.no_grad()
    def served_parameters(self) -> dict[str, Tensor]:
        """The block's parameters as it will serve: folded so far, and stand-ins for all its quantized weights."""
        parameters = folded_parameters(self.block, self.scalings)
        pre_scaled = activation_scales(self.scalings)
        for name, linear in self.linears.items():
            weight = parameters.get(f"{name}.weight", linear.weight)
            parameters[f"{name}.weight"] = self.settings.quantizer.stand_in(weight, pre_scaled.get(name))
        return parameters

    @torch.no_grad()
    def plan(self) -> list[tuple[nn.Module, str, Tensor]]:
        """The block's new parameters: folded producers and quantized weights."""
        folded = folded_parameters(self.block, self.scalings)
        pre_scaled = activation_scales(self.scalings)
        result = []
        for name, linear in self.linears.items():
            weight = folded.pop(f"{name}.weight", linear.weight.detach())
            try:
                result.append((linear, "weight", self.settings.quantizer.quantize(weight, pre_scaled.get(name))))
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
                stream.distorted = (stream.behind or stream).between(self.index + 1, distorted)
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


def mean_abs(inputs: list[Tensor], counted: list[Tensor], ranks: Ranks = ALONE) -> Tensor:
    """(in_features,) fp32: mean |x| of every channel over the counted tokens of all batches.

    inputs, counted: of the batches that this rank runs.
    """
    selected = _counted_tokens(inputs, counted)
    found = ranks.gather([(x.abs().sum(0, dtype=torch.float32), len(x)) for x in selected])
    return torch.stack([total for total, _ in found]).sum(0) / sum(number for _, number in found)


def max_abs(inputs: list[Tensor], counted: list[Tensor], ranks: Ranks = ALONE) -> Tensor:
    """(in_features,) fp32: max |x| of every channel over the counted tokens of all batches, as `mean_abs`."""
    selected = _counted_tokens(inputs, counted)
    found = ranks.gather([x.abs().amax(0) if len(x) else x.new_zeros(x.shape[-1]) for x in selected])
    return torch.stack(found).amax(0).float()


def _counted_tokens(inputs: list[Tensor], counted: list[Tensor]) -> list[Tensor]:
    """(tokens, in_features) a batch.

    Of another sequence than the text (the image that cross-attention reads) every token counts.
    """
    return [
        x.flatten(0, -2)[mask.flatten()] if x[..., 0].numel() == mask.numel() else x.flatten(0, -2)
        for x, mask in zip(inputs, counted, strict=True)
    ]
