"""compile_for_generation: compiled decoding gives eager decoding's tokens, in one graph, without breaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import build_batch, build_model, model_inputs
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torchao.quantization import quantize_ as torchao_quantize_

from mbq_ao import Int3WeightOnlyConfig, Int8DynamicActivationInt4WeightMBQConfig, compile_for_generation

FAMILIES = [
    *("llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    *("internvl", "gemma3", "smolvlm", "paligemma"),
]
GRAPHS = {"gemma3": 2}  # of whose two kinds of layers only one keeps a static length


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def generate(model: nn.Module, family: str, num_text: int, **options: object) -> Tensor:
    batch = model_inputs(build_batch(family, num_text))
    return model.generate(
        **batch, **options, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=True
    )


def precision(family: str) -> str:
    return "W3A16" if FAMILIES.index(family) % 2 else "W4A8"


def test_the_page_says_what_is_tested() -> None:
    page = (Path(__file__).parents[1] / "docs" / "generate.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert rows == [f"| {family} | {precision(family)} | {GRAPHS.get(family, 1)} | 0 |" for family in FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_decoding(family: str) -> None:
    model = build_model(family)
    kind = {"W3A16": Int3WeightOnlyConfig, "W4A8": Int8DynamicActivationInt4WeightMBQConfig}[precision(family)]
    torchao_quantize_(model, kind(group_size=32), lambda m, fqn: isinstance(m, nn.Linear) and ".layers." in fqn)
    lengths = (9, 14, 30, 9)
    eager = [generate(model, family, n) for n in lengths]
    assert compile_for_generation(model, max_cache_len=64, backend="aot_eager") is model
    for length, expected in zip(lengths, eager, strict=True):
        assert torch.equal(generate(model, family, length), expected), length
    assert sum(counters["graph_break"].values()) == 0
    assert counters["stats"]["unique_graphs"] == GRAPHS.get(family, 1)


def test_by_inductor() -> None:
    model = build_model("llama")
    torchao_quantize_(
        model, Int3WeightOnlyConfig(group_size=32), lambda m, fqn: isinstance(m, nn.Linear) and "layers" in fqn
    )
    expected = generate(model, "llama", 9)
    compile_for_generation(model)
    assert torch.equal(generate(model, "llama", 9), expected)
    assert counters["stats"]["unique_graphs"] == 1 and sum(counters["graph_break"].values()) == 0


def test_refusals() -> None:
    with pytest.raises(TypeError, match="that can generate, got Linear"):
        compile_for_generation(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        compile_for_generation(build_model("llama"), max_cache_len=0)
