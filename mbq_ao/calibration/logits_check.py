"""The end-to-end check of a calibration: folding alone must not move the model's logits.

The groups were accepted by looking at one block at a time. What a block's own output does not show is caught
here: a value that a fold changes and that the model reads somewhere else as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mbq_ao.calibration.batch import CalibrationBatch
from mbq_ao.calibration.capture import first_tensor, forward, hooked, last_positions
from mbq_ao.calibration.experts import ExpertLinear
from mbq_ao.calibration.fold import Scaling, folded_parameters
from mbq_ao.calibration.residency import HERE, Placement, resident_on

_LOGITS = "the logits"
_NUM_POSITIONS = 64  # compared at the end of the batch; logits of every position of a long one would be gigabytes


@torch.no_grad()
def check_logits(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    scalings: Mapping[str, list[Scaling]],
    batches: list[CalibrationBatch],
    placement: Placement = HERE,
    outputs_of: Sequence[str] = (),
) -> float:
    """Relative change of the last 64 logits of the smallest batch when every block is folded but not quantized.

    outputs_of: blocks whose outputs must not change either. The logits may show little of a vision tower's.
    Raises RuntimeError if folding changes what the model computes, or if a folded linear is called from outside
    its block. The model is left as it was.
    """
    if not any(scalings.values()):
        return 0.0
    batch = min(batches, key=lambda b: b.num_tokens).on(placement)
    compared = {name: blocks[name] for name in outputs_of}
    before = _computed(model, batch, compared)

    def changes(scalings: Mapping[str, list[Scaling]]) -> dict[str, float]:
        with _folded(blocks, scalings, placement):
            after = _computed(model, batch, compared)
        return {what: ((after[what] - x).norm() / x.norm().clamp(min=1e-30)).item() for what, x in before.items()}

    errors = changes(scalings)
    precise = all(p.dtype == torch.float32 for b in blocks.values() for p in b.parameters())
    limit = 1e-3 if precise else 0.1  # half precision: rounding W s once more, through all layers
    wrong = [what for what, error in errors.items() if not error <= limit]
    if wrong and any(isinstance(module, ExpertLinear) for b in blocks.values() for module in b.modules()):
        # Rounding W s may send a token to another of two nearly equal experts. Powers of two are not rounded.
        exact = {name: [Scaling(s.group, s.s.log2().round().exp2()) for s in found] for name, found in scalings.items()}
        if all(error <= limit for error in changes(exact).values()):
            return errors[_LOGITS]
    if wrong:
        raise RuntimeError(
            f"folding the scales changes {wrong[0]} by {errors[wrong[0]]:.2g} (relative, limit {limit:g}): the model "
            "reads a folded value outside its block. Pass scale_groups=[...] without the group at fault, or "
            "report the architecture"
        )
    return errors[_LOGITS]


def _computed(model: nn.Module, batch: CalibrationBatch, blocks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The outputs of all calls of the blocks, flattened, and at last the logits."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in blocks}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        outputs[name].append(first_tensor(output).float().flatten())

    with hooked(block.register_forward_hook(partial(keep, name)) for name, block in blocks.items()):
        logits = forward(model, batch, logits_to_keep=last_positions(batch, _NUM_POSITIONS))[..., -_NUM_POSITIONS:, :]
    # Tokens that a model forbids (Chameleon's images) are no result, and their norm would drown every change.
    logits = logits.masked_fill(logits <= torch.finfo(logits.dtype).min, 0).float()
    return {f"the output of {name}": torch.cat(found) for name, found in outputs.items() if found} | {_LOGITS: logits}


@contextmanager
def _folded(
    blocks: Mapping[str, nn.Module], scalings: Mapping[str, list[Scaling]], placement: Placement
) -> Iterator[None]:
    """Inside, the model computes with the folded parameters of all blocks.

    Vectors (norms, biases) are folded all the time. Matrices are folded only while their block runs, because
    all of them together would be a second model; being called at another time is an error instead.
    """
    running: set[str] = set()
    originals: dict[nn.Parameter, Tensor] = {}
    resident = ExitStack()

    def replace(block: nn.Module, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            parameter = block.get_parameter(name)
            originals.setdefault(parameter, parameter.data)
            parameter.data = value

    def enter(block_name: str, block: nn.Module, args: Any) -> None:
        running.add(block_name)
        resident.enter_context(resident_on(placement.device, block))  # folding is work for the device, too
        replace(block, {n: v for n, v in folded_parameters(block, scalings[block_name]).items() if v.ndim > 1})

    def leave(block_name: str, block: nn.Module, args: Any, output: Any) -> None:
        running.discard(block_name)
        for parameter in block.parameters():
            if parameter.ndim > 1 and parameter in originals:
                parameter.data = originals[parameter]
                del originals[parameter]  # not before it is back: an interrupt must find it here
        resident.close()

    def refuse_elsewhere(block_name: str, name: str, module: nn.Module, args: Any) -> None:
        if block_name not in running:
            raise RuntimeError(
                f"{block_name}.{name} is called from outside its block, where folding its scales would change the "
                "result. Pass scale_groups=[...] without this linear, or report the architecture"
            )

    handles = []
    try:
        for block_name, block in blocks.items():
            for name in {name for scaling in scalings[block_name] for name in _matrices(block, scaling)}:
                guard = partial(refuse_elsewhere, block_name, name)
                handles.append(block.get_submodule(name).register_forward_pre_hook(guard))
            handles.append(block.register_forward_pre_hook(partial(enter, block_name)))
            handles.append(block.register_forward_hook(partial(leave, block_name)))
            replace(block, folded_parameters(block, scalings[block_name], vectors_only=True))
        yield
    finally:
        resident.close()
        for parameter, data in originals.items():
            parameter.data = data
        for handle in handles:
            handle.remove()


def _matrices(block: nn.Module, scaling: Scaling) -> Iterator[str]:
    """The linears whose weights this scaling folds."""
    if (producer := scaling.group.producer) is not None:
        yield from scaling.group.linears
        if block.get_submodule(producer).weight.ndim > 1:
            yield producer
