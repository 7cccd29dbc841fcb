"""Measure which kernel configuration is fastest for the layers of a model on this GPU, and remember it.

    mbq_ao.tune(model)        minutes, once for a model and a GPU; nothing is tuned unless you call this

Every candidate is run in a CUDA graph over as many copies of the weight as the L2 cache cannot hold, because that is
how a layer is met while decoding: with its weight in memory. A time is the median of several replays.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mbq_ao.fuse_linears import neighbours
from mbq_ao.int3_tensor import MBQInt3Tensor
from mbq_ao.kernels.checks import has_kernels
from mbq_ao.kernels.int3_layout import packed_shape

if TYPE_CHECKING:
    from mbq_ao.kernels.choice import Choice

NUM_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
Timer = Callable[[Sequence[Callable[[], Tensor]]], float]


def tune(
    model: nn.Module,
    *,
    num_rows: Iterable[int] = NUM_ROWS,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    timer: Timer | None = None,
) -> dict[str, float]:
    """Find the fastest configuration for every 3-bit weight shape of `model` and every number of rows of x.

    num_rows: rows of x; 1 to 16 serve decoding, the rest prefill. Each stands for all numbers down to half of it.
    dtype: of x, bfloat16 or float16; None: the dtype of each weight.
    progress: show a progress bar.
    timer: takes calls that do the same work on different copies of a weight, returns seconds a call; None: on the GPU.

    The choices are used from the next call on, and by later processes: they are kept in a JSON file for this GPU and
    Triton version in $MBQ_AO_CACHE or ~/.cache/mbq_ao (kernels/choice.py); choices of other models in it stay.
    Returns, for each problem, how many times faster the choice is than the default, 1.0 where the default is kept.
    Linears that fuse_linears_ laid together are tuned as one, too, in the groups that it made.
    Raises ValueError if the model has no 3-bit weight, or has them on a device that the kernels do not run on.
    """
    weights = {id(m.weight): m.weight for m in model.modules() if isinstance(getattr(m, "weight", None), MBQInt3Tensor)}
    devices = {w.device for w in weights.values()}
    if not weights:
        raise ValueError("tune needs a model with 3-bit weights, got none; call quantize_ first (W4A8 is not tuned)")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if len(devices) > 1 or not (interpreted or has_kernels(next(iter(devices)))):
        raise ValueError(
            f"tune measures kernels on one NVIDIA GPU, got 3-bit weights on {', '.join(map(str, devices))}; "
            'move the model with .to("cuda")'
        )
    # Not before: without Triton these cannot be imported.
    from mbq_ao.kernels import choice
    from mbq_ao.kernels.int3_linear import run_choice

    (device,) = devices
    timer = timer or _cold_seconds
    sizes = [(*w.shape, w) for w in weights.values()] + list(_joined_sizes(model))
    shapes = list(dict.fromkeys((n, k, w.group_size, w.dtype, dtype or w.dtype) for n, k, w in sizes))
    path = choice.table_path(device)
    table, gains = choice.read_table(path), {}
    # fp32 is always dequantized; there is nothing to choose.
    tasks = [(shape, rows) for shape in shapes if shape[-1] != torch.float32 for rows in sorted(set(num_rows))]
    for (n, k, group_size, scale_dtype, x_dtype), rows in tqdm(tasks, desc="tune", disable=not progress):
        x = torch.randn(rows, k, device=device, dtype=x_dtype)
        copies = _copies(n, k, group_size, scale_dtype, device)
        default = choice.default_choice(rows, n, k, group_size, x_dtype, device)
        times: dict[choice.Choice, float] = {}
        for candidate in dict.fromkeys([default, *_candidates(default)]):
            calls = [partial(run_choice, candidate, x, *weight, None, group_size) for weight in copies]
            try:
                times[candidate] = timer(calls)
            except RuntimeError:  # more registers or shared memory than this GPU has: not a candidate
                if candidate == default:
                    raise
        best = min(times, key=times.__getitem__)
        problem = choice.Problem.of(rows, n, k, group_size, x_dtype)
        table[problem] = best
        gains[f"{problem.num_rows} x ({n}, {k}), group size {group_size}, {problem.dtype}"] = (
            times[default] / times[best]
        )
    choice.write_table(path, table)
    return gains


def _candidates(default: Choice) -> Iterator[Choice]:
    """What may be faster than the default: its neighbours, and the other kernel."""
    from mbq_ao.kernels import gemm_config
    from mbq_ao.kernels.choice import Dequantize
    from mbq_ao.kernels.gemv_config import GemvConfig

    if isinstance(default, GemvConfig):
        for num_warps in (4, 8, 16):
            for col_tiles in sorted({default.col_tiles, max(1, default.col_tiles // 2), 2 * default.col_tiles}):
                for split_k in sorted({1, default.split_k, 2 * default.split_k}):
                    yield replace(default, num_warps=num_warps, col_tiles=col_tiles, split_k=split_k)
        yield replace(default, row_tiles=2, col_tiles=max(1, default.col_tiles // 2))
        return
    yield from (gemm_config.FEW, gemm_config.SOME, gemm_config.MANY, gemm_config.MOST)
    yield Dequantize()


def _joined_sizes(model: nn.Module) -> Iterator[tuple[int, int, MBQInt3Tensor]]:
    """(n, k, a weight of it) of the first two, three, ... of linears that lie together in memory."""
    for parent in model.modules():
        for run in neighbours(parent):
            weights = [linear.weight for _, linear in run]
            together = len({w.qdata.untyped_storage().data_ptr() for w in weights}) == 1
            if together and isinstance(weights[0], MBQInt3Tensor):
                for end in range(2, len(weights) + 1):
                    yield sum(w.shape[0] for w in weights[:end]), weights[0].shape[1], weights[0]


def _copies(
    n: int, k: int, group_size: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Random packed weights, together at least three times the L2 cache."""
    shape = packed_shape(n, k)
    groups = -(-k // group_size)
    nbytes = 1536 * shape[0] * shape[1] + 3 * n * groups
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return [
        (
            torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device=device),
            torch.rand(n, groups, device=device).add_(0.5).to(dtype),
            torch.randint(0, 8, (n, groups), dtype=torch.uint8, device=device),
        )
        for _ in range(max(1, -(-3 * l2 // nbytes)))
    ]


def _cold_seconds(calls: Sequence[Callable[[], Tensor]], num_replays: int = 15) -> float:
    """Median seconds a call, replayed in a CUDA graph."""
    for call in calls[:2]:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    seconds = []
    for replay in range(num_replays + 2):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 2:  # the first ones raise the clock
            seconds.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(seconds)
