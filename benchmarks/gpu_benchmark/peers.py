"""Part 3: other people's kernels, in the same run, each in the configuration its authors recommend.

An adapter is `prepare(weight)`, which quantizes and packs one matrix and returns what is called with x. Before it is
timed its result is compared with the product of the unquantized weight: weights are uniform in [-1, 1], on which even
plain rounding to 3 bits with one scale a row is above 0.98, and a wrong layout or a wrong scale is far below.

A peer that is not installed, or fails, is named in the results with the reason.

First all of them compile what they compile, at once and untimed (their caches are on disk); tuning, where a peer
tunes, happens again alone, in the process that is timed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.resources
import importlib.util
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpu_benchmark.kernels import GROUP_SIZE, shapes_and_rows
from gpu_benchmark.measure import Clock, cosine
from gpu_benchmark.tasks import Context, Task

MIN_COSINE = 0.98
MAX_ROWS_FIRST = 16  # decoding is what the kernels are for: measured for every matrix before prefill is for any
WARM_SHARDS = 5
Layer = Callable[[Tensor], Tensor]


class Peer:
    """One library. `modules` must be importable; `graph` is False where its launches cannot be captured."""

    name: str
    bits: float
    package: str
    modules: tuple[str, ...]
    dtype = torch.bfloat16
    graph = True
    compiles = False  # at the first call, and keeps it on disk
    configuration = ""

    def load(self) -> str:
        """Import it and return its version. Raises ImportError."""
        for module in self.modules:
            importlib.import_module(module)
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown version"

    def prepare(self, weight: Tensor) -> tuple[Layer, int]:
        """The layer of an (N, K) weight in self.dtype, and the bytes of its packed weight."""
        raise NotImplementedError


class Cublas(Peer):
    name, bits, package, modules = "cuBLAS bf16", 16, "torch", ("torch",)
    configuration = "torch.nn.functional.linear"

    def prepare(self, weight: Tensor) -> tuple[Layer, int]:
        weight = weight.clone()  # each copy has to be another piece of memory
        return lambda x: torch.nn.functional.linear(x, weight), weight.nbytes


class TorchaoInt4(Peer):
    name, bits, package = "torchao int4", 4, "torchao"
    modules = ("torchao.quantization", "torchao.quantization.quantize_.workflows")
    configuration = "Int4WeightOnlyConfig(group_size=128, int4_packing_format=TILE_PACKED_TO_4D), which is tinygemm"

    @staticmethod
    def config() -> Any:
        """torchao's int4 configuration for this kind of GPU; its default packing needs a package of its own."""
        from torchao.quantization import Int4WeightOnlyConfig
        from torchao.quantization.quantize_.workflows import Int4PackingFormat

        return Int4WeightOnlyConfig(group_size=GROUP_SIZE, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D)

    def prepare(self, weight: Tensor) -> tuple[Layer, int]:
        from torchao.quantization import quantize_

        n, k = weight.shape
        linear = nn.Linear(k, n, bias=False, device="meta", dtype=self.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(linear, self.config())
        if type(linear.weight) in (Tensor, nn.Parameter):
            raise RuntimeError(f"torchao left the {n} x {k} weight as it was")
        return linear, linear.weight.qdata.nbytes + linear.weight.scale_and_zero.nbytes


class Gemlite(Peer):
    """Values and scales as HQQ's, w = (q - zero) * scale; fp16, as in its own examples and benchmarks."""

    name, bits, package, modules = "gemlite W4", 4, "gemlite", ("gemlite", "gemlite.helper")
    dtype = torch.float16
    compiles = True
    configuration = "A16W4_HQQ_INT, group 128, its own autotuning; its H100 table on another Hopper GPU"

    def load(self) -> str:
        version = super().load()
        gemlite = importlib.import_module("gemlite")
        # It ships tuned configurations by GPU name, none for the H200, whose multiprocessors are the H100's.
        core = importlib.import_module("gemlite.core")
        if core.get_default_cache_config() is None and torch.cuda.get_device_capability() == (9, 0):
            gemlite.load_config(str(importlib.resources.files("gemlite") / "configs" / "h100.json"))
        return version

    def prepare(self, weight: Tensor) -> tuple[Layer, int]:
        from gemlite.helper import A16W4_HQQ_INT

        q, scale, zero = round_to_grid(weight, 15)
        n = weight.shape[0]
        layer = A16W4_HQQ_INT(device=str(weight.device), dtype=self.dtype).from_weights(
            q, scale.to(self.dtype).view(n, -1), zero.to(self.dtype).view(n, -1)
        )
        return layer, sum(t.nbytes for t in (layer.W_q, layer.scales, layer.zeros))


class Humming(Peer):
    """Symmetric, as its documentation has it: no zero points, so fewer bytes than ours."""

    package, modules = "humming-kernels", ("humming", "humming.layer")
    compiles = True

    def __init__(self, bits: int) -> None:
        self.bits, self.name = bits, f"humming W{bits}"
        self.configuration = f"HummingLayer, uint{bits}, group 128, its own choice of tile"

    def prepare(self, weight: Tensor) -> tuple[Layer, int]:
        from humming.layer import HummingLayer

        n, k = weight.shape
        config = {"dtype": f"uint{self.bits}", "group_size": GROUP_SIZE}
        layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=self.dtype).to(weight.device)
        layer.load_from_unquantized(weight)
        layer.transform()
        return layer, sum(p.nbytes for p in layer.parameters())


