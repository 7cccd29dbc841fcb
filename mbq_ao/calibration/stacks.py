"""What is calibrated beside the decoder's layers: `targets=` made into stacks of blocks.

A stack is a run of blocks of which each reads what the one before wrote: the transformer blocks of a vision tower, or
a projector, a merger, a pooling head as the one block of its own. Which modules these are is not looked up in a table.
One pass of the model over the calibration data, up to its decoder, shows what is called, with what, and in which order:

    an element of a ModuleList or Sequential that holds two linears or more: a block, behind the element before it where
        it is always called on that one's very output; else it begins a stack
    the largest module around another linear that is called with a hidden state: a block, and a stack of its own
    a linear that is called alone, or in or after the decoder (lm_head): plain rounding, and a line in the report
    a linear that no calibration batch runs, or that embeds patches before the tower's first block: left alone, and a
        line in the report (a filter may choose the latter)

A stack may run any number of times in a forward: not at all for text, once for all images, or for one after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mbq_ao.calibration.batch import CalibrationBatch
from mbq_ao.calibration.capture import (
    BlockStream,
    ModuleCall,
    Reached,
    first_tensor,
    forward,
    hooked,
    last_positions,
    record_call,
)
from mbq_ao.calibration.experts import ExpertParameter
from mbq_ao.calibration.ranks import Ranks
from mbq_ao.calibration.residency import Placement
from mbq_ao.calibration.selection import vision_side
from mbq_ao.calibration.settings import Targets

_NEVER_RUN = "no calibration batch runs them"
_OF_TORCH = "torch.nn.MultiheadAttention computes with their weights itself"
_ALONE = "called alone, not in a block that takes a hidden state"
_EMBEDDING = "they embed the patches, before the first block"
_LATE = "they run in or after the decoder, outside of its layers"


@dataclass(frozen=True)
class Stack:
    """Blocks of which each reads what the one before wrote, in order and by their full names.

    selected: block -> {name in the block: linear to be quantized}. step: prefix of its blocks' names in a work_dir.
    passes: how often each batch runs it; empty for the decoder, which runs once.
    experts, routers: of the decoder's layers, see experts.py.
    """

    blocks: dict[str, nn.Module]
    selected: dict[str, dict[str, nn.Linear]]
    step: str
    passes: Sequence[int] = ()
    experts: Mapping[str, list[ExpertParameter]] = field(default_factory=dict)
    routers: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The block's, if there is one, else that of the module that holds them."""
        first = next(iter(self.blocks))
        return first if len(self.blocks) == 1 else first.rpartition(".")[0]


@dataclass
class Beside:
    """What is quantized beside the decoder's layers.

    stacks: in the order in which they run. rounded, left_alone: linears that are quantized by plain rounding, and
    those that are not, and why; by their full names.
    """

    stacks: list[Stack] = field(default_factory=list)
    rounded: dict[str, str] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)


def listed_blocks(model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, nn.Module]:
    """The elements of lists of modules around the linears, the outermost ones, that hold two linears or more."""
    found = {}
    for path in linears:
        parent: nn.Module = model
        for name in _prefixes(path):
            module = model.get_submodule(name)
            if isinstance(parent, (nn.ModuleList, nn.Sequential)) and _is_block(module):
                found[name] = module
                break
            parent = module
    return found


def _is_block(module: nn.Module) -> bool:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return False
    return sum(isinstance(m, nn.Linear) for m in module.modules()) > 1


