"""targets=: the vision tower and the projector calibrated beside the decoder, or what a filter takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline as expect
from families import FAMILIES, MIXTURES, MULTIMODAL, TEXT_ONLY
from models import (
    assert_nothing_left,
    build_batch,
    build_model,
    float_inputs,
    model_inputs,
    snapshot,
)
from refusals import refused
from targeting import BOTH, KINDS, LLAVA, calib_data, is_quantized, llava, quantized
from torch import nn

from mbq_ao import Int3WeightOnlyConfig, mbq_config, quantize_
from mbq_ao.calibration.capture import find_blocks
from mbq_ao.calibration.scale_groups import BlockProber

# Not all of docs/models.md: a tower is found by what it does, and these are the kinds there are.
VLMS = [f for f in (*MULTIMODAL, *MIXTURES, "gemma4", "cohere2_vision", "lfm2_vl", "blip_2") if f not in TEXT_ONLY]
WITHOUT_TOWER = ("phi4_multimodal", "emu3", "chameleon", "fuyu")  # that transformers' get_encoder finds


@pytest.mark.parametrize("family", [family for family in VLMS if family not in WITHOUT_TOWER])
def test_all_is_quantized_or_named(family: str) -> None:
    precision: Any = list(KINDS)[VLMS.index(family) % 2]
    model = build_model(family)
    data = calib_data(family)
    before = snapshot(model)
    with torch.no_grad():
        reference = model(**model_inputs(data[0])).logits

    report = quantized(model, data, precision=precision)

    assert report.settings["targets"] == BOTH
    layers = find_blocks(model)
    assert list(report.stacks.values())[-1] == list(layers) and len(report.stacks) > 1
    named = {*report.not_quantized, *report.left_alone}
    of_text = {*model.get_decoder().modules(), *(m for layer in layers.values() for m in layer.modules())}
    of_text |= {model.get_input_embeddings(), model.get_output_embeddings()}
    if (audio := model.get_encoder(modality="audio")) not in (None, model):
        of_text |= set(audio.modules())
    beside = {name: m for name, m in model.named_modules() if m not in of_text}
    for name, module in beside.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{parameter_name}".removesuffix(".weight")
            assert is_quantized(parameter) == (parameter.ndim > 1 and full_name not in named), full_name
            assert not is_quantized(parameter) or isinstance(parameter, KINDS[precision]), full_name
    # Nothing is lost: every linear is in one place of the report.
    linears = [n for n, m in beside.items() if isinstance(m, nn.Linear) and is_quantized(m.weight)]
    grouped = [
        f"{group.block}.{name}" for group in report.groups if group.block not in layers for name in group.linears
    ]
    assert sorted([*grouped, *report.rounded]) == sorted(linears)
    assert not set(report.not_scaled) & set(linears)
    for layer in layers.values():
        assert all(is_quantized(m.weight) for n, m in layer.named_modules() if n.endswith(("q_proj", "up_proj", "fc1")))
    # Only the decoder is balanced, and folding alone changes nothing.
    assert all(group.sensitivity is None or group.block in layers for group in report.groups)
    assert any(group.sensitivity is not None for group in report.groups)
    assert report.logits_error < 1e-5
    folded = {f"{g.block}.{g.producer}" for g in report.groups if g.producer}
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, (value, copy) in before.items():
        if (module := name.rpartition(".")[0]) in beside and module not in {*linears, *folded}:
            assert after[name] is value and torch.equal(value, copy), name
    assert_nothing_left(model)
    with torch.no_grad():
        logits = model(**model_inputs(data[0])).logits
    assert logits.isfinite().all()
    assert 1e-3 < (logits - reference).norm() / reference.norm() < 1.0


def found(family: str, data: list[dict[str, Any]] | None = None, **options: Any) -> str:
    """Beside the decoder: the stacks and their groups (those of its first block), and what is in none."""
    report = quantized(build_model(family), data or calib_data(family), n_grid=1, **options)
    lines = []
    for stack, blocks in [*report.stacks.items()][:-1]:
        lines.append(f"{stack} ({len(blocks)})")
        groups = [group for group in report.groups if group.block == blocks[0]]
        lines += [f"  {group.producer} -> {', '.join(group.linears)} | {group.fold}" for group in groups]
    lines += [f"rounded: {name}:\n  {why}" for name, why in report.rounded.items()]
    lines += [f"left alone: {name}:\n  {why}" for name, why in report.left_alone.items()]
    return "\n".join(lines)


def test_groups_of_clip() -> None:
    expect(
        found("llava"),
        """\
