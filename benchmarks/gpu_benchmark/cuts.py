"""Part 3: the cuts of the W4A8 kernel, at a few shapes: how good is the one that w4a8_config.py chooses?

Every cut, undivided and for few rows of x in 2 and 4 splits, and the default one. The whole op, as in kernels.py. The
gate has compiled and checked them all. Few repeats: this is for choosing, not for quoting.
"""

from __future__ import annotations

import dataclasses
import functools
import traceback
from typing import Any

import torch

from gpu_benchmark.kernels import Ours, check_result
from gpu_benchmark.measure import Clock
from gpu_benchmark.precisions import PRECISIONS
from gpu_benchmark.shapes import CUT_ROWS, CUT_SHAPES, MAX_ROWS_DECODING, in_two_passes, names
from gpu_benchmark.tasks import Context, Task

SPLITS = (1, 2, 4)
SMOKE_SHAPES = ((16, 128),)
SMOKE_ROWS = (1,)


class QuickClock(Clock):
    MIN_CALLS = 8
    MIN_REPEATS = 3
    SECONDS = 0.02


def tasks(seconds: float) -> list[Task]:
    return [Task("cuts", measure, seconds)]


def measure(context: Context) -> None:
    """A row for each matrix and number of rows. A cut that fails, fails alone; those not reached are named."""
    torch.manual_seed(0)
    clock = QuickClock(context.device)
    passes = in_two_passes(*((SMOKE_SHAPES, SMOKE_ROWS) if context.smoke else (CUT_SHAPES, CUT_ROWS)))
    plan = [(shape, [m]) for shape, rows in passes for m in rows]
    for i, ((n, k), (m,)) in enumerate(plan):
        if context.remaining() < 0:
            context.emit({"not_reached": names(plan[i:])})
            return
        layer = Ours(clock, PRECISIONS["W4A8"], n, k, torch.bfloat16)
        context.emit({"n": n, "k": k, "m": m, **measure_rows(context, layer, m)})


def measure_rows(context: Context, layer: Ours, m: int) -> dict[str, Any]:
    """Microseconds of every cut by its name, which of them is the default, and what failed."""
    from mbq_ao.kernels.launch import capability_of
    from mbq_ao.kernels.w4a8_config import cuts_for, default_w4a8_config

    x = torch.randn(m, layer.k, device=context.device).to(torch.bfloat16)
    reference = layer.reference(x)
    default = default_w4a8_config(m, layer.n, layer.k, 0, capability_of(x.device))
    cuts = [cut for cut in cuts_for(0) if cut.serves(m)][: 2 if context.smoke else None]
    splits = SPLITS if m <= MAX_ROWS_DECODING else SPLITS[:1]
    configs = [default, *(dataclasses.replace(cut, splits=s) for s in splits for cut in cuts)]
    times, failed = {}, {}
    for config in dict.fromkeys(configs):
        try:
            times[name_of(config)] = time_cut(layer, x, reference, config)
        except Exception:
            failed[name_of(config)] = traceback.format_exc(limit=-3)
    return {"default": name_of(default), "us": times, "failed": failed}


def time_cut(layer: Ours, x: torch.Tensor, reference: torch.Tensor, config: Any) -> float:
    from mbq_ao.kernels.w4a8_gemm import w4a8_linear_triton

    linear = functools.partial(w4a8_linear_triton, bias=None, act_pre_scale=None, group_size=layer.group_size)
    linear = functools.partial(linear, config=config)
    check_result(linear(x, *layer.weights[0]), reference)
    return layer.clock.time([functools.partial(linear, x, *packed) for packed in layer.weights])["us"]


def name_of(config: Any) -> str:
    """block_n x block_m x columns of a step, warps, slices and splits where there are several, fused."""
    name = f"{config.block_n} x {config.block_m} x {config.block_k * config.slices}, {config.num_warps} warps"
    name += "".join(f", {value} {what}" for what in ("slices", "splits") if (value := getattr(config, what)) > 1)
    return name + ", fused" * config.fused
