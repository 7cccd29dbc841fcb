"""save_gptq, read back by import_checkpoint; gptqmodel 7.7 has loaded such a checkpoint, see docs/interchange.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build_batch, build_model, model_inputs
from torch import nn
from torchao.quantization import FqnToConfig
from torchao.quantization import quantize_ as torchao_quantize_

from mbq_ao import (
    Int3WeightOnlyConfig,
    Int8DynamicActivationInt4WeightMBQConfig,
    MBQInt3Tensor,
    import_checkpoint,
    save_gptq,
)
from mbq_ao.hf_quantizer import packed_weights


def rounded(family: str, config: Any, dtype: torch.dtype = torch.float16) -> nn.Module:
    model = build_model(family)
    for parameter in model.parameters():  # `model.to(dtype)` would round the rotary frequencies as well
        parameter.data = parameter.data.to(dtype)
    torchao_quantize_(model, config, lambda m, fqn: isinstance(m, nn.Linear) and ".layers." in fqn)
    return model


@pytest.mark.parametrize(
    ("family", "config", "bits", "group_size", "dtype"),
    [
        ("llava", Int3WeightOnlyConfig(group_size=32), 3, 32, torch.float16),
        ("llama", Int3WeightOnlyConfig(group_size=None), 3, -1, torch.bfloat16),
        ("llama", Int8DynamicActivationInt4WeightMBQConfig(group_size=None), 4, -1, torch.float16),
    ],
)
def test_round_trip(family: str, config: Any, bits: int, group_size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model = rounded(family, config, dtype)
    save_gptq(model, tmp_path)
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written == json.loads((tmp_path / "quantize_config.json").read_text())
    fields = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": bits == 4, "desc_act": False}
    assert "lm_head" in written["modules_to_not_convert"]
    assert fields.items() <= written.items() and written["checkpoint_format"] == "gptq_v2"
    again = import_checkpoint(tmp_path, "w3a16" if bits == 3 else "w4a8")
    before, after = packed_weights(model), packed_weights(again)
    assert before.keys() == after.keys() and before
    for name, weight in before.items():
        assert torch.equal(after[name].qdata, weight.qdata), name
        assert torch.equal(after[name].scale.to(dtype), weight.scale), name
        if bits == 3:
            assert torch.equal(after[name].zero_point, weight.zero_point), name
    if dtype == torch.float16:
        inputs = {k: v.half() if v.is_floating_point() else v for k, v in model_inputs(build_batch(family)).items()}
        with torch.no_grad():
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_refusals(tmp_path: Path) -> None:
    w3, w4 = Int3WeightOnlyConfig(group_size=32), Int8DynamicActivationInt4WeightMBQConfig()
    with pytest.raises(ValueError, match="no quantized weights of ours"):
        save_gptq(build_model("llama"), tmp_path / "m")
    mixed = build_model("llama", torch.float16)
    torchao_quantize_(mixed, FqnToConfig({r"re:.*mlp\..*_proj": w3, r"re:.*self_attn\..*_proj": w4}), filter_fn=None)
    with pytest.raises(ValueError, match=r"one number of bits .*here 32, .*MBQInt3Tensor.*MBQW4A8Tensor"):
        save_gptq(mixed, tmp_path / "m")
    with pytest.raises(ValueError, match=r"scales of model\.layers.* are torch\.float32"):
        save_gptq(rounded("llama", w3, torch.float32), tmp_path / "m")
    scaled = rounded("llama", w3)
    linear = scaled.get_submodule("model.layers.0.mlp.down_proj")
    pre_scale = torch.rand(linear.in_features).half()
    linear.weight = nn.Parameter(MBQInt3Tensor.from_hp(linear.weight.dequantize(), 32, pre_scale), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.weight has an act_pre_scale"):
        save_gptq(scaled, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    assert not hasattr(scaled, "hf_quantizer")
