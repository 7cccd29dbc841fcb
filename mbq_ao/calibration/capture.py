"""The decoder's blocks, and what each of them is called with (those beside the decoder: stacks.py).

One forward of the whole model records, for every block and batch, the arguments beside the hidden
state (attention mask, position embeddings, ...), so that a block can be replayed alone:

    x_0 --block 0--> x_1 --(+ delta_1)--block 1--> x_2 ...

Arguments are kept per block because they differ between layers (Gemma3's sliding and full masks).
delta_i is what the model itself adds between two blocks (Qwen3-VL's deepstack vision features); it
does not depend on the blocks' weights, so a replayed stream may add the recorded one. Keeping the
input of every block instead was rejected: it costs a copy of the activations per layer.
"""

from __future__ import annotations

import inspect
from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import Cache, PreTrainedModel

from mbq_ao.calibration.batch import CalibrationBatch
from mbq_ao.calibration.residency import HERE, Placement


def find_blocks(model: nn.Module, blocks: Sequence[nn.Module] | None = None) -> dict[str, nn.Module]:
    """The language model's decoder layers in order, by their fully qualified names.

    Without `blocks`: the largest nn.ModuleList under transformers' `model.get_decoder()`; where that method is missing,
    or leads to nothing below the model, the model's only one. Raises ValueError if there is none, if the largest might
    as well be a vision tower's, or if one of `blocks` is not part of the model.
    """
    if blocks is None:
        blocks = _decoder_layers(model)
    names = {module: name for name, module in model.named_modules()}
    for block in blocks:
        if block not in names:
            raise ValueError(f"blocks must be modules of the model, got a {type(block).__name__} that is not in it")
    return {names[block]: block for block in blocks}


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if isinstance(decoder, nn.Module) and decoder is not model and (lists := _module_lists(decoder)):
        return list(max(lists.values(), key=_num_parameters))
    lists = _module_lists(model)
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outermost) == 1:
        return list(lists[outermost[0]])
    if not outermost:
        raise ValueError(
            f"{type(model).__name__} has no decoder layers: found no nn.ModuleList with parameters; "
            "pass blocks=[...] with the layers to quantize"
        )
    raise ValueError(
        f"{type(model).__name__} has no get_decoder() that leads to its language model, and several lists that may be "
        f"the decoder layers: {', '.join(outermost)}; pass the right one, such as blocks=list(model.{outermost[0]})"
    )


def _module_lists(root: nn.Module) -> dict[str, nn.ModuleList]:
    modules = root.named_modules()
    return {name: m for name, m in modules if isinstance(m, nn.ModuleList) and any(True for _ in m.parameters())}


def _num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def first_tensor(output: Any) -> Tensor:
    """The hidden state in a module's output, which is a tensor or begins with one."""
    return output[0] if isinstance(output, (tuple, list)) else output


@dataclass
class ModuleCall:
    """The arguments of one call of a module, to be replayed; `hidden` stands in for the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_key: int | str = 0

    @classmethod
    def record(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModuleCall:
        # A key-value cache would grow, and be read, at every replay. Keys and values that layers share (Gemma 3n and 4)
        # lie in one mapping that all of them hold: a replay would write its own for the others to read.
        plain_args, plain_kwargs = tree_map_only(
            (Cache, UserDict),
            lambda leaf: None if isinstance(leaf, Cache) else dict(leaf),
            (tuple(args), dict(kwargs)),
        )
        tensors = (key for key, value in plain_kwargs.items() if isinstance(value, Tensor))
        key = "hidden_states" if "hidden_states" in kwargs else next(tensors, "hidden_states")
        return cls(plain_args, plain_kwargs, 0 if args else key)

    @property
    def hidden(self) -> Tensor:
        return self.args[self.hidden_key] if isinstance(self.hidden_key, int) else self.kwargs[self.hidden_key]

    def with_hidden(self, hidden: Tensor | None) -> ModuleCall:
        if isinstance(self.hidden_key, int):
            return ModuleCall((hidden, *self.args[1:]), self.kwargs, self.hidden_key)
        return ModuleCall(self.args, {**self.kwargs, self.hidden_key: hidden}, self.hidden_key)

    def map_tensors(self, fn: Any) -> ModuleCall:
        """The same call with `fn` applied to every tensor, inside tuples and dicts too."""
        args, kwargs = tree_map_only(Tensor, fn, (self.args, self.kwargs))
        return ModuleCall(args, kwargs, self.hidden_key)

    def run(self, module: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The module's output, with some of its parameters replaced (the module itself is not touched)."""
        if not parameters:
            return first_tensor(module(*self.args, **self.kwargs))
        return first_tensor(torch.func.functional_call(module, dict(parameters), self.args, self.kwargs))


