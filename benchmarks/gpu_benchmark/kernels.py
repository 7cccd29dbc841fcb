"""Part 2: our kernels beside bf16 F.linear, for every matrix of shapes.py and every number of rows.

bandwidth    bytes of the packed weight (3-bit values, scales, zero points) a second, over the copy bandwidth
             measured in the same process: 1 would be as fast as memory allows
speed-up     time of torch's F.linear on the bf16 weight over ours
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_benchmark.measure import Clock, copy_bandwidth, cosine
from gpu_benchmark.shapes import ROWS, all_shapes
from gpu_benchmark.tasks import Context, Task

GROUP_SIZE = 128
SMOKE_SHAPES = ((64, 256), (96, 128))
SMOKE_ROWS = (1, 8, 64)
MAX_ROWS_FP16 = 16  # above, fp16 and bf16 do the same work


def tasks(seconds: float) -> list[Task]:
    return [Task("kernels", measure, seconds)]


def shapes_and_rows(smoke: bool) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    return (list(SMOKE_SHAPES), SMOKE_ROWS) if smoke else (list(all_shapes()), ROWS)


def measure(context: Context) -> None:
    """A row for each matrix and number of rows. A matrix that fails, fails alone; those not reached are named."""
    torch.manual_seed(0)
    clock = Clock(context.device)
    context.emit({"copy_bandwidth": copy_bandwidth(clock), "l2_bytes": clock.l2_bytes})
    shapes, rows = shapes_and_rows(context.smoke)
    for i, (n, k) in enumerate(shapes):
        if context.remaining() < 0:
            context.emit({"not_reached": [f"{n} x {k}" for n, k in shapes[i:]]})
            return
        try:
            measure_shape(context, clock, n, k, rows)
        except Exception:
            context.emit({"n": n, "k": k, "error": traceback.format_exc(limit=-3)})


def measure_shape(context: Context, clock: Clock, n: int, k: int, rows: tuple[int, ...]) -> None:
    ours = {torch.bfloat16: Ours(clock, n, k, torch.bfloat16)}
    if context.fp16:
        ours[torch.float16] = Ours(clock, n, k, torch.float16)
    baseline = Baseline(clock, n, k)
    for m in rows:
        x = torch.randn(m, k, device=clock.device)
        row: dict[str, Any] = {"m": m, "n": n, "k": k, "packed_bytes": ours[torch.bfloat16].nbytes}
        row["linear"] = baseline.time(x)
        for dtype, layer in ours.items():
            if dtype == torch.bfloat16 or m <= MAX_ROWS_FP16:
                row[f"ours_{'bf16' if dtype == torch.bfloat16 else 'fp16'}"] = layer.time(x)
        context.emit(row)


class Baseline:
    """bf16 F.linear, which is cuBLAS, over as many copies of the weight as exceed the cache."""

    def __init__(self, clock: Clock, n: int, k: int) -> None:
        weight = torch.randn(n, k, device=clock.device).to(torch.bfloat16)
        self.clock = clock
        self.weights = [weight, *(weight.clone() for _ in range(clock.num_copies(weight.nbytes) - 1))]

    def time(self, x: Tensor) -> dict[str, Any]:
        x = x.to(torch.bfloat16)
        linear = torch.nn.functional.linear
        return self.clock.time([lambda w=w: linear(x, w) for w in self.weights])


class Ours:
    """`torch.ops.mbq_ao.int3_linear` over as many copies of a random packed weight as exceed the cache."""

    def __init__(self, clock: Clock, n: int, k: int, dtype: torch.dtype) -> None:
        from mbq_ao.kernels.layout import pack_int3

        qdata = pack_int3(torch.randint(0, 8, (n, k), dtype=torch.uint8, device=clock.device))
        groups = -(-k // GROUP_SIZE)
        scale = (torch.rand(n, groups, device=clock.device) * 0.02 + 0.001).to(dtype)
        zero_point = torch.randint(0, 8, (n, groups), dtype=torch.uint8, device=clock.device)
        weight = (qdata, scale, zero_point)
        self.clock, self.dtype = clock, dtype
        self.nbytes = sum(t.nbytes for t in weight)
        self.weights = [weight]
        self.weights += [tuple(t.clone() for t in weight) for _ in range(clock.num_copies(self.nbytes) - 1)]

    def time(self, x: Tensor) -> dict[str, Any]:
        x = x.to(self.dtype)
        check = cosine(_call(x, self.weights[0])(), self._reference(x))
        if not check > 0.999:
            raise RuntimeError(f"wrong result before timing: cosine {check} with the dequantized product")
        return self.clock.time([_call(x, weight) for weight in self.weights])

    def _reference(self, x: Tensor) -> Tensor:
        weight = torch.ops.mbq_ao.int3_dequantize(*self.weights[0], x.shape[-1], GROUP_SIZE, x.dtype)
        return torch.nn.functional.linear(x, weight)


def _call(x: Tensor, weight: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    qdata, scale, zero_point = weight
    return lambda: torch.ops.mbq_ao.int3_linear(x, qdata, scale, zero_point, None, GROUP_SIZE)
