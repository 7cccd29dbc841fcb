"""Modality sensitivity against a naive oracle: transformers' own loss, weight gradients on, backward hooks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import IMAGE
from models import assert_unchanged, build_batch, build_model, float_inputs, model_inputs, pad_right, snapshot
from torch import Tensor, nn

from mbq_ao import mbq_config
from mbq_ao.calibration.batch import collect_batches
from mbq_ao.calibration.capture import find_blocks, takes
from mbq_ao.calibration.mbq import calibrate
from mbq_ao.calibration.sensitivity import floor_at_median, modality_sensitivity

COMPARED = ("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj")


def measured(model: nn.Module, data: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    batches = collect_batches(model, data)
    blocks = find_blocks(model)
    inspected = [(block, name) for block in blocks for name in COMPARED]
    return modality_sensitivity(model, blocks, inspected, batches, answer_masks=[b.answer for b in batches])


def naive(model: nn.Module, data: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """|g_vision| / |g_answer| at o_proj and down_proj, one sample at a time, every parameter with a gradient."""
    grads: dict[str, Tensor] = {}
    blocks = find_blocks(model)
    sums: dict[tuple[str, str], list[list[Tensor]]] = {}
    handles = []
    for block_name, block in blocks.items():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            full = f"{block_name}.{name}"

            def keep(module: nn.Module, grad_in: Any, grad_out: Any, full: str = full) -> None:
                grads[full] = grad_out[0]

            handles.append(block.get_submodule(name).register_full_backward_hook(keep))
    for batch in data:
        (model(**batch).loss / len(data)).backward()
        vision, answer = batch["input_ids"] == IMAGE, batch["labels"] != -100
        for block_name in blocks:
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                g = grads[f"{block_name}.{name}"]
                pair = sums.setdefault((block_name, name), [[], []])
                pair[0].append(g[vision].abs().mean())
                pair[1].append(g[answer].abs().mean())
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {key: float(torch.stack(v).mean() / torch.stack(a).mean()) for key, (v, a) in sums.items()}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_against_the_naive_computation(family: str) -> None:
    model = build_model(family)
    data = [build_batch(family, num_text=n, seed=n) for n in (8, 11)]
    ratios, expected = measured(model, data), naive(model, data)
    for (block, name), value in expected.items():
        assert ratios[block, name] == pytest.approx(value, rel=1e-5, abs=1e-9)
        # The compared module's output has the gradient of its last linear's, where nothing lies between.
        assert ratios[block, name.partition(".")[0]] == pytest.approx(value, rel=1e-5, abs=1e-9)
    assert max(expected.values()) > 0


def test_samples_of_one_padded_batch_count_as_they_do_alone() -> None:
    model = build_model("llama")
    alone = [build_batch("llama", num_text=n, seed=n) for n in (8, 12)]
    padded = [pad_right(batch, 12) for batch in alone]
    together = {key: torch.cat([b[key] for b in padded]) for key in padded[0]}
    for batch in (*alone, together):
        vision = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        vision[:, 1:4] = True
        batch["vision_mask"] = vision
    one_by_one, at_once = measured(model, alone), measured(model, [together])
    assert at_once == {key: pytest.approx(value, rel=1e-4, abs=1e-9) for key, value in one_by_one.items()}


def test_a_sample_without_an_image_has_no_part() -> None:
    model, one = build_model("llama"), build_batch("llama")
    one["vision_mask"] = torch.zeros_like(one["input_ids"], dtype=torch.bool)
    one["vision_mask"][:, 1:4] = True
    two = {key: value.repeat(2, 1) for key, value in one.items()}  # the same text twice, its image once
    two["vision_mask"][1] = False
    alone, both = measured(model, [one]), measured(model, [two])
    other = build_batch("llama", num_text=20, seed=1)  # whose answers have other gradients
    other["vision_mask"] = torch.zeros_like(other["input_ids"], dtype=torch.bool)
    for found in (both, measured(model, [one, other])):
        assert found == {key: pytest.approx(value, rel=1e-4, abs=1e-9) for key, value in alone.items()}
    assert max(alone.values()) > 0


def test_logits_are_computed_only_where_an_answer_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build_model("llava"), [build_batch("llava")]
    assert takes(model, "logits_to_keep")
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    few = measured(model, data)
    assert sizes == [3]  # three answer tokens
    forward = type(model).forward

    def without(self: nn.Module, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        return forward(self, input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask)

    monkeypatch.setattr(type(model), "forward", without)
    everywhere = measured(model, data)
    handle.remove()
    assert sizes[1] == data[0]["input_ids"].shape[1]
    assert everywhere == {key: pytest.approx(value, rel=1e-5, abs=1e-9) for key, value in few.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    data = [build_batch("llava")]
    exact = measured(build_model("llava"), data)
    rough = measured(build_model("llava", dtype), [float_inputs(batch, dtype) for batch in data])
    assert rough == {key: pytest.approx(value, rel=0.2, abs=1e-6) for key, value in exact.items()}


def test_small_gradients_do_not_vanish_in_float16() -> None:
    """Below 6e-8 a half-precision number is 0; the loss is scaled up so that such gradients keep their ratio."""
    models = {dtype: build_model("llava", dtype) for dtype in (torch.float32, torch.float16)}
    for model in models.values():
        model.lm_head.weight.detach().mul_(2.0**-19)
    data = [build_batch("llava")]
    exact = measured(models[torch.float32], data)
    rough = measured(models[torch.float16], [float_inputs(batch, torch.float16) for batch in data])
    assert rough == {key: pytest.approx(value, rel=0.2, abs=1e-6) for key, value in exact.items()}


def test_nothing_is_left_behind_even_by_an_exception() -> None:
    model = build_model("llava")
    model.lm_head.weight.requires_grad_(False)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    before = snapshot(model)
    measured(model, [build_batch("llava")])
    assert_unchanged(model, before)
    handle = model.lm_head.register_forward_hook(lambda *args: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        measured(model, [build_batch("llava")])
    handle.remove()
    assert_unchanged(model, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable


def test_gradients_that_are_not_finite_are_named() -> None:
    model = build_model("llava")

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * float("nan")

    handle = model.lm_head.register_forward_hook(lambda module, args, output: Broken.apply(output))
    with pytest.raises(ValueError, match=r"NaN or inf in the gradient at model.language_model.layers.1"):
        measured(model, [build_batch("llava")])
    handle.remove()


def test_the_floor_is_the_median_over_the_blocks_of_each_module() -> None:
    raw = {("0", "attn"): 1.0, ("1", "attn"): 0.4, ("2", "attn"): 0.2, ("3", "attn"): 0.0, ("0", "mlp"): 0.1}
    assert floor_at_median(raw) == {
        ("0", "attn"): 1.0,
        ("1", "attn"): 0.4,
        ("2", "attn"): pytest.approx(0.3),
        ("3", "attn"): pytest.approx(0.3),
        ("0", "mlp"): 0.1,
    }


@pytest.mark.parametrize("floored", [True, False])
def test_whether_r_is_raised_to_the_floor_is_the_recipes_choice(floored: bool) -> None:
    data = [build_batch("llava")]
    settings = mbq_config(data, group_size=32, recipe="mbq", n_grid=1).settings()
    settings = replace(settings, recipe=replace(settings.recipe, floored=floored))
    _, report = calibrate(build_model("llava"), data, settings, progress=False)
    found = [(group.sensitivity, group.sensitivity_raw) for group in report.groups]
    assert len(found) == 8 and all(r is not None and raw is not None and r >= raw for r, raw in found)
    assert any(r > raw for r, raw in found) == floored


def test_several_hidden_states_a_token() -> None:
    """Gemma 3n's layers carry (A, B, T, C): the gradient at a layer's output is the mean over the A of each token."""
    model, batch = build_model("gemma3n_text"), build_batch("gemma3n_text", batch_size=2)
    batch["vision_mask"] = torch.zeros_like(batch["labels"], dtype=torch.bool)
    batch["vision_mask"][:, 2:5] = True
    (collected,) = collect_batches(model, [batch])
    blocks = find_blocks(model)
    first = next(iter(blocks))
    found = modality_sensitivity(model, blocks, [(first, "")], [collected], answer_masks=[collected.answer])

    grads: list[Tensor] = []
    handle = blocks[first].register_forward_hook(lambda m, a, y: y.register_hook(grads.append) and None)
    logits = model(**model_inputs(batch)).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    (losses.view(2, -1).sum(1) / 3).sum().backward()
    handle.remove()
    per_token = grads[0].abs().mean((0, 3))
    assert grads[0].ndim == 4
    expected = per_token[batch["vision_mask"]].mean() / per_token[collected.answer].mean()
    assert found == {(first, ""): pytest.approx(expected.item(), rel=1e-4)}
