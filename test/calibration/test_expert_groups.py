"""The scale groups of mixtures of experts, found by experiment."""

from __future__ import annotations

import re

import pytest
from expecttest import assert_expected_inline
from models import build_batch, build_model
from test_family_groups import describe

from mbq_ao.calibration.batch import collect_batches
from mbq_ao.calibration.capture import capture_streams, find_blocks
from mbq_ao.calibration.experts import experts_as_linears
from mbq_ao.calibration.fold import ScaleGroup
from mbq_ao.calibration.scale_groups import BlockProber

pytestmark = pytest.mark.filterwarnings("ignore:no vision token found")


def describe_block(family: str) -> str:
    """The groups behind attention in the last block. *: all experts; by: where the sensitivity is measured."""
    model = build_model(family)
    blocks, batches = find_blocks(model), collect_batches(model, [build_batch(family, 12)])
    with experts_as_linears(model, blocks, batches, None):
        (stream,) = capture_streams(model, blocks, batches)
        for index, layer in enumerate(blocks.values()):
            call = stream.call(index, stream.between(index, stream.hidden))
            stream.hidden = call.run(layer)
        groups = [g for g in BlockProber(layer, call).find_all() if "self_attn" not in g.linears[0]]
    return "\n".join(dict.fromkeys(map(shown, groups)))


def shown(group: ScaleGroup) -> str:
    text = describe(group) + (f" by {group.sensitivity_at!r}" if group.sensitivity_at else "")
    every = re.sub(r"proj\.0(, \S+proj\.\d)+", "proj.*", text)
    return re.sub(r"(mlp|feed_forward)\.|_proj|post_attention_layer", "", re.sub(r"proj\.\d", "proj.*", every))


def test_qwen3_vl_moe() -> None:
    assert_expected_inline(
        describe_block("qwen3_vl_moe"),
        """\
norm -> gate, experts.gate_up.* | weight | at 'mlp'
experts.gate_up.* -> experts.down.* | rows offset 32 width 1 repeats 1 | at 'experts.down.*' by 'experts'""",
    )


def test_llama4() -> None:
    assert_expected_inline(
        describe_block("llama4"),
        """\
norm -> router, shared_expert.gate, shared_expert.up, experts.gate_up.* | weight | at 'feed_forward'
experts.gate_up.* -> experts.down.* | rows offset 32 width 1 repeats 1 | at 'experts.down.*' by 'feed_forward'
shared_expert.up -> shared_expert.down | rows offset 0 width 1 repeats 1 | at 'shared_expert.down'""",
    )


def test_glm4v_moe() -> None:
    assert_expected_inline(
        describe_block("glm4v_moe"),
        """\
norm -> gate, shared_experts.gate, shared_experts.up, experts.gate_up.* | weight | at 'mlp'
experts.gate_up.* -> experts.down.* | rows offset 32 width 1 repeats 1 | at 'experts.down.*' by 'experts'
shared_experts.up -> shared_experts.down | rows offset 0 width 1 repeats 1 | at 'shared_experts.down'""",
    )


def test_mixtral() -> None:
    assert_expected_inline(
        describe_block("mixtral"),
        """\
norm -> gate, experts.gate_up.* | weight | at 'mlp'
experts.gate_up.* -> experts.down.* | rows offset 32 width 1 repeats 1 | at 'experts.down.*' by 'experts'""",
    )


def test_qwen3_moe() -> None:
    assert_expected_inline(
        describe_block("qwen3_moe"),
        """\
norm -> gate, experts.gate_up.* | weight | at 'mlp'
experts.gate_up.* -> experts.down.* | rows offset 32 width 1 repeats 1 | at 'experts.down.*' by 'experts'""",
    )


def test_qwen2_moe() -> None:
    assert_expected_inline(
        describe_block("qwen2_moe"),
        """\
norm -> shared_expert.gate, shared_expert.up, gate, shared_expert_gate, experts.gate_up.* | weight | at 'mlp'
shared_expert.up -> shared_expert.down | rows offset 0 width 1 repeats 1 | at 'shared_expert.down'
experts.gate_up.* -> experts.down.* | rows offset 32 width 1 repeats 1 | at 'experts.down.*' by 'experts'""",
    )


def test_gpt_oss() -> None:
    assert_expected_inline(
        describe_block("gpt_oss"),
        """\
norm -> router, experts.gate_up.* | weight | at 'mlp'
None -> experts.down.* | None | at 'experts.down.*' by 'experts'""",
    )


def test_deepseek_v3() -> None:
    assert_expected_inline(
        describe_block("deepseek_v3"),
        """\
norm -> gate, shared_experts.gate, shared_experts.up, experts.gate_up.* | weight | at 'mlp'
experts.gate_up.* -> experts.down.* | rows offset 32 width 1 repeats 1 | at 'experts.down.*' by 'experts'
shared_experts.up -> shared_experts.down | rows offset 0 width 1 repeats 1 | at 'shared_experts.down'""",
    )
