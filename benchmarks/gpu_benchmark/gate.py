"""Part 1, the gate: the kernels against fp64 arithmetic. Nothing is timed that is not right.

Every case is y = x @ W.T + bias through `torch.ops.mbq_ao.int3_linear`, with random 3-bit values, scales and zero
points. The reference is computed in fp64 from the values before they were packed. Half of the cases have activations
as language models do: one channel in a hundred 300 times larger.

Two bounds, derived, not tuned. u is the unit roundoff of x's dtype, x o w the products of x with the exact weight.

    each element    |error| <= 1.01 u |y|                                      the result is rounded once
                             + 8 u ||x o w||   where M > 16                    the weight may be rounded once as well;
                                               by Hoeffding false once in 10^13
                             + 2 sqrt(K) 2^-24 level max(scale) ||x||_1        sums in fp32; their terms are x q scale
                                                                               and x z scale, in bf16 x (128 + q) scale
    their rms       rms(error) <= u rms(y) [+ u rms(x o w)] + K / 16 2^-23 level max(scale) rms(||x||_2)

Tensor cores truncate where they add, K / 16 times; hence the last term. The second bound is the sharp one: it sees
an error of the size of one rounding in every element, which the first must allow.

Outputs and workspaces are NaN before each call: torch fills `empty` in its deterministic mode. All of it runs twice
and must repeat bit for bit, in a CUDA graph as well.
"""

from __future__ import annotations

import functools
import itertools
import os
from typing import Any

import torch
from torch import Tensor

from gpu_benchmark.measure import Clock
from gpu_benchmark.tasks import Context, Task

ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 64, 65, 128, 512, 2048)
SHAPES = ((1536, 576), (4096, 4096), (3420, 1280), (1280, 3420), (4304, 1152), (1152, 4304), (896, 4864))
SMOKE_ROWS = (1, 3, 17, 65)
SMOKE_SHAPES = ((40, 576), (33, 100))
MIN_SHAPES = 2  # that every dtype and group size must have been checked on, with all numbers of rows
GROUPS = (32, 64, 128, None)
UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
MAX_ROWS_EXACT_WEIGHT = 16  # of x: up to here the weight itself is never rounded


TENSOR_CORES = "tensor cores"


def tasks(seconds: float) -> list[Task]:
    """One for each dtype and group size, so that they compile at once, and one for the machine's arithmetic."""
    result = [Task(TENSOR_CORES, check_tensor_cores, seconds)]
    for dtype, group in itertools.product(UNIT_ROUNDOFF, GROUPS):
        name = f"{str(dtype).removeprefix('torch.')} group {group or 'row'}"
        result.append(Task(name, functools.partial(check_linear, dtype=dtype, group_size=group), seconds))
    return result


def verdict(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the gate is passed, and whether by the fp16 path.

    Where tensor cores do not take fp16 subnormals as they are, the fp16 path cannot be right; the bf16 path does
    without them and is the fallback: then only bf16 has to pass, and only bf16 is timed.
    """
    rows = [row for result in results for row in result["rows"]]
    exact = next((row["subnormals_exact"] for row in rows if "subnormals_exact" in row), None)
    asked = [r for r in results if r["name"] != TENSOR_CORES and (exact is not False or "bfloat16" in r["name"])]
    failed = [result["name"] for result in asked if not _passed(result)]
    cases = [row for row in rows if "worst" in row]
    return {
        "passed": bool(asked) and not failed,
        "failed": failed,
        "fp16": exact is not False,
        "subnormals_exact": exact,
        "cases": len(cases),
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


def random_layer(
    m: int, n: int, k: int, group_size: int | None, dtype: torch.dtype, device: torch.device, outliers: bool
) -> tuple[list[Any], Tensor]:
    """Arguments of int3_linear, and the exact weight in fp64."""
    from mbq_ao.kernels.layout import pack_int3

    g = group_size or k
    groups = -(-k // g)
    x = torch.randn(m, k, device=device)
    if outliers:
        x[:, torch.randperm(k, device=device)[: max(1, k // 100)]] *= 300
    x = x.to(dtype)
    q = torch.randint(0, 8, (n, k), dtype=torch.uint8, device=device)
    scale = (torch.rand(n, groups, device=device) * 0.02 + 0.001).to(dtype)
    zero_point = torch.randint(0, 8, (n, groups), dtype=torch.uint8, device=device)
    bias = torch.randn(n, device=device).to(dtype)

    def spread(t: Tensor) -> Tensor:
        return t.double().repeat_interleave(g, 1)[:, :k]

    weight = (q.double() - spread(zero_point)) * spread(scale)
    return [x, pack_int3(q), scale, zero_point, bias, g], weight


def compare(y: Tensor, args: list[Any], weight: Tensor) -> dict[str, Any]:
    """The two bounds of this module's docstring: the largest error as a part of each.

    On a CPU the weight is rounded for any number of rows.
    """
    x, _, scale, _, bias, _ = args
    m, k = x.shape
    x64 = x.double()
    expected = torch.nn.functional.linear(x64, weight, None if bias is None else bias.double())
    u, level = UNIT_ROUNDOFF[x.dtype], 135 if x.dtype == torch.bfloat16 else 14
    largest_scale = float(scale.double().amax())
    bound = 1.01 * u * expected.abs()
    bound += 2 * k**0.5 * 2.0**-24 * level * largest_scale * x64.abs().sum(-1, keepdim=True)
    rms_bound = u * _rms(expected) + k / 16 * 2.0**-23 * level * largest_scale * _rms(x64.norm(dim=-1))
    if m > MAX_ROWS_EXACT_WEIGHT or x.device.type == "cpu":
        products = (x64.square() @ weight.square().T).sqrt()
        bound += 8 * u * products
        rms_bound += u * _rms(products)
    error = (y.double() - expected).abs()
    # A NaN anywhere makes both of these NaN, and NaN <= 1 is false.
    worst, rms = float((error / bound).amax()), float(_rms(error) / rms_bound)
    return {"worst": worst, "rms": rms, "ok": worst <= 1 and rms <= 1}


def _rms(t: Tensor) -> Tensor:
    return t.square().mean().sqrt()


def check_linear(context: Context, *, dtype: torch.dtype, group_size: int | None) -> None:
    """All shapes and numbers of rows of one dtype and group size."""
    poison()
    torch.manual_seed(0)
    clock = Clock(context.device)
    op = torch.ops.mbq_ao.int3_linear
    shapes, rows = (SMOKE_SHAPES, SMOKE_ROWS) if context.smoke else (SHAPES, ROWS)
    plan = list(itertools.product(shapes, rows))
    for i, ((n, k), m) in enumerate(plan):
        if context.remaining() < 0:
            context.emit({"not_reached": [f"{n} x {k}, M = {m}" for (n, k), m in plan[i:]]})
            return
        args, weight = random_layer(m, n, k, group_size, dtype, context.device, outliers=i % 2 == 1)
        if shapes.index((n, k)) % 2:
            args[4] = None  # without bias
        y = op(*args)
        row = {"m": m, "n": n, "k": k, "bias": args[4] is not None, **compare(y, args, weight)}
        again: list[Tensor] = []
        replay = clock.capture([lambda args=args, again=again: again.append(op(*args))])
        replay()
        clock.synchronize()
        row["repeats"] = torch.equal(again[-1], y) and torch.equal(op(*args), y)
        row["ok"] = row["ok"] and row["repeats"]
        context.emit(row)


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
