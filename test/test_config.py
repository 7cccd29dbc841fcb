"""Int3WeightOnlyConfig and Int8DynamicActivationInt4WeightMBQConfig through torchao's own quantize_."""

import copy
import io
import textwrap

import expecttest
import pytest
import torch
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

from mbq_ao import Int3WeightOnlyConfig, Int8DynamicActivationInt4WeightMBQConfig, MBQInt3Tensor, MBQW4A8Tensor

TENSOR_OF = {Int3WeightOnlyConfig: MBQInt3Tensor, Int8DynamicActivationInt4WeightMBQConfig: MBQW4A8Tensor}
each_config = pytest.mark.parametrize("config", list(TENSOR_OF), ids=["int3", "w4a8"])


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 96, bias=False))


@each_config
def test_every_linear_is_rounded_to_nearest(config: type) -> None:
    model = small_model()
    original = copy.deepcopy(model)
    quantize_(model, config(group_size=64))
    for i in (0, 2):
        weight = model[i].weight
        assert isinstance(weight, TENSOR_OF[config])
        assert isinstance(weight, nn.Parameter)
        assert weight.group_size == 64
        assert torch.equal(weight.dequantize(), TENSOR_OF[config].from_hp(original[i].weight, 64).dequantize())
    assert torch.equal(model[0].bias, original[0].bias)


def test_filter_fn_chooses() -> None:
    model = small_model()
    quantize_(model, Int3WeightOnlyConfig(), filter_fn=lambda module, fqn: fqn == "2")
    assert not isinstance(model[0].weight, MBQInt3Tensor)
    assert isinstance(model[2].weight, MBQInt3Tensor)


@each_config
@pytest.mark.parametrize("names", [r"re:.*\.weight|^0\.weight", "0", "0.weight"])
def test_by_name(names: str, config: type) -> None:
    # A module's name hands every parameter to the handler, the bias too.
    model = small_model()
    quantize_(model, FqnToConfig({names: config(group_size=32)}), filter_fn=None)
    assert isinstance(model[0].weight, TENSOR_OF[config])
    assert type(model[0].bias) is nn.Parameter


@each_config
@pytest.mark.parametrize("group_size", [None, -1])
def test_one_scale_a_row(group_size: int | None, config: type) -> None:
    model = small_model()
    quantize_(model, config(group_size=group_size))
    assert model[0].weight.scale.shape == (64, 1)
    assert config(group_size=group_size) == config(group_size=None)


def test_default_group_sizes() -> None:
    assert Int3WeightOnlyConfig().group_size == 128
    assert Int8DynamicActivationInt4WeightMBQConfig().group_size is None


@each_config
def test_survives_torchao_s_serialization_of_configs(config: type, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.core import config as torchao_config

    # torchao loads classes only from modules it lists; the integrations put ours on the list.
    monkeypatch.setattr(torchao_config, "ALLOWED_AO_MODULES", {*torchao_config.ALLOWED_AO_MODULES, "mbq_ao.config"})
    instance = config(group_size=32)
    assert torchao_config.config_from_dict(torchao_config.config_to_dict(instance)) == instance


def test_a_whole_model_is_saved_and_loaded() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    quantize_(model, Int3WeightOnlyConfig(group_size=32))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert repr(loaded) == repr(model) and "MBQInt3Tensor" in repr(loaded)
    assert torch.equal(loaded(torch.ones(1, 64)), model(torch.ones(1, 64)))


def test_quantized_model_is_copied_and_moved_with_its_print() -> None:
    model = small_model()
    quantize_(model, Int3WeightOnlyConfig(group_size=32))
    other = copy.deepcopy(model).to(torch.bfloat16)
    assert "bfloat16" in str(other)
    assert "bfloat16" not in str(model)


class TestTexts(expecttest.TestCase):
    def says(self, error: type[Exception], call) -> str:
        with self.assertRaises(error) as caught:
            call()
        return textwrap.fill(str(caught.exception), 100)

    def test_print(self) -> None:
        model = small_model()
        quantize_(model, Int3WeightOnlyConfig(group_size=32))
        self.assertExpectedInline(
            textwrap.fill(str(model[2]), 100),
            """\
Linear(in_features=64, out_features=96, bias=False, weight=MBQInt3Tensor(shape=(96, 64),
group_size=32, dtype=torch.float32, device=cpu))""",
        )

    def test_group_size(self) -> None:
        self.assertExpectedInline(
            self.says(ValueError, lambda: Int3WeightOnlyConfig(group_size=100)),
            """group_size must be 32, 64, 128 or None (one scale a row), got 100""",
        )

    def test_quantizing_twice(self) -> None:
        model = small_model()
        quantize_(model, Int3WeightOnlyConfig(group_size=32))
        again = lambda: quantize_(model, Int3WeightOnlyConfig(group_size=32))  # noqa: E731
        self.assertExpectedInline(
            self.says(ValueError, again),
            """\
the weight of this Linear is quantized already: MBQInt3Tensor(shape=(64, 256), group_size=32,
dtype=torch.float32, device=cpu); exclude the module with filter_fn, or load the model again""",
        )
        other = lambda: quantize_(model, Int8DynamicActivationInt4WeightMBQConfig())  # noqa: E731
        self.assertIn("quantized already: MBQInt3Tensor", self.says(ValueError, other))