def _prefixes(path: str) -> list[str]:
    """The modules on the way to one: "a.b.c" -> ["a", "a.b", "a.b.c"]."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


@torch.no_grad()
def find_stacks(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    first_layer: nn.Module,
    batches: Sequence[CalibrationBatch],
    targets: Targets,
    ranks: Ranks,
    placement: Placement,
) -> Beside:
    """Run the model and see what the linears are part of. first_layer: the decoder's.

    Raises ValueError if "decoder+vision" finds that no batch runs one of them.
    """
    listed = listed_blocks(model, linears)
    look = partial(_seen_in, model, linears, listed, first_layer, past_decoder=callable(targets))
    of_batches = ranks.gather([look(batch.on(placement)) for batch in ranks.mine(batches)])
    seen = _merged(of_batches)
    if not callable(targets) and not seen.called.keys() & linears.keys():
        raise ValueError(
            f'targets="decoder+vision", but no calibration batch runs one of the {len(linears)} linears of the vision '
            "tower and the projector: calibrate with images"
        )
    runs = [run for calls in seen.calls.values() for run in _runs([c for c in calls if c[0] not in seen.refused])]
    blocks = {block for run in runs for block in run}
    order = list(seen.called)
    in_blocks = (i for i, name in enumerate(order) if any(p in listed for p in _prefixes(name)))
    embedding = set() if callable(targets) else set(order[: next(in_blocks, 0)])
    result = Beside()
    parts: dict[str, list[str]] = {}
    for name, linear in linears.items():
        if isinstance(linear, NonDynamicallyQuantizableLinear):
            result.left_alone[name] = _OF_TORCH
        elif name not in seen.called:
            where, why = (result.rounded, _LATE) if name in seen.late else (result.left_alone, _NEVER_RUN)
            where[name] = why
        elif name in embedding:
            result.left_alone[name] = _EMBEDDING
        elif (block := _block_around(name, seen, blocks)) is None:
            result.rounded[name] = _ALONE
        else:
            parts.setdefault(block, []).append(name)
            if block not in blocks:
                blocks.add(block)
                runs.append([block])
    for run in sorted((run for run in runs if any(b in parts for b in run)), key=lambda run: order.index(run[0])):
        selected = {b: {n.removeprefix(f"{b}."): linears[n] for n in parts.get(b, ())} for b in run}
        step = f"stack_{len(result.stacks):02}_block_"
        passes = [batch.called[run[0]] for batch in of_batches]
        result.stacks.append(Stack({b: model.get_submodule(b) for b in run}, selected, step, passes))
    return result


def other_weights(model: nn.Module, layers: Mapping[str, nn.Module], beside: Beside) -> list[str]:
    """Matrices (and kernels) beside the decoder that are outside of the stacks, and that no other list names."""
    blocks = tuple(f"{block}." for stack in beside.stacks for block in stack.blocks)
    return [
        f"{name}.{parameter}".removesuffix(".weight")
        for name, module in vision_side(model, layers).items()
        if name not in beside.rounded and name not in beside.left_alone
        for parameter, value in module.named_parameters(recurse=False)
        if value.ndim > 1 and not f"{name}.".startswith(blocks)
    ]


def _block_around(name: str, seen: _Seen, blocks: set[str]) -> str | None:
    """The block that the linear is in, or the largest module around it that can be one."""
    around = _prefixes(name)[:-1]
    for path in around:
        if path in blocks:
            return path
    for path in around:
        holds_one = any(block.startswith(f"{path}.") for block in blocks)
        if path in seen.called and path not in seen.refused and not holds_one:
            return path
    return None


@dataclass
class _Seen:
    """What a batch calls before the decoder, by full names, in the order of the first calls, and how often.

    refused: called with something else than one hidden state, or returning something else.
    calls: of the listed blocks, list by list, and whether each was called on the output of the one before.
    late: what is called from the decoder's first layer on.
    """

    called: Counter[str] = field(default_factory=Counter)
    refused: set[str] = field(default_factory=set)
    calls: dict[str, list[tuple[str, bool]]] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)


def _merged(of_batches: Sequence[_Seen]) -> _Seen:
    result = _Seen()
    for seen in of_batches:
        result.called.update(seen.called)
        result.refused |= seen.refused
        result.late |= seen.late
        for parent, calls in seen.calls.items():
            result.calls.setdefault(parent, []).extend(calls)
    return result


def _seen_in(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    listed: Mapping[str, nn.Module],
    first_layer: nn.Module,
    batch: CalibrationBatch,
    *,
    past_decoder: bool,
) -> _Seen:
    """Run the model on a batch; past its decoder's first layer only where a filter may have chosen something there."""
    seen = _Seen()
    last_output: dict[str, Tensor] = {}
    in_decoder = False

    def begin_decoder() -> None:
        nonlocal in_decoder
        in_decoder = True

    def record(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if in_decoder:
            seen.late.add(name)
            return
        seen.called[name] += 1
        call, output = ModuleCall.record(args, kwargs), first_tensor(output)
        hidden = dict([*enumerate(call.args), *call.kwargs.items()]).get(call.hidden_key)
        if not (_is_hidden(hidden) and _is_hidden(output)):
            seen.refused.add(name)
        elif name in listed:
            parent = name.rpartition(".")[0]
            chained = parent in last_output and torch.equal(last_output[parent], hidden)
            seen.calls.setdefault(parent, []).append((name, chained))
            last_output[parent] = output

    handles = (
        model.get_submodule(name).register_forward_hook(partial(record, name), with_kwargs=True)
        for name in dict.fromkeys(prefix for path in linears for prefix in _prefixes(path))
    )
    go = _forward_past if past_decoder else forward_until
    with hooked(handles):
        go(model, batch, first_layer, begin_decoder)
    return seen


def _is_hidden(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1


def _runs(calls: Sequence[tuple[str, bool]]) -> list[list[str]]:
    """The blocks cut into runs: within one, each is called on the output of the one before, every time."""
    order = list(dict.fromkeys(name for name, _ in calls))
    counts = Counter(name for name, _ in calls)
    runs: list[list[str]] = []
    for before, name in zip([None, *order], order, strict=False):
        follows = all(
            chained and calls[i - 1][0] == before for i, (other, chained) in enumerate(calls) if other == name
        )
        if follows and counts[name] == counts[before or name]:
            runs[-1].append(name)
        else:
            runs.append([name])
    return runs


@torch.no_grad()
def capture_passes(
    model: nn.Module,
    stack: Stack,
    batches: Sequence[CalibrationBatch],
    first_layer: nn.Module,
    ranks: Ranks,
    placement: Placement,
) -> list[BlockStream]:
    """As `capture_streams`, of a stack that runs before the decoder: a stream for each pass that this rank has."""
    own = ranks.mine([batch for batch, number in zip(batches, stack.passes, strict=True) for _ in range(number)])
    streams: list[BlockStream] = []

    def record(index: int, where: str, *call: Any) -> None:
        if index == 0:
            streams.append(BlockStream(placement=placement))
        record_call(streams[-1], index, where, *call)

    for batch in {batch.index: batch for batch in own}.values():
        hooks = (
            block.register_forward_hook(
                partial(record, index, f"{name} on calibration batch {batch.index}"), with_kwargs=True
            )
            for index, (name, block) in enumerate(stack.blocks.items())
        )
        with hooked(hooks):
            forward_until(model, batch.on(placement), first_layer)
    for stream in streams:
        stream.last_output = None
    return streams[: len(own)]  # a rank without a pass of its own has been given the first one


def forward_until(
    model: nn.Module, batch: CalibrationBatch, first_layer: nn.Module, at_decoder: Callable[[], None] = lambda: None
) -> None:
    """Run the model up to the decoder's first layer."""

    def reached() -> None:
        at_decoder()
        raise Reached

    with suppress(Reached):
        _forward_past(model, batch, first_layer, reached)


def _forward_past(
    model: nn.Module, batch: CalibrationBatch, first_layer: nn.Module, at_decoder: Callable[[], None]
) -> None:
    with hooked([first_layer.register_forward_pre_hook(lambda module, args: at_decoder())]):
        forward(model, batch, logits_to_keep=last_positions(batch, 1))
