"""What one block cannot show: folded values that the model reads outside their block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import assert_unchanged, build_batch, build_model, snapshot
from torch import Tensor, nn

from mbq_ao import mbq_config, quantize_
from mbq_ao.calibration.batch import collect_batches
from mbq_ao.calibration.fold import ScaleGroup, Scaling
from mbq_ao.calibration.logits_check import check_logits

pytestmark = pytest.mark.filterwarnings("ignore:no vision token found")
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@pytest.fixture
def model() -> nn.Module:
    return build_model("llama")


def config(**options: Any) -> Any:
    return mbq_config([build_batch("llama")], group_size=32, n_grid=3, **({"recipe": "mbq"} | options))


def quantize_fails(model: nn.Module, error: type[Exception], **options: Any) -> str:
    before = snapshot(model)
    with pytest.raises(error) as caught:
        quantize_(model, config(**options), progress=False)
    assert_unchanged(model, before)
    return str(caught.value)


def read_before_the_head(model: nn.Module, value: Any) -> Any:
    """Let the model add `value(hidden)` to the hidden state before its last norm."""
    return model.model.norm.register_forward_pre_hook(lambda module, args: (args[0] + value(args[0]),))


def test_a_norm_of_two_blocks_is_not_folded(model: nn.Module) -> None:
    layers = model.model.layers
    layers[1].input_layernorm = layers[0].input_layernorm
    before = layers[0].input_layernorm.weight.detach().clone()
    report = quantize_(model, config(), progress=False)
    found = {(g.block[-1], g.linears[0]): g.fold for g in report.groups}
    assert found["0", ATTENTION[0]] == found["1", ATTENTION[0]] == "act_pre_scale"
    assert found["0", "mlp.gate_proj"] == found["1", "mlp.gate_proj"] == "weight"
    assert torch.equal(layers[0].input_layernorm.weight, before)
    assert report.logits_error < 1e-5


def test_paper_mode_leaves_a_norm_of_two_blocks_alone(model: nn.Module) -> None:
    layers = model.model.layers
    layers[1].input_layernorm = layers[0].input_layernorm
    report = quantize_(model, config(recipe="paper"), progress=False)
    assert ATTENTION[0] not in [g.linears[0] for g in report.groups]


def test_an_explicit_group_cannot_fold_a_norm_of_two_blocks(model: nn.Module) -> None:
    model.model.norm.weight = model.model.layers[1].input_layernorm.weight
    text = quantize_fails(model, ValueError, scale_groups=[ScaleGroup(ATTENTION, "input_layernorm")])
    assert "model.layers.1.input_layernorm.weight and model.norm.weight are one parameter; untie them" in text


def test_a_norm_that_is_read_outside_its_block(model: nn.Module) -> None:
    weight = model.model.layers[0].input_layernorm.weight
    handle = read_before_the_head(model, lambda hidden: weight)
    text = quantize_fails(model, RuntimeError)
    assert "folding the scales changes the logits by" in text and "Pass scale_groups=" in text
    handle.remove()
    quantize_(model, config(), progress=False)


def test_a_linear_that_is_called_outside_its_block(model: nn.Module) -> None:
    mlp = model.model.layers[0].mlp
    handle = read_before_the_head(model, lambda hidden: mlp.up_proj(hidden)[..., : hidden.shape[-1]])
    text = quantize_fails(model, RuntimeError)
    assert "model.layers.0.mlp.up_proj is called from outside its block" in text
    handle.remove()
    quantize_(model, config(), progress=False)


@pytest.mark.parametrize("num_text", [9, 100])
def test_a_wrong_fold_moves_the_logits_and_a_right_one_does_not(model: nn.Module, num_text: int) -> None:
    """Long batches are compared at their last positions only."""
    batches = collect_batches(model, [build_batch("llama", num_text=num_text)], None)
    blocks = {f"model.layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    s = torch.linspace(0.5, 2.0, 64)

    def error(group: ScaleGroup) -> float:
        return check_logits(model, blocks, {name: [Scaling(group, s)] for name in blocks}, batches)

    before = snapshot(model)
    assert error(ScaleGroup(ATTENTION, "input_layernorm", "weight")) < 1e-5
    with pytest.raises(RuntimeError, match="folding the scales changes the logits"):
        error(ScaleGroup(ATTENTION[:2], "input_layernorm", "weight"))
    assert_unchanged(model, before)


def test_full_logits_are_not_held(model: nn.Module) -> None:
    sizes: list[int] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        sizes.append(output.shape[1])

    batches = collect_batches(model, [build_batch("llama", num_text=100)], None)
    handle = model.lm_head.register_forward_hook(note)
    layer = model.model.layers[0]
    group = ScaleGroup(ATTENTION, "input_layernorm", "weight")
    ones = Scaling(group, torch.ones(layer.self_attn.q_proj.in_features))
    check_logits(model, {"model.layers.0": layer}, {"model.layers.0": [ones]}, batches)
    handle.remove()
    assert sizes == [64, 64]
