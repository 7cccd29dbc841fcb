"""quantize_ over model families: what is quantized, what stays, folds that change nothing, and docs/models.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, MULTIMODAL, REFUSED, TEXT_ONLY
from model_matrix import PAGE, REGENERATE, entry, not_tested, read_page, refusal
from models import (
    assert_nothing_left,
    assert_unchanged,
    build_batch,
    build_model,
    float_inputs,
    model_inputs,
    snapshot,
)
from torch import Tensor, nn

from mbq_ao import MBQInt3Tensor, MBQW4A8Tensor, mbq_config, quantize_
from mbq_ao.calibration.capture import find_blocks
from mbq_ao.calibration.fold import ScaleGroup
from mbq_ao.calibration.scale_groups import BlockProber
from mbq_ao.calibration.scale_search import SearchResult, search_scale
from mbq_ao.quantize import W3A16Quantizer, W4A8Quantizer

ONE_OF_EACH_KIND = [
    "llava",
    "gemma3",
    "paligemma",
    "mllama",
    "glm4v",
    "granite4_vision",
    "qwen3_5",
    "gemma4_shared_kv",
    "cohere2_vision",
    "lfm2_vl",
    "blip_2",
    "kosmos2",
    "llama_mha",
    "phi",
    "phi3",
    "gemma3n_text",
    "olmo2",
    "starcoder2",
    "nemotron",
    "falcon",
    "mamba",
]
NOT_CALLED = ("mixer.dt_proj",)  # Mamba reads its weight, which can then not be quantized
KINDS: Any = {"w3a16": MBQInt3Tensor, "w4a8": MBQW4A8Tensor}


pytestmark = pytest.mark.filterwarnings("ignore:no vision token found")


def in_turn(families: Iterable[str]) -> list[tuple[str, str]]:
    """Both precisions for the families that most people use, and for one of each kind; the others take turns."""
    both = {*MULTIMODAL, *ONE_OF_EACH_KIND}
    return [(f, p) for i, f in enumerate(families) for j, p in enumerate(KINDS) if f in both or i % 2 == j]


@pytest.mark.parametrize(("family", "precision"), in_turn(FAMILIES))
def test_quantize(family: str, precision: Any) -> None:
    model = build_model(family)
    batches = [build_batch(family, 9), build_batch(family, 12, seed=2)]
    before = snapshot(model)
    blocks = find_blocks(model)
    assert {name.rpartition(".")[0] for name in blocks} == {FAMILIES[family].layers}
    reference = allowed_logits(model, batches[0])

    report = quantize_(
        model, mbq_config(batches, precision=precision, group_size=32, n_grid=3, recipe="mbq"), progress=False
    )

    assert report is not None and report.groups
    assert (report.settings["precision"], report.settings["group_size"]) == (precision, 32)
    linears = {
        f"{block}.{name}"
        for block, module in blocks.items()
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear) and name not in NOT_CALLED
    }
    assert report.num_linears == len(linears)
    assert report.not_scaled == []
    for name in linears:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, KINDS[precision]) and weight.block_size == [1, 32], name
    # Folding alone changes nothing, so the scales are in the right places.
    assert report.logits_error < 1e-5
    # Every parameter that neither is quantized nor takes a fold is the same object with the same bits.
    folded = {f"{g.block}.{g.producer}" for g in report.groups if g.producer}
    changed = linears | folded
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, (value, copy) in before.items():
        if name.rpartition(".")[0] not in changed:
            assert after[name] is value and torch.equal(value, copy), name
    assert_nothing_left(model)
    logits = allowed_logits(model, batches[0])
    assert logits.isfinite().all()
    error = ((logits - reference).norm() / reference.norm()).item()
    assert 1e-3 < error < 0.9  # 3 or 4 bits on random weights: far from exact, and far from unrelated
    if family not in (*TEXT_ONLY, "mllama"):
        assert all(g.sensitivity is not None for g in report.groups)
    if family not in (*TEXT_ONLY, "mllama", "gemma4_shared_kv"):
        # Nothing reads what the last layer makes of vision tokens, nor do layers that share an earlier one's keys and
        # values: r is the median's there, if other layers are like it.
        like = Counter(tuple(g.linears) for g in report.groups)
        assert all(g.sensitivity > 0 for g in report.groups if like[tuple(g.linears)] > 1)
    assert read_page(PAGE.read_text(encoding="utf-8")).get(family) == entry(family, model, report), REGENERATE


def allowed_logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Logits, with 0 for the tokens that the model forbids (Chameleon's image tokens)."""
    with torch.no_grad():
        logits = model(**model_inputs(batch)).logits
    return logits.masked_fill(logits == torch.finfo(logits.dtype).min, 0)


