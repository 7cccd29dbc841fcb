"""The clock, cold caches, and what this machine's memory can do.

A decode step reads every weight once and finds none of them in the cache, so neither may a benchmark. Each measurement
runs over as many copies of the weight as exceed the L2 cache three times, one after another, captured in one CUDA
graph. (The alternative, overwriting the cache between calls, puts two events around each call: their resolution and
cost are as large as the 2 to 5 microseconds to be measured, and the write-backs it leaves run on into the call.)
A call's time is the graph's over its number of calls, so it has the gaps between launches in it that a decode step
has too. The graph is replayed twice for each measurement and the second replay timed: the first keeps the device
busy while the second is queued, so that no launch from the host is timed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], object]


class Clock:
    """Times calls on one device: CUDA graphs and events on a GPU, `perf_counter` elsewhere."""

    MIN_CALLS = 16  # so that the gap between two replays is spread over enough calls
    MAX_CALLS = 256
    MIN_REPEATS = 7
    SECONDS = 0.1  # for the repeats of one measurement
    CACHES = 3

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if self.on_gpu else 1 << 16

    def num_copies(self, nbytes: int) -> int:
        """How many copies of a weight of so many bytes are read in turn: at least two, three caches in all."""
        wanted = math.ceil(self.CACHES * self.l2_bytes / nbytes)
        return min(max(wanted, 2), self.MAX_CALLS if self.on_gpu else 3)

    def time(self, calls: Sequence[Call], graph: bool = True) -> dict[str, Any]:
        """Microseconds of one call: the median over the repeats, and their 10th and 90th percentile.

        `graph=False` is for code that cannot be captured: the calls are queued one by one, so the host's time for
        a launch is in the result wherever it exceeds the kernel's.
        """
        rounds = math.ceil((self.MIN_CALLS if self.on_gpu else 1) / len(calls))
        calls = list(calls) * rounds
        replay = self.capture(calls) if graph else lambda: [call() for call in calls]
        replay()
        first = self._seconds(replay)
        repeats = min(max(int(self.SECONDS / (2 * first)), self.MIN_REPEATS), 50) if self.on_gpu else 3
        times = sorted(self._seconds(replay) / len(calls) * 1e6 for _ in range(repeats))
        return {
            "us": statistics.median(times),
            "low_us": times[len(times) // 10],
            "high_us": times[-1 - len(times) // 10],
            "repeats": repeats,
            "calls": len(calls),
            "graph": graph and self.on_gpu,
        }

    def capture(self, calls: Sequence[Call]) -> Call:
        """One call that does all of them: the replay of a CUDA graph, or a loop where there are none."""
        if not self.on_gpu:
            return lambda: [call() for call in calls]
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # compiles and tunes what is compiled or tuned at the first call
            for call in calls:
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for call in calls:
                call()
        return captured.replay

    def elapsed(self, call: Call) -> float:
        """Seconds from an idle device to the end of all that the call queues: what a user waits."""
        self.synchronize()
        began = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _seconds(self, replay: Call) -> float:
        if not self.on_gpu:
            return self.elapsed(replay)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        replay()
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def copy_bandwidth(clock: Clock) -> float:
    """Bytes a second of a large copy on the device, read and written bytes counted."""
    size = (1 << 30) if clock.on_gpu else (1 << 16)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / clock.time([lambda: target.copy_(source)])["us"] * 1e6


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two tensors as vectors, in fp64; NaN if either holds one."""
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))
