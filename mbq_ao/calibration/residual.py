"""Where the output of a linear is added to a residual stream, found by trying and not by the names of modules.

A linear whose output is added, as it is, to what came to it by another way can make up for what is wrong with that
other part, too. Which linears do is seen from what happens to the block when something is added to their outputs: some
module then reads, or the block returns, the same and more by exactly that much.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mbq_ao.calibration.capture import OUTPUT, ModuleCall, hooked


@torch.no_grad()
def place_of_sum(call: ModuleCall, block: nn.Module, linear: str, parameters: Mapping[str, Tensor]) -> str | None:
    """The module of the block that reads the sum of the linear's output and something else first, OUTPUT if the
    block returns it; None where there is no such sum, say because a norm comes before it.

    parameters: of the block, that are replaced.
    """
    generator = torch.Generator().manual_seed(0)  # of the host: the same on every device
    size = call.hidden.float().square().mean(-1, keepdim=True).sqrt()  # of each token: some are far larger than others
    added: list[Tensor] = []
    early: set[str] = set()  # modules that are called before the linear: what they read first is not the sum

    def watch(added: list[Tensor]) -> dict[str, Tensor]:
        """What modules read after the linear, and its output."""
        seen: dict[str, Tensor] = {}

        def at_linear(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if linear in seen or output.shape[:-1] != size.shape[:-1]:
                return None
            if not added:
                noise = torch.randn(output.shape, generator=generator).to(output.device)
                added.append((noise * size).to(output.dtype))
                seen[linear] = output
                return None
            seen[linear] = output + added[0]
            return seen[linear]

        def at_module(name: str, module: nn.Module, args: Any) -> None:
            if linear not in seen:
                early.add(name)
            elif name not in seen and args and getattr(args[0], "shape", None) == seen[linear].shape:
                seen[name] = args[0]

        others = {name: m for name, m in block.named_modules() if name not in (OUTPUT, linear)}
        handles = [m.register_forward_pre_hook(partial(at_module, name)) for name, m in others.items()]
        with hooked([*handles, block.get_submodule(linear).register_forward_hook(at_linear)]):
            seen[OUTPUT] = call.run(block, parameters)
        return seen

    before, after = watch(added), watch(added)
    if linear not in before:
        return None
    output, more = before.pop(linear), added[0]
    for name, value in before.items():
        if name in early or name not in after or value.shape != output.shape:
            continue
        if not torch.equal(value, output):
            # Of large values, as some channels have them, a sum keeps fewer digits; `size` stands for sums on the way.
            rounding = 8 * torch.finfo(value.dtype).eps * (value.abs() + after[name].abs() + size)
            if ((after[name] - value - more).abs() <= rounding).all():
                return name
    return None
