"""The scale groups of all blocks of a stack: found, or as the user gave them, and those that the recipe scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from mbq_ao.calibration.capture import BlockStream
from mbq_ao.calibration.fold import RowMap, ScaleGroup
from mbq_ao.calibration.scale_groups import BlockProber
from mbq_ao.calibration.settings import CalibrationSettings, Recipe


def find_groups(
    owners: Mapping[nn.Parameter, list[str]],
    blocks: Mapping[str, nn.Module],
    streams: list[BlockStream],
    settings: CalibrationSettings,
    selected: Mapping[str, dict[str, nn.Linear]],
) -> tuple[dict[str, list[ScaleGroup]], dict[str, list[str]], dict[str, dict[str, str]]]:
    """The scale groups of every block, its linears that must stay, see `read_past_forward`, and linear -> the module
    at whose output its sensitivity is measured.

    Blocks of the same structure are probed once.
    owners: of each parameter of the model. One that other modules own as well is never folded. Raises ValueError
    if a group of `settings.scale_groups` asks for it.
    """
    _check_disjoint(settings.scale_groups or ())
    stream = min(streams, key=probing_cost)
    known: dict[tuple[Any, ...], tuple[list[ScaleGroup], list[str]]] = {}
    weighed = settings.recipe.fits_weights and settings.balance
    result, not_called, measured_at = {}, {}, {}
    for index, (name, block) in enumerate(blocks.items()):
        signature = (
            type(block),
            tuple((n, type(m), getattr(getattr(m, "weight", None), "shape", None)) for n, m in block.named_modules()),
        )
        if signature not in known:
            prober = BlockProber(block, stream.call(index, stream.between(index, stream.hidden)))
            if settings.scale_groups is not None:
                found = [prober.complete(group) for group in settings.scale_groups]
            else:
                found = prober.find_all() if settings.recipe.scaled or weighed else []
            known[signature] = found, prober.read_past_forward()
        groups, not_called[name] = known[signature]
        measured_at[name] = {n: g.measured_at for g in groups for n in g.linears if weighed}
        found = [_unshared(group, name, block, owners, settings.scale_groups is not None) for group in groups]
        result[name] = [
            group
            for group in found
            if _is_scaled(group, block, settings.recipe) and any(n in selected[name] for n in group.linears)
        ]
        measured_at[name] |= {n: g.measured_at for g in result[name] for n in g.linears}
    return result, not_called, measured_at


def probing_cost(stream: BlockStream) -> float:
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
    if not recipe.scaled:
        return False
    if group.producer is None:
        return recipe.pre_scale_unfolded
    if recipe.norms_only and group.fold == "rows":
        return False
    if recipe.tie_shared_rows or not group.mixes_tokens:
        return True
    # The published code scales o_proj only if v_proj has the very same shape.
    return block.get_submodule(group.producer).weight.shape == block.get_submodule(group.linears[0]).weight.shape
