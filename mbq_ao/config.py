"""torchao configs: how `quantize_` gives a linear layer one of our weights without calibration.

    from torchao.quantization import quantize_
    quantize_(model, Int3WeightOnlyConfig(group_size=128))      # every nn.Linear; choose others with filter_fn

Rounding to the nearest point of the grid is what calibration (mbq_ao.mbq_config) is measured against.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from mbq_ao.int3_tensor import MBQInt3Tensor
from mbq_ao.packed_weight import PackedWeight, check_group_size
from mbq_ao.w4a8_tensor import MBQW4A8Tensor


@dataclass(kw_only=True)
class Int3WeightOnlyConfig(AOBaseConfig):
    """3-bit weights, asymmetric, group-wise, rounded to nearest; activations stay as they are.

    group_size: 32, 64 or 128 input channels share a scale; None (or -1, as elsewhere in torchao): one a row.
    """

    group_size: int | None = 128

    def __post_init__(self) -> None:
        self.group_size = check_group_size(self.group_size)


@dataclass(kw_only=True)
class Int8DynamicActivationInt4WeightMBQConfig(AOBaseConfig):
    """4-bit weights, symmetric, rounded to nearest; activations are quantized to 8 bits, one scale a token (W4A8).

    group_size: 32, 64 or 128 input channels share a scale; None (or -1): one a row, as in the paper, and less work.
    """

    group_size: int | None = None

    def __post_init__(self) -> None:
        self.group_size = check_group_size(self.group_size)


@register_quantize_module_handler(Int3WeightOnlyConfig)
def quantize_linear_int3(
    module: nn.Module, config: Int3WeightOnlyConfig, *, parameter_name: str = "weight"
) -> nn.Module:
    """Replace the module's weight by its 3-bit form. Any other parameter (a bias) is left as it is."""
    return _quantize_linear(module, MBQInt3Tensor, config.group_size, parameter_name)


@register_quantize_module_handler(Int8DynamicActivationInt4WeightMBQConfig)
def quantize_linear_w4a8(
    module: nn.Module, config: Int8DynamicActivationInt4WeightMBQConfig, *, parameter_name: str = "weight"
) -> nn.Module:
    """Replace the module's weight by its 4-bit form. Any other parameter (a bias) is left as it is."""
    return _quantize_linear(module, MBQW4A8Tensor, config.group_size, parameter_name)


def _quantize_linear(
    module: nn.Module, kind: type[PackedWeight], group_size: int | None, parameter_name: str
) -> nn.Module:
    if parameter_name != "weight":
        return module
    weight = module.weight
    if isinstance(weight, PackedWeight):
        raise ValueError(
            f"the weight of this {type(module).__name__} is quantized already: {weight}; "
            "exclude the module with filter_fn, or load the model again"
        )
    quantized = kind.from_hp(weight.detach(), group_size)
    module.weight = nn.Parameter(quantized, requires_grad=False)
    show_weight(module)
    return module


def show_weight(module: nn.Module) -> None:
    """Let `print(model)` say what kind of weight the module has."""
    module.extra_repr = functools.partial(_extra_repr, module)  # not a method, which could not be unpickled


def _extra_repr(self: nn.Module) -> str:
    """What `print(model)` says of a quantized layer: the class's own line, and the packed weights."""
    packed = [f"{name}={p}" for name, p in self._parameters.items() if isinstance(p, PackedWeight)]
    return ", ".join(filter(None, [type(self).extra_repr(self), *packed]))
