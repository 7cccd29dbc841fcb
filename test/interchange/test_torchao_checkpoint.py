"""save_torchao, and transformers' own loader for torchao checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXTURES
from models import build_batch, build_model, model_inputs
from safetensors import safe_open
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, Int8Tensor
from torchao.quantization import quantize_ as torchao_quantize_

import mbq_ao
from mbq_ao import (
    Int3WeightOnlyConfig,
    Int8DynamicActivationInt4WeightMBQConfig,
    import_checkpoint,
    mbq_config,
    quantize_,
    save_torchao,
)
from mbq_ao.hf_quantizer import packed_weights
from mbq_ao.interchange import torchao_checkpoint
from mbq_ao.packed_weight import PackedWeight

W3, W4A8 = Int3WeightOnlyConfig(group_size=32), Int8DynamicActivationInt4WeightMBQConfig()


def rounded(family: str, config: Any = W3, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = build_model(family)
    for parameter in model.parameters():  # `model.to(dtype)` would round the rotary frequencies as well
        parameter.data = parameter.data.to(dtype)
    torchao_quantize_(model, config, lambda m, fqn: isinstance(m, nn.Linear) and ".layers." in fqn)
    return model


@torch.no_grad()
def logits(model: nn.Module, family: str) -> Tensor:
    for parameter in model.parameters():
        if not isinstance(parameter, PackedWeight | Int8Tensor):  # BLAS rounds by where in a mapped file it lies
            parameter.data = parameter.data.clone()
    return model(**model_inputs(build_batch(family))).logits


# Its tower has `.layers.`, too, of which the attention is written `self_attn.q_proj` as well.
LEFT_OUT_OF_LLAVA = {"lm_head", "multi_modal_projector"}


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(("family", "config"), [("internvl", W3), ("llava", W4A8)])
def test_ours_through_transformers_own_loader(family: str, config: Any, tmp_path: Path) -> None:
    """Bit for bit, in shards; the model that was saved is as it was; ours again afterwards."""
    model = rounded(family, config)
    expected = logits(model, family)
    save_torchao(model, tmp_path / "torchao", max_shard_size="60KB")
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    assert len(list((tmp_path / "torchao").glob("*.safetensors"))) > 1
    written = settings(tmp_path / "torchao")
    assert written["quant_method"] == "torchao"
    if family == "llava":
        assert set(written["modules_to_not_convert"]) == LEFT_OUT_OF_LLAVA
    loaded = FAMILIES[family].auto.from_pretrained(tmp_path / "torchao", device_map="auto")
    assert {n: repr(w) for n, w in packed_weights(loaded).items()} == {
        n: repr(w) for n, w in packed_weights(model).items()
    }
    assert torch.equal(logits(loaded, family), expected)
    imported = import_checkpoint(tmp_path / "torchao")
    imported.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(mbq_ao.from_pretrained(tmp_path / "ours"), family), expected)


def test_calibrated_with_act_pre_scale(tmp_path: Path) -> None:
    """Attached to our quantizer before and after; act_pre_scale goes along, also into torchao's own tensor."""
    model = build_model("olmo2")
    data = [build_batch("olmo2", 9)]
    quantize_(model, mbq_config(data, precision="w4a8", n_grid=3, recipe="mbq"), progress=False)
    assert any(w.act_pre_scale is not None for w in packed_weights(model).values())
    quantizer = model.hf_quantizer
    for stock in (False, True):
        save_torchao(model, tmp_path / "torchao", stock=stock)
        assert model.hf_quantizer is quantizer and model.config.quantization_config is quantizer.quantization_config
        again = import_checkpoint(tmp_path / "torchao", "w4a8")
        assert torch.equal(logits(again, "olmo2"), logits(model, "olmo2")), stock


