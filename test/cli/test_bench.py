"""`mbq-ao bench`: nothing is told before the logits agree, and on a CPU only ratios."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import document, invoke, refusal
from models import build_batch, build_model, model_inputs

from mbq_ao import mbq_config, quantize_
from mbq_ao.cli import bench
from mbq_ao.packed_weight import PackedWeight

OPTIONS = ["--prompt-tokens", 12, "--new-tokens", 8, "--repeats", 3]


@pytest.fixture(autouse=True)
def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBQ_AO_CPU_COMPILE", "0")


def test_ratios(rounded: Path) -> None:
    shown = document("bench", rounded, *OPTIONS)
    assert set(shown["ratios"]) == {"prefill", "decode", "weights"} and shown["ratios"]["decode"] > 0
    small, large = shown["weights_nbytes"]
    assert small < large and shown["ratios"]["weights"] == large / small
    assert shown["logits_error"] < 1e-4 and shown["dtype"] == "float32"
    assert not {"prefill_seconds", "decode_tokens_per_second"} & shown.keys()


def test_against_another_model(llava: Path, rounded: Path) -> None:
    done = invoke("bench", rounded, "--against", llava, *OPTIONS)
    assert done.exit_code == 0, done.output
    assert f"{rounded} against {llava}" in done.stdout and "Only ratios" in done.stdout
    assert "logits agree to" in done.stdout and torch.__version__ in done.stdout
    assert "14/14" in done.stderr  # generations: for each model one to warm up and three of both lengths


def test_figures_of_a_gpu() -> None:
    fast, slow = bench.Speed(0.1, 0.01, 300, 500), bench.Speed(0.2, 0.04, 900, 1000)
    figures = bench._figures(fast, slow, absolute=True)
    assert figures["ratios"] == {"prefill": 2.0, "decode": 4.0, "weights": 3.0}
    assert figures["decode_tokens_per_second"] == [100.0, 25.0] and figures["peak_nbytes"] == [500, 1000]


@pytest.mark.filterwarnings("ignore:no vision token found")
@pytest.mark.parametrize("family", ["olmo2", "gpt_oss"])
@torch.no_grad()
def test_unpacked_weights_compute_the_same(family: str) -> None:
    """With factors of the activations, and transposed experts."""
    model, batch = build_model(family), build_batch(family, 20)
    with torch.enable_grad():
        quantize_(model, mbq_config([batch], group_size=32, n_grid=3, balance=False, recipe="mbq"), progress=False)
    packed = [p for p in model.parameters() if isinstance(p, PackedWeight)]
    assert any(p.act_pre_scale is not None for p in packed)
    expected = model(**model_inputs(batch)).logits
    bench._unpack(model)
    assert not any(isinstance(p, PackedWeight) for p in model.parameters())
    assert bench._difference(model(**model_inputs(batch)).logits, expected) < 1e-5


def test_nothing_is_told_where_the_kernels_are_wrong(rounded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = bench._unpack

    def wrong(model: Any) -> None:
        unpack(model)
        model.get_output_embeddings().weight.mul_(1.01)

    monkeypatch.setattr(bench, "_unpack", wrong)
    told = refusal("bench", rounded, *OPTIONS)
    assert "the logits are 9.9e-03 apart" in told and "No figures are shown" in told


def test_refusals(llava: Path) -> None:
    assert "has no quantized weights to measure" in refusal("bench", llava, *OPTIONS)
