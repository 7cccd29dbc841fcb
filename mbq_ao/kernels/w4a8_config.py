"""How the W4A8 kernel is cut into programs: arithmetic (devices.py), until a GPU has measured it.

    1 .. 8 tokens    FUSED, FUSED_SMALL    a program's warps share its rows of the weight and have columns of their own
    .. 16            FEW, FEW_SMALL        the same
    .. about 64      SOME                  on Hopper one warp group, 64 rows of the weight
    more             MANY, MOST            on Hopper two

A fused program quantizes the tokens for itself, before its loop for their scales and again in it for their integers:
110 instructions a step and warp, for one to 8 tokens, instead of a kernel of its own.

A step of the kernel's loop costs the largest of what it asks of one SM:

    issue     instructions of a warp, counted in the SASS, * warps / 4 schedulers
    tensor    2 * block_n * block_m * columns operations, twice the rate of 16 bits
    shared    bytes of xq and packed words: written by cp.async, and read, xq by every 64 rows of the weight on Hopper
              and by every warp elsewhere
    L2        bytes of xq and of packed words
"""

import dataclasses
import functools

from mbq_ao.kernels.devices import LAUNCH, ceil_div, device_of, row_bucket

_MAX_COLUMNS = 1 << 17  # of a program, whose sums are int32: 16 * 8 * 127 * 2^17 < 2^31
_STEP_LATENCY = 200  # cycles from a barrier to the end of a dot product, at least
_MEMORY_LATENCY = 800


@dataclasses.dataclass(frozen=True, kw_only=True)
class W4A8Config:
    """How the kernel is cut into programs.

    block_n, block_m: rows of the weight and tokens a program; block_n in whole tiles of 16.
    block_k: columns a slice and step of the loop, 64 or 128; 64 with groups that are no multiple of 128.
    slices: parts of a step's columns, each by warps of its own and summed at the end.
    splits: parts of K, each by programs of its own; fp32 parts are then summed by a second kernel, in their order.
    num_stages: of loads in flight, plus one.
    fused: every program quantizes the tokens, at most block_m, for itself: one kernel less. Needs slices > 1.
    """

    block_n: int
    block_m: int
    block_k: int = 128
    slices: int = 1
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4
    fused: bool = False

    def __post_init__(self) -> None:
        powers = (self.block_n, self.block_m, self.slices, self.num_warps)
        if any(value < 1 or value & (value - 1) for value in powers) or self.splits < 1:
            raise ValueError(
                f"block_n, block_m, slices and num_warps must be powers of two, got {powers}, and splits at least 1, "
                f"got {self.splits}"
            )
        if self.block_n < 16 or self.block_m < 8 or self.block_k not in (64, 128) or self.slices > 8:
            raise ValueError(
                "block_n must be at least 16, block_m 8, block_k 64 or 128 and slices at most 8, got "
                f"block_n={self.block_n}, block_m={self.block_m}, block_k={self.block_k}, slices={self.slices}"
            )
        if self.fused and (self.slices == 1 or self.block_k != 64):
            raise ValueError(
                f"fused=True needs slices of K and block_k=64, got slices={self.slices}, block_k={self.block_k}"
            )

    def serves(self, num_rows: int) -> bool:
        """Whether it can be used for so many tokens; a grid has at most 65,535 programs in this direction."""
        return num_rows <= self.block_m * (1 if self.fused else 65535)


FEW_SMALL = W4A8Config(block_n=16, block_m=8, block_k=64, slices=8, num_warps=8, num_stages=6)
FEW = W4A8Config(block_n=32, block_m=8, block_k=64, slices=4, num_stages=6)
FUSED_SMALL = W4A8Config(block_n=32, block_m=8, block_k=64, slices=8, num_warps=8, num_stages=6, fused=True)
FUSED = W4A8Config(block_n=64, block_m=8, block_k=64, slices=4, num_stages=6, fused=True)
SOME = W4A8Config(block_n=64, block_m=32)
MANY = W4A8Config(block_n=128, block_m=128, num_warps=8)
MOST = W4A8Config(block_n=128, block_m=256, num_warps=8, num_stages=3)
CUTS = (
    FEW_SMALL,
    FEW,
    FUSED,
    FUSED_SMALL,
    dataclasses.replace(FEW_SMALL, block_m=16),
    dataclasses.replace(FEW, block_m=16),
    SOME,
    dataclasses.replace(SOME, block_m=64),
    MANY,
    MOST,
)
# Counted by benchmarks/w4a8_sass_report.py on sm_90: registers a thread, and instructions of a step's warp. With a
# scale a group the sums are held twice.
_REGISTERS = {8: 56, 16: 62, 32: 64, 64: 90, 128: 128, 256: 254}


