"""transformers' view of a quantized model: quant_method "mbq", which `from_pretrained` and `save_pretrained` call.

Importing this module registers it with transformers. That has to happen before a checkpoint is loaded: transformers
only warns about a method that it does not know, and returns a model with random weights. `import mbq_ao` sees to it,
and where the package is installed with pip so does `import torch` (_mbq_ao_autoload.py).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

import mbq_ao
from mbq_ao.config import show_weight
from mbq_ao.packed_weight import GROUP_SIZES, PackedWeight
from mbq_ao.quant_primitives import num_groups
from mbq_ao.safetensors_format import (
    FORMAT_VERSION,
    WEIGHT_TYPES,
    assemble,
    check_checksums,
    check_version,
    flatten_weights,
    opened,
)
from mbq_ao.tensor_parallel import (
    is_sharded,
    local_weight,
    shard_later,
    shard_of,
    shard_the_rest,
)

METHOD = "mbq"
CHECKSUMS = "mbq_checksums.json"
REPORT = "mbq_report.json"

_BEFORE_5_23 = not hasattr(HfQuantizer, "update_parallel_plan")  # transformers


@dataclass
class Loading:
    """What `mbq_ao.from_pretrained` asks of the quantizer that transformers makes, and hears from it."""

    verify: bool = True  # compare checksums
    error: ValueError | None = None  # the first weight that could not be put together


LOADING: ContextVar[Loading | None] = ContextVar("LOADING", default=None)


class MBQCheckpointConfig(QuantizationConfigMixin):
    """`quantization_config` in config.json.

    format_version: of the checkpoint, see safetensors_format.py.
    precision, group_size, recipe, ...: what `mbq_config` was given; None where the weights were rounded without it.
    parameters: name of a quantized parameter ("weight", and those of experts) -> whether it is stored transposed.
    num_weights: how many weights are quantized.  dtype: of the model, and so of most scales.
    calibration: number and sha256 of the calibration batches.
    Fields that this version does not know are kept.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        precision: str | None = None,
        group_size: int | None = None,
        parameters: Mapping[str, bool] | None = None,
        num_weights: int | None = None,
        dtype: str | None = None,
        calibration: Mapping[str, Any] | None = None,
        mbq_ao_version: str | None = None,
        **settings: Any,
    ) -> None:
        settings.pop("quant_method", None)
        self.quant_method = METHOD
        self.format_version = format_version
        self.precision = precision
        self.group_size = group_size
        self.parameters = dict(parameters or {"weight": False})
        self.num_weights = num_weights
        self.dtype = dtype
        self.calibration = None if calibration is None else dict(calibration)
        self.mbq_ao_version = mbq_ao_version
        self.__dict__.update(settings)

    def describe(self, model: nn.Module) -> None:
        """Set what can be read off a quantized model.

        Raises ValueError if some parameters of one name are stored transposed and others not.
        """
        weights = packed_weights(model)
        self.parameters = {}
        for name, weight in weights.items():
            parameter = name.rpartition(".")[2]
            if self.parameters.setdefault(parameter, weight.transposed) != weight.transposed:
                raise ValueError(f"{name} is stored transposed and other parameters called {parameter} are not")
        self.num_weights = len(weights)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.mbq_ao_version = mbq_ao.__version__


class MBQHfQuantizer(HfQuantizer):
    """Takes packed weights apart when transformers saves a model, and puts them together when it loads one."""

    requires_calibration = True  # from_pretrained(..., quantization_config=...) cannot quantize: it has no data
    quantization_config: MBQCheckpointConfig
    report: Any = None  # the CalibrationReport, in the process that calibrated
    dtype: torch.dtype | None = None  # that the model is loaded in
    parallel = False  # whether the model is loaded tensor parallel
    # Of the parameters as the model was built, where transformers may load others as they are stored.
    plain_dtypes: Mapping[str, torch.dtype] = MappingProxyType({})

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        check_version(self.quantization_config.format_version, "this checkpoint")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map puts layers on the disk, from where quantized weights cannot be used; leave out "
                "offload_folder, or put these layers on the CPU"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        distributed = getattr(model.config, "distributed_config", None)
        if distributed is None:
            return
        if distributed.dp_size > 1 or distributed.pp_size > 1:
            raise ValueError(
                "quantized weights can be sharded tensor parallel only: leave fsdp_size, dp_replicate_size and pp_size "
                f"of DistributedConfig at 1, got {distributed}"
            )
        self.parallel = True
        override = distributed.tp_plan if plan is model.tp_plan else distributed.ep_plan
        shard_later(model, plan, override, self.quantization_config.parameters)

    def get_weight_conversions(self) -> list[WeightConverter]:
        parts = dict.fromkeys(
            part
            for kind in WEIGHT_TYPES.values()
            for part in (*kind.tensor_data_names, *kind.optional_tensor_data_names)
        )
        return [
            # Sharded weights are put together on the host: the device shall hold this rank's part only.
            WeightConverter(
                [f"_{parameter}_{part}" for part in parts], parameter, [_Assemble(self)], force_cpu=self.parallel
            )
            for parameter in self.quantization_config.parameters
        ]

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        # It would shard a weight's data one by one.
        if getattr(model.config, "distributed_config", None) is not None and _BEFORE_5_23:
            raise NotImplementedError(
                "loading a quantized checkpoint tensor parallel needs transformers 5.23 or later, this is "
                f"{transformers.__version__}; upgrade it, or load the whole checkpoint in each process and use "
                "torch's parallelize_module"
            )
        if _BEFORE_5_23 and self.dtype is not None:
            kept = tuple(model._get_dtype_plan(self.dtype))  # names of modules that stay in fp32
            self.plain_dtypes = {n: p.dtype for n, p in model.named_parameters() if not any(k in n for k in kept)}
        loading = LOADING.get()
        if loading is None or loading.verify:
            for path in map(Path, checkpoint_files or ()):
                verify_shard(path)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from mbq_ao.pretrained import attach

        forget_conversions(model, _Assemble)
        shard_the_rest(model)
        if self.parallel and not any(is_sharded(p) for p in model.parameters()):
            warnings.warn(
                f"the tp_plan of {type(model).__name__} shards none of the quantized weights, so that every rank holds "
                "all of them: give rules for its layers, DistributedConfig(tp_plan={...}), see docs/parallel.md",
                stacklevel=2,
            )
        found, expected = len(packed_weights(model)), self.quantization_config.num_weights
        if expected is not None and found != expected:
            raise ValueError(
                f"the checkpoint lists {expected} quantized weights, but {type(model).__name__} got {found}: it is "
                "incomplete, or of another architecture"
            )
        if self.dtype is not None and str(self.dtype).removeprefix("torch.") != self.quantization_config.dtype:
            for name in packed_weights(model):
                module, parameter = get_module_from_name(model, name)
                weight = module._parameters[parameter].data.to(self.dtype)
                module._parameters[parameter] = nn.Parameter(weight, requires_grad=False)
        plain = {
            n: p for n, p in model.named_parameters() if n in self.plain_dtypes and not isinstance(p, PackedWeight)
        }
        for name, parameter in plain.items():
            parameter.data = parameter.data.to(self.plain_dtypes[name])
        attach(model, config=self.quantization_config)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
        self.quantization_config.describe(model)
        return flatten_weights(model.state_dict())


