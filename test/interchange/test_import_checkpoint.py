"""import_checkpoint: whole checkpoints of GPTQ, AWQ and torchao, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import change_tensors, write_checkpoint
from models import build_batch, build_model, model_inputs
from safetensors.torch import load_file
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int8Tensor, PerGroup
from torchao.quantization.quant_api import IntxWeightOnlyConfig, MappingType
from transformers import AutoConfig, AutoModelForCausalLM, TorchAoConfig

from mbq_ao import (
    MBQInt3Tensor,
    MBQW4A8Tensor,
    from_pretrained,
    import_checkpoint,
    mbq_config,
    quantize_,
)
from mbq_ao.packed_weight import PackedWeight


@torch.no_grad()
def logits(model: nn.Module, family: str = "llama") -> Tensor:
    dtype = next(p.dtype for p in model.parameters() if not isinstance(p, PackedWeight))
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model_inputs(build_batch(family)).items()}
    return model(**batch).logits


def quantized(model: nn.Module, kind: type[Tensor]) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, kind)}


def assert_weights(model: nn.Module, expected: dict[str, Tensor], kind: type[Tensor]) -> None:
    """The quantized weights are those that were written, bit for bit, each once."""
    found = quantized(model, kind)
    assert len(found) == len(expected)
    for name, weight in found.items():
        (key,) = [key for key in expected if key.split(".")[-5:] == name.split(".")[-5:]]
        assert torch.equal(weight.dequantize() if kind is not nn.Parameter else weight, expected[key]), name


@pytest.mark.parametrize(
    ("group_size", "sym", "checkpoint_format"), [(32, False, "gptq"), (-1, False, "gptq_v2"), (64, True, "gptq")]
)
def test_gptq(group_size: int, sym: bool, checkpoint_format: str, tmp_path: Path) -> None:
    changes = {"checkpoint_format": checkpoint_format}
    written = write_checkpoint(tmp_path / "gptq", group_size=group_size, sym=sym, changes=changes)
    model = import_checkpoint(tmp_path / "gptq")
    assert_weights(model, written, MBQInt3Tensor)
    model.save_pretrained(tmp_path / "ours")
    again = from_pretrained(tmp_path / "ours")
    assert_weights(again, written, MBQInt3Tensor)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_vision_language_models(family: str, tmp_path: Path) -> None:
    """Names in the file are those of older transformers; the tower is as it was; several shards."""
    written = write_checkpoint(tmp_path / "gptq", family=family)
    plain = import_checkpoint(tmp_path / "gptq", "plain")
    model = import_checkpoint(tmp_path / "gptq", device_map="auto")
    assert_weights(model, written, MBQInt3Tensor)
    assert not hasattr(plain.config, "quantization_config") and not hasattr(plain, "hf_quantizer")
    assert not quantized(plain, PackedWeight)
    # The same weights; sums are in another order.
    torch.testing.assert_close(logits(model, family), logits(plain, family), atol=5e-2, rtol=5e-2)
    plain.save_pretrained(tmp_path / "plain")
    tower = {n: p for n, p in build_model(family, torch.float16).named_parameters() if "vision" in n or "visual" in n}
    assert tower and all(torch.equal(p, model.get_parameter(name)) for name, p in tower.items())


def test_plain_then_calibrated(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "awq", "awq", 4)
    model = import_checkpoint(tmp_path / "awq", "plain", dtype=torch.float32)
    for name, weight in written.items():
        assert torch.equal(model.get_parameter(name).half(), weight), name
    report = quantize_(model, mbq_config([build_batch("llama")], group_size=64, n_grid=2, recipe="mbq"), progress=False)
    assert report is not None and len(quantized(model, MBQInt3Tensor)) == len(written)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(from_pretrained(tmp_path / "ours")), logits(model))


def test_awq_as_torchaos(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "awq", "awq", 4)
    model = import_checkpoint(tmp_path / "awq", "torchao")
    assert_weights(model, written, Int8Tensor)
    expected = logits(import_checkpoint(tmp_path / "awq", "plain"))
    torch.testing.assert_close(logits(model), expected, atol=5e-2, rtol=5e-2)
    model.save_pretrained(tmp_path / "torchao")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "torchao")
    assert_weights(again, written, Int8Tensor)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_symmetric_4_bits_as_w4a8(method: str, tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "m", method, 4, sym=True, group_size=64)
    model = import_checkpoint(tmp_path / "m", "w4a8", dtype=torch.bfloat16)
    assert_weights(model, written, MBQW4A8Tensor)  # scales stay float16
    assert logits(model).dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "ours")
    assert_weights(from_pretrained(tmp_path / "ours"), written, MBQW4A8Tensor)


def test_4_bits_need_a_decision(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "awq", "awq", 4)
    with pytest.raises(ValueError, match='4 bits, which precision=None does not decide: give "plain"'):
        import_checkpoint(tmp_path / "awq")
    for precision, reason in {"w3a16": "4 bits, and w3a16 has 3", "w4a8": "not symmetric"}.items():
        with pytest.raises(ValueError, match=f'layers.*_proj.*{reason}.*precision="plain" .* requantize=True'):
            import_checkpoint(tmp_path / "awq", precision)
    model = import_checkpoint(tmp_path / "awq", "w3a16", requantize=True)
    for name, weight in quantized(model, MBQInt3Tensor).items():
        assert torch.equal(weight.dequantize(), MBQInt3Tensor.from_hp(written[name], 32).dequantize()), name
    assert len(quantized(model, MBQInt3Tensor)) == len(written)


@pytest.mark.parametrize(("method", "bits"), [("gptq", 3), ("awq", 4)])
def test_config_in_a_file_of_its_own(method: str, bits: int, tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, method, bits, own_file=True)
    model = import_checkpoint(tmp_path, "plain")
    for name, weight in written.items():
        assert torch.equal(model.get_parameter(name), weight), name


def test_a_damaged_config_in_a_file_of_its_own(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, own_file=True)
    path = tmp_path / "quantize_config.json"
    for text in (path.read_text()[:-5], "3"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"quantize_config\.json is damaged"):
            import_checkpoint(tmp_path)


def test_pickled_shards_and_the_callers_config(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    config = AutoConfig.from_pretrained(tmp_path)
    assert_weights(import_checkpoint(tmp_path, config=config), written, MBQInt3Tensor)
    assert config.quantization_config["quant_method"] == "gptq"


def test_order_of_activations(tmp_path: Path) -> None:
    def shuffled(k: int) -> Tensor:
        return (torch.arange(k) // 32)[torch.randperm(k, generator=torch.Generator().manual_seed(0))]

    written = write_checkpoint(tmp_path, group_of=shuffled, changes={"desc_act": True})
    with pytest.raises(ValueError, match=r"desc_act without static_groups.*precision=\"plain\" and calibrate"):
        import_checkpoint(tmp_path)
    model = import_checkpoint(tmp_path, "plain")
    for name, weight in written.items():
        assert torch.equal(model.get_parameter(name), weight), name


def test_biases_that_the_model_does_not_have(tmp_path: Path) -> None:
    """AutoGPTQ wrote zeros; anything else would be lost."""
    write_checkpoint(tmp_path)
    bias = "model.layers.0.mlp.up_proj.bias"
    change_tensors(tmp_path, lambda tensors: tensors.update({bias: torch.zeros(128).half()}))
    expected = logits(import_checkpoint(tmp_path))
    assert expected.isfinite().all()
    change_tensors(tmp_path, lambda tensors: tensors.update({bias: torch.ones(128).half()}))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.bias; they would be lost"):
        import_checkpoint(tmp_path)


def remove(key: str) -> Any:
    return lambda tensors: tensors.pop(key)


def cut(key: str) -> Any:
    return lambda tensors: tensors.update({key: tensors[key][:-1].contiguous()})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (remove("model.layers.1.mlp.up_proj.qzeros"), r"layers\.1\.mlp\.up_proj.*no qzeros"),
        (remove("model.layers.1.mlp.up_proj.qweight"), r"layers\.1\.mlp\.up_proj.*no qweight"),
        (
            cut("model.layers.0.self_attn.q_proj.qweight"),
            r"qweight of model\.layers\.0\.self_attn\.q_proj",
        ),
        (remove("model.norm.weight"), r"model\.norm\.weight missing"),
    ],
)
def test_damaged_checkpoints(change: Any, says: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=says):
        import_checkpoint(tmp_path)


def test_a_truncated_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        import_checkpoint(tmp_path)


def test_fused_experts_are_refused(tmp_path: Path) -> None:
    """transformers fuses the experts, which these checkpoints have one by one, into one parameter."""
    write_checkpoint(tmp_path, family="qwen3_moe")
    path = tmp_path / "model.safetensors"
    assert any(".experts.0." in name and name.endswith("qweight") for name in load_file(path))
    with pytest.raises(ValueError, match=r"experts\.0\..*qweight is of one expert.*experts\.gate_up_proj"):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "changes", "says"),
    [
        ({"precision": "w2a16"}, {}, "precision must be None or one of 'w3a16'"),
        ({"requantize": True}, {}, 'requantize=True needs precision="w3a16" or "w4a8"'),
        ({"precision": "plain", "requantize": True}, {}, "requantize=True needs"),
        ({}, {"quant_method": "bitsandbytes"}, "'bitsandbytes'; gptq, awq and torchao can be imported"),
        ({}, {"quant_method": "mbq"}, "mbq_ao.from_pretrained"),
        ({}, {"bits": 8}, "cannot import .* 8 bits"),
        ({}, {"checkpoint_format": "marlin"}, "cannot import .*'marlin'"),
    ],
)
def test_refusals(arguments: dict[str, Any], changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, changes=changes)
    with pytest.raises(ValueError, match=says):
        import_checkpoint(tmp_path, **arguments)


def test_a_model_that_is_not_quantized(tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is not quantized: .* no quantization_config.* no quantize_config.json"):
        import_checkpoint(tmp_path)


def test_from_pretrained_says_how(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"quant_method 'gptq'; load it with mbq_ao\.import_checkpoint"):
        from_pretrained(tmp_path)


# --- torchao ----------------------------------------------------------------------------------------------------


def torchao_checkpoint(folder: Path, config: Any) -> dict[str, Tensor]:
    """Written by transformers and torchao alone."""
    build_model("llama", torch.float16).save_pretrained(folder / "plain")
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=TorchAoConfig(config))
    model.save_pretrained(folder / "torchao")
    return {n: m.weight.dequantize() for n, m in model.named_modules() if "_proj" in n and isinstance(m, nn.Linear)}


def test_torchao_3_bits(tmp_path: Path) -> None:
    config = IntxWeightOnlyConfig(torch.int3, PerGroup(32), MappingType.ASYMMETRIC)
    written = torchao_checkpoint(tmp_path, config)
    model = import_checkpoint(tmp_path / "torchao")
    assert_weights(model, {f"{name}.weight": w for name, w in written.items()}, MBQInt3Tensor)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(from_pretrained(tmp_path / "ours")), logits(model))


def test_torchao_4_bits(tmp_path: Path) -> None:
    written = torchao_checkpoint(tmp_path, IntxWeightOnlyConfig(torch.int4, PerGroup(32), MappingType.SYMMETRIC))
    with pytest.raises(ValueError, match=r"_proj\.weight of .* has 4 bits"):
        import_checkpoint(tmp_path / "torchao")
    model = import_checkpoint(tmp_path / "torchao", "w4a8")
    assert_weights(model, {f"{name}.weight": w for name, w in written.items()}, MBQW4A8Tensor)
    with pytest.raises(ValueError, match="w3a16 has 3"):
        import_checkpoint(tmp_path / "torchao", "w3a16")
    plain = import_checkpoint(tmp_path / "torchao", "plain")
    assert all(torch.equal(plain.get_parameter(f"{name}.weight"), w) for name, w in written.items())


def test_torchao_tensors_that_we_cannot_read(tmp_path: Path) -> None:
    torchao_checkpoint(tmp_path, Float8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"_proj\.weight is a Float8Tensor; load it with transformers"):
        import_checkpoint(tmp_path / "torchao")
