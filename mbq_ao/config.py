"""torchao configs: how `quantize_` gives a linear layer one of our weights without calibration.

    from torchao.quantization import quantize_
    quantize_(model, Int3WeightOnlyConfig(group_size=128))      # every nn.Linear; choose others with filter_fn

Rounding to the nearest point of the grid is what calibration (mbq_ao.mbq_config) is measured against.
"""

from __future__ import annotations

import types
from dataclasses import dataclass

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from mbq_ao.int3_tensor import GROUP_SIZES, MBQInt3Tensor


@dataclass(kw_only=True)
class Int3WeightOnlyConfig(AOBaseConfig):
    """3-bit weights, asymmetric, group-wise, rounded to nearest; activations stay as they are.

    group_size: 32, 64 or 128 input channels share a scale; None (or -1, as elsewhere in torchao): one a row.
    """

    group_size: int | None = 128

    def __post_init__(self) -> None:
        if self.group_size == -1:
            self.group_size = None
        if self.group_size not in GROUP_SIZES or isinstance(self.group_size, bool):
            raise ValueError(f"group_size must be 32, 64, 128 or None (one scale a row), got {self.group_size!r}")


@register_quantize_module_handler(Int3WeightOnlyConfig)
def quantize_linear_int3(
    module: nn.Module, config: Int3WeightOnlyConfig, *, parameter_name: str = "weight"
) -> nn.Module:
    """Replace the module's weight by its 3-bit form. Any other parameter (a bias) is left as it is."""
    if parameter_name != "weight":
        return module
    weight = module.weight
    if isinstance(weight, MBQInt3Tensor):
        raise ValueError(
            f"the weight of this {type(module).__name__} is quantized already: {weight}; "
            "exclude the module with filter_fn, or load the model again"
        )
    quantized = MBQInt3Tensor.from_hp(weight.detach(), config.group_size)
    module.weight = nn.Parameter(quantized, requires_grad=False)
    module.extra_repr = types.MethodType(_extra_repr, module)
    return module


def _extra_repr(self: nn.Module) -> str:
    """What `print(model)` says of a quantized layer; the class's own line, and the weight."""
    return f"{type(self).extra_repr(self)}, weight={self.weight}"
