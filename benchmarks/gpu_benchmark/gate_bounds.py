"""What the rules of both precisions share: rounding, and an error as a part of what is allowed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def rms(t: Tensor) -> Tensor:
    return t.square().mean().sqrt()


def parts_of(error: Tensor, bound: Tensor, rms_bound: Tensor) -> dict[str, Any]:
    """The largest error and their rms as parts of what is allowed. A NaN anywhere makes both NaN: NaN <= 1 is false."""
    largest, mean = float((error.abs() / bound).amax()), float(rms(error) / rms_bound)
    return {"worst": largest, "rms": mean, "ok": largest <= 1 and mean <= 1}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """As torch.equal, but NaN is equal to itself."""
    integers = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.view(integers), b.view(integers))
