"""Compute on a device that need not hold the whole model, nor the activations of all samples.

What is large comes to the device when it is needed and leaves it afterwards: a decoder layer, a layer of the vision
tower, the embedding table and the head while their forward runs, activations a batch or a chunk of tokens at a time.
The small rest of the model (norms, projectors, patch embedding) is there all the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


@dataclass(frozen=True)
class Placement:
    """Where calibration computes, and where it keeps what it does not compute with at the moment.

    device: computes. Everything else is kept in the host's memory. None: every tensor stays where it is.
    """

    device: torch.device | None = None
    _kept: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary, repr=False)

    @classmethod
    def of(cls, model: nn.Module, device: torch.device | None) -> Placement:
        """To compute on `device`; a model that lies there already (or device=None) needs nothing moved."""
        if device is None:
            return cls()
        device = torch.empty(0, device=device).device  # "cuda" is none of its tensors' devices, "cuda:0" is
        tensors = (*model.parameters(), *model.buffers())
        return cls() if all(t.device == device for t in tensors) else cls(device)

    @property
    def host(self) -> torch.device | None:
        return None if self.device is None else torch.device("cpu")

    def fetch(self, tree: T) -> T:
        """`tree` (nested tuples, lists, dicts) with every tensor on the device."""
        return tree_map_only(Tensor, self._fetch, tree) if self.device is not None else tree

    def keep(self, tree: T) -> T:
        """`tree` with every tensor in the host's memory. What was kept before, or was fetched, is there once."""
        return tree_map_only(Tensor, self._keep, tree) if self.device is not None else tree

    def _fetch(self, tensor: Tensor) -> Tensor:
        if tensor.device == self.device:
            return tensor
        copy = tensor.to(self.device)
        if not tensor.requires_grad:
            self._kept[copy] = copy._version, tensor
        return copy

    def _keep(self, tensor: Tensor) -> Tensor:
        if tensor.device == self.host:
            return tensor
        version, copy = self._kept.get(tensor, (None, None))
        if copy is None or version != tensor._version:  # changed in place since
            copy = tensor.detach().to(self.host)
            self._kept[tensor] = tensor._version, copy
        return copy


HERE = Placement()
"""Compute where everything is."""


@contextmanager
def computing_on(device: torch.device | None, model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """The model computes on `device`: its large parts are there while their forward runs, the others all the time.

    Large are `blocks`, the members of every nn.ModuleList, and the input and output embeddings. At the end, whatever
    happened, everything is back where it was. device=None does nothing.

    Parameters are replaced by copies, not moved: the backward pass of the sensitivity keeps the copies
    of a layer alive that it needs, which `Module.to` would move away under it.
    """
    if device is None:
        yield
        return
    large = large_parts(model, blocks)
    inside = {module for part in large for module in part.modules()}
    with ExitStack() as stack:
        _replace_tensors((module for module in model.modules() if module not in inside), device, stack)
        for part in large:
            stack.callback(_set_forward, part, part.__dict__.get("forward"))
            # Not a closure: a deep copy of the layer must run the copy's own modules.
            part.forward = partial(_forward_on, device, part, part.forward)
        yield


@contextmanager
def resident_on(device: torch.device | None, layer: nn.Module) -> Iterator[None]:
    """The layer's parameters and buffers are copies on `device` inside the block (None: nothing happens)."""
    with ExitStack() as stack:
        if device is not None:
            _replace_tensors(layer.modules(), device, stack)
        yield


def large_parts(model: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """See `computing_on`. None of them contains another: blocks come first, then of nested lists the outer one."""
    parts = list(blocks)
    of_blocks, covered = set(parts), {module for block in parts for module in block.modules()}
    listed = (child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module)
    embeddings = (getattr(model, f"get_{kind}_embeddings", lambda: None)() for kind in ("input", "output"))
    for part in (*listed, *(e for e in embeddings if isinstance(e, nn.Module))):
        inside = set(part.modules())
        if part not in covered and not inside & of_blocks:
            parts.append(part)
            covered |= inside
    return parts


def forget_residency(layer: nn.Module) -> None:
    """Let a copy of a layer made inside `computing_on`, and there to stay, run its own forward.

    What `computing_on` put there refers back to the copy, which would then outlive its last user until the garbage
    collector comes by.
    """
    forward = layer.__dict__.get("forward")
    if isinstance(forward, partial) and forward.func is _forward_on:
        own = forward.args[2]
        _set_forward(layer, None if getattr(own, "__self__", None) is layer else own)


def _forward_on(device: torch.device, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with resident_on(device, layer):
        return forward(*args, **kwargs)


def _set_forward(layer: nn.Module, forward: Callable[..., Any] | None) -> None:
    layer.__dict__.pop("forward", None)
    if forward is not None:
        layer.__dict__["forward"] = forward


def _replace_tensors(modules: Iterable[nn.Module], device: torch.device, stack: ExitStack) -> None:
    """Replace the modules' own tensors by copies on `device`, until the stack closes. Shared ones stay shared."""
    copies: dict[int, Tensor] = {}
    for module in modules:
        for table in (module._parameters, module._buffers):
            for name, tensor in list(table.items()):
                if tensor is None or tensor.device == device:
                    continue
                if id(tensor) not in copies:
                    copy = tensor.detach().to(device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    copies[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
                stack.callback(table.__setitem__, name, tensor)
                table[name] = copies[id(tensor)]
