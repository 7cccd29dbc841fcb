"""`import_checkpoint`: a GPTQ, AWQ or torchao checkpoint of a transformers model, loaded into our weights.

    model = mbq_ao.import_checkpoint("someone/model-gptq-3bit")              # exactly, as w3a16
    model = mbq_ao.import_checkpoint("someone/model-awq", "plain")           # then calibrate with mbq_ao.quantize_

transformers does the loading: its names, shards, devices and hub. While it does, the checkpoint's method is replaced by
one of ours, "mbq_import", which puts the weights together one at a time.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.torchao import TorchAoDeserialize
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from mbq_ao.config import show_weight
from mbq_ao.hf_quantizer import LOADING, METHOD, Loading, forget_conversions
from mbq_ao.interchange.affine import PRECISIONS, AffineWeight, InexactError
from mbq_ao.interchange.awq import AWQFormat
from mbq_ao.interchange.gptq import GPTQFormat
from mbq_ao.interchange.torchao import STOCK_TENSORS, from_stock
from mbq_ao.interchange.torchao_checkpoint import attach_torchao, register_with_torchao
from mbq_ao.packed_weight import PackedWeight
from mbq_ao.pretrained import attach, hub_arguments, load_filled
from mbq_ao.safetensors_format import listed, opened

_IMPORT = "mbq_import"
_FORMATS: dict[Any, type[GPTQFormat] | type[AWQFormat]] = {"gptq": GPTQFormat, "awq": AWQFormat}
_OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # older than quantization_config


def import_checkpoint(
    name_or_path: str | os.PathLike[str], precision: str | None = None, *, requantize: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """Load a GPTQ, AWQ or torchao checkpoint of a transformers model, weight for weight as it is.

    precision: what the quantized linears become.
        "w3a16": MBQInt3Tensor. The default for 3 bits.
        "w4a8": MBQW4A8Tensor. Exact for weights that are symmetric about zero; activations are rounded to 8 bits, which
            the checkpoint's own library may not have done.
        "torchao": torchao's Int8Tensor, weight only: exact, asymmetric too, at 8 bits a weight in memory.
        "plain": a plain tensor in the model's dtype, to calibrate with `mbq_ao.quantize_`, or to compare with.
        None: "w3a16" for 3 bits; ValueError for others, which cannot be ours without a decision of yours.
    requantize: with "w3a16" and "w4a8", round those weights anew to the nearest that have no exact form. They have
        been rounded before, so this is worse than quantizing the original model; "plain" and calibration are better.
    kwargs: as transformers' `from_pretrained` takes them (device_map, dtype, revision, ...). dtype is of the
        rest of the model; scales keep the dtype that they are stored in.

    Raises ValueError, naming the weight or the field, for a checkpoint that cannot be imported exactly (and why, and
    what would do), that is damaged or incomplete, or of a method or layout that is not known; OSError if there is none.
    """
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision must be None or one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    if requantize and precision not in ("w3a16", "w4a8"):
        raise ValueError(f'requantize=True needs precision="w3a16" or "w4a8" to round to, got {precision!r}')
    # A copy, as it is the caller's.
    config = copy.deepcopy(kwargs.pop("config", None)) or AutoConfig.from_pretrained(
        name_or_path, **hub_arguments(kwargs)
    )
    settings = _quantization_settings(config, name_or_path, kwargs)
    method = settings["quant_method"]
    if method == "torchao":
        config.quantization_config = settings
        return _import_torchao(name_or_path, config, precision, requantize, kwargs)
    if method not in _FORMATS:
        raise ValueError(
            f"{name_or_path} has quant_method {method!r}; gptq, awq and torchao can be imported"
            + ("; load it with mbq_ao.from_pretrained" if method == METHOD else "")
        )
    try:
        source = _FORMATS[method](settings)
    except ValueError as error:
        raise ValueError(f"cannot import {name_or_path}: {error}") from error
    if precision is None and source.bits != 3:
        raise ValueError(
            f"{name_or_path} is {method} with {source.bits} bits, which precision=None does not decide: give "
            '"plain" (to calibrate), "torchao" (weight only, exact) or "w4a8" (activations in 8 bits)'
        )
    config.quantization_config = {
        "quant_method": _IMPORT,
        "source": source,
        "precision": precision or "w3a16",
        "requantize": requantize,
    }
    loading = _Import(verify=False)
    model, unexpected = load_filled(name_or_path, config, loading, kwargs)
    # AutoGPTQ writes zeros as the bias of linears that have none.
    lost = sorted(key for key in unexpected if _end(key) in loading.biases)
    if lost:
        raise ValueError(
            f"{name_or_path} has biases for linears that have none in {type(model).__name__}: {listed(lost)}; they "
            "would be lost"
        )
    return model


@dataclass
class _Import(Loading):
    """What a checkpoint has beside its weights."""

    biases: set[str] = field(default_factory=set)  # ends of the names of quantized linears' biases that are not zero


def _tensors_in(files: Iterable[str]) -> dict[str, Callable[[], Tensor]]:
    """Name of a tensor in the checkpoint -> what reads it."""
    tensors: dict[str, Callable[[], Tensor]] = {}
    for path in files:
        if path.endswith(".safetensors"):
            file = opened(path)
            tensors |= {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        else:
            state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            tensors |= {name: partial(state_dict.__getitem__, name) for name in state_dict}
    return tensors


def _biases_that_count(tensors: Mapping[str, Callable[[], Tensor]]) -> set[str]:
    biases = (name for name in tensors if name.endswith(".bias") and f"{name[:-5]}.qweight" in tensors)
    return {_end(name) for name in biases if tensors[name]().count_nonzero()}


def _refuse_fused_experts(model: nn.Module, names: Iterable[str]) -> None:
    fused = next((name for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3), None)
    single = next((name for name in names if re.search(r"\.experts\.\d+\..*\.qweight$", name)), None)
    if fused and single:
        raise ValueError(
            f"{single} is of one expert, but {type(model).__name__} holds all in one parameter, {fused}, and such "
            "checkpoints are not imported; quantize the original model with mbq_ao.quantize_"
        )


def _end(name: str) -> str:
    """The part of a name that transformers does not change: `layers.0.self_attn.q_proj.bias`."""
    return ".".join(name.split(".")[-5:])


def _converted(weight: AffineWeight, precision: str, dtype: torch.dtype, requantize: bool) -> Tensor:
    try:
        return weight.convert(precision, dtype, requantize)
    except InexactError as error:
        ways = {
            "plain": "Keep it quantized",
            "torchao": 'Use precision="plain"',
        }.get(
            precision, 'Use precision="plain" and calibrate; requantize=True rounds such weights anew, which is worse'
        )
        raise ValueError(f"no exact form as {precision}: {error}. {ways}") from error


def _import_torchao(
    name_or_path: Any, config: Any, precision: str | None, requantize: bool, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """Loaded by transformers' own quantizer; then every weight is converted."""
    register_with_torchao()
    model, _ = load_filled(name_or_path, config, Loading(verify=False), kwargs)
    forget_conversions(model, TorchAoDeserialize)
    quantized = {name: p for name, p in model.named_parameters() if isinstance(p, TorchAOBaseTensor)}
    other = [name for name, p in quantized.items() if not isinstance(p, (*STOCK_TENSORS, PackedWeight))]
    if other or not quantized:
        what = f"{other[0]} is a {type(quantized[other[0]]).__name__}" if other else "nothing in it is quantized"
        raise ValueError(f"{name_or_path} cannot be imported: {what}; load it with transformers")
    for name, weight in quantized.items():
        if isinstance(weight, PackedWeight) and precision is None:  # written by save_torchao
            continue
        try:
            unpacked = AffineWeight.of(name, weight) if isinstance(weight, PackedWeight) else from_stock(name, weight)
        except InexactError as error:
            raise ValueError(
                f"{name_or_path} cannot be imported: {error}; load it with transformers instead"
            ) from error
        kind = precision or ("w3a16" if unpacked.bits == 3 else None)
        if kind is None:
            raise ValueError(
                f"{name} of {name_or_path} has {unpacked.bits} bits, which precision=None does not decide: give "
                '"plain" (to calibrate) or "w4a8" (activations in 8 bits), or load it with transformers'
            )
        converted = _converted(unpacked, kind, model.dtype, requantize)
        module, parameter = get_module_from_name(model, name)
        setattr(module, parameter, nn.Parameter(converted, requires_grad=False))
        if isinstance(converted, PackedWeight):
            show_weight(module)
    _attach(model, model.hf_quantizer, precision)
    return model