class Reached(Exception):
    """Ends a forward where nothing more is to be seen."""


OUTPUT = ""  # in place of a module's name: what the block returns


def inputs_in(
    call: ModuleCall, block: nn.Module, modules: Sequence[str], parameters: Mapping[str, Tensor]
) -> list[Tensor]:
    """(tokens, in_features) at the input of each of these modules at its first call, or of OUTPUT, of one run of the
    block with some of its parameters replaced."""
    seen: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if name not in seen:
            # The block runs on, and may change it in place.
            seen[name] = args[0] if len(seen) + 1 == len(modules) else args[0].clone()
        if len(seen) == len(modules):
            raise Reached  # what the block does after that is most of its work, and not asked for

    hooks = (block.get_submodule(name).register_forward_pre_hook(partial(record, name)) for name in modules if name)
    with hooked(hooks), suppress(Reached):
        seen[OUTPUT] = call.run(block, parameters)
    return [seen[name].flatten(0, -2) for name in modules]


@dataclass
class BlockStream:
    """One batch on its way through the blocks: the hidden state, and how each block is called.

    Kept where its placement keeps things; `call` and `between` take and give tensors where they are computed with.
    """

    hidden: Tensor = field(default_factory=lambda: torch.empty(0))  # at the current block's input
    calls: list[ModuleCall] = field(default_factory=list)  # one a block, without the hidden state
    deltas: dict[int, Tensor] = field(default_factory=dict)  # added before block i
    distorted: Tensor | None = None  # the stream through the quantized blocks, with error propagation
    behind: BlockStream | None = None  # how the blocks are called behind what is quantized before them, with it too
    last_output: Tensor | None = None  # only while recording
    placement: Placement = HERE

    def call(self, index: int, hidden: Tensor) -> ModuleCall:
        """The call of block `index` on `hidden`."""
        return self.calls[index].with_hidden(hidden).map_tensors(self.placement.fetch)

    def start_behind(self, stream: BlockStream) -> None:
        """Let the distorted stream be this one, recorded while what comes before the blocks is quantized."""
        self.behind, self.distorted = stream, stream.hidden

    def between(self, index: int, output: Tensor) -> Tensor:
        """The input of block `index`, given the output of the one before."""
        return output + self.deltas[index].to(output.device) if index in self.deltas else output


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Remove the hooks at the end, whatever happens. A generator of handles registers them in here."""
    registered = []
    try:
        for handle in handles:
            registered.append(handle)  # one by one: an interrupt leaves none behind
        yield
    finally:
        for handle in registered:
            handle.remove()


def takes(module: nn.Module, name: str) -> bool:
    """Whether the module's forward has a parameter of this name."""
    return name in inspect.signature(module.forward).parameters


def forward(model: nn.Module, batch: CalibrationBatch, **extra: Any) -> Tensor:
    """The model's logits (B, T', V), run as for inference but without a cache.

    Of `extra` (logits_to_keep) the model gets what its forward has a parameter for.
    """
    extra = {k: v for k, v in extra.items() if takes(model, k)}
    if isinstance(model, PreTrainedModel):  # takes it, by name or among its **kwargs
        extra["use_cache"] = False
    output = model(**{**batch.inputs, **extra})
    logits = getattr(output, "logits", None)
    return first_tensor(output) if logits is None else logits


