"""export_decoder: the program of a decoder, as exported, saved and loaded, and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import build_model, snapshot
from torch import Tensor, nn
from torchao.quantization import quantize_ as torchao_quantize_

from mbq_ao import Int3WeightOnlyConfig, Int8DynamicActivationInt4WeightMBQConfig, export_decoder

LINEAR_OPS = [torch.ops.mbq_ao.int3_linear.default, torch.ops.mbq_ao.w4a8_linear.default]
PROMPT, LENGTH = 7, 10


def rounded(family: str, **changes: object) -> nn.Module:
    """Attention in W3A16, the rest of a layer in W4A8."""
    model = build_model(family, **changes)
    for config, within in (
        (Int3WeightOnlyConfig(group_size=32), ".self_attn."),
        (Int8DynamicActivationInt4WeightMBQConfig(), ".mlp."),
    ):
        torchao_quantize_(
            model,
            config,
            lambda m, fqn, within=within: isinstance(m, nn.Linear) and ".layers." in fqn and within in fqn,
        )
    return model


def inputs(model: nn.Module) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 100, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH)[None]
    if "Qwen" in type(model).__name__:
        positions = torch.stack([positions, positions // 2, positions % 3])  # as where there is an image
    return model.get_input_embeddings()(ids), positions


@torch.no_grad()
def decoded(program: Callable[..., Tensor], embeds: Tensor, positions: Tensor) -> Tensor:
    """Logits of the prompt's last token, and of one token after the other."""
    logits = [program(embeds[:, :PROMPT], positions[..., :PROMPT], torch.tensor(0))]
    for i in range(PROMPT, LENGTH):
        logits.append(program(embeds[:, i : i + 1], positions[..., i : i + 1], torch.tensor(i)))
    return torch.stack(logits, 1)


@torch.no_grad()
def expected(model: nn.Module, embeds: Tensor, positions: Tensor) -> Tensor:
    return model(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits[:, PROMPT - 1 :]


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mixtral"])
def test_exported(family: str, tmp_path: Path) -> None:
    model = rounded(family, num_hidden_layers=1, layer_types=["full_attention"])
    before = snapshot(model)
    program = export_decoder(model, max_cache_len=16)
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert after.keys() == before.keys() and all(after[name] is value for name, (value, _) in before.items())
    assert model.get_decoder().config._attn_implementation == "sdpa"
    arguments = inputs(model)
    module, logits = program.module(), expected(model, *arguments)
    for _ in range(2):  # the second begins anew
        assert_close(decoded(module, *arguments), logits)
    if family == "qwen2_5_vl":
        torch.export.save(program, tmp_path / "decoder.pt2")
        assert_close(decoded(torch.export.load(tmp_path / "decoder.pt2").module(), *arguments), logits)
        ops = [node.target for node in program.run_decompositions().graph.nodes]
        assert [ops.count(op) for op in LINEAR_OPS] == [4, 3]


def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    model = rounded("llava", num_hidden_layers=1, layer_types=None)
    arguments = inputs(model)
    program = export_decoder(model, max_cache_len=16)
    quickly = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "decoder.pt2"), inductor_configs=quickly
    )
    loaded = torch._inductor.aoti_load_package(str(tmp_path / "decoder.pt2"))
    assert_close(decoded(loaded, *arguments), expected(model, *arguments))


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("qwen3_vl", "shows images to its layers by deepstack_visual_embeds"),
        ("paligemma", "shows images to its layers by token_type_ids"),
        ("mllama", "shows images to its layers by cross_attention_states"),
        ("mistral3", "the cache of Mistral3ForConditionalGeneration has layers of the kind StaticSlidingWindowLayer"),
    ],
)
def test_models_that_are_refused(family: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        export_decoder(build_model(family), max_cache_len=16)


def test_other_refusals() -> None:
    with pytest.raises(TypeError, match="that can generate, got Linear"):
        export_decoder(nn.Linear(2, 2), max_cache_len=16)
    model = build_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, y: torch.tanh(y) if y.dim() == 3 else y)
    with pytest.raises(ValueError, match="computes other logits than its decoder and head do"):
        export_decoder(model, max_cache_len=16)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to("meta"))
    with pytest.raises(ValueError, match=r"lm_head\.weight is offloaded"):
        export_decoder(model, max_cache_len=16)
