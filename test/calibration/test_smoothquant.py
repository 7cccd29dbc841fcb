"""recipe="smoothquant" of whole models against a plain computation: the formula, two folds a layer, rounding."""

from typing import Any

import pytest
import torch
from models import build_batch, build_model, pad_right
from torch import Tensor, nn

from mbq_ao import MBQInt3Tensor, MBQW4A8Tensor, mbq_config, quantize_

pytestmark = pytest.mark.filterwarnings("ignore:no vision token found")
SECOND_NORM = {"llama": "post_attention_layernorm", "gemma3": "pre_feedforward_layernorm"}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
KINDS: Any = {"w3a16": MBQInt3Tensor, "w4a8": MBQW4A8Tensor}


def batches_of(family: str) -> list[dict[str, Tensor]]:
    """The second one of llama has four padding tokens, with activations that are not to count."""
    first, second = build_batch(family, 14), build_batch(family, 10, seed=2)
    return [first, pad_right(second, 14) if family == "llama" else second]


def layer_inputs(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The input of every linear of the decoder, (valid tokens, channels)."""
    seen: dict[str, list[Tensor]] = {}
    mask = torch.ones(())

    def keep(module: nn.Module, args: Any, name: str) -> None:
        seen.setdefault(name, []).append(args[0][mask.bool()])

    layers = model.get_decoder().layers
    handles = [
        m.register_forward_pre_hook(lambda m, a, n=n: keep(m, a, n))
        for n, m in layers.named_modules()
        if isinstance(m, nn.Linear)
    ]
    for batch in batches:
        mask = batch["attention_mask"]
        model(**{k: v for k, v in batch.items() if k != "labels"})
    for handle in handles:
        handle.remove()
    return {name: torch.cat(xs) for name, xs in seen.items()}


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("family", SECOND_NORM)
@torch.no_grad()
def test_smoothquant(family: str, precision: Any) -> None:
    expected, batches = build_model(family), batches_of(family)
    inputs = layer_inputs(expected, batches)
    one = 1.0 if family == "gemma3" else 0.0  # its norms multiply by 1 + weight
    layers = expected.get_decoder().layers
    losses = []
    for i, layer in enumerate(layers):
        for norm, names in (("input_layernorm", ATTENTION), (SECOND_NORM[family], MLP)):
            linears = [layer.get_submodule(name) for name in names]
            x = inputs[f"{i}.{names[0]}"]
            weight_peak = torch.cat([m.weight for m in linears]).abs().max(0).values.clamp(min=1e-5)
            s = (x.abs().max(0).values.sqrt() / weight_peak.sqrt()).clamp(min=1e-5)
            if names == MLP:
                gate, up = linears
                down, target = layer.mlp.down_proj, layer.mlp(x)

                def mlp(x: Tensor, g: nn.Parameter, u: nn.Parameter, layer: Any = layer, down: Any = down) -> Tensor:
                    hidden = layer.mlp.act_fn(nn.functional.linear(x, g)) * nn.functional.linear(x, u)
                    return down(hidden)

                for factor in (torch.ones_like(s), s):
                    g, u = (KINDS[precision].from_hp(m.weight * factor, 32) for m in (gate, up))
                    losses.append((target - mlp(x / factor, g, u)).abs().mean().item())
            producer = layer.get_submodule(norm)
            producer.weight.copy_((one + producer.weight) / s - one)
            for m in linears:
                m.weight.mul_(s)

    model = build_model(family)
    report = quantize_(
        model, mbq_config(batches, precision=precision, group_size=32, recipe="smoothquant"), progress=False
    )
    assert report is not None and report.settings["balance"] is False
    assert [g.linears for g in report.groups] == [list(ATTENTION), list(MLP)] * len(layers)
    assert {(g.alpha, g.sensitivity, g.loss_rtn, g.loss) for g in report.groups} == {
        (0.5, None, *g.losses) for g in report.groups
    }
    assert [loss for g in report.groups[1::2] for loss in g.losses] == pytest.approx(losses, rel=1e-4)
    assert [n.rpartition(".")[2] for n in report.not_scaled] == ["o_proj", "down_proj"] * len(layers)
    assert report.logits_error < 1e-5
    served = model.get_decoder().layers
    for name, parameter in layers.named_parameters():
        actual = served.get_parameter(name)
        if isinstance(actual, KINDS[precision]):
            rounded = KINDS[precision].from_hp(parameter, 32)
            assert (actual.dequantize() - rounded.dequantize()).norm() <= 1e-4 * rounded.dequantize().norm(), name
        else:
            torch.testing.assert_close(actual, parameter)


def test_a_model_whose_norms_follow_the_linears_is_rounded() -> None:
    """Nothing to scale, and nothing to report but that."""
    model = build_model("olmo2")
    report = quantize_(model, mbq_config([build_batch("olmo2")], recipe="smoothquant"), progress=False)
    assert report is not None and report.groups == [] and len(report.not_scaled) == 14
    assert "rounded without a scale" in str(report)
    assert all(isinstance(m.weight, MBQInt3Tensor) for m in model.model.layers.modules() if isinstance(m, nn.Linear))
