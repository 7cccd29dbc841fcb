"""compute_device on a second device: the same results bit for bit, no op of two devices, and its peak of memory.

The device is test/second_device, registered in a process of its own: torch knows it for good once it is.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from models import assert_unchanged, build_batch, build_model, snapshot
from second_device import counted_device
from second_device.process import process_with_device
from torch import nn

from mbq_ao import mbq_config, quantize_
from mbq_ao.calibration import scale_search
from mbq_ao.calibration.batch import collect_batches
from mbq_ao.calibration.capture import capture_streams, find_blocks
from mbq_ao.calibration.memory import estimate
from mbq_ao.calibration.residency import Placement, computing_on
from mbq_ao.calibration.sensitivity import modality_sensitivity
from mbq_ao.packed_weight import PackedWeight

_TOKENS = 46  # of a llava batch with 40 tokens of text


@pytest.fixture(scope="module")
def there() -> Iterator[Callable[..., Any]]:
    """Calls a function of this module in the process that has the device."""
    with process_with_device() as call:
        yield call


def mixing() -> str:
    x = torch.ones(3, device=counted_device().device)
    assert counted_device().live_bytes() >= 12
    try:
        return str(torch.where(x > 0, x, torch.ones(3)))
    except RuntimeError as error:
        return str(error)


def test_an_op_of_two_devices_fails(there: Callable[..., Any]) -> None:
    assert "expected all tensors to be on the same device" in there(mixing).lower()


def calibrated(
    family: str, model_there: bool, **options: Any
) -> tuple[list[dict[str, Any]], dict[str, bytes], set[str]]:
    """Records, bytes of all parameters, and where they are. Computed on the device, wherever the model lies."""
    model = build_model(family)
    data = [build_batch(family, n, seed=n) for n in (9, 12)]
    if model_there:
        model.to(counted_device().device)
    report = quantize_(
        model,
        mbq_config(data, group_size=32, **({"recipe": "mbq"} | options)),
        compute_device=None if model_there else "counted",
        progress=False,
    )
    content = {}
    for name, parameter in model.named_parameters():
        is_packed = isinstance(parameter, PackedWeight)
        tensors = [getattr(parameter, n) for n in parameter.__tensor_flatten__()[0]] if is_packed else [parameter]
        content[name] = b"".join(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    return report.records(), content, {p.device.type for p in model.parameters()}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llava", {"n_grid": 3}),
        ("qwen2_5_vl", {"n_grid": 2}),
        ("qwen3_vl", {"propagate_error": True, "precision": "w4a8", "n_grid": 3}),  # image features between layers
        ("gemma3", {"recipe": "smoothquant", "precision": "w4a8"}),  # other masks in every second layer
        ("mllama", {"recipe": "paper", "n_grid": 3}),  # cross-attention
        ("qwen3_vl_moe", {"propagate_error": True, "n_grid": 2}),
        ("qwen3_vl", {"targets": "decoder+vision", "propagate_error": True, "precision": "w4a8", "n_grid": 3}),
        ("mllama", {"targets": "decoder+vision", "n_grid": 3}),
        ("qwen3_vl_moe", {"targets": "decoder+vision", "recipe": "best", "balance": True}),
    ],
)
def test_where_the_model_lies_does_not_change_a_bit(
    family: str, options: dict[str, Any], there: Callable[..., Any]
) -> None:
    expected, actual = (there(calibrated, family, model_there, **options) for model_there in (True, False))
    assert actual[0] == expected[0]
    # Not the other way round: to this device `Module.to` brings tied weights as two.
    assert [name for name, content in actual[1].items() if expected[1][name] != content] == []
    assert (expected[2], actual[2]) == ({"counted"}, {"cpu"})


def phases(num_layers: int, num_batches: int) -> dict[str, int]:
    """Peak of the device in capture and sensitivity alone, and in all; what is left there; and what was stated."""
    scale_search.CHUNK_TOKENS = 2 * _TOKENS
    counted = counted_device()
    model = build_model("llava", num_hidden_layers=num_layers)
    data = [build_batch("llava", num_text=40, seed=i) for i in range(num_batches)]
    blocks = find_blocks(model)
    placement = Placement.of(model, counted.device)
    batches = collect_batches(model, data, placement.host)
    inspected = [(block, name) for block in blocks for name in ("self_attn", "mlp")]
    peaks = {}

    def measured(name: str, function: Callable[[], object]) -> None:
        gc.collect()
        counted.reset_peak()
        function()
        peaks[name] = counted.peak_bytes()

    with computing_on(placement.device, model, blocks.values()):
        measured("capture", partial(capture_streams, model, blocks, batches, placement))
        answers = [b.answer for b in batches]
        sensitivity = partial(modality_sensitivity, model, blocks, inspected, batches, answer_masks=answers)
        measured("sensitivity", partial(sensitivity, placement=placement))
    for name, options in {"mbq": {"n_grid": 3}, "best": {"recipe": "best"}, "gptq": {"recipe": "gptq"}}.items():
        model = build_model("llava", num_hidden_layers=num_layers)
        config = mbq_config(data, group_size=64, **({"recipe": "mbq"} | options))
        measured(name, partial(quantize_, model, config, compute_device="counted", progress=False))
    gc.collect()
    state = partial(estimate, model_of_the_same_size(num_layers), num_batches, _TOKENS, answer_tokens=3)
    stated = {f"stated for {name}": state(recipe=name).device_peak for name in ("mbq", "best", "gptq")}
    return peaks | {"left": counted.live_bytes()} | stated


def model_of_the_same_size(num_layers: int) -> nn.Module:
    with torch.device("meta"):
        return type(model := build_model("llava", num_hidden_layers=num_layers))(model.config)


def test_neither_layers_nor_samples_move_the_peak(there: Callable[..., Any]) -> None:
    few, layers, samples = (there(phases, *sizes) for sizes in ((2, 3), (6, 3), (2, 9)))
    for name in ("capture", "sensitivity", "mbq", "best", "gptq"):
        # Not a hidden state of 46 x 64 floats a layer or batch, which would be 47 and 70 kB.
        assert layers[name] <= few[name] + 1000, name
        assert samples[name] <= few[name] + 1000, name
    assert few["left"] == layers["left"] == samples["left"] == 0


def test_the_peak_is_within_the_estimate(there: Callable[..., Any]) -> None:
    found = there(phases, 2, 3)
    for recipe in ("mbq", "best", "gptq"):
        assert 0.5 * found[f"stated for {recipe}"] <= found[recipe] <= found[f"stated for {recipe}"], recipe


def interrupted() -> None:
    model = build_model("llava")
    before = snapshot(model)
    for at_call in (0, 3, 6):
        calls = iter(range(10**9))

        def hook(module: nn.Module, args: Any, at_call: int = at_call, calls: Iterator[int] = calls) -> None:
            if next(calls) == at_call:
                raise KeyboardInterrupt

        handle = model.get_decoder().layers[1].mlp.register_forward_pre_hook(hook)
        config = mbq_config([build_batch("llava")], group_size=32, n_grid=2, recipe="mbq")
        with pytest.raises(KeyboardInterrupt):
            quantize_(model, config, compute_device="counted", progress=False)
        handle.remove()
        assert_unchanged(model, before)


def test_interrupted(there: Callable[..., Any]) -> None:
    there(interrupted)


def moved() -> set[str]:
    model = build_model("llava")
    config = mbq_config([build_batch("llava")], group_size=32, n_grid=2, recipe="mbq")
    quantize_(model, config, device="counted", progress=False)
    return {p.device.type for p in (*model.parameters(), *model.buffers())}


def test_device_moves_the_model_at_the_end(there: Callable[..., Any]) -> None:
    assert there(moved) == {"counted"}
