"""Other people's kernels, each in the configuration that its authors recommend: how a layer of theirs is made.

Those with activations in 8 bits have one scale a token, chosen as it comes, and one a row of the weight, symmetric, as
our W4A8. torchao 0.18 has none for int8 x int4 on a GPU: its Int8DynamicActivationIntxWeightConfig computes in floating
point what an exported model will compute in integers.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

GROUP_SIZE = 128
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
    rows: tuple[int, ...] | None = None  # of x, that are measured; None: all

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


class Torchao(Peer):
    """A linear that torchao has quantized. `data`: the tensors of its weight."""

    package = "torchao"
    data: tuple[str, ...]

    @staticmethod
    def config() -> Any:
        raise NotImplementedError

    def prepare(self, weight: Tensor) -> tuple[Layer, int]:
        from torchao.quantization import quantize_

        n, k = weight.shape
        linear = nn.Linear(k, n, bias=False, device="meta", dtype=self.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(linear, self.config())
        if type(linear.weight) in (Tensor, nn.Parameter):
            raise RuntimeError(f"torchao left the {n} x {k} weight as it was")
        return self.layer(linear), sum(getattr(linear.weight, name).nbytes for name in self.data)

    def layer(self, linear: nn.Linear) -> Layer:
        return linear


class TorchaoInt4(Torchao):
    name, bits, data = "torchao int4", 4, ("qdata", "scale_and_zero")
    modules = ("torchao.quantization", "torchao.quantization.quantize_.workflows")
    configuration = "Int4WeightOnlyConfig(group_size=128, int4_packing_format=TILE_PACKED_TO_4D), which is tinygemm"

    @staticmethod
    def config() -> Any:
        """torchao's int4 configuration for this kind of GPU; its default packing needs a package of its own."""
        from torchao.quantization import Int4WeightOnlyConfig
        from torchao.quantization.quantize_.workflows import Int4PackingFormat

        return Int4WeightOnlyConfig(group_size=GROUP_SIZE, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D)


class TorchaoInt8(Torchao):
    """Compiled, as its documentation has it: eager, each step of quantizing the tokens is a kernel.

    It compiles and tunes for every matrix and number of rows, which takes seconds: fewer rows. torch's int8 matmul
    on CUDA wants more than 16.
    """

    name, bits, data, modules = "torchao W8A8", 8, ("qdata", "scale"), ("torchao.quantization",)
    configuration = "Int8DynamicActivationInt8WeightConfig(), torch.compile"
    compiles = True
    rows = (64, 1024, 2048)

    def load(self) -> str:
        version = super().load()
        for limit in ("recompile_limit", "accumulated_recompile_limit"):
            setattr(torch._dynamo.config, limit, 10_000)
        return version

    @staticmethod
    def config() -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return Int8DynamicActivationInt8WeightConfig()

    def layer(self, linear: nn.Linear) -> Layer:
        backend = "inductor" if linear.weight.is_cuda else "eager"
        return torch.compile(linear, dynamic=False, backend=backend)


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


class GemliteW4A8(Gemlite):
    """Its own A8W4 helpers take fp8 activations where nothing else is said; INT8 x 4 bits is its general layer."""

    name = "gemlite W4A8"
    configuration = "GemLiteLinear, input INT8, scaled_activations, zeros 8, its own autotuning; configs as gemlite W4"

    def prepare(self, weight: Tensor) -> tuple[Layer, int]:
        from gemlite import DType, GemLiteLinear

        n, k = weight.shape
        scale = weight.float().abs().amax(1, keepdim=True) / 7.5
        q = ((weight.float() / scale).round() + 8).clamp(0, 15).to(torch.uint8)
        layer = GemLiteLinear(
            4,
            group_size=k,
            in_features=k,
            out_features=n,
            input_dtype=DType.INT8,
            output_dtype=DType.FP16,
            scaled_activations=True,
        )
        layer.pack(q, scale, zeros=8)
        return layer, sum(t.nbytes for t in (layer.W_q, layer.scales))


class Humming(Peer):
    """Symmetric, as its documentation has it: no zero points, so fewer bytes than our W3A16.

    int8: activations in 8 bits.
    """

    package, modules = "humming-kernels", ("humming", "humming.layer")
    compiles = True

    def __init__(self, bits: int, int8: bool = False) -> None:
        self.bits, self.name = bits, f"humming W{bits}" + ("A8" if int8 else "")
        self.weight_config = {"dtype": f"uint{bits}", "group_size": 0 if int8 else GROUP_SIZE}  # 0: one scale a row
        self.input_config = {"dtype": "int8"} if int8 else None
        inputs = "int8 x, a scale a token and row" if int8 else "group 128"
        self.configuration = f"HummingLayer, uint{bits}, {inputs}, its own choice of tile"

    def prepare(self, weight: Tensor) -> tuple[Layer, int]:
        from humming.layer import HummingLayer

        n, k = weight.shape
        layer = HummingLayer(
            shape_n=n,
            shape_k=k,
            weight_config=dict(self.weight_config),  # it writes into them
            input_config=self.input_config and dict(self.input_config),
            torch_dtype=self.dtype,
        ).to(weight.device)
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


PEERS: tuple[Peer, ...] = (
    *(Cublas(), TorchaoInt4(), Humming(3), Humming(4), Gemlite(), AnyPrecision()),
    *(TorchaoInt8(), Humming(4, int8=True), GemliteW4A8()),
)


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
