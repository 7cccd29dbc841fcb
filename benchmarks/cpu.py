"""The 3-bit linear on this CPU against fp32 and bf16 F.linear and torch's int4 kernel: ratios of times, not times.

    python benchmarks/cpu.py                        all shapes, one thread and all threads; writes results/cpu.{json,md}
    python benchmarks/cpu.py --quick                4096 x 4096, a few rows, one thread; writes nothing

Results are checked against fp64 before anything is timed. Contenders take turns, call by call, so that what else the
machine does hits all of them, and a figure is the median over the rounds of (time of the other / time of ours) within
a round. Rounds in which a fixed matmul, run before and after, is slowed down are dropped: a busy neighbour on the same
core takes away arithmetic rather than memory bandwidth, and so changes the ratios. Before each call the
cache is filled with other data, and then the same is done with a second layer of that size: as in a model, the weight
comes from memory, and the code that reads it has just been used. x is in fp32 except where it says otherwise. The int4
kernel has groups of 128 as well.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import mbq_ao
from mbq_ao.kernels import int3_cpu
from mbq_ao.kernels.int3_layout import unpack_int3

F = torch.nn.functional
Contenders = dict[str, Callable[[], Tensor]]

GROUP = 128
SHAPES = [(4096, 4096), (11008, 2048), (896, 4864), (896, 896)]  # N, K
ROWS = [1, 2, 4, 8, 16, 64]
MAX_ROWS_INT4_FP32 = 8  # seconds a call beyond
MIN_ROUNDS = 7
PATIENCE = 4
BUSY = 1.2  # a round counts if the probes before and after it took less than this times the best probe
PROBE = torch.ones(512, 512)
RESULTS = pathlib.Path(__file__).resolve().parent / "results"

# Column: what is divided by what, in the names of `contenders`.
RATIOS = {
    "fp32": ("fp32", "int3"),
    "bf16": ("bf16", "int3"),
    "int4, fp32 x": ("int4", "int3"),
    "int4, bf16 x": ("int4_bf16", "int3"),
    "bf16; ours in bf16": ("bf16", "int3_bf16"),
    "fp32; ours uncompiled": ("fp32", "int3_uncompiled"),
}


class Layer:
    """One weight in every format."""

    def __init__(self, n: int, k: int, seed: int) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.int3 = mbq_ao.MBQInt3Tensor.from_hp(torch.randn(n, k, generator=gen), GROUP)
        self.fp32 = self.int3.dequantize()
        self.bf16 = self.fp32.bfloat16()
        # The same values in the int4 kernel: (q4 - 8) * scale + zero, q4 = q.
        q = unpack_int3(self.int3.qdata, n, k).int()
        self.int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        zero = (8.0 - self.int3.zero_point) * self.int3.scale
        self.int4_scales = torch.stack((self.int3.scale, zero), -1).transpose(0, 1).contiguous()
        self.int4_scales_bf16 = self.int4_scales.bfloat16()

    def contenders(self, x: Tensor) -> Contenders:
        int4 = torch.ops.aten._weight_int4pack_mm_for_cpu
        x_bf16 = x.bfloat16()
        w = self.int3
        contenders = {
            "int3": lambda: F.linear(x, w),
            "int3_bf16": lambda: F.linear(x_bf16, w),
            "int3_uncompiled": lambda: int3_cpu._linear_dequantized(x, w.qdata, w.scale, w.zero_point, GROUP),
            "fp32": lambda: F.linear(x, self.fp32),
            "bf16": lambda: F.linear(x_bf16, self.bf16),
            "int4_bf16": lambda: int4(x_bf16, self.int4, GROUP, self.int4_scales_bf16),
        }
        if x.shape[0] <= MAX_ROWS_INT4_FP32:
            contenders["int4"] = lambda: int4(x, self.int4, GROUP, self.int4_scales)
        return contenders

    def check(self, x: Tensor, contenders: Contenders) -> None:
        expected = x.double() @ self.fp32.double().t()
        for name, run in contenders.items():
            error = ((run().double() - expected).norm() / expected.norm()).item()
            if not error < (2e-2 if "bf16" in name else 2e-6):
                raise SystemExit(f"{name} is wrong, relative error {error:.1e}: nothing was timed")


def measure(contenders: Contenders, before_it: Contenders, seconds: float) -> dict:
    """For each of RATIOS the median over quiet rounds, and the ratio of the fastest calls; the numbers of rounds.

    before_it: the same with another layer.  Goes on for up to PATIENCE * seconds until MIN_ROUNDS were quiet; if they
    were not, all rounds count.
    """
    other_data = torch.ones(24 << 20)  # 96 MiB
    rounds: list[tuple[float, dict[str, float]]] = []
    quiet: list[dict[str, float]] = []
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or len(rounds) < MIN_ROUNDS or len(quiet) < MIN_ROUNDS:
        if elapsed > PATIENCE * seconds and len(rounds) >= MIN_ROUNDS:
            break
        probe, times = _probe(), {}
        for name, run in contenders.items():
            other_data.add_(1)
            before_it[name]()
            before = time.perf_counter()
            run()
            times[name] = time.perf_counter() - before
        rounds.append((max(probe, _probe()), times))
        quiet = [times for probe, times in rounds if probe < BUSY * _best_probe[torch.get_num_threads()]]
    counted = quiet if len(quiet) >= MIN_ROUNDS else [times for _, times in rounds]
    ratios = {
        label: {
            "median": round(statistics.median(times[other] / times[ours] for times in counted), 2),
            "fastest": round(min(times[other] for times in counted) / min(times[ours] for times in counted), 2),
        }
        for label, (other, ours) in RATIOS.items()
        if other in contenders and ours in contenders
    }
    return ratios | {"rounds": len(rounds), "quiet": len(quiet)}


_best_probe: dict[int, float] = {}


def _probe() -> float:
    """The time of a fixed matmul: slower than its best, something else has a share of the machine."""
    threads = torch.get_num_threads()
    PROBE @ PROBE  # which is out of the cache
    start = time.perf_counter()
    PROBE @ PROBE
    taken = time.perf_counter() - start
    _best_probe[threads] = min(taken, _best_probe.get(threads, taken))
    return taken


def device() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def table(rows: list[dict]) -> str:
    head = "| threads | N x K | M | " + " | ".join(f"vs {label}" for label in RATIOS) + " |"
    lines = [head, "|" + "---|" * (3 + len(RATIOS))]
    for row in rows:
        ratios = row["ratios"]
        figures = " | ".join(f"{ratios[label]['median']:.2f}" if label in ratios else "" for label in RATIOS)
        busy = "" if ratios["quiet"] >= MIN_ROUNDS else " (busy)"
        lines.append(f"| {row['threads']} | {row['n']} x {row['k']} | {row['m']}{busy} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape, one thread, no files")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape, number of rows and threads")
    args = parser.parse_args()
    all_threads = torch.get_num_threads()
    facts = {
        "device": device(),
        "threads": all_threads,
        "torch": torch.__version__,
        "mbq_ao": mbq_ao.__version__,
        "date": datetime.date.today().isoformat(),
        "load": os.getloadavg()[0],
        "group_size": GROUP,
        "figure": "time of the other / time of ours: above 1 ours is faster",
    }
    print(json.dumps(facts, indent=2))
    rows = []
    for threads in [1] if args.quick or all_threads == 1 else [1, all_threads]:
        torch.set_num_threads(threads)
        start, first = time.perf_counter(), True
        for n, k in SHAPES[:1] if args.quick else SHAPES:
            layer, other = Layer(n, k, 0), Layer(n, k, 1)
            for m in [1, 8] if args.quick else ROWS:
                x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
                contenders = layer.contenders(x)
                layer.check(x, contenders)  # compiles, too
                if first:
                    print(f"# ready after {time.perf_counter() - start:.0f} s, compilation included", flush=True)
                    first = False
                # Apart: its calls are long, and so would be the rounds.
                uncompiled = {name: contenders[name] for name in ("fp32", "int3_uncompiled")}
                del contenders["int3_uncompiled"]
                before_it = other.contenders(x)
                ratios = measure(uncompiled, before_it, args.seconds / 3) | measure(contenders, before_it, args.seconds)
                row = {"threads": threads, "n": n, "k": k, "m": m, "ratios": ratios}
                rows.append(row)
                print(table([row]).splitlines()[-1], f"({ratios['quiet']}/{ratios['rounds']} quiet)", flush=True)
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "cpu.json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
        facts["load_at_the_end"] = os.getloadavg()[0]
        header = (
            f"{facts['device']}, {all_threads} threads; torch {facts['torch']}; {facts['date']}; groups of {GROUP}.\n"
            f"Load average {facts['load']:.1f} before and {facts['load_at_the_end']:.1f} after. {facts['figure']}."
        )
        (RESULTS / "cpu.md").write_text(f"{header}\n\n{table(rows)}\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
