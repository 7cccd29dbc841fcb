"""One model in several precisions, by torchao's own quantize_: a decoder in W4A8, a vision tower in W8A8, and so on."""

import io
from collections import Counter
from pathlib import Path

import pytest
import torch
from models import build_batch, build_model, model_inputs
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, Int8DynamicActivationInt8WeightConfig, quantize_
from torchao.utils import TorchAOBaseTensor

from mbq_ao import Int3WeightOnlyConfig, Int8DynamicActivationInt4WeightMBQConfig, MBQInt3Tensor, MBQW4A8Tensor

W3, W4A8 = Int3WeightOnlyConfig(group_size=32), Int8DynamicActivationInt4WeightMBQConfig(group_size=32)
W8A8 = Int8DynamicActivationInt8WeightConfig()
DECODER = r"model\.language_model\..*_proj"
# Qwen's decoder has biases.
TOWER = {
    "llava": r"model\.vision_tower\..*",
    "qwen2_5_vl": r"model\.visual\.blocks\..*",
}


def kinds(model: nn.Module) -> Counter[str]:
    """How many linears have which kind of weight, and that biases are plain."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert all(m.bias is None or type(m.bias) is nn.Parameter for m in linears)
    return Counter(type(m.weight.data).__name__ for m in linears)


@torch.no_grad()
def logits(model: nn.Module, family: str) -> Tensor:
    return model(**model_inputs(build_batch(family))).logits


def with_plain_weights(model: nn.Module, family: str) -> nn.Module:
    """A full-precision model with the quantized model's weights."""
    state = {k: v.dequantize() if isinstance(v, TorchAOBaseTensor) else v for k, v in model.state_dict().items()}
    plain = build_model(family)
    plain.load_state_dict(state)
    return plain


def assert_near(a: Tensor, b: Tensor, error: float) -> None:
    assert a.isfinite().all()
    assert (a - b).norm() <= error * b.norm()


def assert_serves(model: nn.Module, family: str) -> None:
    """Near full precision, nearer to a model of the same weights, and the same after saving and loading."""
    y = logits(model, family)
    assert_near(y, logits(build_model(family), family), 0.5)  # of a tiny random model, which nothing averages out
    assert_near(y, logits(with_plain_weights(model, family), family), 0.1)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = build_model(family)
    loaded.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert kinds(loaded) == kinds(model)
    assert torch.equal(logits(loaded, family), y)


@pytest.mark.parametrize("family", list(TOWER))
def test_by_name(family: str) -> None:
    model = build_model(family)
    tower = TOWER[family] + r"(proj|qkv|fc\d)"
    quantize_(model, FqnToConfig({f"re:{DECODER}": W4A8, f"re:{tower}": W8A8}), filter_fn=None)
    assert kinds(model) == {"MBQW4A8Tensor": 14, "Int8Tensor": {"llava": 12, "qwen2_5_vl": 5}[family], "Tensor": 3}
    assert type(model.lm_head.weight) is nn.Parameter
    assert_serves(model, family)


def test_the_example_of_the_readme() -> None:
    readme = Path(__file__).parents[1] / "README.md"
    section = readme.read_text(encoding="utf-8").partition("## Mixed precision\n")[2]
    example = section.partition("```python\n")[2].partition("```")[0]
    model = build_model("llava")
    exec(example, {"model": model})
    assert kinds(model) == {"MBQW4A8Tensor": 14, "Int8Tensor": 12, "Tensor": 3}


def test_by_the_name_of_every_parameter() -> None:
    # Biases come to the handler, too.
    model = build_model("qwen2_5_vl")
    quantize_(model, FqnToConfig({rf"re:{DECODER}\.(weight|bias)": W4A8}), filter_fn=None)
    assert kinds(model) == {"MBQW4A8Tensor": 14, "Tensor": 8}


def test_by_two_calls() -> None:
    family = "qwen2_5_vl"
    model, by_name = build_model(family), build_model(family)

    def linear_of(part: str):
        return lambda module, name: isinstance(module, nn.Linear) and name.startswith(part)

    quantize_(model, W4A8, filter_fn=linear_of("model.language_model."))
    quantize_(model, W8A8, filter_fn=linear_of("model.visual.blocks."))
    quantize_(by_name, FqnToConfig({f"re:{DECODER}": W4A8, f"re:{TOWER[family]}(proj|qkv)": W8A8}), filter_fn=None)
    assert kinds(model) == kinds(by_name)
    assert torch.equal(logits(model, family), logits(by_name, family))


def test_both_kinds_of_ours_in_one_model() -> None:
    family = "qwen2_5_vl"
    model = build_model(family)
    config = FqnToConfig({r"re:model\.language_model\..*mlp\..*_proj": W3, f"re:{DECODER}": W4A8})
    quantize_(model, config, filter_fn=None)
    assert kinds(model) == {"MBQInt3Tensor": 6, "MBQW4A8Tensor": 8, "Tensor": 8}
    layer = model.model.language_model.layers[0]
    assert isinstance(layer.mlp.up_proj.weight, MBQInt3Tensor)
    assert isinstance(layer.self_attn.q_proj.weight, MBQW4A8Tensor)
    assert_near(logits(model, family), logits(with_plain_weights(model, family), family), 0.1)


@pytest.mark.parametrize(("n", "k"), [(4304, 1152), (1152, 4304)])
def test_sizes_that_tiles_do_not_divide(n: int, k: int) -> None:
    # 4304 is the width of the MLPs of SigLIP-so400m.
    torch.manual_seed(0)
    layer, x = nn.Linear(k, n), torch.randn(3, k)
    full = layer(x)
    quantize_(layer, Int8DynamicActivationInt4WeightMBQConfig())
    assert (layer.weight.shape, layer.weight.qdata.shape[:2]) == ((n, k), (-(-n // 16), -(-k // 64)))
    y = layer(x)
    assert_near(y, full, 0.15)
    assert_near(y, nn.functional.linear(x, layer.weight.dequantize(), layer.bias), 0.02)
