"""Refuse what cannot be calibrated, before anything is run: each error names the thing and the way out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torchao.utils import TorchAOBaseTensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")


def check_model(model: nn.Module, device: torch.device | None = None) -> None:
    """Raise ValueError for weights on the meta device, a model without parameters, one wrapped for training, or an
    encoder-decoder.

    device: where calibration is to bring its layers; one that accelerate places (`device_map`) is refused then.
    """
    for module in model.modules():
        if type(module).__name__ in _WRAPPERS:
            raise ValueError(
                f"the model is wrapped in {type(module).__name__}: call quantize_ with the model itself, and wrap it "
                "after"
            )
    if not any(True for _ in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no parameters: there is nothing to calibrate")
    if _is_encoder_decoder(model):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: it answers in a sequence of its own, while MBQ weighs "
            "vision and answer tokens of one sequence. Round it without data: torchao.quantization.quantize_ with "
            "Int3WeightOnlyConfig() or Int8DynamicActivationInt4WeightMBQConfig()"
        )
    hooked = next((name for name, module in model.named_modules() if hasattr(module, "_hf_hook")), None)
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(
                f"{name} is on the meta device and has no values"
                + ("" if hooked is None else ", as accelerate offloaded it (device_map)")
                + ': load the whole model into the host\'s memory, from_pretrained(..., device_map="cpu"), and call '
                'quantize_(..., compute_device="cuda"), which brings one layer at a time to the GPU'
            )
        if hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"{name} is a DTensor, of which this rank has a part: call quantize_ with the whole model, before "
                "fully_shard or parallelize_module"
            )
    if hooked is not None and device is not None:
        raise ValueError(
            f"accelerate places the layers of this model (device_map; hook on {hooked or 'the model'!r}) and would "
            f"take them back from {str(device)!r}: leave out device and compute_device to compute where they are, or "
            'load the model with device_map="cpu" and pass compute_device'
        )


def _is_encoder_decoder(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    configs = (config, getattr(config, "text_config", None))  # BLIP-2's own may not say it of its T5
    return any(getattr(c, "is_encoder_decoder", False) for c in configs)


def check_linears(selected: Mapping[str, dict[str, nn.Linear]], owners: Mapping[nn.Parameter, list[str]]) -> None:
    """Raise ValueError for linears that are quantized already, shared, of another dtype or not finite.

    selected: block ("" is the model) -> {name in the block: linear}.  owners: see `owners_of_parameters`.
    """
    for block, linears in selected.items():
        for name, linear in linears.items():
            _check_weight(f"{block}.{name}.weight".removeprefix("."), linear.weight)
            first, *others = owners[linear.weight]
            if others:
                raise ValueError(
                    f"{first} and {others[0]} are one parameter: quantizing it for one place would change the other; "
                    "untie them (copy the weight), or leave both out with filter_fn"
                )


def holders_of_matrices(blocks: Mapping[str, nn.Module]) -> str:
    """The classes of the modules in which the blocks' matrices are, for an error."""
    modules = [m for block in blocks.values() for m in block.modules()]
    holders = {type(m).__name__ for m in modules if any(p.ndim > 1 for p in m.parameters(recurse=False))}
    return ", ".join(sorted(holders)) or "no matrix at all"


def owners_of_parameters(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every parameter with all the names under which the model has it; more than one if modules share it."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    return owners


def _check_weight(name: str, weight: nn.Parameter) -> None:
    if isinstance(weight, TorchAOBaseTensor):
        raise ValueError(
            f"{name} is already quantized ({type(weight).__name__}): calibration needs full-precision weights; "
            "load the full-precision model again"
        )
    if weight.dtype not in _DTYPES:
        raise ValueError(
            f"{name} has dtype {weight.dtype}; supported are float32, float16 and bfloat16: convert the model with "
            ".to(torch.bfloat16)"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"NaN or inf in {name}: a quantized weight could not represent it; repair the checkpoint, or leave the "
            "layer out with filter_fn"
        )