def test_the_page_on_models_has_all_families() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert list(read_page(text)) == list(FAMILIES), REGENERATE
    assert all(refusal(family) in text for family in REFUSED), REGENERATE
    if f"with transformers {transformers.__version__}." in text:  # another version may offer others
        assert not_tested(text) in text, REGENERATE


@pytest.mark.parametrize(
    ("family", "dtype", "precision"),
    [
        ("qwen3_vl", torch.bfloat16, "w3a16"),
        ("qwen3_vl", torch.float16, "w3a16"),
        ("qwen3_vl", torch.bfloat16, "w4a8"),
        ("qwen3_vl", torch.float16, "w4a8"),
        ("gemma4_shared_kv", torch.bfloat16, "w3a16"),
        ("gemma3n_text", torch.bfloat16, "w4a8"),
    ],
)
def test_quantize_half_precision(family: str, dtype: torch.dtype, precision: Any) -> None:
    model = build_model(family, dtype)
    batches = [float_inputs(build_batch(family, n, seed=n), dtype) for n in (9, 12)]
    config = mbq_config(
        batches, precision=precision, group_size=32, n_grid=3, propagate_error=precision == "w4a8", recipe="mbq"
    )
    report = quantize_(model, config, progress=False)
    assert report is not None and 0 < report.logits_error < 0.1
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        assert model(**model_inputs(batches[0])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "decided"),
    [
        ({}, 128),
        ({"group_size": -1}, None),
        ({"recipe": "paper", "group_size": 64}, 64),
        ({"precision": "w4a8"}, None),
        ({"precision": "w4a8", "group_size": 128}, 128),
        ({"precision": "w4a8", "group_size": 128, "recipe": "paper"}, None),
        ({"precision": "w4a8", "group_size": 32, "recipe": "smoothquant"}, 32),
    ],
)
def test_the_group_size_decided(options: dict[str, Any], decided: int | None) -> None:
    config = mbq_config([build_batch("llava")], **({"recipe": "mbq"} | options))
    assert config.group_size == decided
    if config.precision == "w4a8":
        model = build_model("llava")
        report = quantize_(model, config, progress=False)
        assert report is not None and report.settings["group_size"] == decided
        assert model.get_decoder().layers[0].mlp.down_proj.weight.group_size == (decided or 128)


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("names", ["gate_proj up_proj", "gate_proj", "down_proj"])
@pytest.mark.parametrize("family", ["llava", "olmo2"])
def test_the_loss_of_the_search_is_that_of_the_served_module(
    family: str, names: str, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a fold or an act_pre_scale, with and without linears that share s but are not quantized."""
    model, batches = build_model(family), [build_batch(family, 9), build_batch(family, 12, seed=2)]

    def take_the_last(*args: Any, **options: Any) -> SearchResult:  # which is not 1
        return search_scale(*args, **{**options, "choose": False})

    monkeypatch.setattr("mbq_ao.calibration.block.search_scale", take_the_last)
    outputs: list[Tensor] = []

    @torch.no_grad()
    def mlp_outputs() -> Tensor:
        outputs.clear()
        handle = model.get_decoder().layers[0].mlp.register_forward_hook(lambda m, a, y: outputs.append(y[0]))
        for batch in batches:
            model(**model_inputs(batch))
        handle.remove()
        return torch.cat(outputs)

    before = mlp_outputs()
    chosen = lambda module, fqn: "layers.0." in fqn and fqn.rpartition(".")[2] in names.split()  # noqa: E731
    config = mbq_config(
        batches, precision=precision, group_size=32, n_grid=5, balance=False, filter_fn=chosen, recipe="mbq"
    )
    report = quantize_(model, config, progress=False)
    assert report is not None
    (group,) = report.groups
    assert (group.fold == "act_pre_scale") == (family == "olmo2" and names != "down_proj") and group.alpha == 0.8
    assert (before - mlp_outputs()).abs().mean().item() == pytest.approx(group.loss, rel=1e-4)
    for name in names.split():
        weight = model.get_decoder().layers[0].mlp.get_submodule(name).weight
        assert isinstance(weight, KINDS[precision]) and (weight.act_pre_scale is None) == (group.producer is not None)


@pytest.mark.parametrize("family", ["llava", "chameleon"])
def test_a_wrong_fold_is_caught_by_the_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the whole model, with the check of the block switched off and one producer exchanged.

    Chameleon forbids its image tokens: their logits are the lowest number there is.
    """
    find_all = BlockProber.find_all

    def exchanged(self: BlockProber) -> list[ScaleGroup]:
        groups = find_all(self)
        assert groups[2].producer == "post_attention_layernorm"
        return [*groups[:2], replace(groups[2], producer="input_layernorm"), groups[3]]

    monkeypatch.setattr(BlockProber, "find_all", exchanged)
    model = build_model(family)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="folding the scales changes the logits by"):
        quantize_(model, mbq_config([build_batch(family)], group_size=32, n_grid=3, recipe="mbq"), progress=False)
    assert_unchanged(model, before)


