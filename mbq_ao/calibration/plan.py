"""What a calibration leaves to be done: new parameters, set all at once or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mbq_ao.calibration.ranks import ALONE, Ranks
from mbq_ao.calibration.shared_store import agree
from mbq_ao.calibration.work_dir import tensor_text


@dataclass
class Plan:
    """New parameters for some modules, to be set all at once."""

    parameters: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the modules have the new parameters."""
        before = [(module._parameters, name, module.get_parameter(name)) for module, name, _ in self.parameters]
        try:
            for (table, name, parameter), (_, _, value) in zip(before, self.parameters, strict=True):
                table[name] = nn.Parameter(value.to(parameter.device), requires_grad=False)
            yield
        finally:
            for table, name, parameter in before:
                table[name] = parameter

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
