"""Compute on a device that need not hold the whole model: decoder layers go there one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def computing_on(device: torch.device | None, model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Everything but the decoder layers is moved to `device`; a layer is there while its forward runs.

    At the end, whatever happened, everything is back where it was. device=None does nothing.

    A layer's parameters are replaced by copies, not moved: the backward pass of the sensitivity keeps
    the copies alive that it needs, which `Module.to` would move away under it.
    """
    if device is None:
        yield
        return
    layers = list(blocks)
    inside = {id(t) for layer in layers for t in (*layer.parameters(), *layer.buffers())}
    rest = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in inside]
    homes = [(t, t.data) for t in rest]
    own_forward = [(layer, layer.__dict__.get("forward")) for layer in layers]
    try:
        for t in rest:
            t.data = t.data.to(device)
        for layer in layers:
            layer.forward = _resident_forward(layer, layer.forward, device)
        yield
    finally:
        for layer, forward in own_forward:
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.__dict__["forward"] = forward
        for t, data in homes:
            t.data = data


def _resident_forward(layer: nn.Module, forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    def resident(*args: Any, **kwargs: Any) -> Any:
        with resident_on(device, layer):
            return forward(*args, **kwargs)

    return resident


@contextmanager
def resident_on(device: torch.device | None, layer: nn.Module) -> Iterator[None]:
    """The layer's parameters and buffers are copies on `device` inside the block (None: nothing happens)."""
    with ExitStack() as stack:
        if device is not None:
            for module in layer.modules():
                for table in (module._parameters, module._buffers):
                    for name, tensor in list(table.items()):
                        if tensor is not None and tensor.device != device:
                            stack.callback(table.__setitem__, name, tensor)
                            copy = tensor.detach().to(device)
                            table[name] = (
                                nn.Parameter(copy, tensor.requires_grad) if table is module._parameters else copy
                            )
        yield