def quantize_losslessly(
    model: nn.Module, family: str, monkeypatch: pytest.MonkeyPatch, filter_fn: Any = None, **options: Any
) -> float:
    """Search and fold as ever, but put unrounded weights into the model. Returns the logits' relative change."""

    def keep(self: W3A16Quantizer | W4A8Quantizer, weight: Tensor, s: Tensor | None) -> Tensor:
        return weight

    batches = [build_batch(family, 9), build_batch(family, 12, seed=2)]
    with torch.no_grad():
        before = model(**model_inputs(batches[0])).logits
    monkeypatch.setattr(W4A8Quantizer, "stand_in", W4A8Quantizer.quantize)
    for quantizer in (W3A16Quantizer, W4A8Quantizer):
        monkeypatch.setattr(quantizer, "quantize", keep)
    monkeypatch.setattr("mbq_ao.pretrained.attach", lambda *args: None)  # no quantized weights to tell of
    config = mbq_config(batches, **{"recipe": "mbq", "group_size": 32, "n_grid": 4, **options})
    report = quantize_(model, config, filter_fn, progress=False)
    assert report is not None and any(g.alpha > 0 for g in report.groups)
    with torch.no_grad():
        after = model(**model_inputs(batches[0])).logits
    return ((after - before).norm() / before.norm()).item()


@pytest.mark.parametrize("family", ONE_OF_EACH_KIND)
def test_only_rounding_changes_the_function(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantize_losslessly(build_model(family), family, monkeypatch) < 1e-5


@pytest.mark.parametrize("family", ["llava", "gemma3", "mllama", "olmo2", "starcoder2"])
def test_only_rounding_changes_the_function_w4a8(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantize_losslessly(build_model(family), family, monkeypatch, precision="w4a8") < 1e-5


def ends_with(names: str) -> Any:
    return lambda module, fqn: fqn.rpartition(".")[2] in names.split()


@pytest.mark.parametrize("recipe", ["mbq", "paper"])
@pytest.mark.parametrize("family", ["llava", "phi3", "cohere"])
@pytest.mark.parametrize("names", ["q_proj qkv_proj", "v_proj down_proj", "k_proj gate_proj gate_up_proj"])
def test_linears_that_are_left_out(family: str, names: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may share a group with, or be the producer of, linears that are quantized."""
    error = quantize_losslessly(build_model(family), family, monkeypatch, ends_with(names), recipe=recipe)
    assert error < 1e-5


def test_both_filters_choose_what_is_quantized() -> None:
    model = build_model("llava")
    chosen = ends_with("q_proj o_proj down_proj")
    config = mbq_config([build_batch("llava")], group_size=32, n_grid=2, filter_fn=chosen, recipe="mbq")
    report = quantize_(model, config, lambda module, fqn: "layers.1" in fqn, progress=False)
    quantized = [n for n, p in model.named_parameters() if isinstance(p, MBQInt3Tensor)]
    layer = "model.language_model.layers.1"
    assert quantized == [f"{layer}.{name}.weight" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]
    assert report is not None and report.num_linears == 3 and len(report.not_quantized) == 11
    assert {g.block for g in report.groups} == {layer}
