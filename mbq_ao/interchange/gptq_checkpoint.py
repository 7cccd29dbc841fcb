"""`save_gptq`: weights of ours as a GPTQ checkpoint, for those who serve GPTQ."""

from __future__ import annotations

import json
import os
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

import mbq_ao
from mbq_ao.hf_quantizer import packed_weights
from mbq_ao.int3_tensor import MBQInt3Tensor
from mbq_ao.interchange.affine import AffineWeight
from mbq_ao.interchange.gptq import pack_gptq_v2
from mbq_ao.interchange.parts import common_group_size, has_groups_of, left_out
from mbq_ao.packed_weight import PackedWeight
from mbq_ao.pretrained import complete_or_not_at_all, saved_as
from mbq_ao.tensor_parallel import check_whole


def save_gptq(model: PreTrainedModel, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """Write a quantized transformers model as a GPTQ checkpoint (gptq_v2), all or nothing. The model stays as it is.

    The weights are the same, exactly. Activations are not quantized there: W4A8 becomes W4A16.
    kwargs: as transformers' `save_pretrained` takes them (max_shard_size, ...).

    Raises ValueError, naming it, if nothing is quantized, for weights of different bits or group sizes, and for one
    that GPTQ cannot hold: with act_pre_scale, experts, scales that are not float16 numbers, rows or columns that are
    no multiple of 32 (of 8, with 4 bits). OSError if it cannot be written.
    """
    check_whole(model)
    weights = packed_weights(model)
    if not weights:
        raise ValueError(f"this {type(model).__name__} has no quantized weights of ours: call mbq_ao.quantize_ first")
    first = max(weights, key=lambda name: weights[name].scale.shape[-1])
    group_size = common_group_size(weights.values())
    for name, w in weights.items():
        if type(w) is not type(weights[first]) or not has_groups_of(w, group_size):
            raise ValueError(
                f"a GPTQ checkpoint has one number of bits and one group size, here {group_size}, but {first} is "
                f"{weights[first]} and {name} is {w}"
            )
    int3 = isinstance(weights[first], MBQInt3Tensor)
    skipped = left_out(model, set(weights))
    writer = _Writer(_GPTQConfig(3 if int3 else 4, group_size or -1, sym=not int3, modules_to_not_convert=skipped))
    with complete_or_not_at_all(save_directory) as staging:
        with saved_as(model, writer):
            type(model).save_pretrained(model, staging, **kwargs)
        settings = json.dumps(writer.quantization_config.to_dict(), indent=2)
        (staging / "quantize_config.json").write_text(settings, encoding="utf-8")


class _GPTQConfig(QuantizationConfigMixin):
    """What GPTQModel writes; transformers' own GPTQConfig cannot be made without optimum."""

    def __init__(self, bits: int, group_size: int, sym: bool, modules_to_not_convert: list[str]) -> None:
        self.quant_method = QuantizationMethod.GPTQ
        self.bits, self.group_size, self.sym = bits, group_size, sym
        self.modules_to_not_convert = modules_to_not_convert  # for vLLM and SGLang
        self.desc_act = self.lm_head = False
        self.checkpoint_format, self.pack_dtype = "gptq_v2", "int32"
        self.meta = {"quantizer": [f"mbq_ao:{mbq_ao.__version__}"]}


class _Writer(HfQuantizer):
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
        state_dict: dict[str, Any] = {}
        for name, value in model.state_dict().items():
            if isinstance(value, PackedWeight):
                parts = pack_gptq_v2(AffineWeight.of(name, value))
                state_dict |= {f"{name.rpartition('.')[0]}.{part}": tensor for part, tensor in parts.items()}
            else:
                state_dict[name] = value
        return state_dict, {}
