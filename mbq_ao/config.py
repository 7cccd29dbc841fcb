r"""torchao configs: how `quantize_` gives a linear layer one of our weights without calibration.

    from torchao.quantization import quantize_
    quantize_(model, Int3WeightOnlyConfig(group_size=128))      # every nn.Linear; choose others with filter_fn

The experts of a mixture are 3-D parameters, which torchao's FqnToConfig names:

    quantize_(model, FqnToConfig({r"re:.*\.experts\.(gate_up|down)_proj": Int3WeightOnlyConfig()}), filter_fn=None)

Rounding to the nearest point of the grid is what calibration (mbq_ao.mbq_config) is measured against.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor, nn
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
def quantize_module_int3(
    module: nn.Module, config: Int3WeightOnlyConfig, *, parameter_name: str = "weight"
) -> nn.Module:
    """Replace the module's weight, or a 3-D parameter of experts, by its 3-bit form; leave any other (a bias)."""
    return _quantize_parameter(module, MBQInt3Tensor, config.group_size, parameter_name)


@register_quantize_module_handler(Int8DynamicActivationInt4WeightMBQConfig)
def quantize_module_w4a8(
    module: nn.Module, config: Int8DynamicActivationInt4WeightMBQConfig, *, parameter_name: str = "weight"
) -> nn.Module:
    """Replace the module's weight, or a 3-D parameter of experts, by its 4-bit form; leave any other (a bias)."""
    return _quantize_parameter(module, MBQW4A8Tensor, config.group_size, parameter_name)


def _quantize_parameter(
    module: nn.Module, kind: type[PackedWeight], group_size: int | None, parameter_name: str
) -> nn.Module:
    value = getattr(module, parameter_name, None)
    if not isinstance(value, Tensor):
        raise ValueError(f"this {type(module).__name__} has no {parameter_name} to quantize; exclude the module")
    if parameter_name != "weight" and value.dim() != 3:
        return module
    if isinstance(value, PackedWeight):
        raise ValueError(
            f"the {parameter_name} of this {type(module).__name__} is quantized already: {value}; "
            "exclude the module with filter_fn, or load the model again"
        )
    if parameter_name == "weight" and value.dim() != 2:
        raise ValueError(
            f"the weight of this {type(module).__name__} is not that of a linear layer, which is (N, K), but "
            f"{tuple(value.shape)}; exclude the module"
        )
    if value.dim() == 3 and _is_transposed(module, parameter_name):
        quantized = kind.from_hp(value.detach().mT, group_size).mT
    else:
        quantized = kind.from_hp(value.detach(), group_size)
    setattr(module, parameter_name, nn.Parameter(quantized, requires_grad=False))
    show_weight(module)
    return module


def _is_transposed(experts: nn.Module, parameter_name: str) -> bool:
    """Whether its weights are (E, K, N), the input second; transformers says so of most of its experts."""
    if isinstance(transposed := getattr(experts, "is_transposed", None), bool):
        return transposed
    name = type(experts).__name__
    raise ValueError(
        f"{parameter_name} of this {name} is {tuple(getattr(experts, parameter_name).shape)}, and nothing says whether "
        f"its experts are (out, in) or (in, out): set {name}.is_transposed to False or, for (in, out), True before"
    )


def show_weight(module: nn.Module) -> None:
    """Let `print(model)` say what kind of weights the module has."""
    module.extra_repr = functools.partial(_extra_repr, module)  # not a method, which could not be unpickled


def _extra_repr(self: nn.Module) -> str:
    """What `print(model)` says of a quantized module; the class's own line, and its quantized parameters."""
    packed = [f"{name}={p}" for name, p in self.named_parameters(recurse=False) if isinstance(p, PackedWeight)]
    return ", ".join(filter(None, [type(self).extra_repr(self), *packed]))