def default_w4a8_config(num_rows: int, n: int, k: int, group: int, capability: tuple[int, int]) -> W4A8Config:
    """The cut that the model finds fastest for x (num_rows, K) and an (N, K) weight; group: 0 for one scale a row."""
    if num_rows > 16:
        num_rows = row_bucket(num_rows)
    return _best(num_rows, n, k, group, capability)[0]


def w4a8_cycles(config: W4A8Config, num_rows: int, n: int, k: int, group: int, capability: tuple[int, int]) -> float:
    """The model's clock cycles, with those of quantizing x."""
    device = device_of(capability)
    wgmma = capability >= (9, 0) and capability < (12, 0) and config.slices == 1 and config.block_n >= 64
    split_tiles, num_splits = split_of(config, k)
    columns = config.slices * config.block_k
    x_bytes, word_bytes = config.block_m * columns, config.block_n * columns // 2
    readers = config.block_n // 64 if wgmma else max(1, config.num_warps // config.slices // 2)
    outputs = config.block_n * config.block_m / (32 * config.num_warps / config.slices)  # a thread
    instructions = 50 + config.block_n * config.block_k * config.slices / (64 * config.num_warps)
    if not wgmma:
        instructions += config.block_k / 32 * outputs / 4  # dot products
    quantizing = LAUNCH + 3 * num_rows * k / (device.memory * device.num_sms)
    if config.fused:
        quantizing = _MEMORY_LATENCY * ceil_div(k, 4096)
        instructions += 110 * config.block_k // 64
    if group:
        instructions += 3 * outputs * max(1, config.block_k // group)
    step = max(
        instructions * config.num_warps / 4,
        config.block_n * config.block_m * columns / (device.peak if wgmma else device.mma),
        (x_bytes * (1 + readers) + 2 * word_bytes) / 128,
        (x_bytes + word_bytes) / device.l2,
    )
    stages = config.num_stages - 1
    registers = _REGISTERS[config.block_m] + (config.block_m // 2 if group else 0)
    return quantizing + device.kernel_cycles(
        programs=ceil_div(n, config.block_n) * ceil_div(num_rows, config.block_m) * num_splits,
        steps=split_tiles * 64 // columns,
        step=step,
        latency=max(_STEP_LATENCY, 2 * instructions, _MEMORY_LATENCY / stages),
        shared_memory=stages * (x_bytes + word_bytes) + 2048,
        registers=32 * config.num_warps * registers,
        bytes_read=0.5 * n * k + num_rows * k,
        split_outputs=num_splits * num_rows * n if num_splits > 1 else 0,
    )


def split_of(config: W4A8Config, k: int) -> tuple[int, int]:
    """Column tiles of a split, and how many splits that makes of K, at least as many as the integers need."""
    step = config.slices * config.block_k // 64
    steps = ceil_div(k, 64 * step)
    split_steps = ceil_div(steps, max(config.splits, ceil_div(k, _MAX_COLUMNS)))
    return split_steps * step, ceil_div(steps, split_steps)


def cuts_for(group: int) -> list[W4A8Config]:
    """The cuts to choose from; none spills."""
    if group == 0:
        return list(CUTS)
    cuts = [cut for cut in CUTS if cut is not MOST]  # which has no registers left for a second sum
    return [dataclasses.replace(cut, block_k=64) for cut in cuts] if group % 128 else cuts


@functools.lru_cache(4096)
def _best(num_rows: int, n: int, k: int, group: int, capability: tuple[int, int]) -> tuple[W4A8Config, float]:
    cuts = cuts_for(group)
    # A dot product for 8 tokens has no place for more.
    cuts = [cut for cut in cuts if cut.serves(num_rows) and (cut.block_m >= min(num_rows, 16) or cut.slices == 1)]
    configs = [dataclasses.replace(cut, splits=splits) for cut in cuts for splits in (1, 2, 3, 4, 6, 8)]
    timed = [(config, w4a8_cycles(config, num_rows, n, k, group, capability)) for config in configs]
    return min(timed, key=lambda item: item[1])
