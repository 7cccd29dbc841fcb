"""Where a linear's output is added to a residual: on written-out blocks, and on layers of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import build_batch, build_model
from torch import Tensor, nn

from mbq_ao.calibration.batch import collect_batches
from mbq_ao.calibration.capture import OUTPUT, ModuleCall, capture_streams, find_blocks, inputs_in
from mbq_ao.calibration.residual import place_of_sum


class Layer(nn.Module):
    """How the outputs of two linears reach the block's output is given by `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.after, self.drop = nn.LayerNorm(16), nn.LayerNorm(16), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Any:
        if self.kind == "one after the other":
            x = x + self.drop(self.first(x))
            return (x + self.second(self.norm(x)), None)
        if self.kind == "side by side":
            return x + self.first(x) + self.second(self.norm(x))
        if self.kind == "norms behind":
            x = x + self.after(self.first(x))
            return x + 0.5 * self.second(self.norm(x))
        if self.kind == "one norm for both":
            x = x + self.first(self.norm(x))
            return x + self.second(self.norm(x))
        if self.kind == "no residual":
            return self.second(self.norm(self.first(x)))
        raise AssertionError(self.kind)


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("one after the other", "norm", OUTPUT),
        ("side by side", OUTPUT, OUTPUT),
        ("norms behind", None, None),
        ("one norm for both", None, OUTPUT),
        ("no residual", None, None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outlier", [1, 1000])
def test_written_out(kind: str, first: str | None, second: str | None, dtype: torch.dtype, outlier: float) -> None:
    torch.manual_seed(0)
    layer = Layer(kind).to(dtype)
    x = torch.randn(2, 5, 16)
    x[0, 0, 3] *= outlier
    call = ModuleCall.record((x.to(dtype),), {})
    replaced = {"first.weight": layer.first.weight * 2}
    for linear, expected in (("first", first), ("second", second)):
        for parameters in ({}, replaced):
            assert place_of_sum(call, layer, linear, parameters) == expected
    if first == "norm":
        with torch.no_grad():
            stream = x.to(dtype) + layer.first(x.to(dtype)) * 2 - layer.first.bias
            at_norm, output = inputs_in(call, layer, ["norm", OUTPUT], replaced)
            assert torch.allclose(at_norm, stream.flatten(0, 1), rtol=0.02, atol=0.02)
            assert torch.equal(output, call.run(layer, replaced).flatten(0, 1))
            assert torch.equal(inputs_in(call, layer, ["norm"], replaced)[0], at_norm)


@pytest.mark.parametrize(
    ("family", "attention", "mlp"),
    [
        ("llava", "post_attention_layernorm", OUTPUT),
        ("qwen2_5_vl", "post_attention_layernorm", OUTPUT),
        ("gemma3", None, None),  # it norms what it adds
        ("cohere2_vision", OUTPUT, OUTPUT),  # both from one norm
    ],
)
def test_families(family: str, attention: str | None, mlp: str | None) -> None:
    model = build_model(family)
    blocks = find_blocks(model)
    (stream,) = capture_streams(model, blocks, collect_batches(model, [build_batch(family)]))
    block = next(iter(blocks.values()))
    call = stream.call(0, stream.hidden)
    places = [place_of_sum(call, block, name, {}) for name in ("self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj")]
    assert places == [attention, mlp, None]


def test_an_input_that_the_block_changes_later() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            x += self.linear(x)
            return x

    torch.manual_seed(0)
    block, call = InPlace(), ModuleCall.record((torch.randn(2, 5, 16),), {})
    with torch.no_grad():
        (alone,) = inputs_in(call, block, ["linear"], {})
        first, output = inputs_in(call, block, ["linear", OUTPUT], {})
    assert torch.equal(first, alone) and not torch.equal(first, output)
