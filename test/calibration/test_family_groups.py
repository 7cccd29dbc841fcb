"""The scale groups of model families: who produces whose input, and which row feeds which channel."""

from __future__ import annotations

from typing import Any

import pytest
from expecttest import assert_expected_inline
from models import build_batch, build_model

from mbq_ao.calibration.batch import collect_batches
from mbq_ao.calibration.capture import capture_streams, find_blocks
from mbq_ao.calibration.fold import ScaleGroup
from mbq_ao.calibration.scale_groups import BlockProber

pytestmark = pytest.mark.filterwarnings("ignore:no vision token found")


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
    """The groups of all layers; layers with the same groups on one line."""
    texts: dict[str, list[str]] = {}
    for name, groups in groups_of(family, **changes).items():
        texts.setdefault("\n".join(describe(g) for g in groups), []).append(name.rpartition(".")[2])
    return "\n".join(f"layers {', '.join(names)}\n{text}" for text, names in texts.items())


USUAL_BLOCK = """\
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
post_attention_layernorm -> mlp.gate_proj, mlp.up_proj | weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'"""


USUAL_FAMILIES = [
    "llava",
    "llava_pixtral",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "smolvlm",
    "idefics3",
    "mistral3",
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
]


@pytest.mark.parametrize("family", USUAL_FAMILIES)
def test_groups_of_the_usual_block(family: str) -> None:
    assert describe_family(family) == f"layers 0, 1\n{USUAL_BLOCK}"


@pytest.mark.parametrize("family", ["gemma3", "gemma2", "gemma3_text"])
def test_groups_gemma3(family: str) -> None:
    assert_expected_inline(
        describe_family(family),
        """\
layers 0, 1
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | one_plus_weight | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
pre_feedforward_layernorm -> mlp.gate_proj, mlp.up_proj | one_plus_weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'""",
    )


def test_groups_paligemma() -> None:
    assert_expected_inline(
        describe_family("paligemma"),
        """\
layers 0, 1
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | one_plus_weight | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
post_attention_layernorm -> mlp.gate_proj, mlp.up_proj | one_plus_weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'""",
    )


def test_groups_mllama() -> None:
    assert_expected_inline(
        describe_family("mllama"),
        """\
layers 0, 2
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
post_attention_layernorm -> mlp.gate_proj, mlp.up_proj | weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'
layers 1
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
layers 0, 1
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 1 repeats 1 mixes tokens | at 'self_attn.o_proj'
post_attention_layernorm -> mlp.gate_proj, mlp.up_proj | weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'""",
    )


@pytest.mark.parametrize("family", ["opt", "blip_2", "instructblip"])
def test_groups_opt(family: str) -> None:
    assert_expected_inline(
        describe_family(family),
        """\
layers 0, 1
self_attn_layer_norm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight | at 'self_attn'
self_attn.v_proj -> self_attn.out_proj | rows offset 0 width 1 repeats 1 mixes tokens | at 'self_attn.out_proj'
final_layer_norm -> fc1 | weight | at 'fc1'
fc1 -> fc2 | rows offset 0 width 1 repeats 1 | at 'fc2'""",
    )


@pytest.mark.parametrize("family", ["phi3", "phi4_multimodal"])
def test_groups_phi3(family: str) -> None:
    assert_expected_inline(
        describe_family(family),
        """\
layers 0, 1
input_layernorm -> self_attn.qkv_proj | weight | at 'self_attn'
self_attn.qkv_proj -> self_attn.o_proj | rows offset 96 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
post_attention_layernorm -> mlp.gate_up_proj | weight | at 'mlp'
mlp.gate_up_proj -> mlp.down_proj | rows offset 128 width 1 repeats 1 | at 'mlp.down_proj'""",
    )


@pytest.mark.parametrize("family", ["cohere", "cohere2_vision", "aya_vision"])
def test_groups_cohere(family: str) -> None:
    assert_expected_inline(
        describe_family(family),
        """\
layers 0, 1
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, mlp.gate_proj, mlp.up_proj | weight | at ''
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'""",
    )


@pytest.mark.parametrize("family", ["olmo2", "exaone4_5"])
def test_groups_olmo2(family: str) -> None:
    assert_expected_inline(
        describe_family(family),
        """\
layers 0, 1
None -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | None | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
None -> mlp.gate_proj, mlp.up_proj | None | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'""",
    )


