"""Calibrations with targets=, for the tests of what is quantized and of how the stacks are run."""

from __future__ import annotations

import functools
from typing import Any

from families import FAMILIES
from models import build_batch, build_model
from results import bits, parts_of
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mbq_ao import CalibrationReport, MBQInt3Tensor, MBQW4A8Tensor, mbq_config, quantize_

KINDS: Any = {"w3a16": MBQInt3Tensor, "w4a8": MBQW4A8Tensor}
BOTH = "decoder+vision"
LLAVA = FAMILIES["llava"]


def calib_data(family: str) -> list[dict[str, Any]]:
    return [build_batch(family, 9), build_batch(family, 12, seed=2)]


def quantized(model: nn.Module, data: list[dict[str, Any]], filter_fn: Any = None, **options: Any) -> CalibrationReport:
    device, work_dir = options.pop("device", None), options.pop("work_dir", None)
    config = mbq_config(data, **{"recipe": "mbq", "group_size": 32, "n_grid": 3, "targets": BOTH, **options})
    report = quantize_(model, config, filter_fn, device, progress=False, work_dir=work_dir)
    assert report is not None
    return report


@functools.cache
def llava(**options: Any) -> tuple[nn.Module, CalibrationReport]:
    """A quantized model that several tests look at."""
    model = build_model("llava")
    return model, quantized(model, calib_data("llava"), **options)


def state(model: nn.Module) -> dict[str, list[bytes]]:
    return {name: [bits(p).numpy().tobytes() for p in parts] for name, parts in parts_of(model).items()}


def is_quantized(value: object) -> bool:
    return isinstance(value, Tensor) and is_traceable_wrapper_subclass(value)