model.vision_tower.encoder.layers (2)
  layer_norm1 -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight
  self_attn.v_proj -> self_attn.out_proj | rows
  layer_norm2 -> mlp.fc1 | weight
  None -> mlp.fc2 | act_pre_scale
model.multi_modal_projector (1)
  None -> linear_1 | act_pre_scale
  None -> linear_2 | act_pre_scale""",
    )


def test_groups_of_siglip_and_its_pooling_head() -> None:
    expect(
        found("paligemma"),
        """\
model.vision_tower.encoder.layers.0 (1)
  layer_norm1 -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight
  self_attn.v_proj -> self_attn.out_proj | rows
  layer_norm2 -> mlp.fc1 | weight
  None -> mlp.fc2 | act_pre_scale
model.vision_tower.head (1)
  layernorm -> mlp.fc1 | weight
  None -> mlp.fc2 | act_pre_scale
model.multi_modal_projector (1)
  None -> linear | act_pre_scale
left alone: model.vision_tower.head.attention.out_proj:
  torch.nn.MultiheadAttention computes with their weights itself""",
    )


def test_groups_of_windowed_attention_and_a_merger() -> None:
    expect(
        found("qwen2_5_vl"),
        """\
model.visual.blocks.0 (1)
  norm1 -> attn.qkv | weight
  attn.qkv -> attn.proj | rows
  norm2 -> mlp.gate_proj, mlp.up_proj | weight
  mlp.up_proj -> mlp.down_proj | rows
model.visual.merger (1)
  None -> mlp.0 | act_pre_scale
  None -> mlp.2 | act_pre_scale""",
    )


def test_groups_of_deepstack_mergers() -> None:
    expect(
        found("qwen3_vl"),
        """\
model.visual.blocks.0 (1)
  norm1 -> attn.qkv | weight
  attn.qkv -> attn.proj | rows
  norm2 -> mlp.linear_fc1 | weight
  None -> mlp.linear_fc2 | act_pre_scale
model.visual.deepstack_merger_list.0 (1)
  norm -> linear_fc1 | weight
  None -> linear_fc2 | act_pre_scale
model.visual.merger (1)
  None -> linear_fc1 | act_pre_scale
  None -> linear_fc2 | act_pre_scale""",
    )


def test_groups_of_a_projector_that_merges_patches() -> None:
    expect(
        found("mistral3"),
        """\
model.vision_tower.transformer.layers.0 (1)
  attention_norm -> attention.q_proj, attention.k_proj, attention.v_proj | weight
  attention.v_proj -> attention.o_proj | rows
  ffn_norm -> feed_forward.gate_proj, feed_forward.up_proj | weight
  feed_forward.up_proj -> feed_forward.down_proj | rows
model.multi_modal_projector (1)
  None -> patch_merger.merging_layer | act_pre_scale
  patch_merger.merging_layer -> linear_1 | rows
  None -> linear_2 | act_pre_scale""",
    )


def test_groups_of_two_lists_and_a_projector_of_one_linear() -> None:
    expect(
        found("mllama"),
        """\
model.vision_model.transformer.layers (2)
  input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight
  self_attn.v_proj -> self_attn.o_proj | rows
  post_attention_layernorm -> mlp.fc1 | weight
  None -> mlp.fc2 | act_pre_scale
model.vision_model.global_transformer.layers.0 (1)
  input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight
  self_attn.v_proj -> self_attn.o_proj | rows
  post_attention_layernorm -> mlp.fc1 | weight
  None -> mlp.fc2 | act_pre_scale
rounded: model.multi_modal_projector:
  called alone, not in a block that takes a hidden state""",
    )


def test_groups_of_internvl_by_the_published_rules() -> None:
    expect(
        found("internvl", recipe="paper"),
        """\
model.vision_tower.encoder.layer.0 (1)
  layernorm_before -> attention.q_proj, attention.k_proj, attention.v_proj | weight
  attention.v_proj -> attention.projection_layer | rows
  layernorm_after -> mlp.fc1 | weight