def test_groups_starcoder2() -> None:
    assert_expected_inline(
        describe_family("starcoder2"),
        """\
layers 0, 1
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
post_attention_layernorm -> mlp.c_fc | weight | at 'mlp'
None -> mlp.c_proj | None | at 'mlp.c_proj'""",
    )


def test_groups_glm4v() -> None:
    assert_expected_inline(
        describe_family("glm4v"),
        """\
layers 0, 1
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
post_attention_layernorm -> mlp.gate_up_proj | weight | at 'mlp'
mlp.gate_up_proj -> mlp.down_proj | rows offset 128 width 1 repeats 1 | at 'mlp.down_proj'""",
    )


def test_groups_phi() -> None:
    assert_expected_inline(
        describe_family("phi"),
        """\
layers 0, 1
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, mlp.fc1 | weight | at ''
self_attn.v_proj -> self_attn.dense | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.dense'
None -> mlp.fc2 | None | at 'mlp.fc2'""",
    )


def test_groups_gemma3n_text() -> None:
    assert_expected_inline(
        describe_family("gemma3n_text"),
        """\
layers 0
altup.router_norm -> altup.modality_router | weight | at 'altup.modality_router'
None -> altup.prediction_coefs | None | at 'altup.prediction_coefs'
None -> laurel.linear_left, self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | None | at ''
laurel.linear_left -> laurel.linear_right | rows offset 0 width 1 repeats 1 | at 'laurel.linear_right'
None -> self_attn.o_proj | None | at 'self_attn.o_proj'
pre_feedforward_layernorm -> mlp.gate_proj, mlp.up_proj | weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'
None -> altup.correction_coefs | None | at 'altup.correction_coefs'
None -> per_layer_input_gate | None | at 'per_layer_input_gate'
None -> per_layer_projection | None | at 'per_layer_projection'
layers 1
altup.router_norm -> altup.modality_router | weight | at 'altup.modality_router'
None -> altup.prediction_coefs | None | at 'altup.prediction_coefs'
None -> laurel.linear_left, self_attn.q_proj | None | at ''
laurel.linear_left -> laurel.linear_right | rows offset 0 width 1 repeats 1 | at 'laurel.linear_right'
None -> self_attn.o_proj | None | at 'self_attn.o_proj'
pre_feedforward_layernorm -> mlp.gate_proj, mlp.up_proj | weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'
None -> altup.correction_coefs | None | at 'altup.correction_coefs'
None -> per_layer_input_gate | None | at 'per_layer_input_gate'
None -> per_layer_projection | None | at 'per_layer_projection'""",
    )


def test_groups_gemma4_shared_kv() -> None:
    assert_expected_inline(
        describe_family("gemma4_shared_kv"),
        """\
layers 0
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight | at 'self_attn'
None -> self_attn.o_proj | None | at 'self_attn.o_proj'
pre_feedforward_layernorm -> mlp.gate_proj, mlp.up_proj | weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'
None -> per_layer_input_gate | None | at 'per_layer_input_gate'
None -> per_layer_projection | None | at 'per_layer_projection'
layers 1
input_layernorm -> self_attn.q_proj | weight | at 'self_attn'
None -> self_attn.o_proj | None | at 'self_attn.o_proj'
pre_feedforward_layernorm -> mlp.gate_proj, mlp.up_proj | weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'
None -> per_layer_input_gate | None | at 'per_layer_input_gate'
None -> per_layer_projection | None | at 'per_layer_projection'""",
    )


def test_groups_gemma4_k_eq_v() -> None:
    assert_expected_inline(
        describe_family("gemma4_k_eq_v"),
        """\
layers 0
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight | at 'self_attn'
None -> self_attn.o_proj | None | at 'self_attn.o_proj'
pre_feedforward_layernorm -> mlp.gate_proj, mlp.up_proj | weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'
layers 1
input_layernorm -> self_attn.q_proj, self_attn.k_proj | weight | at 'self_attn'
None -> self_attn.o_proj | None | at 'self_attn.o_proj'
pre_feedforward_layernorm -> mlp.gate_proj, mlp.up_proj | weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'""",
    )


