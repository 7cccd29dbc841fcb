"""quantize_ over model families: groups found, what is quantized, what stays, folds that change nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from models import (
    CONFIGS,
    TEXT_ONLY,
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
from mbq_ao.calibration.batch import collect_batches
from mbq_ao.calibration.capture import capture_streams, find_blocks
from mbq_ao.calibration.fold import ScaleGroup
from mbq_ao.calibration.scale_groups import BlockProber
from mbq_ao.calibration.scale_search import SearchResult, search_scale
from mbq_ao.quantize import W3A16Quantizer, W4A8Quantizer

KINDS: Any = {"w3a16": MBQInt3Tensor, "w4a8": MBQW4A8Tensor}
BLOCKS = {
    "smolvlm": "model.text_model.layers",
    "opt": "model.decoder.layers",
    **{family: "model.layers" for family in TEXT_ONLY if family != "opt"},
}


def describe(group: ScaleGroup) -> str:
    row_map = group.row_map
    rows = f" offset {row_map.offset} width {row_map.width} repeats {row_map.repeats}" if group.fold == "rows" else ""
    mixes = " mixes tokens" if group.mixes_tokens else ""
    return f"{group.producer} -> {', '.join(group.linears)} | {group.fold}{rows}{mixes} | at {group.inspect!r}"


def groups_of(family: str, **changes: Any) -> dict[str, list[ScaleGroup]]:
    model = build_model(family, **changes)
    blocks = find_blocks(model)
    (stream,) = capture_streams(model, blocks, collect_batches(model, [build_batch(family, 8)]))
    found = {}
    for index, (name, block) in enumerate(blocks.items()):
        found[name] = BlockProber(block, stream.call(index, stream.between(index, stream.hidden))).find_all()
        stream.hidden = stream.call(index, stream.between(index, stream.hidden)).run(block)
    return found


def describe_family(family: str, **changes: Any) -> str:
    """The groups of all blocks; blocks with the same groups on one line."""
    texts: dict[str, list[str]] = {}
    for name, groups in groups_of(family, **changes).items():
        texts.setdefault("\n".join(describe(g) for g in groups), []).append(name)
    return "\n".join(f"{', '.join(names)}\n{text}" for text, names in texts.items())


pytestmark = pytest.mark.filterwarnings("ignore:no vision token found")


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("family", CONFIGS)
def test_quantize(family: str, precision: Any) -> None:
    model = build_model(family)
    batches = [build_batch(family, 9), build_batch(family, 12, seed=2)]
    before = snapshot(model)
    blocks = find_blocks(model)
    assert {name.rpartition(".")[0] for name in blocks} == {BLOCKS.get(family, "model.language_model.layers")}
    with torch.no_grad():
        reference = model(**model_inputs(batches[0])).logits

    report = quantize_(model, mbq_config(batches, precision=precision, group_size=32, n_grid=3), progress=False)

    assert report is not None and report.groups
    assert (report.settings["precision"], report.settings["group_size"]) == (precision, 32)
    linears = {
        f"{block}.{name}"
        for block, module in blocks.items()
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear)
    }
    assert report.num_linears == len(linears)
    assert report.not_scaled == [] and report.not_quantized == []
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
    with torch.no_grad():
        logits = model(**model_inputs(batches[0])).logits
    assert logits.isfinite().all()
    error = ((logits - reference).norm() / reference.norm()).item()
    assert 1e-3 < error < 0.9  # 3 or 4 bits on random weights: far from exact, and far from unrelated
    if family not in (*TEXT_ONLY, "mllama"):
        assert all(g.sensitivity is not None and g.sensitivity > 0 for g in report.groups)


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantize_half_precision(dtype: torch.dtype, precision: Any) -> None:
    model = build_model("qwen3_vl", dtype)
    batches = [float_inputs(build_batch("qwen3_vl", n, seed=n), dtype) for n in (9, 12)]
    config = mbq_config(batches, precision=precision, group_size=32, n_grid=3, propagate_error=precision == "w4a8")
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
    config = mbq_config([build_batch("llava")], **options)
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
    config = mbq_config(batches, precision=precision, group_size=32, n_grid=5, balance=False, filter_fn=chosen)
    report = quantize_(model, config, progress=False)
    assert report is not None
    (group,) = report.groups
    assert (group.fold == "act_pre_scale") == (family == "olmo2" and names != "down_proj") and group.alpha == 0.8
    assert (before - mlp_outputs()).abs().mean().item() == pytest.approx(group.loss, rel=1e-4)
    for name in names.split():
        weight = model.get_decoder().layers[0].mlp.get_submodule(name).weight
        assert isinstance(weight, KINDS[precision]) and (weight.act_pre_scale is None) == (group.producer is not None)


def test_a_wrong_fold_is_caught_by_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the whole model, with the check of the block switched off and one producer exchanged."""
    find_all = BlockProber.find_all

    def exchanged(self: BlockProber) -> list[ScaleGroup]:
        groups = find_all(self)
        assert groups[2].producer == "post_attention_layernorm"
        return [*groups[:2], replace(groups[2], producer="input_layernorm"), groups[3]]

    monkeypatch.setattr(BlockProber, "find_all", exchanged)
    model = build_model("llava")
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="folding the scales changes the logits by"):
        quantize_(model, mbq_config([build_batch("llava")], group_size=32, n_grid=3), progress=False)
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
    report = quantize_(model, mbq_config(batches, group_size=32, n_grid=4, **options), filter_fn, progress=False)
    assert report is not None and any(g.alpha > 0 for g in report.groups)
    with torch.no_grad():
        after = model(**model_inputs(batches[0])).logits
    return ((after - before).norm() / before.norm()).item()