class AnyPrecision(Peer):
    """Non-uniform, one table of eight values a row; here eight equally spaced ones. Its kernel takes up to 8 rows.

    Its launches go to the default stream, which a CUDA graph cannot capture.
    """

    name, bits, package, modules = "any-precision-llm W3", 3, "any_precision_ext", ("any_precision_ext",)
    dtype = torch.float16
    graph = False
    configuration = "matmul_kbit up to 8 rows, dequant_kbit and matmul above, as AnyPrecisionLinear does"

    def prepare(self, weight: Tensor) -> tuple[Layer, int]:
        from any_precision_ext import dequant_kbit, matmul_kbit

        q, scale, zero = round_to_grid(weight, 7, group_size=weight.shape[1])
        planes = pack_bitplanes(q, 3)
        table = ((torch.arange(8, device=weight.device) - zero.view(-1, 1)) * scale.view(-1, 1)).to(self.dtype)

        def layer(x: Tensor) -> Tensor:
            if x.shape[0] <= 8:
                return matmul_kbit(x, planes, table, 3)
            return x @ dequant_kbit(planes, table, 3).T

        return layer, planes.nbytes + table.nbytes


PEERS: tuple[Peer, ...] = (Cublas(), TorchaoInt4(), Humming(3), Humming(4), Gemlite(), AnyPrecision())


def round_to_grid(weight: Tensor, highest: int, group_size: int = GROUP_SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 values (N, K) in 0..highest, and fp32 scale and zero (N, K / group_size, 1): w ~ (q - zero) * scale."""
    grouped = weight.float().unflatten(1, (-1, group_size))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = (high - low) / highest
    zero = (-low / scale).round()
    q = (grouped / scale + zero).round().clamp(0, highest).to(torch.uint8).flatten(1)
    return q, scale, zero


def pack_bitplanes(q: Tensor, bits: int) -> Tensor:
    """any-precision-llm's `qweight`: (bits, N, K / 32) int32, the highest bit first.

    The 32 threads of a warp share 1024 columns (fewer at a row's end). Thread t's word holds columns 8 t .. 8 t + 7 of
    each quarter of them, the first quarter in its highest byte, the first column in the byte's highest bit.
    """
    n, k = q.shape
    words = []
    for start in range(0, k, 1024):
        chunk = q[:, start : start + 1024].to(torch.int64)
        threads = chunk.shape[1] // 32
        chunk = chunk.view(n, 4, threads, 8).transpose(1, 2).reshape(n, threads, 32)
        place = 31 - torch.arange(32, device=q.device)
        words.append(torch.stack([(((chunk >> bit) & 1) << place).sum(-1) for bit in reversed(range(bits))]))
    packed = torch.cat(words, -1)
    return (packed - ((packed >> 31) << 32)).to(torch.int32)  # as a signed word


def warm_tasks(seconds: float, smoke: bool) -> list[Task]:
    """For every peer that compiles: some of the matrices, called once with every number of rows."""
    shapes, _ = shapes_and_rows(smoke)
    return [
        Task(f"compile {peer.name} {i}", functools.partial(warm, peer=peer, shapes=shapes[i::WARM_SHARDS]), seconds)
        for peer in PEERS
        for i in range(WARM_SHARDS)
        if peer.compiles and _importable(peer)
    ]


def warm(context: Context, *, peer: Peer, shapes: list[tuple[int, int]]) -> None:
    """Compile, untimed. What fails here fails again, and is recorded, when it is measured."""
    peer.load()
    _, rows = shapes_and_rows(context.smoke)
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
    shapes, rows = shapes_and_rows(context.smoke)
    few, many = ([m for m in rows if (m <= MAX_ROWS_FIRST) == first] for first in (True, False))
    plan = [(shape, few) for shape in shapes] + [(shape, many) for shape in shapes]
    failed: set[tuple[int, int]] = set()
    for i, ((n, k), ms) in enumerate(plan):
        if context.remaining() < 0:
            context.emit({"not_reached": [f"{n} x {k}, M {ms[0]} to {ms[-1]}" for (n, k), ms in plan[i:]]})
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