class _Assemble(ConversionOps):
    """The parts of one weight, as read from the file -> the weight."""

    def __init__(self, hf_quantizer: MBQHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # transformers leaves the dtypes of such an operation's tensors alone

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Tensor]:
        try:
            return {full_layer_name: self._assemble(input_dict, model, full_layer_name)}
        except ValueError as error:
            # transformers goes on, and ends with an error that names neither the tensor nor the reason.
            if (loading := LOADING.get()) is not None:
                loading.error = loading.error or error
            raise

    def _assemble(self, input_dict: dict[str, Any], model: Any, name: str) -> PackedWeight:
        module, parameter = get_module_from_name(model, name)
        prefix = f"_{parameter}_"
        parts = {key.removeprefix(prefix): v[0] if isinstance(v, list) else v for key, v in input_dict.items()}
        kind = next(
            (k for k in WEIGHT_TYPES.values() if set(k.tensor_data_names) == parts.keys() - {"act_pre_scale"}), None
        )
        if kind is None:
            raise ValueError(f"the checkpoint is incomplete: of {name} it has only {', '.join(sorted(parts))}")
        config = self.hf_quantizer.quantization_config
        shape, transposed = tuple(getattr(module, parameter).shape), config.parameters.get(parameter, False)
        attributes = _attributes(shape, parts["scale"].shape[-1], config.group_size, transposed)
        weight = assemble(kind, name, parts, attributes, "the checkpoint")
        module._is_hf_initialized = True
        if isinstance(module, nn.Linear):
            show_weight(module)
        return shard_of(weight, module, parameter, name)

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("MBQHfQuantizer takes weights apart before transformers converts them")


def _attributes(shape: Sequence[int], groups: int, group_size: int | None, transposed: bool) -> dict[str, Any]:
    """The constructor's attributes of a weight that the model has in this shape, with this many groups a row.

    The number of groups tells the group size, except where all of a row is in one.
    """
    k = shape[-2] if transposed else shape[-1]
    candidates = [g or k for g in (group_size, *GROUP_SIZES)]
    g = next((g for g in candidates if num_groups(k, g) == groups), k)
    return {"shape": shape, "block_size": [1] * (len(shape) - 1) + [g], "transposed": transposed or None}


def forget_conversions(model: nn.Module, operation: type[ConversionOps]) -> None:
    """Take out of a loaded model the conversions that have this operation.

    Saving would run them backwards, but the state dict that it gets has been taken apart already.
    """
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [
        c for c in conversions if not any(isinstance(op, operation) for op in getattr(c, "operations", ()))
    ]


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """Fully qualified name -> quantized weight, or what this rank has of it."""
    weights = ((name, local_weight(p)) for name, p in model.named_parameters(remove_duplicate=False))
    return {name: weight for name, weight in weights if weight is not None}


def verify_shard(path: Path) -> bool:
    """Compare a shard with the checksums beside it; False if there are none. Raises ValueError naming what differs."""
    listed = path.parent / CHECKSUMS
    expected = json.loads(listed.read_text(encoding="utf-8")).get(path.name) if listed.is_file() else None
    if path.suffix != ".safetensors" or expected is None:
        return False
    with opened(path) as file:
        names = set(file.keys())
        missing = sorted(expected.keys() - names)
        if missing:
            raise ValueError(f"{path} is incomplete: {', '.join(missing[:3])} missing; copy or download it again")
        check_checksums({name: file.get_tensor(name) for name in names}, expected, path)
    return True


def _register() -> None:
    # Plain assignment: the decorators of transformers refuse a second time, as importlib.reload makes it.
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = MBQCheckpointConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = MBQHfQuantizer


_register()
torch.serialization.add_safe_globals([MBQCheckpointConfig])
