"""Weights that are fitted to their inputs, on whole models: which inputs, and how much a token weighs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import routing
from models import build_batch, build_model, model_inputs, pad_right
from torch import Tensor, nn

from mbq_ao import from_pretrained, mbq_config, quantize_, save_pretrained
from mbq_ao.calibration import fitting
from mbq_ao.calibration.error_compensation import GridOf, compensate
from mbq_ao.calibration.mbq import calibrate
from mbq_ao.calibration.refinement import refine
from mbq_ao.calibration.report import CalibrationReport
from mbq_ao.calibration.settings import RECIPES, Recipe
from mbq_ao.int3_tensor import MBQInt3Tensor
from mbq_ao.packed_weight import PackedWeight
from mbq_ao.quant_primitives import choose_qparams_affine, choose_scale_symmetric

PLAIN = replace(RECIPES["mbq"], scaled=False)
COMPENSATED = replace(PLAIN, compensated=True)


def grid_of(precision: str, group_size: int) -> GridOf:
    if precision == "w3a16":
        return GridOf(partial(choose_qparams_affine, group_size=group_size), 3, group_size)
    return GridOf(lambda w: (choose_scale_symmetric(w, group_size=group_size),), 4, group_size)


def calib_data(family: str, number: int = 4) -> list[dict[str, Any]]:
    """Enough tokens for the tiny models' channels."""
    return [build_batch(family, 40, batch_size=2, seed=i) for i in range(number)]


def quantized(model: nn.Module, data: list[dict[str, Any]], recipe: Recipe, **options: Any) -> CalibrationReport:
    config = mbq_config(data, **{"recipe": "mbq", "n_grid": 3, "group_size": 32, **options})
    plan, report = calibrate(model, data, replace(config.settings(), recipe=recipe), progress=False)
    plan.apply(model)
    return report


def read_by(model: nn.Module, names: list[str], batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What the linears read, (tokens, in_features) each, over all batches."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def record(name: str, module: nn.Module, args: Any) -> None:
        seen[name].append(args[0].flatten(0, -2))

    handles = [model.get_submodule(n).register_forward_pre_hook(partial(record, n)) for n in names]
    with torch.no_grad():
        for batch in batches:
            model(**model_inputs(batch))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(x) for name, x in seen.items()}


def packed_linears(model: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, PackedWeight):
            yield name, module.weight


def sensitivities(family: str, data: list[dict[str, Any]], **options: Any) -> dict[str, float | None]:
    """Of each linear, from a calibration that scales channels and reports on it."""
    report = quantized(build_model(family), data, RECIPES["mbq"], **options)
    return {f"{g.block}.{name}": g.sensitivity for g in report.groups for name in g.linears}


@pytest.mark.parametrize(
    "change",
    [*({"sensitivity_power": p} for p in (0, 1, 2)), {"discounts_chance": True}, {"refining_rounds": 2}],
    ids=str,
)
@pytest.mark.parametrize("precision", ["w3a16", "w4a8"])
def test_every_linear_is_fitted_to_what_it_reads_at_serving_time(precision: Any, change: dict[str, Any]) -> None:
    """Each weight is what compensation makes of the inputs that the quantized model itself gives to it."""
    model, data = build_model("llava"), calib_data("llava")
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    recipe = replace(COMPENSATED, **change)
    report = quantized(model, data, recipe, precision=precision)
    assert report.num_linears == 14
    of_linear = sensitivities("llava", data, precision=precision)
    vision = torch.cat([(batch["input_ids"] == model.config.image_token_id).flatten() for batch in data])
    inputs = read_by(model, [name for name, _ in packed_linears(model)], data)
    assert len(inputs) == 14
    losses = {f"{fit.block}.{name}": (fit.loss_rtn, fit.loss) for fit in report.fits for name in fit.linears[:1]}
    alone = {f"{fit.block}.{fit.linears[0]}" for fit in report.fits if len(fit.linears) == 1}
    for name, weight in packed_linears(model):
        r = of_linear[name]
        assert r is not None and r != 1
        x = inputs[name] * torch.where(vision, r**recipe.sensitivity_power, 1.0).sqrt()[:, None]
        hessian = x.T @ x
        if recipe.discounts_chance:
            hessian.diagonal().mul_(1 + x.shape[1] / x.shape[0])
        w, grid = original[f"{name}.weight"], grid_of(precision, weight.group_size)
        expected, found = compensate(w, hessian.clone(), grid)
        if recipe.refining_rounds:
            expected, _ = refine(w, expected, found, hessian, grid, recipe.refining_rounds)
        # Where a value lies between two points, the last bit decides, and all that follows in its row differs.
        assert ((weight.dequantize() - expected).abs() < 1e-5).float().mean() > 0.97, name
        if name in alone:
            lost = [w - q for q in (type(weight).from_hp(w, weight.group_size).dequantize(), weight.dequantize())]
            assert losses[name] == pytest.approx([float((e @ hessian * e).sum()) for e in lost], rel=1e-3)


def test_drift_of_the_inputs_is_made_up_for() -> None:
    """What the last block's linears compute of the quantized model's inputs, against the plain model's of its own."""
    data = calib_data("llava", 8)
    original = build_model("llava")
    names = [
        name
        for name, m in original.model.language_model.named_modules(prefix="model.language_model")
        if isinstance(m, nn.Linear) and ".layers.1." in name
    ]
    own = read_by(original, names, data)
    errors: dict[bool, list[float]] = {}
    for corrects_drift in (False, True):
        model = build_model("llava")
        quantized(model, data, replace(COMPENSATED, sensitivity_power=0, corrects_drift=corrects_drift))
        seen = read_by(model, names, data)
        linears = [(seen[n], model.get_submodule(n).weight, own[n], original.get_submodule(n).weight) for n in names]
        with torch.no_grad():
            errors[corrects_drift] = [float((x @ w.dequantize().T - x0 @ w0.T).norm()) for x, w, x0, w0 in linears]
    gains = [with_ / without for with_, without in zip(errors[True], errors[False], strict=True)]
    assert sum(gains) / len(gains) < 0.95, gains


