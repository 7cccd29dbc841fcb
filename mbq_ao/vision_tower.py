"""The vision tower's linears by plain rounding, beside a calibrated decoder: `mbq_config(..., vision=config)`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.core.config import AOBaseConfig
from torchao.quantization import quantize_


def find_vision_tower(model: nn.Module) -> nn.Module | None:
    """The module that transformers' `get_encoder("image")` finds."""
    tower = model.get_encoder(modality="image") if hasattr(model, "get_encoder") else None
    # transformers returns the model itself where it finds none.
    return tower if isinstance(tower, nn.Module) and tower is not model and tower in set(model.modules()) else None


def vision_linears(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> dict[str, nn.Linear]:
    """The nn.Linear of the vision tower, which transformers' `get_encoder("image")` finds, by their full names.

    Raises ValueError if there is no vision tower, or no linear of it passes filter_fn.
    """
    tower = find_vision_tower(model)
    names = {module: name for name, module in model.named_modules()}
    if tower is None:
        raise ValueError(
            f"vision=... quantizes the vision tower, but {type(model).__name__} has none that transformers' "
            'get_encoder("image") finds; leave it out, and call torchao.quantization.quantize_ with a filter_fn'
        )
    linears = {
        f"{names[tower]}.{name}".removesuffix("."): module
        for name, module in tower.named_modules()
        # torch.nn.MultiheadAttention computes with the weight of its out_proj itself.
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }
    chosen = {name: linear for name, linear in linears.items() if filter_fn is None or filter_fn(linear, name)}
    if not chosen:
        raise ValueError(
            f"vision=... has nothing to quantize: none of the {len(linears)} nn.Linear of {names[tower]} passes "
            f"filter_fn; it is given names like {next(iter(linears), '')!r}"
        )
    return chosen


def rounded_weights(linears: Mapping[str, nn.Linear], config: AOBaseConfig) -> dict[str, Tensor]:
    """The weights that torchao's `quantize_` with this config gives the linears, which stay as they are.

    Without those that it leaves alone, for their size or dtype. Raises ValueError if the config changes more of a
    linear than its weight.
    """
    result = {}
    for name, linear in linears.items():
        twin = copy.copy(linear)
        twin._parameters = dict(linear._parameters)
        holder = nn.Sequential(twin)
        quantize_(holder, config, filter_fn=lambda module, fqn: isinstance(module, nn.Linear))
        weight = getattr(holder[0], "weight", None)
        if type(holder[0]) is not type(linear) or not isinstance(weight, Tensor):
            raise ValueError(
                f"vision={type(config).__name__} makes a {type(holder[0]).__name__} of {name}, but only configs that "
                "change nothing but the weight can be used; call torchao.quantization.quantize_ with a filter_fn"
            )
        if is_traceable_wrapper_subclass(weight):
            result[name] = weight.data
    return result