@pytest.mark.parametrize("family", CONFIGS)
def test_only_rounding_changes_the_function(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantize_losslessly(build_model(family), family, monkeypatch) < 1e-5


@pytest.mark.parametrize("family", ["llava", "gemma3", "mllama", "olmo2", "starcoder2"])
def test_only_rounding_changes_the_function_w4a8(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantize_losslessly(build_model(family), family, monkeypatch, precision="w4a8") < 1e-5


def ends_with(names: str) -> Any:
    return lambda module, fqn: fqn.rpartition(".")[2] in names.split()


@pytest.mark.parametrize("recipe", ["best", "paper"])
@pytest.mark.parametrize("family", ["llava", "phi3", "cohere"])
@pytest.mark.parametrize("names", ["q_proj qkv_proj", "v_proj down_proj", "k_proj gate_proj gate_up_proj"])
def test_linears_that_are_left_out(family: str, names: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may share a group with, or be the producer of, linears that are quantized."""
    error = quantize_losslessly(build_model(family), family, monkeypatch, ends_with(names), recipe=recipe)
    assert error < 1e-5


def test_both_filters_choose_what_is_quantized() -> None:
    model = build_model("llava")
    chosen = ends_with("q_proj o_proj down_proj")
    config = mbq_config([build_batch("llava")], group_size=32, n_grid=2, filter_fn=chosen)
    report = quantize_(model, config, lambda module, fqn: "layers.1" in fqn, progress=False)
    quantized = [n for n, p in model.named_parameters() if isinstance(p, MBQInt3Tensor)]
    layer = "model.language_model.layers.1"
    assert quantized == [f"{layer}.{name}.weight" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]
    assert report is not None and report.num_linears == 3 and len(report.not_quantized) == 11
    assert {g.block for g in report.groups} == {layer}


USUAL_BLOCK = """\
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
post_attention_layernorm -> mlp.gate_proj, mlp.up_proj | weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'"""


@pytest.mark.parametrize(
    "family",
    [
        "llava",
        "llava_onevision",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "internvl",
        "smolvlm",
        "mistral3",
        "llama",
        "qwen3",
    ],
)
def test_groups_of_the_usual_block(family: str) -> None:
    blocks = BLOCKS.get(family, "model.language_model.layers")
    assert describe_family(family) == f"{blocks}.0, {blocks}.1\n{USUAL_BLOCK}"


def test_groups_gemma3() -> None:
    assert_expected_inline(
        describe_family("gemma3"),
        """\
model.language_model.layers.0, model.language_model.layers.1
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | one_plus_weight | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
pre_feedforward_layernorm -> mlp.gate_proj, mlp.up_proj | one_plus_weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'""",
    )


def test_groups_paligemma() -> None:
    assert_expected_inline(
        describe_family("paligemma"),
        """\
model.language_model.layers.0, model.language_model.layers.1
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | one_plus_weight | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
post_attention_layernorm -> mlp.gate_proj, mlp.up_proj | one_plus_weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'""",
    )


def test_groups_mllama() -> None:
    assert_expected_inline(
        describe_family("mllama"),
        """\
model.language_model.layers.0, model.language_model.layers.2
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
post_attention_layernorm -> mlp.gate_proj, mlp.up_proj | weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'
model.language_model.layers.1
input_layernorm -> cross_attn.q_proj | weight | at 'cross_attn'
None -> cross_attn.k_proj, cross_attn.v_proj | None | at 'cross_attn'
cross_attn.v_proj -> cross_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'cross_attn.o_proj'
post_attention_layernorm -> mlp.gate_proj, mlp.up_proj | weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'""",
    )


def test_groups_llama_mha() -> None:
    assert_expected_inline(
        describe_family("llama_mha"),
        """\
model.layers.0, model.layers.1
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 1 repeats 1 mixes tokens | at 'self_attn.o_proj'
post_attention_layernorm -> mlp.gate_proj, mlp.up_proj | weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'""",
    )


def test_groups_opt() -> None:
    assert_expected_inline(
        describe_family("opt"),
        """\
model.decoder.layers.0, model.decoder.layers.1
self_attn_layer_norm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight | at 'self_attn'
self_attn.v_proj -> self_attn.out_proj | rows offset 0 width 1 repeats 1 mixes tokens | at 'self_attn.out_proj'
final_layer_norm -> fc1 | weight | at 'fc1'
fc1 -> fc2 | rows offset 0 width 1 repeats 1 | at 'fc2'""",
    )


def test_groups_phi3() -> None:
    assert_expected_inline(
        describe_family("phi3"),
        """\
model.layers.0, model.layers.1
input_layernorm -> self_attn.qkv_proj | weight | at 'self_attn'
self_attn.qkv_proj -> self_attn.o_proj | rows offset 96 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
post_attention_layernorm -> mlp.gate_up_proj | weight | at 'mlp'
mlp.gate_up_proj -> mlp.down_proj | rows offset 128 width 1 repeats 1 | at 'mlp.down_proj'""",
    )


def test_groups_cohere() -> None:
    assert_expected_inline(
        describe_family("cohere"),
        """\
model.layers.0, model.layers.1
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, mlp.gate_proj, mlp.up_proj | weight | at ''
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'""",
    )


def test_groups_olmo2() -> None:
    assert_expected_inline(
        describe_family("olmo2"),
        """\
model.layers.0, model.layers.1
None -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | None | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
None -> mlp.gate_proj, mlp.up_proj | None | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'""",
    )


def test_groups_starcoder2() -> None:
    assert_expected_inline(
        describe_family("starcoder2"),
        """\
model.layers.0, model.layers.1
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
post_attention_layernorm -> mlp.c_fc | weight | at 'mlp'
None -> mlp.c_proj | None | at 'mlp.c_proj'""",
    )
