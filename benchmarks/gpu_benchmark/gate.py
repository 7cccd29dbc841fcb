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
SHAPES = ((1536, 576), (896, 4864), (3420, 1280), (1280, 3420), (4304, 1152), (1152, 4304), (4096, 4096))
SMOKE_ROWS = (1, 3, 17, 65)
SMOKE_SHAPES = ((40, 576), (33, 100))
GROUPS = (32, 64, 128, None)
UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
MAX_ROWS_EXACT_WEIGHT = 16  # of x: up to here the weight itself is never rounded


def tasks(smoke: bool) -> list[Task]:
    """One for each dtype and group size, so that they compile at once, and one for the machine's arithmetic."""
    seconds = 60.0 if smoke else 150.0
    result = [Task("tensor cores", check_tensor_cores, seconds)]
    for dtype, group in itertools.product(UNIT_ROUNDOFF, GROUPS):
        name = f"{str(dtype).removeprefix('torch.')} group {group or 'row'}"
        result.append(Task(name, functools.partial(check_linear, dtype=dtype, group_size=group), seconds))
    return result


def verdict(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the gate is passed, and whether by the fp16 path.

    Where tensor cores do not take fp16 subnormals as they are, the fp16 path cannot be right; the bf16 path does
    without them and is the fallback: then only bf16 has to pass, and only bf16 is timed.
    """
    exact = next((r["subnormals_exact"] for r in _rows(results) if "subnormals_exact" in r), None)
    excused = "float16" if exact is False else None
    failed = [r["name"] for r in results if not r["name"].startswith(excused or "\0") and not _passed(r)]
    cases = [row for row in _rows(results) if "worst" in row]
    return {
        "passed": not failed and bool(cases),
        "failed": failed,
        "fp16": exact is not False,
        "subnormals_exact": exact,
        "cases": len(cases),
        "wrong": [row for row in cases if not row["ok"]][:20],
    }


def _passed(result: dict[str, Any]) -> bool:
    return result["status"] == "done" and all(row.get("ok", True) for row in result["rows"])


def _rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for result in results for row in result["rows"]]


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
    for i, ((n, k), m) in enumerate(itertools.product(shapes, rows)):
        args, weight = random_layer(m, n, k, group_size, dtype, context.device, outliers=i % 2 == 1)
        if shapes.index((n, k)) % 2:
            args[4] = None  # without bias
        y = op(*args)
        row = {"m": m, "n": n, "k": k, "bias": args[4] is not None, **compare(y, args, weight)}
        again = []
        clock.capture([lambda args=args, again=again: again.append(op(*args))])()
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
    """Whether a tensor-core product of fp16 subnormals q 2^(p - 24), q = 0..7, p = 0, 3, 6, is exact."""
    from gpu_benchmark.dot import dot

    torch.manual_seed(0)
    q = torch.randint(0, 8, (32, 64), device=context.device)
    place = torch.tensor([0, 3, 6], device=context.device)[torch.randint(0, 3, (64,), device=context.device)]
    a = (q << place).to(torch.int16).view(torch.float16)
    b = torch.randint(-1024, 1025, (64, 16), device=context.device).to(torch.float16)
    expected = (q << place).double() @ b.double() * 2.0**-24  # below 2^24 before scaling: exact in fp32 as well
    got = dot(a, b)
    context.emit({"subnormals_exact": torch.equal(got.double(), expected), "flushed": bool((got == 0).all())})
