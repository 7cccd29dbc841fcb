"""Part 1, the gate: the kernels against fp64 arithmetic. Nothing is timed that is not right.

Every case is a linear of random values, scales (and zero points), computed by the op and, in fp64, from the values
before they were packed. What is asked of each precision is gate_w3a16.py and gate_w4a8.py; one that fails is not
timed, and the other is.

Outputs and workspaces are NaN before each call: torch fills `empty` in its deterministic mode. All of it runs twice
and must repeat bit for bit, in a CUDA graph as well.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import traceback
from typing import Any

import torch
from torch import Tensor

from gpu_benchmark import gate_w3a16, gate_w4a8
from gpu_benchmark.gate_bounds import same_bits
from gpu_benchmark.measure import Clock
from gpu_benchmark.tasks import Context, Task

ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 64, 65, 128, 256, 512, 1024, 2048)
SHAPES = ((1536, 576), (4096, 4096), (3420, 1280), (1280, 3420), (4304, 1152), (1152, 4304), (896, 4864))
SMOKE_ROWS = (1, 3, 17, 65)
SMOKE_SHAPES = ((40, 576), (33, 100))
CUT_SHAPES = ((4096, 4096), (520, 1100))  # the first is one that is timed, and what that needs is compiled by then
CUT_SMOKE_SHAPES = ((16, 576), (33, 100))
CUT_SPLITS = (1, 3)
CUT_TASKS = 4
MIN_SHAPES = 2  # that every dtype and group size must have been checked on, with all numbers of rows
# Modules, each with NAME, CASES, random_layer and compare.
RULES: dict[str, Any] = {rules.NAME: rules for rules in (gate_w3a16, gate_w4a8)}
TENSOR_CORES = "tensor cores"


def tasks(seconds: float) -> list[Task]:
    """One for each dtype and group size, so that they compile at once, and one for the machine's arithmetic.

    And some for every cut of the W4A8 kernel, chosen or not.
    """
    result = [Task(TENSOR_CORES, check_tensor_cores, seconds)]
    for name, rules in RULES.items():
        for dtype, group in rules.CASES:
            title = f"{name} {str(dtype).removeprefix('torch.')} group {group or 'row'}"
            check = functools.partial(check_linear, precision=name, dtype=dtype, group_size=group)
            result.append(Task(title, check, seconds))
    for part in range(CUT_TASKS):
        title = f"{gate_w4a8.NAME} cuts {part + 1} of {CUT_TASKS}"
        result.append(Task(title, functools.partial(check_cuts, part=part), seconds))
    return result


def verdict(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Which precisions passed, and whether W3A16 did by its fp16 path.

    Where tensor cores do not take fp16 subnormals as they are, that path cannot be right; the bf16 path does
    without them and is the fallback: then only bf16 has to pass, and only bf16 is timed. A cut that cannot be run
    gives no wrong result: it is named, and W4A8 is timed by the others.
    """
    rows = [row for result in results for row in result["rows"]]
    exact = next((row["subnormals_exact"] for row in rows if "subnormals_exact" in row), None)
    found = {}
    for name in RULES:
        asked = [result for result in results if result["name"].startswith(name)]
        if exact is False and name == gate_w3a16.NAME:
            asked = [result for result in asked if "bfloat16" in result["name"]]
        failed = [result["name"] for result in asked if not _passed(result)]
        found[name] = {"passed": bool(asked) and not failed, "failed": failed}
    cases = [row for row in rows if "worst" in row]
    not_run = [row["cut"] for row in rows if "cut" in row and "error" in row]
    return {
        "precisions": found,
        "passed": [name for name in RULES if found[name]["passed"]],
        "all": all(of["passed"] for of in found.values()) and not not_run,
        "fp16": exact is not False,
        "subnormals_exact": exact,
        "cases": len(cases),
        "not_run": not_run,
        "wrong": [row for row in cases if not row["ok"]][:20],
    }


def _passed(result: dict[str, Any]) -> bool:
    """All that was checked is right, and enough was checked."""
    cases = [row for row in result["rows"] if "worst" in row]
    ms = {row["m"] for row in cases}
    whole = [shape for shape in {(c["n"], c["k"]) for c in cases} if _rows_of(cases, shape) == ms]
    enough = len(whole) >= MIN_SHAPES
    return result["status"] == "done" and enough and all(row["ok"] for row in cases)


def _rows_of(cases: list[dict[str, Any]], shape: tuple[int, int]) -> set[int]:
    return {case["m"] for case in cases if (case["n"], case["k"]) == shape}