@pytest.mark.parametrize(("family", "config", "error"), [("llava", W3, 1e-6), ("llama", W4A8, 0.05)])
def test_stock_tensors(family: str, config: Any, error: float, tmp_path: Path) -> None:
    """torchao's Int8Tensor holds the same weights; only the arithmetic of activations is its own."""
    model = rounded(family, config)
    save_torchao(model, tmp_path, stock=True)
    loaded = FAMILIES[family].auto.from_pretrained(tmp_path)
    for name, weight in packed_weights(model).items():
        stock = loaded.get_parameter(name)
        assert isinstance(stock, Int8Tensor) and torch.equal(stock.dequantize(), weight.dequantize()), name
    expected = logits(model, family)
    assert (logits(loaded, family) - expected).norm() <= error * expected.norm()


def test_stock_tensors_fit_what_their_config_makes(tmp_path: Path) -> None:
    """vLLM makes a weight by the config, and copies slices of the checkpoint's into it."""
    for config in (W3, W4A8):
        save_torchao(rounded("llama", config), tmp_path, stock=True)
        loaded = FAMILIES["llama"].auto.from_pretrained(tmp_path)
        plain = build_model("llama")
        quant_type = loaded.config.quantization_config.quant_type
        torchao_quantize_(plain, quant_type, lambda m, fqn: isinstance(m, nn.Linear) and fqn != "lm_head")
        for name, weight in loaded.named_parameters():
            if isinstance(weight, Int8Tensor):
                made = plain.get_parameter(name).data
                made.narrow(0, 16, 16).copy_(weight.data.narrow(0, 16, 16))
                assert torch.equal(made.qdata[16:32], weight.qdata[16:32])
        assert settings(tmp_path)["modules_to_not_convert"] == ["lm_head"]


def test_stock_names_nothing_of_ours(tmp_path: Path) -> None:
    """What is to be looked up by name while loading is all torchao's."""
    save_torchao(rounded("llama", W4A8), tmp_path, stock=True)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        metadata = json.dumps(file.metadata())
    assert "Int8Tensor" in metadata
    assert "mbq" not in metadata.lower() and "mbq" not in (tmp_path / "config.json").read_text().lower()


def test_several_configs(tmp_path: Path) -> None:
    model = build_model("llama")
    torchao_quantize_(model, FqnToConfig({r"re:.*mlp\..*_proj": W3, r"re:.*self_attn\..*_proj": W4A8}), filter_fn=None)
    assert len(packed_weights(model)) == 14
    save_torchao(model, tmp_path)
    assert len(settings(tmp_path)["quant_type"]["default"]["_data"]["fqn_to_config"]) == 14
    assert torch.equal(logits(FAMILIES["llama"].auto.from_pretrained(tmp_path), "llama"), logits(model, "llama"))


def test_experts(tmp_path: Path) -> None:
    family = next(iter(MIXTURES))
    model = build_model(family)
    torchao_quantize_(model, FqnToConfig({r"re:.*\.experts\.(gate_up|down)_proj": W3}), filter_fn=None)
    save_torchao(model, tmp_path / "ours")
    loaded = MIXTURES[family].auto.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(loaded, family), logits(model, family))
    with pytest.raises(ValueError, match=r"experts\..*holds the experts of a mixture"):
        save_torchao(model, tmp_path / "stock", stock=True)
    assert not (tmp_path / "stock").exists() and [f.name for f in tmp_path.iterdir()] == ["ours"]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no quantized weights of ours"):
        save_torchao(build_model("llama"), tmp_path)
    grouped = rounded("llama", Int8DynamicActivationInt4WeightMBQConfig(group_size=32))
    with pytest.raises(ValueError, match=r"layers.*_proj\.weight has \d scales a row"):
        save_torchao(grouped, tmp_path / "m", stock=True)
    assert not (tmp_path / "m").exists() and not hasattr(grouped, "hf_quantizer")

    import torchao.prototype.safetensors.safetensors_utils as utils

    monkeypatch.delattr(utils, "ALLOWED_CLASSES")
    with pytest.raises(RuntimeError, match=r"ALLOWED_CLASSES.*tested with 0\.18.*stock=True"):
        torchao_checkpoint.register_with_torchao()
