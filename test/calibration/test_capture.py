"""Capturing: blocks are found, called once each, and replayed alone they give what the model itself computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from models import build_batch, build_model, model_inputs
from torch import Tensor, nn
from transformers import DynamicCache

from mbq_ao import mbq_config, quantize_
from mbq_ao.calibration import mbq
from mbq_ao.calibration.batch import collect_batches
from mbq_ao.calibration.capture import ModuleCall, capture_streams, find_blocks

ADD_VISION_BETWEEN_BLOCKS = ("qwen3_vl", "granite4_vision")
pytestmark = pytest.mark.filterwarnings("ignore:no vision token found")


@torch.no_grad()
def inputs_of_blocks(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """The hidden state at the input of every block in a forward of the whole model."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    handles = [b.register_forward_pre_hook(keep, with_kwargs=True) for b in find_blocks(model).values()]
    model(**model_inputs(batch))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_replayed_blocks_compute_what_the_model_computes(family: str) -> None:
    model = build_model(family)
    data = [build_batch(family, 9), build_batch(family, 12, batch_size=2, seed=2)]
    blocks = find_blocks(model)
    streams = capture_streams(model, blocks, collect_batches(model, data))
    for batch, stream in zip(data, streams, strict=True):
        hidden = stream.hidden
        for index, (block, expected) in enumerate(zip(blocks.values(), inputs_of_blocks(model, batch), strict=True)):
            if index:
                hidden = stream.between(index, hidden)
            torch.testing.assert_close(hidden, expected)
            for _ in range(2):  # a replay leaves nothing behind that changes the next one
                again = stream.call(index, hidden).run(block)
            hidden = again
        assert bool(stream.deltas) == (family in ADD_VISION_BETWEEN_BLOCKS)


@torch.no_grad()
def test_a_replay_does_not_change_what_later_layers_share() -> None:
    """Gemma 4's later layers read the keys and values of an earlier one."""
    model = build_model("gemma4_shared_kv")
    first, second = blocks = list(find_blocks(model).values())
    (stream,) = capture_streams(model, find_blocks(model), collect_batches(model, [build_batch("gemma4_shared_kv")]))
    hidden = stream.call(0, stream.hidden).run(first)
    before = stream.call(1, hidden).run(second)
    v_proj = first.self_attn.v_proj.weight
    changed = stream.call(0, stream.hidden).run(first, {"self_attn.v_proj.weight": torch.rand_like(v_proj)})
    assert not torch.equal(changed, hidden) and len(blocks) == 2
    assert torch.equal(stream.call(1, hidden).run(second), before)


def test_the_distorted_stream_is_that_of_the_quantized_model(monkeypatch: pytest.MonkeyPatch) -> None:
    distorted: list[Tensor] = []
    search = mbq.BlockCalibrator.search

    def spy(self: mbq.BlockCalibrator, groups: Any) -> Any:
        distorted.extend(s.distorted.clone() for s in self.streams if s.distorted is not None)
        return search(self, groups)

    monkeypatch.setattr(mbq.BlockCalibrator, "search", spy)
    model, batch = build_model("qwen3_vl"), build_batch("qwen3_vl")
    clean = inputs_of_blocks(model, batch)[1]
    quantize_(model, mbq_config([batch], group_size=32, n_grid=3, propagate_error=True, recipe="mbq"), progress=False)
    served = inputs_of_blocks(model, batch)[1]
    torch.testing.assert_close(distorted[-1], served, rtol=1e-4, atol=1e-5)
    assert (served - clean).norm() > 0.01 * clean.norm()


def test_calls_with_the_hidden_state_as_keyword() -> None:
    call = ModuleCall.record((), {"hidden_states": torch.ones(2), "scale": torch.tensor(3.0)})
    assert call.hidden_key == "hidden_states" and torch.equal(call.hidden, torch.ones(2))
    assert call.with_hidden(None).hidden is None

    class Scale(nn.Module):
        def forward(self, hidden_states: Tensor, scale: Tensor) -> tuple[Tensor, None]:
            return hidden_states * scale, None

    assert torch.equal(call.with_hidden(torch.full((2,), 2.0)).run(Scale()), torch.full((2,), 6.0))


def test_a_cache_is_not_recorded() -> None:
    """A key-value cache would grow, and be read, at every replay."""
    cache = DynamicCache()
    call = ModuleCall.record((torch.ones(2), cache), {"past_key_values": cache, "nested": (cache, 1)})
    assert call.args[1] is None and call.kwargs == {"past_key_values": None, "nested": (None, 1)}


def test_blocks_given_by_hand_replace_the_search_for_them() -> None:
    model = build_model("llava")
    vision = model.model.vision_tower.encoder.layers
    names = find_blocks(model, list(vision))
    assert list(names) == ["model.vision_tower.encoder.layers.0", "model.vision_tower.encoder.layers.1"]
    assert list(names.values()) == list(vision)
