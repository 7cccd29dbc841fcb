"""Part 2: our kernels beside bf16 F.linear, for every matrix of shapes.py and every number of rows.

bandwidth    bytes of the packed weight (values, scales, zero points) a second, over the copy bandwidth measured in
             the same process: 1 would be as fast as memory allows
speed-up     time of torch's F.linear on the bf16 weight over ours
TOPS         2 M N K over our time

W3A16 in groups of 128, W4A8 with one scale a row. A W4A8 linear is the whole op: its tokens are quantized in it. What
that takes alone is measured, too, once for each number of columns.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor

from gpu_benchmark.measure import Call, Clock, copy_bandwidth, cosine
from gpu_benchmark.precisions import PRECISIONS, Precision
from gpu_benchmark.shapes import MAX_ROWS_DECODING, ROWS, Shape, all_shapes, in_two_passes, names
from gpu_benchmark.tasks import Context, Task

SMOKE_SHAPES = ((64, 256), (96, 128))
SMOKE_ROWS = (1, 8, 64)


def tasks(seconds: float) -> list[Task]:
    return [Task("kernels", measure, seconds)]


def shapes_and_rows(smoke: bool) -> tuple[list[Shape], tuple[int, ...]]:
    return (list(SMOKE_SHAPES), SMOKE_ROWS) if smoke else (list(all_shapes()), ROWS)


def measure(context: Context) -> None:
    """A row for each matrix and number of rows. A matrix that fails, fails alone; those not reached are named."""
    torch.manual_seed(0)
    clock = Clock(context.device)
    context.emit({"copy_bandwidth": copy_bandwidth(clock), "l2_bytes": clock.l2_bytes})
    plan = in_two_passes(*shapes_and_rows(context.smoke))
    quantized: set[tuple[int, int]] = set()
    for i, ((n, k), rows) in enumerate(plan):
        if context.remaining() < 0:
            context.emit({"not_reached": names(plan[i:])})
            return
        try:
            measure_shape(context, clock, n, k, rows)
            if "W4A8" in context.precisions:
                for m in rows:
                    if (m, k) not in quantized:
                        quantized.add((m, k))
                        context.emit({"m": m, "k": k, "quantize": clock.time(quantize_calls(clock, m, k))})
        except Exception:
            context.emit({"n": n, "k": k, "error": traceback.format_exc(limit=-3)})


def measure_shape(context: Context, clock: Clock, n: int, k: int, rows: list[int]) -> None:
    """One precision that fails leaves the others their times."""
    ours: dict[str, Ours] = {}
    for name in context.precisions:
        for column, dtype in PRECISIONS[name].timed.items():
            fp16 = dtype == torch.float16  # with many rows it does the same work as bf16
            if not fp16 or (context.fp16 and rows[0] <= MAX_ROWS_DECODING):
                ours[column] = Ours(clock, PRECISIONS[name], n, k, dtype)
    baseline = Baseline(clock, n, k)
    for m in rows:
        x = torch.randn(m, k, device=clock.device)
        row: dict[str, Any] = {"m": m, "n": n, "k": k, "linear": baseline.time(x)}
        for column, layer in ours.items():
            try:
                row[column] = {**layer.time(x), "packed_bytes": layer.nbytes}
            except Exception:
                context.emit({"n": n, "k": k, "m": m, "column": column, "error": traceback.format_exc(limit=-3)})
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
    """One of our ops over as many copies of a random packed weight as exceed the cache."""

    def __init__(self, clock: Clock, precision: Precision, n: int, k: int, dtype: torch.dtype) -> None:
        values = precision.values(n, k, precision.group_size, dtype, clock.device)
        packed = precision.pack(values)
        self.clock, self.precision, self.n, self.k = clock, precision, n, k
        self.dtype, self.group_size = dtype, values.group_size
        self.nbytes = sum(t.nbytes for t in packed)
        copies = clock.num_copies(self.nbytes) - 1
        self.weights = [packed, *(tuple(t.clone() for t in packed) for _ in range(copies))]

    def time(self, x: Tensor) -> dict[str, Any]:
        x = x.to(self.dtype)
        linear, g = self.precision.linear, self.group_size
        check_result(linear(x, self.weights[0], g), self.reference(x))
        return self.clock.time([lambda packed=packed: linear(x, packed, g) for packed in self.weights])

    def reference(self, x: Tensor) -> Tensor:
        weight = self.precision.dequantize(self.weights[0], x.shape[-1], self.group_size, x.dtype)
        return torch.nn.functional.linear(x, weight)


def check_result(y: Tensor, reference: Tensor) -> None:
    """Integers of 8 bits for x leave a cosine of 0.9999."""
    if not (found := cosine(y, reference)) > 0.999:
        raise RuntimeError(f"wrong result before timing: cosine {found} with the dequantized product")


def quantize_calls(clock: Clock, m: int, k: int) -> list[Call]:
    """Quantizing tokens that the layer before has left in the cache, as it does."""
    from mbq_ao.kernels.reference import quantize_tokens
    from mbq_ao.kernels.w4a8_gemm import quantize_tokens_triton

    x = torch.randn(m, k, device=clock.device).to(torch.bfloat16)
    if not clock.on_gpu:
        return [lambda: quantize_tokens(x)]
    return [lambda: quantize_tokens_triton(x, None, k)]