def test_groups_lfm2_vl() -> None:
    assert_expected_inline(
        describe_family("lfm2_vl"),
        """\
layers 0
operator_norm -> conv.in_proj | weight | at 'conv'
conv.in_proj -> conv.out_proj | rows offset 128 width 1 repeats 1 mixes tokens | at 'conv.out_proj'
ffn_norm -> feed_forward.w1, feed_forward.w3 | weight | at 'feed_forward'
feed_forward.w3 -> feed_forward.w2 | rows offset 0 width 1 repeats 1 | at 'feed_forward.w2'
layers 1
operator_norm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight | at 'self_attn'
self_attn.v_proj -> self_attn.out_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.out_proj'
ffn_norm -> feed_forward.w1, feed_forward.w3 | weight | at 'feed_forward'
feed_forward.w3 -> feed_forward.w2 | rows offset 0 width 1 repeats 1 | at 'feed_forward.w2'""",
    )


def test_groups_qwen3_5() -> None:
    assert_expected_inline(
        describe_family("qwen3_5"),
        """\
layers 0
input_layernorm -> linear_attn.in_proj_qkv, linear_attn.in_proj_z, linear_attn.in_proj_b, \
linear_attn.in_proj_a | one_plus_weight | at 'linear_attn'
None -> linear_attn.out_proj | None | at 'linear_attn.out_proj'
post_attention_layernorm -> mlp.gate_proj, mlp.up_proj | one_plus_weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'
layers 1
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | one_plus_weight | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
post_attention_layernorm -> mlp.gate_proj, mlp.up_proj | one_plus_weight | at 'mlp'
mlp.up_proj -> mlp.down_proj | rows offset 0 width 1 repeats 1 | at 'mlp.down_proj'""",
    )


def test_groups_kosmos2() -> None:
    assert_expected_inline(
        describe_family("kosmos2"),
        """\
layers 0, 1
self_attn_layer_norm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight | at 'self_attn'
self_attn.inner_attn_ln -> self_attn.out_proj | weight | at 'self_attn.out_proj'
final_layer_norm -> ffn.fc1 | weight | at 'ffn'
ffn.ffn_layernorm -> ffn.fc2 | weight | at 'ffn.fc2'""",
    )


def test_groups_falcon() -> None:
    assert_expected_inline(
        describe_family("falcon"),
        """\
layers 0, 1
input_layernorm -> self_attention.query_key_value, mlp.dense_h_to_4h | weight | at ''
self_attention.query_key_value -> self_attention.dense | rows offset 80 width 16 repeats 4 mixes tokens \
| at 'self_attention.dense'
None -> mlp.dense_4h_to_h | None | at 'mlp.dense_4h_to_h'""",
    )


def test_groups_fuyu() -> None:
    assert_expected_inline(
        describe_family("fuyu"),
        """\
layers 0, 1
input_layernorm -> self_attn.query_key_value | weight | at 'self_attn'
None -> self_attn.dense | None | at 'self_attn.dense'
post_attention_layernorm -> mlp.dense_h_to_4h | weight | at 'mlp'
None -> mlp.dense_4h_to_h | None | at 'mlp.dense_4h_to_h'""",
    )


def test_groups_nemotron() -> None:
    assert_expected_inline(
        describe_family("nemotron"),
        """\
layers 0, 1
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | one_plus_weight | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
post_attention_layernorm -> mlp.up_proj | one_plus_weight | at 'mlp'
None -> mlp.down_proj | None | at 'mlp.down_proj'""",
    )


def test_groups_mamba() -> None:
    assert_expected_inline(
        describe_family("mamba"),
        """\
layers 0, 1
norm -> mixer.in_proj | weight | at 'mixer'
None -> mixer.x_proj | None | at 'mixer.x_proj'
None -> mixer.out_proj | None | at 'mixer.out_proj'""",
    )


def test_groups_cosmos3_edge() -> None:
    assert_expected_inline(
        describe_family("cosmos3_edge"),
        """\
layers 0, 1
input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj | weight | at 'self_attn'
self_attn.v_proj -> self_attn.o_proj | rows offset 0 width 16 repeats 2 mixes tokens | at 'self_attn.o_proj'
post_attention_layernorm -> mlp.fc1 | weight | at 'mlp'
None -> mlp.fc2 | None | at 'mlp.fc2'""",
    )