def last_positions(batch: CalibrationBatch, count: int) -> Tensor:
    """Where to compute logits, for `logits_to_keep`: (count,) int64, the last ones.

    A number would do for the logits, but makes Gemma 4 drop the other tokens before its last layers.
    """
    length = batch.valid.shape[1]
    return torch.arange(max(length - count, 0), length, device=batch.valid.device)


@torch.no_grad()
def capture_streams(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    batches: Iterable[CalibrationBatch],
    placement: Placement = HERE,
) -> list[BlockStream]:
    """Run the model once on each batch and record how its blocks are called. What is recorded is kept by `placement`.

    Raises ValueError naming the block at whose input a NaN or inf appears, and RuntimeError if the
    forward does not call every block once and in order, or on other tokens than those of the batch.
    What the model itself raises gets a note that names the batch.
    """
    streams = []
    for batch in batches:
        stream = BlockStream(placement=placement)
        hooks = (
            block.register_forward_hook(
                partial(record_call, stream, index, f"{name} on calibration batch {batch.index}"), with_kwargs=True
            )
            for index, (name, block) in enumerate(blocks.items())
        )
        with hooked(hooks):
            try:
                forward(model, batch.on(placement), logits_to_keep=last_positions(batch, 1))
            except Exception as error:
                shapes = {k: tuple(v.shape) for k, v in batch.inputs.items() if isinstance(v, Tensor)}
                error.add_note(f"raised while {type(model).__name__} ran calibration batch {batch.index}: {shapes}")
                raise
        if len(stream.calls) != len(blocks):
            raise RuntimeError(
                f"{type(model).__name__} made {len(stream.calls)} calls of its {len(blocks)} blocks on calibration "
                f"batch {batch.index}; every block must run once: pass the right ones as blocks=[...]"
            )
        num_hidden = stream.hidden.shape[:-1].numel()
        if stream.hidden.shape[-3:-1] != batch.valid.shape and num_hidden != batch.num_tokens:
            raise RuntimeError(
                f"{type(model).__name__} runs its decoder layers on hidden states of shape "
                f"{tuple(stream.hidden.shape)} where calibration batch {batch.index} has tokens of shape "
                f"{tuple(batch.valid.shape)}: models that put tokens of their own beside those of input_ids are not "
                "supported; pass blocks=[...] if these are not the language model's layers"
            )
        stream.last_output = None
        streams.append(stream)
    return streams


def record_call(
    stream: BlockStream,
    index: int,
    where: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    """A forward hook: add this call of block number `index` to the stream."""
    if index != len(stream.calls):
        raise RuntimeError(
            f"the model runs {where} as its block number {len(stream.calls)}, where number {index} was expected: every "
            "block must run once and in the order of blocks=[...]"
        )
    call = ModuleCall.record(args, kwargs)
    if not torch.isfinite(call.hidden).all():
        raise ValueError(
            f"NaN or inf in the activations at the input of {where}: the scales would be meaningless. Check the "
            "model's weights and dtype (float16 overflows where bfloat16 does not) and the batch"
        )
    if stream.last_output is None:
        stream.hidden = stream.placement.keep(call.hidden)
    elif call.hidden.shape != stream.last_output.shape:
        raise RuntimeError(
            f"{where} is given a hidden state of shape {tuple(call.hidden.shape)}, but the block before it gave "
            f"{tuple(stream.last_output.shape)}: every block must run on all tokens; pass the right ones as "
            "blocks=[...]"
        )
    elif call.hidden is not stream.last_output and not torch.equal(call.hidden, stream.last_output):
        stream.deltas[len(stream.calls)] = stream.placement.keep(call.hidden - stream.last_output)
    stream.calls.append(call.with_hidden(None).map_tensors(stream.placement.keep))
    stream.last_output = first_tensor(output)
