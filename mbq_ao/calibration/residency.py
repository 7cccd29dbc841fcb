"""Compute on a device that need not hold the whole model: decoder layers go there one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def computing_on(device: torch.device | None, model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Everything but the decoder layers is moved to `device`; a layer is there while its forward runs.

    At the end, whatever happened, everything is back where it was. device=None does nothing.

    Parameters are replaced by copies, not moved: the backward pass of the sensitivity keeps the copies
    of a layer alive that it needs, which `Module.to` would move away under it.
    """
    if device is None:
        yield
        return
    layers = list(blocks)
    inside = {module for layer in layers for module in layer.modules()}
    with ExitStack() as stack:
        _replace_tensors((module for module in model.modules() if module not in inside), device, stack)
        for layer in layers:
            stack.callback(_set_forward, layer, layer.__dict__.get("forward"))
            # Not a closure: a deep copy of the layer must run the copy's own modules.
            layer.forward = partial(_forward_on, device, layer, layer.forward)
        yield


@contextmanager
def resident_on(device: torch.device | None, layer: nn.Module) -> Iterator[None]:
    """The layer's parameters and buffers are copies on `device` inside the block (None: nothing happens)."""
    with ExitStack() as stack:
        if device is not None:
            _replace_tensors(layer.modules(), device, stack)
        yield


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
