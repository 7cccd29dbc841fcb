"""The vision tower in a precision of its own, in the same call as the calibrated decoder."""

from typing import Any

import pytest
import torch
from models import assert_unchanged, build_batch, build_model, model_inputs, snapshot
from torch import nn
from torchao.quantization import FqnToConfig, Int8DynamicActivationInt8WeightConfig
from torchao.quantization import quantize_ as torchao_quantize_

from mbq_ao import Int8DynamicActivationInt4WeightMBQConfig, MBQW4A8Tensor, mbq_config, quantize_

W8A8 = Int8DynamicActivationInt8WeightConfig()
W4A8 = Int8DynamicActivationInt4WeightMBQConfig()
TOWERS = {"llava": "model.vision_tower", "qwen2_5_vl": "model.visual", "smolvlm": "model.vision_model"}


def config(family: str, **changes: Any) -> Any:
    return mbq_config([build_batch(family, 9)], precision="w4a8", n_grid=2, **({"recipe": "mbq"} | changes))


def linears_of(model: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if n.startswith(prefix) and isinstance(m, nn.Linear)}


@pytest.mark.parametrize("vision", [W8A8, W4A8], ids=["w8a8", "w4a8"])
@pytest.mark.parametrize("family", TOWERS)
def test_every_linear_of_the_tower_is_rounded(family: str, vision: Any) -> None:
    model = build_model(family)
    with torch.no_grad():
        expected = model(**model_inputs(build_batch(family))).logits
    report = quantize_(model, config(family, vision=vision), progress=False)
    tower = linears_of(model, TOWERS[family])
    assert report is not None and report.vision == list(tower)
    kind = {type(m.weight.data).__name__ for m in tower.values()}
    assert kind == {"MBQW4A8Tensor" if vision is W4A8 else "Int8Tensor"}
    assert not any(m.weight.requires_grad for m in tower.values())
    assert all(isinstance(m.weight, MBQW4A8Tensor) for m in linears_of(model, "model.language_model").values())
    assert type(model.lm_head.weight) is nn.Parameter
    assert f"vision tower: {len(tower)} linears rounded without calibration, {type(vision).__name__}" in str(report)
    with torch.no_grad():
        logits = model(**model_inputs(build_batch(family))).logits
    assert logits.isfinite().all()
    assert 1e-3 < (logits - expected).norm() / expected.norm() < 0.9


@torch.no_grad()
@pytest.mark.parametrize("vision", [W8A8, W4A8], ids=["w8a8", "w4a8"])
def test_the_attention_of_torch_reads_its_own_weights(vision: Any) -> None:
    model = build_model("gemma3")  # whose SigLIP has torch.nn.MultiheadAttention at its end
    report = quantize_(model, config("gemma3", vision=vision), progress=False)
    assert report is not None and report.vision and not any("out_proj" in n and "head" in n for n in report.vision)
    assert "MBQW4A8Tensor" in repr(model.get_decoder().layers[0].mlp)
    assert model(**model_inputs(build_batch("gemma3"))).logits.isfinite().all()


def test_errors_of_the_tower_come_before_the_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llava")
    monkeypatch.setattr("mbq_ao.calibration.mbq.calibrate", lambda *args, **kwargs: pytest.fail("calibrated"))
    torchao_quantize_(model, W4A8, filter_fn=lambda m, fqn: isinstance(m, nn.Linear) and "vision_tower" in fqn)
    with pytest.raises(ValueError, match="is quantized already"):
        quantize_(model, config("llava", vision=W4A8), progress=False)


def test_without_the_option_the_tower_stays_as_it_is() -> None:
    model = build_model("llava")
    before = {name: id(p) for name, p in model.named_parameters() if name.startswith("model.vision_tower")}
    report = quantize_(model, config("llava"), progress=False)
    assert report is not None and report.vision == []
    assert {name: id(p) for name, p in model.named_parameters() if name in before} == before


def test_filter_fn_chooses_in_the_tower_too() -> None:
    model = build_model("llava")
    report = quantize_(model, config("llava", vision=W8A8), lambda module, fqn: "mlp" in fqn, progress=False)
    assert report is not None and report.vision == [n for n in linears_of(model, TOWERS["llava"]) if "mlp" in n]
    with pytest.raises(ValueError, match=r"none of the 12 nn.Linear of model.vision_tower passes filter_fn"):
        quantize_(build_model("llava"), config("llava", vision=W8A8), lambda m, fqn: "language" in fqn, progress=False)


def test_nothing_is_changed_if_rounding_the_tower_fails() -> None:
    model = build_model("llava")
    with torch.no_grad():
        next(iter(linears_of(model, TOWERS["llava"]).values())).weight[0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_(model, config("llava", vision=W4A8), progress=False)
    assert_unchanged(model, before)


def test_a_config_that_replaces_modules_is_refused() -> None:
    from torchao.core.config import AOBaseConfig
    from torchao.quantization.transform_module import register_quantize_module_handler

    class Replacing(AOBaseConfig):
        pass

    @register_quantize_module_handler(Replacing)
    def replace(module: nn.Module, config: Replacing) -> nn.Module:
        return nn.Identity()

    with pytest.raises(ValueError, match=r"vision=Replacing makes a Identity of model\.vision_tower\."):
        quantize_(build_model("llava"), config("llava", vision=Replacing()), progress=False)


def test_a_model_without_a_vision_tower() -> None:
    model = build_model("llama")
    settings = mbq_config([build_batch("llama", 9)], n_grid=2, group_size=32, vision=W8A8, recipe="mbq")
    with pytest.raises(ValueError, match="LlamaForCausalLM has none that transformers"):
        quantize_(model, settings, progress=False)


@pytest.mark.parametrize("vision", ["w8a8", mbq_config([]), FqnToConfig({})], ids=["text", "mbq", "by name"])
def test_only_configs_that_need_no_data(vision: Any) -> None:
    with pytest.raises(ValueError, match="vision must be a torchao config that rounds without data"):
        mbq_config([], vision=vision)
