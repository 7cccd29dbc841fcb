"""Scale groups of experts. They read gathered copies of one hidden state, so shared storage does not show the groups.

    fed by experts   down of each expert: its own s, folded into rows of the same expert's up projection, found by
                     probing one expert and accepted for all of them at once
    fed by a norm    one s for all that reads the norm: every expert, the router, shared experts. It costs nothing at
                     inference; the router's columns take s too, though it is never quantized
    by neither       its own s for each expert, which stays on the quantized tensor (act_pre_scale)

The first that leaves the block's output unchanged is taken, for all experts of a parameter alike, as they become one
tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mbq_ao.calibration.capture import first_tensor, hooked
from mbq_ao.calibration.experts import ExpertLinear, ExpertLinears
from mbq_ao.calibration.fold import ScaleGroup

if TYPE_CHECKING:
    from mbq_ao.calibration.scale_groups import BlockProber


def expert_parameters(block: nn.Module) -> dict[str, ExpertLinears]:
    """Name of each parameter of experts -> its linears."""
    return {name: module for name, module in block.named_modules() if isinstance(module, ExpertLinears)}


def find_expert_groups(prober: BlockProber) -> list[ScaleGroup]:
    groups: list[ScaleGroup] = []
    earlier: list[str] = []
    parameters = expert_parameters(prober.block)
    called = {n: prober.position(f"{n}.0") for n in parameters if any(_of(n, name) for name in prober.trace.order)}
    for parameter in sorted(called, key=called.__getitem__):
        names = [f"{parameter}.{e}" for e in range(len(parameters[parameter]))]
        feeding = [n for n in reversed(earlier) if n.rpartition(".")[0] == parameter.rpartition(".")[0]]
        groups += _fed_by_experts(prober, names, feeding) or _fed_by_a_norm(prober, names) or _alone(prober, names)
        earlier.append(parameter)
    return groups


def _of(parameter: str, linear: str) -> bool:
    return linear.rpartition(".")[0] == parameter


def _alone(prober: BlockProber, names: list[str]) -> list[ScaleGroup]:
    around = _smallest_with_all_tokens(prober, names[0])
    return [ScaleGroup((name,), inspect=name, sensitivity_at=around) for name in names]


def _fed_by_experts(prober: BlockProber, names: list[str], feeding: list[str]) -> list[ScaleGroup]:
    """feeding: parameters of the same module that run before."""
    seen = [name for name in names if name in prober.trace.num_rows]
    busiest = max(seen, key=lambda name: prober.trace.num_rows[name])
    number = busiest.rpartition(".")[2]
    for parameter in feeding:
        row_map = prober.find_row_map(f"{parameter}.{number}", busiest, prober.block.get_submodule(busiest).in_features)
        if row_map is not None:
            groups = [
                replace(group, producer=f"{parameter}.{e}", fold="rows", row_map=row_map)
                for e, group in enumerate(_alone(prober, names))
            ]
            if prober.preserve_output(groups):
                return groups
    return []


def _fed_by_a_norm(prober: BlockProber, names: list[str]) -> list[ScaleGroup]:
    trace, num_channels = prober.trace, prober.block.get_submodule(names[0]).weight.shape[1]
    first = next(name for name in trace.order if name in set(names))
    for producer in dict.fromkeys(trace.before(first)):
        module = prober.block.get_submodule(producer)
        if module.weight.shape != (num_channels,) or producer not in trace.writes:
            continue
        readers = [n for n in dict.fromkeys(trace.order) if _reads(prober, n, trace.writes[producer], num_channels)]
        group = ScaleGroup((*readers, *names), producer)
        inspect = prober.inspected(group)
        if not readers:  # the list of experts is not called itself
            inspect = inspect.rpartition(".")[0]
        group = replace(group, inspect=inspect)
        folds = ("weight", "one_plus_weight") if getattr(module, "bias", None) is None else ("weight",)
        for fold in folds:
            found = replace(group, fold=fold)  # type: ignore[arg-type]
            if prober.preserve_output([found]):
                return [found]
    return []


def _reads(prober: BlockProber, name: str, storage: int, num_channels: int) -> bool:
    module = prober.block.get_submodule(name)
    if isinstance(module, ExpertLinear) or prober.trace.reads[name] != storage:
        return False
    return module.weight.ndim == 2 and module.weight.shape[1] == num_channels


def _smallest_with_all_tokens(prober: BlockProber, expert: str) -> str:
    """The smallest module around the expert whose output has a row for every token of the block."""
    num_rows: dict[str, int] = {}

    def record(name: str, output: object) -> None:
        tensor = first_tensor(output)
        if isinstance(tensor, Tensor):
            num_rows[name] = tensor.shape[:-1].numel()

    def hooks(names: list[str]) -> Iterator[object]:
        for name in names:
            module = prober.block.get_submodule(name)
            yield module.register_forward_hook(lambda m, a, y, name=name: record(name, y))

    parts = expert.split(".")[:-2]
    around = [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
    with torch.no_grad(), hooked(hooks(around)):
        prober.call.run(prober.block)
    return next((n for n in around if num_rows.get(n) == prober.output.shape[:-1].numel()), "")
