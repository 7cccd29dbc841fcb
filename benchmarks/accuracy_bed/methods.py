"""What is compared: each method is a Recipe and a few settings, all through the library's own calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

from mbq_ao import mbq_config
from mbq_ao.calibration.mbq import calibrate
from mbq_ao.calibration.report import CalibrationReport
from mbq_ao.calibration.settings import RECIPES, CalibrationSettings, Fit, Recipe
from mbq_ao.quant_primitives import choose_qparams_affine, fake_quantize_affine

SCALES = RECIPES["mbq"]
PLAIN = replace(SCALES, scaled=False)


def round_by_hqq(w: Tensor, *, group_size: int, num_bits: int) -> Tensor:
    """Half-quadratic quantization (Badri and Shaji 2023), torchao's; its zero points are not whole numbers.

    Raises ValueError where the groups do not fill the rows.
    """
    if w.shape[1] % group_size:
        raise ValueError(f"HQQ needs groups that fill the rows, got groups of {group_size} for {w.shape[1]} columns")
    q, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        w, num_bits, group_size, compute_dtype=torch.float32, device=str(w.device), raw_output=True
    )
    scale, zero = (x.repeat_interleave(group_size, 1) for x in (scale, zero))
    return ((q - zero) * scale).to(w.dtype)


@dataclass(frozen=True)
class Method:
    """rounding: of weights that no recipe fits to their inputs, in groups (not of w4a8)."""

    recipe: Recipe
    settings: dict[str, Any] = field(default_factory=dict)
    rounding: Callable[..., Tensor] = fake_quantize_affine

    def can(self, precision: str) -> bool:
        return precision != "w4a8" or self.rounding is fake_quantize_affine


UNBALANCED = {"balance": False}
METHODS = {
    "RTN": Method(PLAIN, UNBALANCED),
    "HQQ": Method(PLAIN, UNBALANCED, round_by_hqq),
    "AWQ-like": Method(SCALES, {"balance": False, "loss": "mse"}),
    "SmoothQuant": Method(RECIPES["smoothquant"], UNBALANCED),
    "GPTQ": Method(RECIPES["gptq"], UNBALANCED),
    "best": Method(RECIPES["best"], UNBALANCED),
    "wGPTQ": Method(RECIPES["gptq"]),
    "MBQ paper": Method(RECIPES["paper"]),
    "MBQ": Method(SCALES),
    "SmoothQuant + GPTQ": Method(replace(RECIPES["smoothquant"], compensated=True), UNBALANCED),
    "AWQ-like + GPTQ": Method(replace(SCALES, compensated=True), {"balance": False, "loss": "mse"}),
    "MBQ + GPTQ": Method(replace(SCALES, compensated=True, sensitivity_power=0)),
    "MBQ + wGPTQ": Method(replace(SCALES, compensated=True)),
}


def _switch(text: str) -> bool:
    """Raises ValueError for anything but "on" and "off"."""
    if text not in ("on", "off"):
        raise ValueError(f'a step is "on" or "off", got {text!r}')
    return text == "on"


CHANGES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "grid": ("search_grid", _switch),
    "drift": ("corrects_drift", _switch),
    "act order": ("act_order", _switch),
    "shift": ("shift_answers", _switch),
    "floor": ("floored", _switch),
    "balance": ("balance", _switch),
    "residual": ("corrects_residual", _switch),
    "discount": ("discounts_chance", _switch),
    "rounds": ("refining_rounds", int),
    "power": ("sensitivity_power", float),
    "loss": ("loss", str),
    "distorted": ("propagate_error", _switch),
}


def method_of(name: str) -> Method:
    """One of METHODS, and after commas what of CHANGES is different in it: "GPTQ, grid, power=0.5".

    Raises ValueError for another name.
    """
    base, *changes = name.split(", ")
    if base not in METHODS or not {c.split("=")[0] for c in changes} <= CHANGES.keys():
        raise ValueError(
            f"there is no method {name!r}: it must be one of {', '.join(METHODS)}, followed by any of "
            f"{', '.join(CHANGES)}, with commas between"
        )
    method = METHODS[base]
    for change in changes:
        key, _, text = change.partition("=")
        attribute, read = CHANGES[key]
        try:
            value = {attribute: read(text or "on")}
        except ValueError as error:
            raise ValueError(f"{change!r} in {name!r}: {error}") from error
        if hasattr(method.recipe, attribute):
            method = replace(method, recipe=replace(method.recipe, **value))
        else:
            method = replace(method, settings=method.settings | value)
    return method


@dataclass(frozen=True)
class FakeQuantizer:
    """Weights of `num_bits` on an asymmetric grid that stay plain tensors: the packed tensor's values, served fast."""

    num_bits: int
    group_size: int
    rounding: Callable[..., Tensor] = fake_quantize_affine

    def stand_in(self, weight: Tensor, s: Tensor | None) -> Tensor:
        if s is None:
            return self.rounding(weight, group_size=self.group_size, num_bits=self.num_bits)
        return self.rounding(weight * s, group_size=self.group_size, num_bits=self.num_bits) / s

    quantize = stand_in

    def fit(self, weights: Sequence[Tensor], s: Tensor | None, fit: Fit) -> list[Tensor]:
        w = torch.cat(list(weights)) if s is None else torch.cat(list(weights)) * s

        def choose(columns: Tensor) -> tuple[Tensor, ...]:
            return choose_qparams_affine(columns, group_size=self.group_size, num_bits=self.num_bits)

        rounded, grid = fit(w, s, choose, self.num_bits, self.group_size)
        scale, zero = (p.float().repeat_interleave(self.group_size, 1)[:, : w.shape[1]] for p in grid)
        rounded = (rounded / scale).round_().add_(zero).clamp_(0, 2**self.num_bits - 1).sub_(zero).mul_(scale)
        return list((rounded if s is None else rounded / s).split([len(x) for x in weights]))

    def while_fitting(self, fitted: Tensor) -> Tensor:
        return fitted


def settings_for(
    method: Method, precision: str, group_size: int, calib: list[dict[str, Tensor]]
) -> CalibrationSettings:
    """precision: "w3a16", "w2a16" or "w4a8" (one scale a row)."""
    config = mbq_config(calib, precision="w4a8" if precision == "w4a8" else "w3a16", recipe="mbq", **method.settings)
    settings = replace(config.settings(), recipe=method.recipe)
    if precision == "w4a8":
        return settings
    return replace(settings, quantizer=FakeQuantizer(int(precision[1]), group_size, method.rounding))


def quantize(
    model: nn.Module, method: Method, precision: str, group_size: int, calib: list[dict[str, Tensor]]
) -> CalibrationReport:
    """In place."""
    plan, report = calibrate(model, calib, settings_for(method, precision, group_size, calib), progress=False)
    plan.apply(model)
    return report
