"""Part 4: other people's kernels, in the same run, each in the configuration its authors recommend.

They are in adapters.py: `prepare(weight)` quantizes and packs one matrix and returns what is called with x. Before a
peer is timed its result is compared with the product of the unquantized weight: weights are uniform in [-1, 1], on
which even plain rounding to 3 bits with one scale a row is above 0.98, and a wrong layout or scale is far below.

A peer that is not installed, or fails, is named in the results with the reason.

First all of them compile what they compile, at once and untimed (their caches are on disk); tuning, where a peer
tunes, happens again alone, in the process that is timed.
"""

from __future__ import annotations

import functools
import importlib.util
import traceback
from typing import Any

import torch

from gpu_benchmark import kernels
from gpu_benchmark.adapters import PEERS, Peer
from gpu_benchmark.measure import Clock, cosine
from gpu_benchmark.shapes import Shape, in_two_passes, names, peer_shapes
from gpu_benchmark.tasks import Context, Task

MIN_COSINE = 0.98
WARM_SHARDS = 5


def shapes_and_rows(peer: Peer, smoke: bool) -> tuple[list[Shape], list[int]]:
    shapes, rows = kernels.shapes_and_rows(smoke)
    return shapes if smoke else peer_shapes(), [m for m in rows if peer.rows is None or m in peer.rows]


def warm_tasks(seconds: float, smoke: bool) -> list[Task]:
    """For every peer that compiles: some of the matrices, called once with every number of rows."""
    return [
        Task(f"compile {peer.name} {i}", functools.partial(warm, peer=peer, shapes=shapes), seconds)
        for peer in PEERS
        for i in range(WARM_SHARDS)
        if peer.compiles and _importable(peer) and (shapes := shapes_and_rows(peer, smoke)[0][i::WARM_SHARDS])
    ]


def warm(context: Context, *, peer: Peer, shapes: list[Shape]) -> None:
    """Compile, untimed. What fails here fails again, and is recorded, when it is measured."""
    peer.load()
    _, rows = shapes_and_rows(peer, context.smoke)
    for n, k in shapes:
        layer, _ = peer.prepare(torch.rand(n, k, device=context.device).mul_(2).sub_(1).to(peer.dtype))
        for m in rows:
            layer(torch.randn(m, k, device=context.device).to(peer.dtype))


def _importable(peer: Peer) -> bool:
    """Whether it is installed, without importing it: that is for children to do."""
    return all(importlib.util.find_spec(module.partition(".")[0]) is not None for module in peer.modules)


def tasks(seconds: float) -> list[Task]:
    """`seconds` for all; a peer that is missing leaves its part to the others."""
    share = seconds / max(1, sum(_importable(peer) for peer in PEERS))
    return [Task(peer.name, functools.partial(measure, peer=peer), share) for peer in PEERS]


def measure(context: Context, *, peer: Peer) -> None:
    """A row for each matrix and number of rows, few rows of x first. What fails, fails alone."""
    about = {"bits": peer.bits, "configuration": peer.configuration, "dtype": str(peer.dtype).removeprefix("torch.")}
    try:
        version = peer.load()
    except Exception as error:  # a broken installation raises anything at all
        context.emit({"missing": f"{type(error).__name__}: {error}", **about})
        return
    context.emit({"version": version, **about})
    torch.manual_seed(0)
    clock = Clock(context.device)
    plan = in_two_passes(*shapes_and_rows(peer, context.smoke))
    failed: set[Shape] = set()
    for i, ((n, k), ms) in enumerate(plan):
        if context.remaining() < 0:
            context.emit({"not_reached": names(plan[i:])})
            return
        if (n, k) in failed:
            continue
        try:
            measure_shape(context, clock, peer, n, k, ms)
        except Exception:
            failed.add((n, k))
            context.emit({"n": n, "k": k, "error": traceback.format_exc(limit=-3)})


def measure_shape(context: Context, clock: Clock, peer: Peer, n: int, k: int, rows: list[int]) -> None:
    weight = torch.rand(n, k, device=clock.device).mul_(2).sub_(1).to(peer.dtype)
    layer, nbytes = peer.prepare(weight)
    layers = [layer, *(peer.prepare(weight)[0] for _ in range(clock.num_copies(nbytes) - 1))]
    for m in rows:
        x = torch.randn(m, k, device=clock.device).to(peer.dtype)
        row: dict[str, Any] = {"m": m, "n": n, "k": k, "packed_bytes": nbytes}
        row["cosine"] = cosine(layer(x), torch.nn.functional.linear(x, weight))
        if row["cosine"] > MIN_COSINE:  # false for a NaN
            row |= clock.time([lambda layer=layer, x=x: layer(x) for layer in layers], graph=peer.graph)
        else:
            row["error"] = f"cosine {row['cosine']:.3f} with the product of the unquantized weight: not timed"
        context.emit(row)