def _attach(model: PreTrainedModel, importer: HfQuantizer, precision: str | None) -> None:
    """Make the model one of ours, of torchao, or a plain one, whatever it was loaded as."""
    importer.remove_quantization_config(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False
    if precision == "torchao":
        attach_torchao(model)
    else:
        attach(model)


def _quantization_settings(config: Any, name_or_path: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's quantization_config as a dict with a quant_method, from config.json or a file of its own."""
    for place in (config, config.get_text_config(decoder=True)):
        settings = getattr(place, "quantization_config", None)
        if settings is not None:
            settings = settings if isinstance(settings, dict) else settings.to_dict()
            del place.quantization_config
            return {"quant_method": None, **settings}
    for file_name, method in _OWN_FILES.items():
        file = cached_file(
            name_or_path,
            file_name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub_arguments(kwargs),
        )
        if file is not None:
            try:
                return {"quant_method": method, **json.loads(Path(file).read_text(encoding="utf-8"))}
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(f"{file} is damaged: {error}; copy or download it again") from error
    raise ValueError(
        f"{name_or_path} is not quantized: its config.json has no quantization_config, and there is no "
        f"{' or '.join(_OWN_FILES)}; load it with transformers, and quantize it with mbq_ao.quantize_"
    )


class ImportConfig(QuantizationConfigMixin):
    """In memory only, while a checkpoint is being imported."""

    def __init__(
        self, source: GPTQFormat | AWQFormat, precision: str, requantize: bool, quant_method: str = _IMPORT
    ) -> None:
        self.quant_method = quant_method
        self.source, self.precision, self.requantize = source, precision, requantize


class ImportQuantizer(HfQuantizer):
    """Puts the weights of another library's checkpoint together while transformers loads it."""

    requires_calibration = True
    quantization_config: ImportConfig
    dtype: torch.dtype

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def get_weight_conversions(self) -> list[WeightConverter]:
        parts = self.quantization_config.source.parts
        return [WeightConverter([rf"\.{part}$" for part in parts], ".weight", [_Unpack(self)])]

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        tensors = _tensors_in(checkpoint_files or ())
        _refuse_fused_experts(model, tensors)
        loading = LOADING.get()
        if isinstance(loading, _Import):
            loading.biases = _biases_that_count(tensors)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        forget_conversions(model, _Unpack)
        _attach(model, self, self.quantization_config.precision)
        return model


class _Unpack(ConversionOps):
    """The parts of one weight, as read from the file -> the weight."""

    def __init__(self, hf_quantizer: ImportQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # transformers leaves the dtypes of such an operation's tensors alone

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Tensor]:
        try:
            return {full_layer_name: self._convert(input_dict, model, full_layer_name)}
        except ValueError as error:
            # transformers goes on, and ends with an error that names neither the tensor nor the reason.
            if (loading := LOADING.get()) is not None:
                loading.error = loading.error or error
            raise

    def _convert(self, input_dict: dict[str, Any], model: Any, name: str) -> Tensor:
        config = self.hf_quantizer.quantization_config
        module, _ = get_module_from_name(model, name)
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name} is quantized in the checkpoint, but is of a {type(module).__name__}, no linear")
        parts = {key[2:-1]: v[0] if isinstance(v, list) else v for key, v in input_dict.items()}
        weight = config.source.unpack(name, parts, module.out_features, module.in_features)
        converted = _converted(weight, config.precision, self.hf_quantizer.dtype, config.requantize)
        module._is_hf_initialized = True
        if isinstance(converted, PackedWeight):
            show_weight(module)
        return converted

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("an imported checkpoint is not written back")


# Plain assignment, as in hf_quantizer.py: the module may be reloaded.
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_IMPORT] = ImportConfig
auto.AUTO_QUANTIZER_MAPPING[_IMPORT] = ImportQuantizer
