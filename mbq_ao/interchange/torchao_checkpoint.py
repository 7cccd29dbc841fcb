"""torchao's own checkpoint format, which transformers reads as quant_method "torchao", and so does vLLM.

mbq_ao.save_torchao(model, folder)                # our tensors: whoever loads it needs mbq_ao, registered
mbq_ao.save_torchao(model, folder, stock=True)    # torchao's Int8Tensor: loads without mbq_ao, at 8 bits a weight

import mbq_ao, transformers
mbq_ao.register_with_torchao()
model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import FqnToConfig
from transformers import PreTrainedModel, TorchAoConfig
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from mbq_ao.hf_quantizer import packed_weights
from mbq_ao.interchange.parts import common_group_size, left_out
from mbq_ao.interchange.torchao import STOCK_TENSORS, config_of, to_stock
from mbq_ao.packed_weight import PackedWeight
from mbq_ao.pretrained import complete_or_not_at_all, saved_as
from mbq_ao.safetensors_format import WEIGHT_TYPES
from mbq_ao.tensor_parallel import check_whole

TESTED = "0.18"


def register_with_torchao() -> None:
    """Let torchao, and transformers' TorchAoConfig with it, read and write our weights. May be called again.

    torchao has no public way to do this. Extended are three lists of what a checkpoint may name: ALLOWED_AO_MODULES in
    torchao.core.config (configs), ALLOWED_TENSORS_SUBCLASSES and ALLOWED_CLASSES in
    torchao.prototype.safetensors.safetensors_utils (tensors). Raises RuntimeError if a torchao other than the one that
    this was tested with keeps them elsewhere.
    """
    try:
        from torchao.core.config import ALLOWED_AO_MODULES
        from torchao.prototype.safetensors.safetensors_utils import ALLOWED_CLASSES, ALLOWED_TENSORS_SUBCLASSES

        ALLOWED_AO_MODULES.add("mbq_ao.config")
        ALLOWED_CLASSES.update(WEIGHT_TYPES)
        ALLOWED_TENSORS_SUBCLASSES.extend(name for name in WEIGHT_TYPES if name not in ALLOWED_TENSORS_SUBCLASSES)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"torchao {version('torchao')} cannot be told of our weights: {error}. This was tested with {TESTED}; use "
            "model.save_pretrained and mbq_ao.from_pretrained, or save_torchao(stock=True), which do without"
        ) from error


def save_torchao(
    model: PreTrainedModel, save_directory: str | os.PathLike[str], *, stock: bool = False, **kwargs: Any
) -> None:
    """Write a quantized transformers model as a torchao checkpoint, all or nothing. The model stays as it is.

    stock: as torchao's own Int8Tensor, which needs nothing of ours. W3A16: the same weights, exactly. W4A8 with one
        scale a row: the same weights; activations are rounded by torchao, to 1/127.5 of a token's largest value instead
        of 1/127. Weights take 8 bits in the file and in memory.
        False: as our tensors, bit for bit; the reader calls `register_with_torchao()` first.
    kwargs: as transformers' `save_pretrained` takes them (max_shard_size, ...).

    Raises ValueError if nothing is quantized, and with stock=True, naming it, for a weight that torchao cannot hold:
    experts, several scales a row in W4A8, columns that are no whole groups. OSError if it cannot be written.
    """
    check_whole(model)
    weights = packed_weights(model)
    if not weights:
        raise ValueError(f"this {type(model).__name__} has no quantized weights of ours: call mbq_ao.quantize_ first")
    if not stock:
        register_with_torchao()
    with complete_or_not_at_all(save_directory) as staging:
        writer = _Writer(_torchao_config(model, weights, stock), stock)
        with saved_as(model, writer):
            # Names as the model has them: those of the metadata are, and vLLM compares the two.
            type(model).save_pretrained(model, staging, **{"save_original_format": False, **kwargs})


def attach_torchao(model: PreTrainedModel) -> None:
    """Let transformers save a model that has torchao's tensors."""
    weights = {name: p for name, p in model.named_parameters() if isinstance(p, STOCK_TENSORS)}
    model.config.quantization_config = _torchao_config(model, weights, stock=True)
    model.hf_quantizer = TorchAoHfQuantizer(model.config.quantization_config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = model.config.quantization_config.quant_method


class _Writer(TorchAoHfQuantizer):
    def __init__(self, config: TorchAoConfig, stock: bool) -> None:
        super().__init__(config, pre_quantized=True)
        self.stock = stock

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
        state_dict = model.state_dict()
        if self.stock:
            packed = {name: w for name, w in state_dict.items() if isinstance(w, PackedWeight)}
            state_dict.update((name, to_stock(name, w)) for name, w in packed.items())
        return flatten_tensor_state_dict(state_dict)


def _torchao_config(model: nn.Module, weights: Mapping[str, Tensor], stock: bool) -> TorchAoConfig:
    """One config and what it leaves out, which is what vLLM understands where it fuses linears; else config by name."""
    group_size = common_group_size(weights.values())
    configs = {name: config_of(w, stock, group_size) for name, w in weights.items()}
    first = next(iter(configs.values()))
    if all(config == first for config in configs.values()) and all(name.endswith(".weight") for name in configs):
        return TorchAoConfig(first, modules_to_not_convert=left_out(model, set(weights)))
    return TorchAoConfig(FqnToConfig(OrderedDict((name.removesuffix(".weight"), c) for name, c in configs.items())))
