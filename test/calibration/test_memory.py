"""What calibration holds beyond the model: peak bytes of live tensors, counted storage by storage."""

import functools
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from models import build_batch, build_model
from torch import nn

from mbq_ao import mbq_config, quantize_


def test_the_counter_counts() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1
        del a
        c = b * 2
        del b, c
        torch.zeros(10)
    assert live.peak == 8000
    assert live.now == 0


@functools.cache  # several tests look at the same run
def peak(*, num_layers: int, num_batches: int, propagate_error: bool = False, precision: Any = "w3a16") -> int:
    model = build_model("llava", num_hidden_layers=num_layers)
    data = [build_batch("llava", num_text=40, seed=i) for i in range(num_batches)]
    inputs = [value for batch in data for value in batch.values()]
    with LiveBytes([*model.parameters(), *model.buffers(), *inputs]) as live:
        config = mbq_config(
            data, precision=precision, group_size=64, n_grid=3, propagate_error=propagate_error, recipe="mbq"
        )
        quantize_(model, config, progress=False)
    return live.peak


@pytest.fixture(scope="module")
def sizes() -> dict[str, int]:
    """Bytes of the parts that the docstring of calibration/mbq.py names, for the model of this test."""
    block = build_model("llava", num_hidden_layers=1).get_decoder().layers[0]
    linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
    num_weights = sum(m.weight.numel() for m in linears)
    tokens = build_batch("llava", num_text=40)["input_ids"].numel()
    return {
        "block": 4 * sum(p.numel() for p in block.parameters()),
        # tiles of 32 x 128 pad the 64-wide weights of this small model to twice their size
        "packed": int(2 * num_weights * 3 / 8 + 5 * num_weights / 64),
        "packed_w4a8": int(num_weights / 2 + 4 * num_weights / 64),
        "hidden": 4 * tokens * 64,
        "batch": tokens,
    }


def test_a_layer_more_costs_its_packed_weights_and_one_hidden_state(sizes: dict[str, int]) -> None:
    """Not an unpacked copy of the layer, nor activations of all batches."""
    grown = (peak(num_layers=6, num_batches=3) - peak(num_layers=2, num_batches=3)) / 4
    # Folded norms and the arguments of a block's call are small change beside these two.
    assert grown <= 1.5 * (sizes["packed"] + sizes["hidden"])
    assert grown < sizes["block"] / 2


def test_a_batch_more_costs_its_hidden_states_and_one_group(sizes: dict[str, int]) -> None:
    grown = (peak(num_layers=2, num_batches=13) - peak(num_layers=2, num_batches=3)) / 10
    # The stream, and of one group: input, target, what the joined copy for the search holds of both, and the widest
    # (128) activations of a forward over them; the batch's own inputs (pixels) and logits.
    assert grown <= 8 * sizes["hidden"]
    assert peak(num_layers=6, num_batches=13) - peak(num_layers=6, num_batches=3) <= 1.1 * 10 * grown


@pytest.mark.parametrize(("num_layers", "num_batches"), [(2, 3), (2, 13), (6, 3), (6, 13)])
def test_the_peak_is_what_the_docstring_says(num_layers: int, num_batches: int, sizes: dict[str, int]) -> None:
    stated = num_layers * sizes["packed"] + 3.5 * sizes["block"] + 4.5 * num_batches * sizes["hidden"]
    assert 0.4 * stated <= peak(num_layers=num_layers, num_batches=num_batches) <= stated


def test_the_peak_of_w4a8(sizes: dict[str, int]) -> None:
    stated = 2 * sizes["packed_w4a8"] + 3.5 * sizes["block"] + 10 * 2 * sizes["hidden"]
    assert 0.4 * stated <= peak(num_layers=2, num_batches=2, propagate_error=True, precision="w4a8") <= stated


@pytest.mark.parametrize(("num_layers", "num_batches"), [(2, 2), (6, 8)])
def test_the_peak_with_error_propagation(num_layers: int, num_batches: int, sizes: dict[str, int]) -> None:
    stated = num_layers * sizes["packed"] + 3.5 * sizes["block"] + 10 * num_batches * sizes["hidden"]
    assert 0.4 * stated <= peak(num_layers=num_layers, num_batches=num_batches, propagate_error=True) <= stated


@pytest.mark.parametrize(("num_batches", "propagate_error"), [(2, False), (6, False), (6, True)])
def test_the_peak_with_experts(num_batches: int, propagate_error: bool) -> None:
    experts_a_token, width, tokens = 4, 32, 400
    config = {"num_experts": 8, "num_experts_per_tok": experts_a_token, "moe_intermediate_size": width}
    model = build_model("qwen3_moe", max_position_embeddings=512, **config)
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    data = [build_batch("qwen3_moe", tokens, seed=i) for i in range(num_batches)]
    inputs = [value for batch in data for value in batch.values()]
    with LiveBytes([*model.parameters(), *model.buffers(), *inputs]) as live:
        options = mbq_config(data, group_size=64, n_grid=3, propagate_error=propagate_error, recipe="mbq")
        report = quantize_(model, options, progress=False)
    assert report is not None
    of_experts = 3.5 * 4 * num_batches * tokens * experts_a_token * width
    hidden = (10 if propagate_error else 4.5) * 4 * num_batches * tokens * 64
    assert live.peak <= report.nbytes_after + 3.5 * block + hidden + of_experts


def test_all_experts_of_a_block_are_not_copied_more_often_than_a_dense_block() -> None:
    config = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
    model = build_model("qwen3_moe", **config)
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    data = build_batch("qwen3_moe", 20)
    with LiveBytes([*model.parameters(), *model.buffers(), *data.values()]) as live:
        report = quantize_(model, mbq_config([data], group_size=64, n_grid=3, recipe="mbq"), progress=False)
    assert report is not None and live.peak <= report.nbytes_after + 3.5 * block
