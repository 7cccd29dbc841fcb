"""Tensor parallel loading of a checkpoint: which part of a packed weight this rank keeps.

transformers replaces a parameter of its plan by an empty DTensor, and cuts every tensor read for it along the
dimension that the parameter is to be sharded in. That is wrong for a weight's other data: an act_pre_scale belongs to
the columns, one scale a row does not follow them. So here the placeholder waits beside the module until the weight
has been put together, from a mapped file and without a copy, and the weight is cut as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    TensorParallelLayer,
    replace_layer_number_by_wildcard,
)

from mbq_ao.packed_weight import PackedWeight

_PREFIX = "mbq_"  # of the names under which styles are registered that shard later
_WAITING = "_mbq_placeholders"


class _ShardedLater(TensorParallelLayer):
    """Another style, whose empty DTensors wait beside the module."""

    def __init__(self, style: Any) -> None:
        self.style = style

    def validate_param(self, module: nn.Module, param: str, mesh: Any, parameter_name: str | None = None) -> None:
        self.style.validate_param(module, param, mesh, parameter_name=parameter_name)

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        whole = module._parameters[param]
        self.style.shard_param(module, param, mesh)
        placeholder = module._parameters[param]
        if isinstance(placeholder, DTensor):
            module.__dict__.setdefault(_WAITING, {})[param] = placeholder
            module._parameters[param] = whole


def shard_later(model: nn.Module, plan: dict[str, str], override: Any, parameters: Iterable[str]) -> None:
    """Let the plan, a rule's name -> style, shard what may be quantized when it has been read.

    override: the user's rules, if any, which transformers adds to the plan later.  parameters: names of quantized ones.
    """
    rules = plan | (override if isinstance(override, dict) else {})
    for name, parameter in model.named_parameters():
        module, _, last = name.rpartition(".")
        if last not in parameters or not (parameter.ndim == 3 or isinstance(model.get_submodule(module), nn.Linear)):
            continue
        rule = replace_layer_number_by_wildcard(name)
        style = rules.get(rule) or rules.get(rule.rpartition(".")[0])
        if style is not None and not style.startswith(_PREFIX):
            if _PREFIX + style not in ALL_PARALLEL_STYLES:
                ALL_PARALLEL_STYLES.register(_PREFIX + style, _ShardedLater(ALL_PARALLEL_STYLES[style]))
            plan[rule] = _PREFIX + style


def shard_of(weight: PackedWeight, module: nn.Module, parameter: str, name: str) -> PackedWeight:
    """What this rank keeps of a weight that was read, in memory of its own; the weight itself where none is sharded.

    The parameter becomes the DTensor that transformers wraps the shard in. Raises ValueError naming the weight.
    """
    placeholder = module.__dict__.get(_WAITING, {}).pop(parameter, None)
    if placeholder is None:
        if isinstance(getattr(module, parameter), DTensor):
            raise ValueError(f"{name} is quantized and cannot be sharded by this tp_plan; leave it out of the plan")
        return weight
    placeholder.requires_grad_(False)
    module._parameters[parameter] = placeholder
    module._hf_quantized_needs_local_tp = True  # forward gets the shard, not the DTensor
    mesh, placements = placeholder.device_mesh, placeholder.placements
    try:
        return distribute_tensor(weight, mesh, placements, src_data_rank=None).to_local()
    except ValueError as error:
        raise ValueError(f"{name} over {mesh.size()} ranks: {error}") from error


def shard_the_rest(model: nn.Module) -> None:
    """Shard what waited and turned out not to be quantized."""
    for module in model.modules():
        for parameter, placeholder in module.__dict__.pop(_WAITING, {}).items():
            value = module._parameters[parameter]
            if not isinstance(value, DTensor):
                mesh, placements = placeholder.device_mesh, placeholder.placements
                sharded = distribute_tensor(value.detach(), mesh, placements, src_data_rank=None)
                module._parameters[parameter] = nn.Parameter(sharded, requires_grad=value.requires_grad)


def local_weight(parameter: Tensor) -> PackedWeight | None:
    """The packed weight that a parameter is, or that this rank has of it; None for any other parameter."""
    if isinstance(parameter, DTensor):
        parameter = parameter._local_tensor
    return parameter if isinstance(parameter, PackedWeight) else None


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is a packed weight of which this rank has a part, or a copy, as a DTensor."""
    return isinstance(parameter, DTensor) and local_weight(parameter) is not None


def check_whole(model: nn.Module) -> None:
    """Raise ValueError for quantized weights that are not all here, and so cannot be saved."""
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(
                f"{name} is a part of a quantized weight, the others are on other ranks, and parts are not joined for "
                "saving: save the model before parallelize_module, or load its checkpoint in one process and save that"
            )
        if isinstance(parameter, PackedWeight) and parameter.device.type == "meta":
            raise ValueError(
                f"{name} is offloaded by accelerate (device_map), from where quantized weights cannot be saved: load "
                'the checkpoint with device_map="cpu" and save that'
            )