def test_drift_of_the_residual_is_made_up_for() -> None:
    """What the decoder's layers hand on, on the calibration data."""
    data = calib_data("llava", 8)
    norm = "model.language_model.norm"
    expected = read_by(build_model("llava"), [norm], data)[norm]
    errors = []
    for corrects_residual in (False, True):
        model = build_model("llava")
        quantized(model, data, replace(RECIPES["best"], corrects_residual=corrects_residual))
        errors.append(float((read_by(model, [norm], data)[norm] - expected).norm()))
    assert errors[1] < 0.97 * errors[0], errors


def test_the_drift_of_few_outputs_is_that_of_many_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linears with fewer outputs than inputs keep what the drift does to the outputs: the same weights, less memory."""
    data, weights, widths = calib_data("llava"), [], []
    moments = fitting._moments

    def counted(inputs: Any, *more: Any) -> Any:
        widths.append(inputs[0][1].shape[1] < inputs[0][0].shape[1])
        return moments(inputs, *more)

    monkeypatch.setattr(fitting, "_moments", counted)
    for narrowed in (fitting._narrowed, lambda inputs, *_: (inputs, False)):
        monkeypatch.setattr(fitting, "_narrowed", narrowed)
        model = build_model("llava")
        quantized(model, data, replace(RECIPES["best"], corrects_residual=False, scaled=True))
        weights.append({name: weight.dequantize() for name, weight in packed_linears(model)})
    assert any(widths[: len(widths) // 2]) and not any(widths[len(widths) // 2 :])
    for name, weight in weights[0].items():
        assert ((weight - weights[1][name]).abs() < 1e-5).float().mean() > 0.97, name


def test_padding_does_not_count() -> None:
    long, short = build_batch("llama_mha", 40), build_batch("llama_mha", 30, seed=2)
    padded = pad_right(short, 40)
    together = {key: torch.cat([long[key], padded[key]]) for key in padded}
    weights = []
    for data in ([long, short], [together]):
        model = build_model("llama_mha")
        quantized(model, data, COMPENSATED)
        weights.append({name: weight.dequantize() for name, weight in packed_linears(model)})
    for name, weight in weights[0].items():
        assert ((weight - weights[1][name]).abs() < 1e-5).float().mean() > 0.97, name


def test_experts_whose_tokens_cannot_be_told_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the unquantized run alone, say because its router gives all experts of a token the same weight."""
    model, data = build_model("qwen3_moe"), calib_data("qwen3_moe")
    original = model.get_submodule("model.layers.1.mlp.experts").gate_up_proj.detach().clone()
    rows, calls = fitting.expert_rows, iter(range(1000))
    monkeypatch.setattr(fitting, "expert_rows", lambda *a, **k: rows(*a, **k) if next(calls) % 2 == 0 else None)
    report = quantized(model, data, RECIPES["best"])
    found = model.get_submodule("model.layers.1.mlp.experts").gate_up_proj
    assert torch.equal(found.dequantize(), MBQInt3Tensor.fake_quantize(original, found.group_size))
    assert "model.layers.1.mlp.experts.gate_up_proj" in report.not_scaled
    assert "model.layers.1.self_attn.q_proj" in report.fitted


def test_experts_are_fitted_to_their_own_tokens() -> None:
    model, data = build_model("qwen3_moe"), calib_data("qwen3_moe", 6)
    experts = "model.layers.1.mlp.experts"
    original = model.get_submodule(experts).gate_up_proj.detach().clone()
    quantized(model, data, replace(COMPENSATED, sensitivity_power=0))
    x = read_by(model, [experts], data)[experts]
    mask = torch.cat([routing(model, batch) for batch in data]) != 0
    found = model.get_submodule(experts).gate_up_proj
    assert isinstance(found, PackedWeight) and mask.any(0).sum() > 1
    for e, weight in enumerate(original):
        rounded = found[e].dequantize()
        if mask[:, e].any():
            own = x[mask[:, e]]
            expected, _ = compensate(weight, own.T @ own, grid_of("w3a16", found.group_size))
        else:
            expected = MBQInt3Tensor.fake_quantize(weight, found.group_size)
        assert ((rounded - expected).abs() < 1e-5).float().mean() > 0.97, e


@pytest.mark.parametrize(("recipe", "balance"), [("best", None), ("gptq", True)])
def test_by_name(tmp_path: Path, recipe: Any, balance: bool | None) -> None:
    """The report, and a checkpoint of it."""
    model, data = build_model("llava"), calib_data("llava")
    report = quantize_(model, mbq_config(data, recipe=recipe, balance=balance, group_size=32), progress=False)
    assert report is not None and len(report.fitted) == report.num_linears == 14 and not report.not_scaled
    assert [len(fit.linears) for fit in report.fits] == [3, 1, 2, 1] * 2
    assert all(0 < fit.loss < fit.loss_rtn for fit in report.fits)
    assert report.settings["balance"] is bool(balance)
    for fit in report.fits:
        assert (fit.sensitivity is not None) is (fit.sensitivity_raw is not None) is bool(balance)
    assert str(report).count("\n") == 2 + 8 + 1 and "14 weights fitted to their inputs" in str(report)
    save_pretrained(model, tmp_path / "m")
    assert CalibrationReport.from_json(tmp_path / "m" / "mbq_report.json").fits == report.fits
    again = from_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(**model_inputs(data[0])).logits, model(**model_inputs(data[0])).logits)
