"""How many rows of x the fused kernel serves, and how it is cut: a model, until a GPU has measured it.

    more than 16 rows of x    the fused kernel, int3_gemm.py, in one of the cuts FEW, SOME, MANY and MOST
    from about 1,500 on       the weight dequantized once, then cuBLAS: `fused_serves` says from where

The model counts clock cycles. A program of the fused kernel takes one step for every 128 columns (times `slices`),
and a step costs the largest of what it asks of one SM:

    issue     instructions of a warp, counted in the SASS, * warps / 4 schedulers
    tensor    2 * block_n * block_m * 128 * slices flops
    shared    bytes of x: written by cp.async, read, on Hopper permuted and written again, and read there by every
              64 rows of the weight
    L2        bytes of x and of packed weight

What becomes of that is devices.py: programs that fit on an SM together share these, and hide each other's latency.

cuBLAS is taken to reach 2/3 of the tensor peak, or the bandwidth that a 16-bit weight needs. Dequantizing moves 2.4
bytes a weight and starts one more kernel: 10% of the matmul from M = 1,700 rows of x on an H200 (2.4 / bandwidth =
0.1 * 2 M / (2/3 peak)), whatever the layer. The fused kernel has to serve below, and has little to gain above.

What it says of a H200, bf16, groups of 128, 8192 x 8192, against that ideal cuBLAS: 1.5x at 64 rows of x, 1.0x at
128, 0.86x from 256 to 1,024 (bound by L2 and shared memory, not arithmetic), then dequantized, 0.88x at 1,536 and
0.91x at 2,048. Layers with few rows of weight fare worse, down to 0.7x at 256.
"""

import dataclasses
import functools

import torch

from mbq_ao.kernels.devices import LAUNCH, ceil_div, device_of, row_bucket

_LATENCY = 800  # cycles of a step that waits for everything in turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmConfig:
    """How the fused kernel is cut into programs.

    block_n, block_m: rows of the weight and of x a program; block_n in whole tiles of 32.
    block_k: columns a dot product, 32, 64 or 128.
    slices: column tiles in work at once, each by warps of its own and summed at the end; then block_n is 32.
    splits: parts of K, each by programs of its own; fp32 parts are then summed by a second kernel, in their order.
    num_stages: of loads in flight, plus one.
    max_registers: a thread. None is ptxas's choice, which can be to spill for the sake of a third program an SM.
    """

    block_n: int = 128
    block_m: int
    block_k: int = 32
    slices: int = 1
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None

    def __post_init__(self) -> None:
        if self.block_n % 32 or self.block_k not in (32, 64, 128) or self.slices not in (1, 2, 4, 8):
            raise ValueError(
                "block_n must be a multiple of 32, block_k 32, 64 or 128 and slices 1, 2, 4 or 8, got "
                f"block_n={self.block_n}, block_k={self.block_k}, slices={self.slices}"
            )
        powers = (self.block_n, self.block_m, self.num_warps)
        if any(value & (value - 1) for value in powers) or self.block_m < 16:
            raise ValueError(
                f"block_n, block_m and num_warps must be powers of two and block_m at least 16, got {powers}"
            )
        if self.slices > 1 and self.block_n != 32:
            raise ValueError(f"slices={self.slices} of K need block_n=32, a row tile a warp, got {self.block_n}")


# Several warps share a row tile, each with its own columns: for layers with too few row tiles to fill a GPU.
FEW = GemmConfig(block_n=32, block_m=32, slices=4, max_registers=255)
# With a third stage shared memory would have room for one program an SM.
SOME = GemmConfig(block_n=32, block_m=64, slices=4, num_stages=2, max_registers=255)
# A warp a row tile, x shared by the four of them.
MANY = GemmConfig(block_m=64, max_registers=255)
MOST = GemmConfig(block_m=128, max_registers=255)


def default_gemm_config(
    num_rows: int, n: int, k: int, group_size: int, dtype: torch.dtype, capability: tuple[int, int]
) -> GemmConfig:
    """The cut that the model finds fastest for (num_rows, K) x (N, K)^T on a GPU of this compute capability."""
    return _best(row_bucket(num_rows), n, k, group_size, dtype, capability)[0]


