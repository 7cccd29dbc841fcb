"""Whatever interrupts calibration, and when it is done: what it does not quantize is as it was."""

from collections.abc import Callable
from typing import Any

import pytest
from models import assert_unchanged, build_batch, snapshot
from torch import nn

from mbq_ao import MBQInt3Tensor, mbq_config, quantize_
from mbq_ao.calibration import mbq, sensitivity
from mbq_ao.quantize import W3A16Quantizer, W4A8Quantizer


def quantized(model: nn.Module) -> bool:
    return any(isinstance(p, MBQInt3Tensor) for p in model.parameters())


def interrupting(model: nn.Module, at_call: int) -> Callable[..., Any]:
    calls = iter(range(10**9))

    def hook(module: nn.Module, args: Any) -> None:
        if next(calls) == at_call:
            raise KeyboardInterrupt

    return hook


# In the capture, the sensitivity pass, the search of the second block (twice), and the check of the logits (twice).
@pytest.mark.parametrize("precision", ["w3a16", "w4a8"])
@pytest.mark.parametrize("at_call", [0, 1, 2, 5, 6, 7])
def test_interrupted(model: nn.Module, at_call: int, precision: Any) -> None:
    handle = model.get_decoder().layers[1].register_forward_pre_hook(interrupting(model, at_call))
    before = snapshot(model)
    config = mbq_config([build_batch("llava")], precision=precision, group_size=32, n_grid=2, recipe="mbq")
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, config, progress=False)
    handle.remove()
    assert_unchanged(model, before)
    assert all(not m.training for m in model.modules())


# The first search, the plan of the first block, and that of the last one.
@pytest.mark.parametrize("at_call", [0, 14, 41])
@pytest.mark.parametrize(("precision", "quantizer"), [("w3a16", W3A16Quantizer), ("w4a8", W4A8Quantizer)])
def test_a_quantizer_that_fails(
    model: nn.Module, precision: Any, quantizer: Any, at_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(10**9))
    before = snapshot(model)

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if next(calls) == at_call:
                raise RuntimeError("CUDA out of memory")
            return original(*args)

        return call

    for name in ("stand_in", "quantize"):
        monkeypatch.setattr(quantizer, name, failing(getattr(quantizer, name)))
    config = mbq_config([build_batch("llava")], precision=precision, group_size=32, n_grid=2, recipe="mbq")
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        quantize_(model, config, progress=False)
    assert_unchanged(model, before)


def test_interrupted_while_the_plan_is_applied(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10**9))
    parameter = nn.Parameter

    def interrupting_parameter(*args: Any, **kwargs: Any) -> nn.Parameter:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return parameter(*args, **kwargs)

    before = snapshot(model)
    plan, _ = mbq.calibrate(
        model, [build_batch("llava")], mbq_config([], group_size=32, n_grid=2, recipe="mbq").settings(), progress=False
    )
    assert_unchanged(model, before)
    with monkeypatch.context() as patch:
        patch.setattr(mbq.nn, "Parameter", interrupting_parameter)
        with pytest.raises(KeyboardInterrupt):
            plan.apply(model)
    assert next(calls) == 6
    assert_unchanged(model, before)
    plan.apply(model)
    assert quantized(model)


def test_a_move_that_fails_leaves_nothing_quantized(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(model)
    model_to = nn.Module.to

    def failing(self: nn.Module, *args: Any) -> nn.Module:
        if self is not model:
            return model_to(self, *args)
        for parameter in list(self.parameters())[:3]:
            parameter.data = parameter.data.double()  # a part of the model has moved by then
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(nn.Module, "to", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        quantize_(
            model,
            mbq_config([build_batch("llava")], group_size=32, n_grid=2, recipe="mbq"),
            device="cpu",
            progress=False,
        )
    monkeypatch.undo()
    assert_unchanged(model, before)


def test_interrupted_before_the_sensitivity_pass_has_begun(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clean-up must not stumble over blocks that were not prepared yet."""

    def interrupting_partial(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    before = snapshot(model)
    trainable = [p.requires_grad for p in model.parameters()]
    monkeypatch.setattr(sensitivity, "partial", interrupting_partial)
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, mbq_config([build_batch("llava")], group_size=32, n_grid=2, recipe="mbq"), progress=False)
    assert_unchanged(model, before)
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_interrupted_while_switching_to_evaluation(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model.train()
    original = type(model).eval

    def interrupting_eval(self: nn.Module) -> nn.Module:
        original(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "eval", interrupting_eval)
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, mbq_config([build_batch("llava")], group_size=32, n_grid=2, recipe="mbq"), progress=False)
    assert all(module.training for module in model.modules())


def test_training_mode_is_restored(model: nn.Module) -> None:
    model.train()
    model.get_decoder().layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    quantize_(model, mbq_config([build_batch("llava")], group_size=32, n_grid=2, recipe="mbq"), progress=False)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_parameters_stay_trainable_or_frozen(model: nn.Module) -> None:
    layers = model.get_decoder().layers
    layers[0].input_layernorm.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    quantize_(model, mbq_config([build_batch("llava")], group_size=32, n_grid=2, recipe="mbq"), progress=False)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (before[name] and not isinstance(parameter, MBQInt3Tensor)), name
    assert layers[1].input_layernorm.weight.requires_grad
