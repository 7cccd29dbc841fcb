"""Stacks of blocks beside the decoder: how they are found, run, resumed and left alone when something goes wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from live_bytes import LiveBytes
from models import assert_unchanged, build_batch, build_model, model_inputs, snapshot
from targeting import BOTH, KINDS, LLAVA, calib_data, is_quantized, llava, quantized, state
from torch import Tensor, nn

from mbq_ao.calibration import block, mbq
from mbq_ao.calibration.capture import find_blocks
from mbq_ao.calibration.residency import computing_on
from mbq_ao.calibration.selection import linears_beside
from mbq_ao.calibration.stacks import _runs, forward_until, listed_blocks


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

    def spy(self: block.BlockCalibrator, groups: Any, *found: Any) -> None:
        distorted[self.name] = [s.hidden if s.distorted is None else s.distorted for s in self.streams]
        use(self, groups, *found)

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
