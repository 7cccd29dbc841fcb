"""targets=: the vision tower and the projector calibrated beside the decoder, or what a filter takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline as expect
from families import FAMILIES, MIXTURES, TEXT_ONLY
from live_bytes import LiveBytes
from models import (
    assert_nothing_left,
    assert_unchanged,
    build_batch,
    build_model,
    float_inputs,
    model_inputs,
    snapshot,
)
from refusals import refused
from results import parts_of
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mbq_ao import CalibrationReport, Int3WeightOnlyConfig, MBQInt3Tensor, MBQW4A8Tensor, mbq_config, quantize_
from mbq_ao.calibration import block, mbq
from mbq_ao.calibration.capture import find_blocks
from mbq_ao.calibration.residency import computing_on
from mbq_ao.calibration.scale_groups import BlockProber
from mbq_ao.calibration.selection import linears_beside
from mbq_ao.calibration.stacks import _runs, forward_until, listed_blocks

KINDS: Any = {"w3a16": MBQInt3Tensor, "w4a8": MBQW4A8Tensor}
BOTH = "decoder+vision"
VLMS = [family for family in FAMILIES | MIXTURES if family not in TEXT_ONLY]
WITHOUT_TOWER = ("phi4_multimodal", "emu3", "chameleon", "fuyu")  # that transformers' get_encoder finds
LLAVA = FAMILIES["llava"]


def calib_data(family: str) -> list[dict[str, Any]]:
    return [build_batch(family, 9), build_batch(family, 12, seed=2)]


def quantized(model: nn.Module, data: list[dict[str, Any]], filter_fn: Any = None, **options: Any) -> CalibrationReport:
    device, work_dir = options.pop("device", None), options.pop("work_dir", None)
    config = mbq_config(data, **{"group_size": 32, "n_grid": 3, "targets": BOTH, **options})
    report = quantize_(model, config, filter_fn, device, progress=False, work_dir=work_dir)
    assert report is not None
    return report


@functools.cache
def llava(**options: Any) -> tuple[nn.Module, CalibrationReport]:
    """A quantized model that several tests look at."""
    model = build_model("llava")
    return model, quantized(model, calib_data("llava"), **options)


def state(model: nn.Module) -> dict[str, list[bytes]]:
    return {name: [p.float().numpy().tobytes() for p in parts] for name, parts in parts_of(model).items()}


def is_quantized(value: object) -> bool:
    return isinstance(value, Tensor) and is_traceable_wrapper_subclass(value)


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


def test_the_decoder_is_calibrated_as_without_the_tower() -> None:
    (model, report), (alone, expected) = llava(), llava(targets="decoder")
    of_decoder = [r for r in report.records() if "language_model" in r["block"]]
    assert of_decoder == expected.records() and 0 < len(of_decoder) < len(report.groups)
    assert (expected.stacks, expected.rounded, expected.left_alone) == ({}, {}, {})
    actual = state(model)
    for name, value in state(alone).items():
        if "vision" not in name and "multi_modal" not in name:
            assert actual[name] == value, name
    assert not any(is_quantized(p) for n, p in alone.named_parameters() if "language_model" not in n)


@pytest.mark.parametrize("precision", KINDS)
def test_with_error_propagation_all_is_searched_behind_what_is_quantized(
    precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Qwen3-VL, whose tower reaches the decoder's layers by way of deepstack too."""
    distorted: dict[str, list[Tensor]] = {}
    use = block.BlockCalibrator.use

    def spy(self: block.BlockCalibrator, groups: Any, scales: Any) -> None:
        distorted[self.name] = [s.hidden if s.distorted is None else s.distorted for s in self.streams]
        use(self, groups, scales)

    monkeypatch.setattr(block.BlockCalibrator, "use", spy)
    model, data = build_model("qwen3_vl"), calib_data("qwen3_vl")
    report = quantized(model, data, precision=precision, propagate_error=True)
    served: dict[str, list[Tensor]] = {name: [] for name in distorted}
    for name, inputs in served.items():
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, inputs=inputs: inputs.append(a[0].clone()))
    with torch.no_grad():
        for batch in data:
            model(**model_inputs(batch))
    assert list(distorted) == [name for blocks in report.stacks.values() for name in blocks]
    for name in distorted:
        for expected, actual in zip(served[name], distorted[name], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


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


def test_text_among_the_images_does_not_count() -> None:
    text = {k: v[:, -6:] for k, v in build_batch("llava").items() if k != "pixel_values"}
    model = build_model("llava")
    report = quantized(model, [text, *calib_data("llava"), text])
    expected = [r for r in llava()[1].records() if "language_model" not in r["block"]]
    assert [r for r in report.records() if "language_model" not in r["block"]] == expected


def test_images_that_go_through_the_tower_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [build_batch("gemma3", batch_size=2), build_batch("gemma3", batch_size=2, seed=2)]
    together = quantized(build_model("gemma3"), data)
    model = build_model("gemma3")
    encode = model.model.vision_tower.encoder.forward

    def one_by_one(inputs_embeds: Tensor, **kwargs: Any) -> Any:
        outputs = [encode(inputs_embeds=image, **kwargs) for image in inputs_embeds.split(1)]
        outputs[0].last_hidden_state = torch.cat([o.last_hidden_state for o in outputs])
        return outputs[0]

    monkeypatch.setattr(model.model.vision_tower.encoder, "forward", one_by_one)
    report = quantized(model, data)
    assert report.stacks == together.stacks
    for group, expected in zip(report.groups, together.groups, strict=True):
        if "vision_tower" in group.block:
            assert group.alpha == expected.alpha
            assert group.losses == pytest.approx(expected.losses, rel=1e-4)


@pytest.mark.parametrize(
    ("calls", "runs"),
    [
        ([("a", False), ("b", True), ("c", True)], [["a", "b", "c"]]),
        ([("a", False), ("b", True), ("a", False), ("b", True)], [["a", "b"]]),
        ([("a", False), ("b", False), ("c", True)], [["a"], ["b", "c"]]),
        ([("a", False), ("b", True), ("a", False), ("b", False)], [["a"], ["b"]]),
        ([("a", False), ("b", True), ("a", False)], [["a"], ["b"]]),
        ([("a", False), ("b", True), ("b", True)], [["a"], ["b"]]),
        ([("a", False), ("a", True), ("b", True)], [["a"], ["b"]]),
        ([("a", False), ("b", True), ("b", False), ("a", False)], [["a"], ["b"]]),
        ([], []),
    ],
)
def test_runs_of_blocks(calls: list[tuple[str, bool]], runs: list[list[str]]) -> None:
    assert _runs(calls) == runs


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


# llava has two blocks in its tower, a projector of one, and two layers in its decoder.
@pytest.mark.parametrize("propagate_error", [False, True])
@pytest.mark.parametrize("where", ["vision_tower.encoder.layers.1", "multi_modal_projector", "language_model.layers.1"])
def test_interrupted_at_any_call(where: str, propagate_error: bool, model: nn.Module) -> None:
    """At every third call of the module or of a copy of it, until there are no more."""
    data = [build_batch("llava")]
    before = snapshot(model)
    for at_call in range(1, 1000, 3):
        calls = iter(range(1, 1000))

        def interrupt(module: nn.Module, args: Any, calls: Any = calls, at_call: int = at_call) -> None:
            if next(calls) == at_call:
                raise KeyboardInterrupt

        handle = model.model.get_submodule(where).register_forward_pre_hook(interrupt)
        try:
            quantized(model, data, n_grid=2, propagate_error=propagate_error)
        except KeyboardInterrupt:
            handle.remove()
            assert_unchanged(model, before)
        else:
            break
    assert at_call > 9 and next(calls) <= at_call


STEPS = ["stack_00_block_0000", "stack_00_block_0001", "stack_01_block_0000", "block_0000", "block_0001"]


@pytest.mark.parametrize("propagate_error", [False, True])
def test_work_dir_goes_on_after_any_block(
    propagate_error: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, report = llava(propagate_error=propagate_error)
    search = block.BlockCalibrator.search
    for number in range(len(STEPS)):
        with monkeypatch.context() as patch:
            calls = iter(range(10))

            def failing(self: Any, groups: Any, calls: Any = calls) -> Any:
                if next(calls) == 1:
                    raise RuntimeError("out of memory")
                return search(self, groups)

            patch.setattr(block.BlockCalibrator, "search", failing)
            again = build_model("llava")
            options = {"propagate_error": propagate_error, "work_dir": tmp_path}
            if number + 1 < len(STEPS):
                with pytest.raises(RuntimeError, match="out of memory"):
                    quantized(again, calib_data("llava"), **options)
            else:
                resumed = quantized(again, calib_data("llava"), **options)
        there = {path.stem for path in tmp_path.glob("*block*")}
        assert there == set(STEPS[: number + 1])
    assert resumed.num_resumed == len(STEPS) - 1
    assert state(again) == state(model) and resumed.records() == report.records()


def test_work_dir_of_a_decoder_alone_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized(build_model("llava"), calib_data("llava"), targets="decoder", work_dir=tmp_path)
    monkeypatch.delattr(mbq, "modality_sensitivity")
    model = build_model("llava")
    report = quantized(model, calib_data("llava"), work_dir=tmp_path)
    assert report.num_resumed == 2 and state(model) == state(llava()[0])


@pytest.mark.filterwarnings("ignore:.*is computed again")
def test_work_dir_of_other_linears_of_the_tower_is_not(tmp_path: Path) -> None:
    quantized(build_model("llava"), calib_data("llava"), work_dir=tmp_path)
    model, narrowed = build_model("llava"), lambda m, fqn: "k_proj" not in fqn or "vision" not in fqn
    with pytest.warns(UserWarning, match="stack_00_block_0000.* is computed again .*it is of another run"):
        report = quantized(model, calib_data("llava"), narrowed, work_dir=tmp_path)
    assert report.num_resumed == 3  # the projector and the decoder's layers
    expected = build_model("llava")
    quantized(expected, calib_data("llava"), narrowed)
    assert state(model) == state(expected)


def test_one_block_at_a_time_is_on_the_device(model: nn.Module) -> None:
    meta = torch.device("meta")
    layers = find_blocks(model)
    listed = listed_blocks(model, linears_beside(model, layers, BOTH, None))
    assert list(listed) == [f"model.vision_tower.encoder.layers.{i}" for i in range(2)]
    blocks = [*listed.values(), *layers.values()]
    before = snapshot(model)
    seen: list[list[str]] = []
    handles = [
        b.mlp.register_forward_pre_hook(
            lambda m, a: seen.append([next(other.parameters()).device.type for other in blocks])
        )
        for b in listed.values()
    ]
    inputs = {k: v.to(meta) if isinstance(v, Tensor) else v for k, v in model_inputs(build_batch("llava")).items()}
    with computing_on(meta, model, blocks), torch.no_grad():
        model.model.vision_tower(pixel_values=inputs["pixel_values"])
    for handle in handles:
        handle.remove()
    assert seen == [["meta", "cpu", "cpu", "cpu"], ["cpu", "meta", "cpu", "cpu"]]
    assert_unchanged(model, before)


def test_the_blocks_of_the_tower_are_among_those_that_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[nn.Module] = []

    def spy(device: Any, model: nn.Module, blocks: Any) -> Any:
        given.extend(blocks)
        return computing_on(device, model, given)

    monkeypatch.setattr(mbq, "computing_on", spy)
    model = build_model("llava")
    quantized(model, calib_data("llava"), device="cpu")
    assert given == [*model.get_decoder().layers, *model.model.vision_tower.encoder.layers]
    assert state(model) == state(llava()[0])


@pytest.mark.parametrize("num_batches", [2, 6])
def test_a_block_more_in_the_tower_costs_its_packed_weights(num_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an unpacked copy of the block, nor a hidden state of every batch."""

    def peak(num_layers: int) -> int:
        config = LLAVA.config()
        config.vision_config.num_hidden_layers, config.vision_config.hidden_size = num_layers, 64
        monkeypatch.setitem(FAMILIES, "llava", replace(LLAVA, config=lambda: config))
        model, data = build_model("llava"), [build_batch("llava", seed=i) for i in range(num_batches)]
        given = [*model.parameters(), *model.buffers(), *(value for batch in data for value in batch.values())]
        with LiveBytes(given) as live:
            quantized(model, data, group_size=64, n_grid=2)
        return live.peak

    grown = (peak(6) - peak(2)) / 4
    num_weights = 4 * 64 * 64 + 2 * 64 * LLAVA.config().vision_config.intermediate_size
    # Tiles pad the weights of this small model to twice their size; a plain copy would be 4 bytes a weight.
    assert grown <= 1.25 * (2 * num_weights * 3 / 8 + 5 * num_weights / 64)


def test_a_forward_is_ended_at_the_decoder(model: nn.Module) -> None:
    from mbq_ao.calibration.batch import collect_batches

    (batch,) = collect_batches(model, [build_batch("llava")])
    called: list[str] = []
    watched = {"projector": model.model.multi_modal_projector, "layer": model.get_decoder().layers[0]}
    for name, module in watched.items():
        module.register_forward_hook(lambda m, a, y, name=name: called.append(name))
    with torch.no_grad():
        forward_until(model, batch, watched["layer"])
    assert called == ["projector"]
    before = snapshot(model)
    with torch.no_grad():
        assert model(**model_inputs(build_batch("llava"))).logits.isfinite().all()
    assert called == ["projector", "projector", "layer"]
    assert_unchanged(model, before)


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