def fused_serves(
    num_rows: int, n: int, k: int, group_size: int, dtype: torch.dtype, capability: tuple[int, int]
) -> bool:
    """Whether the fused kernel is faster than dequantizing the weight once and cuBLAS, by the model."""
    num_rows = row_bucket(num_rows)
    cycles = _best(num_rows, n, k, group_size, dtype, capability)[1]
    return cycles <= dequantize_cycles(n, k, capability) + cublas_cycles(num_rows, n, k, capability)


def split_of(config: GemmConfig, k: int) -> tuple[int, int]:
    """Column tiles of a split, and how many splits that makes of K, at most config.splits."""
    steps = ceil_div(k, 128 * config.slices)
    split_steps = ceil_div(steps, config.splits)
    return split_steps * config.slices, ceil_div(steps, split_steps)


def fused_cycles(
    config: GemmConfig, num_rows: int, n: int, k: int, group_size: int, dtype: torch.dtype, capability: tuple[int, int]
) -> float:
    """The model's clock cycles of the fused kernel."""
    device = device_of(capability)
    split_tiles, num_splits = split_of(config, k)
    programs = ceil_div(n, config.block_n) * ceil_div(num_rows, config.block_m) * num_splits
    columns = 128 * config.slices
    own_instruction = device.peak > device.mma and config.slices == 1  # wgmma, not mma.sync

    x_bytes = config.block_m * columns * 2
    word_bytes = config.block_n * columns * 3 // 8
    if own_instruction:
        shared = x_bytes * (3 + config.block_n // 64)
    else:
        shared = x_bytes * (1 + config.num_warps // config.slices)
    flops = 2 * config.block_n * config.block_m * columns
    step = max(
        _instructions(config, group_size, dtype, own_instruction) * config.num_warps / 4,
        flops / (device.peak if own_instruction else device.mma),
        shared / 128,
        (x_bytes + word_bytes) / device.l2,
    )
    stages = max(1, config.num_stages - 1)
    return device.kernel_cycles(
        programs=programs,
        steps=split_tiles // config.slices,
        step=step,
        latency=_LATENCY,
        shared_memory=stages * (x_bytes + word_bytes) + (1 << 14),
        registers=32 * config.num_warps * _REGISTERS[config.block_m],
        bytes_read=0.4 * n * k,
        split_outputs=num_splits * num_rows * n if num_splits > 1 else 0,
    )


def cublas_cycles(num_rows: int, n: int, k: int, capability: tuple[int, int]) -> float:
    """The model's clock cycles of the matmul with a 16-bit weight."""
    device = device_of(capability)
    compute = 2 * num_rows * n * k / (device.num_sms * device.peak * 2 / 3)
    memory = 2 * (n * k + num_rows * (n + k)) / (device.memory * device.num_sms)
    return LAUNCH + max(compute, memory)


def dequantize_cycles(n: int, k: int, capability: tuple[int, int]) -> float:
    """The model's clock cycles of writing the 16-bit weight."""
    device = device_of(capability)
    return LAUNCH + 2.4 * n * k / (device.memory * device.num_sms)


@functools.lru_cache(4096)
def _best(
    num_rows: int, n: int, k: int, group_size: int, dtype: torch.dtype, capability: tuple[int, int]
) -> tuple[GemmConfig, float]:
    configs = [dataclasses.replace(cut, splits=splits) for cut in cuts(capability) for splits in (1, 2, 3, 4, 6, 8)]
    timed = [(config, fused_cycles(config, num_rows, n, k, group_size, dtype, capability)) for config in configs]
    return min(timed, key=lambda item: item[1])


def cuts(capability: tuple[int, int]) -> tuple[GemmConfig, ...]:
    """The cuts to choose from, few rows of x to most; none spills."""
    device = device_of(capability)
    if device.peak > device.mma:  # asynchronous dot products, with a wait after each
        return FEW, SOME, dataclasses.replace(MANY, block_k=64, max_registers=None), MOST
    # MOST has no registers left for the scales of four groups a tile, and does not save anything here.
    return FEW, SOME, MANY


_REGISTERS = {16: 128, 32: 150, 64: 180, 128: 255, 256: 255}  # a thread, by block_m


def _instructions(config: GemmConfig, group_size: int, dtype: torch.dtype, own_instruction: bool) -> float:
    """Of a warp and step, 128 weights a thread; fitted to the SASS of bf16 with groups of 128."""
    count = 370 + 0.5 * config.block_m if own_instruction else 330 + 3 * config.block_m
    count += 50 if dtype == torch.float16 else 0
    return count + {32: 70, 64: 30}.get(group_size, 0)