model.multi_modal_projector (1)
  layer_norm -> linear_1 | weight""",
    )


def test_groups_of_smoothquant() -> None:
    config = mbq_config(calib_data("llava"), group_size=32, recipe="smoothquant", targets=BOTH)
    report = quantize_(build_model("llava"), config, progress=False)
    assert report is not None
    assert {g.producer for g in report.groups if "vision" in g.block} == {"layer_norm1", "layer_norm2"}
    assert "model.multi_modal_projector.linear_1" in report.not_scaled


def test_half_precision() -> None:
    model = build_model("qwen2_5_vl", torch.bfloat16)
    data = [float_inputs(batch, torch.bfloat16) for batch in calib_data("qwen2_5_vl")]
    report = quantized(model, data, precision="w4a8", propagate_error=True)
    assert 0 < report.logits_error < 0.1 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert model(**model_inputs(data[0])).logits.isfinite().all()


@pytest.mark.parametrize(("hidden", "intermediate"), [(588, 100), (72, 268)])
def test_widths_that_no_tile_divides(hidden: int, intermediate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LLAVA.config()
    config.vision_config.hidden_size, config.vision_config.intermediate_size = hidden, intermediate
    config.vision_config.num_hidden_layers = 1
    config.vision_feature_layer = -1
    monkeypatch.setitem(FAMILIES, "llava", replace(LLAVA, config=lambda: config))
    model = build_model("llava")
    report = quantized(model, [build_batch("llava")], group_size=128, n_grid=2)
    assert {m.weight.shape[1] for m in model.model.vision_tower.modules() if isinstance(m, nn.Linear)} == {
        hidden,
        intermediate,
    }
    assert all(is_quantized(m.weight) for m in model.model.vision_tower.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        assert model(**model_inputs(build_batch("llava"))).logits.isfinite().all()
    assert report.logits_error < 1e-4


def test_linears_that_nothing_runs_stay() -> None:
    model = build_model("llava")
    layer = model.model.vision_tower.encoder.layers[1]
    layer.extra = nn.Linear(32, 32)
    model.model.spare = nn.Linear(32, 32)
    report = quantized(model, calib_data("llava"))
    names = ["model.vision_tower.encoder.layers.1.extra", "model.spare"]
    assert report.left_alone == dict.fromkeys(names, "no calibration batch runs them")
    assert f"left as they are (no calibration batch runs them): {', '.join(names)}" in str(report)
    assert not is_quantized(layer.extra.weight) and not set(report.not_quantized) & set(names)


def test_linears_that_embed_patches_stay_unless_a_filter_takes_them() -> None:
    model, data = build_model("llama4"), calib_data("llama4")
    name = "vision_model.patch_embedding.linear"
    assert quantized(model, data).left_alone == {name: "they embed the patches, before the first block"}
    report = quantized(build_model("llama4"), data, targets=lambda module, fqn: fqn == name)
    assert list(report.stacks) == ["vision_model.patch_embedding"] and not report.left_alone


FILTERS: dict[str, Callable[[nn.Module, str], bool]] = {
    "tower": lambda module, fqn: "vision_tower" in fqn and fqn.endswith("fc1"),
    "decoder": lambda module, fqn: "layers.1.mlp.up_proj" in fqn,
    "head": lambda module, fqn: fqn == "lm_head",
    "all": lambda module, fqn: True,
}


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_takes_what_it_likes(name: str, precision: Any) -> None:
    model = build_model("llava")
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    asked: list[str] = []

    def taking(module: nn.Module, fqn: str) -> bool:
        asked.append(fqn)
        return FILTERS[name](module, fqn)

    report = quantized(model, calib_data("llava"), targets=taking, precision=precision)
    assert sorted(asked) == sorted(linears)
    chosen = [n for n in linears if FILTERS[name](nn.Linear(1, 1), n)]
    assert [n for n, p in model.named_parameters() if is_quantized(p)] == [f"{n}.weight" for n in chosen]
    late = "they run in or after the decoder, outside of its layers"
    assert report.rounded == ({"lm_head": late} if "lm_head" in chosen else {})
    assert {f"{g.block}.{n}" for g in report.groups for n in g.linears} >= set(chosen) - {"lm_head"}
    assert report.settings["targets"] == "filter"
    with torch.no_grad():
        assert model(**model_inputs(build_batch("llava"))).logits.isfinite().all()


def test_filter_fn_narrows() -> None:
    model = build_model("llava")
    quantized(model, calib_data("llava"), lambda m, fqn: "fc1" in fqn or "layers.1.mlp.up" in fqn)
    assert [n for n, p in model.named_parameters() if is_quantized(p)] == [
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "model.vision_tower.encoder.layers.1.mlp.fc1.weight",
        "model.language_model.layers.1.mlp.up_proj.weight",
    ]
    model = build_model("llava")
    quantized(model, calib_data("llava"), lambda m, fqn: "linear_1" in fqn, targets=FILTERS["all"])
    assert [n for n, p in model.named_parameters() if is_quantized(p)] == [
        "model.multi_modal_projector.linear_1.weight"
    ]


def test_a_filter_beside_a_config_for_the_tower() -> None:
    model = build_model("llava")
    report = quantized(
        model,
        calib_data("llava"),
        targets=lambda m, fqn: "projector" in fqn,
        vision=Int3WeightOnlyConfig(group_size=32),
    )
    assert report.vision and all("vision_tower" in name for name in report.vision)
    assert is_quantized(model.model.multi_modal_projector.linear_1.weight)
    assert not any(is_quantized(p) for p in model.get_decoder().parameters())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"targets": "vision"},
            "targets must be one of 'decoder', 'decoder+vision', or a filter (module, fqn) -> bool",
        ),
        ({"vision": Int3WeightOnlyConfig()}, 'targets="decoder+vision" calibrates it; leave out one of them'),
        (
            {"vision": Int3WeightOnlyConfig(), "targets": FILTERS["tower"]},
            "targets and vision=Int3WeightOnlyConfig both quantize model.vision_tower.encoder.layers.0.mlp.fc1 (2 lin",
        ),
        ({"filter_fn": lambda m, fqn: "language" in fqn}, "none of the 14 nn.Linear of the vision tower and the proj"),
        ({"filter_fn": lambda m, fqn: "vision" in fqn}, "none of the 14 nn.Linear in the 2 decoder layers passes filt"),
        ({"targets": lambda m, fqn: False}, "none of the 14 nn.Linear in the 2 decoder layers passes targets and filt"),
    ],
)
def test_refused(model: nn.Module, options: dict[str, Any], text: str) -> None:
    assert text in refused(model, calib_data("llava"), **{"targets": BOTH, **options})


def test_refused_without_an_image(model: nn.Module) -> None:
    text = {k: v[:, -6:] for k, v in build_batch("llava").items() if k != "pixel_values"}
    with pytest.warns(UserWarning, match="no vision token found"):
        said = refused(model, [text], targets=BOTH)
    assert "no calibration batch runs one of the 14 linears of the vision tower and the projector" in said


@pytest.mark.filterwarnings("ignore:no vision token found")
@pytest.mark.parametrize("family", ["llama", *WITHOUT_TOWER])
def test_refused_without_a_tower(family: str) -> None:
    model = build_model(family)
    said = refused(model, [build_batch(family)], targets=BOTH)
    assert f'{type(model).__name__} has none that transformers\' get_encoder("image") finds' in said


def test_tied_embeddings_are_refused(model: nn.Module) -> None:
    model.lm_head.weight = model.get_input_embeddings().weight
    said = refused(model, calib_data("llava"), targets=FILTERS["head"])
    assert "are one parameter" in said and "untie them" in said
    quantized(model, calib_data("llava"))  # which has nothing to do with them
    assert not is_quantized(model.lm_head.weight) and model.lm_head.weight is model.get_input_embeddings().weight


def test_a_wrong_fold_in_the_tower_is_caught_by_what_the_tower_gives(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_all = BlockProber.find_all

    def exchanged(self: BlockProber) -> Any:
        groups = find_all(self)
        return [replace(g, producer="layer_norm1") if g.producer == "layer_norm2" else g for g in groups]

    monkeypatch.setattr(BlockProber, "find_all", exchanged)
    assert "folding the scales changes the output of model.vision_tower.encoder.layers.1 by" in refused(
        model, calib_data("llava"), RuntimeError, targets=BOTH
    )


def test_the_report_shows_the_stacks_apart() -> None:
    _, report = llava()
    lines = str(report).splitlines()
    titles = [line for line in lines if line.startswith("[")]
    assert titles == [
        "[model.vision_tower.encoder.layers]",
        "[model.multi_modal_projector]",
        "[model.language_model.layers]",
    ]
    below = [lines[lines.index(title) + 1].split()[0] for title in titles]
    assert below == [blocks[0] for blocks in report.stacks.values()]
    assert "position_embedding" in lines[-1] and lines[-1].startswith("not quantized: ")


def test_the_picture_is_of_the_decoder() -> None:
    pytest.importorskip("matplotlib", reason="NEEDS MATPLOTLIB: the report's picture is not tested")
    sensitivity, gain = llava()[1].plot().axes
    expected_sensitivity, expected_gain = llava(targets="decoder")[1].plot().axes
    for axes, expected in ((sensitivity, expected_sensitivity), (gain, expected_gain)):
        assert [line.get_xydata().tolist() for line in axes.lines] == [
            line.get_xydata().tolist() for line in expected.lines
        ]
