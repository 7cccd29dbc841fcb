"""How the decoding kernel, int3_gemv.py, is cut into programs, and which constants it is compiled with.

A kernel of one or two microseconds is a matter of bytes in flight and of tails, which no instruction count shows: the
defaults here are arithmetic, to be replaced by what a GPU measures. A tuner passes other configurations.
"""

import dataclasses
import functools

import torch

from mbq_ao.kernels.int3_layout import TILE_K, TILE_N

MAX_ROWS = 16  # of x: two fragments of eight columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemvConfig:
    """How the work is cut; what it means is the same for every number of rows.

    num_warps: of a program; each takes chunks of K.
    row_tiles: row tiles, of 32 rows of the weight, of a program.
    col_tiles: column tiles, of 128 columns, of a chunk: 3 * row_tiles * col_tiles 16-byte loads in flight a lane.
    split_k: programs that share a row tile. More than one needs fp32 scratch and a second, small kernel.
    max_registers: of a thread, or None for what ptxas chooses.
    """

    num_warps: int = 4
    row_tiles: int = 1
    col_tiles: int = 8
    split_k: int = 1
    max_registers: int | None = None

    def __post_init__(self) -> None:
        if self.num_warps not in (1, 2, 4, 8, 16) or min(self.row_tiles, self.col_tiles, self.split_k) < 1:
            raise ValueError(
                "num_warps must be 1, 2, 4, 8 or 16, and row_tiles, col_tiles and split_k at least 1, got "
                f"{self.num_warps}, {self.row_tiles}, {self.col_tiles} and {self.split_k}"
            )


@functools.cache
def default_gemv_config(
    num_rows: int, n: int, k: int, group_size: int, dtype: torch.dtype, *, num_sms: int = 132
) -> GemvConfig:
    """A configuration for x (num_rows, k) and a weight (n, k), from arithmetic, not measured.

    As many loads in flight as registers allow, and K over as many warps as keep every SM supplied. K is split over
    programs only where they would leave half of the SMs idle for longer than a second kernel takes.
    """
    num_row_tiles, num_col_tiles = -(-n // TILE_N), -(-k // TILE_K)
    most = _most_col_tiles(_power_of_2(num_rows), group_size)
    split_k = 1
    if 2 * num_row_tiles <= num_sms and num_col_tiles >= 64:
        split_k = min(8, num_sms // num_row_tiles, num_col_tiles // 16)
    per_program = -(-num_col_tiles // split_k)
    few_programs = num_row_tiles * split_k < 2 * num_sms
    num_warps = 8 if few_programs and per_program > 4 * most else 4
    num_warps = min(num_warps, _power_of_2(per_program))
    per_warp = -(-per_program // num_warps)
    # Of the longer chunks, one that leaves the fewest tiles beyond the end of K.
    lengths = range(min(most, per_warp), min(most // 2, per_warp - 1), -1)
    col_tiles = min(lengths, key=lambda length: -(-per_warp // length) * length)
    return GemvConfig(num_warps=num_warps, col_tiles=col_tiles, split_k=split_k)


def _most_col_tiles(rows: int, group_size: int) -> int:
    """The column tiles of a chunk whose weights, x and scales fit into the registers of a thread."""
    small = group_size == 32
    return {1: 8, 2: 4 if small else 8, 4: 2 if small else 4, 8: 2 if small else 4, 16: 1 if small else 2}[rows]


def _power_of_2(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def gemv_constants(
    num_rows: int, k: int, group_size: int, dtype: torch.dtype, config: GemvConfig, stride_scale: int, stride_zero: int
) -> dict[str, int | bool]:
    """The constants of `_gemv_kernel` that follow from shapes.  group_size = 0: one scale a row."""
    rows = _power_of_2(num_rows)
    unit = group_size if group_size in (32, 64) else 128
    per_trip = config.split_k * config.num_warps * config.col_tiles
    even = k % (TILE_K * per_trip) == 0
    one_chunk = -(-k // TILE_K) <= per_trip
    bf16 = dtype == torch.bfloat16
    vector = 1
    if even and group_size == unit:
        units = config.col_tiles * (TILE_K // unit)
        vector = max(
            v for v in ((1, 2) if rows < 8 else (1, 2, 4)) if not (units % v or stride_scale % v or stride_zero % v)
        )
    return {
        "GROUP": group_size,
        "ROWS": rows,
        "WARPS": config.num_warps,
        "ROW_TILES": config.row_tiles,
        "COL_TILES": config.col_tiles,
        "SPLIT_K": config.split_k,
        "BF16": bf16,
        # Fewer instructions a weight, more a set and, for fp16, more registers than a loop leaves.
        "BY_BLOCK": unit >= 64 and (rows <= 2 if bf16 else rows == 1 and one_chunk),
        "EVEN": even,
        "ONE_CHUNK": one_chunk,
        "VECTOR": vector,
    }