def check_linear(context: Context, *, precision: str, dtype: torch.dtype, group_size: int | None) -> None:
    """All shapes and numbers of rows of one dtype and group size."""
    poison()
    torch.manual_seed(0)
    clock, rules = Clock(context.device), RULES[precision]
    shapes, rows = (SMOKE_SHAPES, SMOKE_ROWS) if context.smoke else (SHAPES, ROWS)
    plan = list(itertools.product(shapes, rows))
    for i, ((n, k), m) in enumerate(plan):
        if context.remaining() < 0:
            context.emit({"not_reached": [f"{n} x {k}, M = {m}" for (n, k), m in plan[i:]]})
            return
        shape = shapes.index((n, k))
        special, bias = (shape + rows.index(m)) % 2 == 1, shape % 2 == 0
        layer = rules.random_layer(m, n, k, group_size, dtype, context.device, special=special, bias=bias)
        y = layer()
        row = {"precision": precision, "m": m, "n": n, "k": k, "bias": bias, **rules.compare(y, layer)}
        again: list[Tensor] = []
        replay = clock.capture([lambda layer=layer, again=again: again.append(layer())])
        replay()
        clock.synchronize()
        row["repeats"] = same_bits(again[-1], y) and same_bits(layer(), y)
        row["ok"] = row["ok"] and row["repeats"]
        context.emit(row)


def check_cuts(context: Context, *, part: int) -> None:
    """Every cut on a shape that is timed and on an odd one. What does not run is an error of that cut alone."""
    from mbq_ao.kernels.w4a8_config import cuts_for

    poison()
    torch.manual_seed(0)
    shapes = CUT_SMOKE_SHAPES if context.smoke else CUT_SHAPES
    cuts = cuts_for(0)[part::CUT_TASKS][: 1 if context.smoke else None]
    for i, cut in enumerate(cuts):
        if context.remaining() < 0:
            context.emit({"not_reached": [str(cut) for cut in cuts[i:]]})
            return
        for splits, (n, k) in itertools.product(CUT_SPLITS, shapes):
            config = dataclasses.replace(cut, splits=splits)
            context.emit(check_cut(context, config, n, k, odd=(n, k) == shapes[1]))


def check_cut(context: Context, config: Any, n: int, k: int, odd: bool) -> dict[str, Any]:
    # Two programs for the tokens, and three tokens for another, except where one is all there may be.
    m = 5 if context.smoke else config.block_m if config.fused else 2 * config.block_m + 3
    row = {"precision": gate_w4a8.NAME, "m": m, "n": n, "k": k, "bias": odd, "cut": str(config)}
    try:
        layer = gate_w4a8.random_layer(m, n, k, None, torch.bfloat16, context.device, special=odd, bias=odd)
        y = layer.by(config)
        row |= gate_w4a8.compare(y, layer, by_kernel=True)
        row["repeats"] = same_bits(layer.by(config), y)
        row["ok"] = row["ok"] and row["repeats"]
    except Exception:
        row["error"] = traceback.format_exc(limit=-3)
    return row


def poison() -> None:
    """Fill what torch.empty returns with NaN, from here on, in this process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic mode asks of cuBLAS
    torch.use_deterministic_algorithms(True, warn_only=True)
    if not torch.empty(64).isnan().all():
        raise RuntimeError("torch.empty is not filled with NaN in deterministic mode; unwritten outputs would pass")


def check_tensor_cores(context: Context) -> None:
    """Whether a tensor-core product of fp16 subnormals q 2^(p - 24), q = 0..7, p = 0, 3, 6, is exact.

    With 32 rows, which are two mma.m16n8k16, and with 64, which Hopper does by wgmma.
    """
    from gpu_benchmark.dot import dot

    torch.manual_seed(0)
    row: dict[str, Any] = {"subnormals_exact": True}
    for m in (32, 64):
        q = torch.randint(0, 8, (m, 64), device=context.device)
        places = torch.tensor([0, 3, 6], device=context.device)[torch.randint(0, 3, (64,), device=context.device)]
        a = (q << places).to(torch.int16).view(torch.float16)
        b = torch.randint(-256, 257, (64, 16), device=context.device).to(torch.float16)
        # In units of 2^-24 every partial sum is an integer below 2^24, exact in fp32 in any order.
        got, expected = dot(a, b).double(), (q << places).double() @ b.double() * 2.0**-24
        row[f"{m} rows"] = "exact" if torch.equal(got, expected) else "zero" if (got == 0).all() else "wrong"
        row["subnormals_exact"] &= row[f"{m} rows"] == "exact"
    context.emit(row)
