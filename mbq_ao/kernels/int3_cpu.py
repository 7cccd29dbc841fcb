"""The linear layer on a CPU: few rows of x by a kernel that torch.compile writes in C++, many by dequantizing.

The compiled kernel reads the packed tiles where they lie (layout.py): no second copy of the weight. Seen as int32
words of two halves, a plane of a tile is (g, t, hi, up), and the sixteen words (t, hi, up) of one g are contiguous:
they are the lanes of the kernel's vectors. A field's column depends on (t, hi) and its row on up, so

    y[16 block + 8 up + g] = sum over (t, hi) of
        sum over tiles  scale * sum over (pair, slab, odd) field * x  -  scale * zero_point * sum of the same x

is, but for the first sum, sixteen independent lanes: load, mask, convert, multiply and add. Fields are used where
they stand in the word, 2^bit too big, and x comes 2^-bit smaller, which is exact.

One row of x is one call. So the number of rows is in no shape, a row's result does not depend on its neighbours, and
N and K are dynamic: a model compiles once for its groups of 128 columns and more, once for 64, once for 32, whatever
its layers; another number of threads compiles again. Rejected: unrolling over rows, to unpack once for several. It
runs out of registers and was slower than a call a row.

When: at the first call with few rows for the size of the weight, in eager and inside a compiled model alike.
It takes some ten seconds, on a busy machine up to a minute, and less once torch has the result on disk; a model of
half a billion parameters loses more by unpacking within the first dozens of tokens. The choice depends on sizes
alone, so that a call always has the same bits. MBQ_AO_CPU_COMPILE=0 in the environment turns it off. Where
torch.compile finds no C++ compiler one warning says so and the weight is unpacked instead.

Rejected: words with N innermost, a layout of its own: no fewer instructions, and it would need the weight twice.
"""

import contextlib
import functools
import logging
import operator
import os
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from mbq_ao.kernels.layout import FIELDS, TILE_K, TILE_N
from mbq_ao.kernels.reference import dequantize_reference

logger = logging.getLogger(__name__)

MAX_ROWS = 16  # beyond, unpacking once is cheaper than unpacking in registers for each row
MIN_WEIGHTS_PER_ROW = 1 << 17  # calling the kernel takes as long as unpacking so many; a toy model compiles nothing
_CHUNK = 1 << 21  # weights dequantized at a time: they stay in the cache until they are multiplied
_R = 5
_LANES = 16  # t, hi, up

# torch.compile must not store the unpacked fields; FMA halves the rounding and the instructions.
_OPTIONS = {
    "realize_opcount_threshold": 1 << 20,
    "realize_reads_threshold": 1 << 20,
    "realize_acc_reads_threshold": 1 << 20,
    "cpp.enable_floating_point_contract_flag": "fast",
}


def int3_linear_cpu(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """`ops.int3_linear` for tensors on a CPU; arguments as checked there. Accumulates in fp32."""
    rows = x.reshape(-1, x.shape[-1])
    y = None
    if _worth_compiling(rows.shape[0], qdata):
        y = _linear_compiled(rows, qdata, scale, zero_point, group_size)
    if y is None:
        y = _linear_dequantized(rows, qdata, scale, zero_point, group_size)
    y = y if bias is None else y + bias.to(y.dtype)
    return y.to(x.dtype).contiguous().view(*x.shape[:-1], scale.shape[0])


def _linear_dequantized(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> Tensor:
    """x @ W.T, W being unpacked in pieces that fit a cache. In x's dtype where the CPU multiplies it, else in fp32."""
    n, k = scale.shape[0], x.shape[1]
    dtype = x.dtype if _multiplies(x.dtype) else torch.float32
    x = x.to(dtype)
    y = x.new_empty((x.shape[0], n))
    step = max(_CHUNK // max(k, 1) // TILE_N, 1) * TILE_N
    for start in range(0, n, step):
        rows, tiles = slice(start, start + step), slice(start // TILE_N, (start + step) // TILE_N)
        weight = dequantize_reference(qdata[tiles], scale[rows], zero_point[rows], k, group_size, dtype)
        y[:, rows] = torch.nn.functional.linear(x, weight)
    return y


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether matmuls of this dtype have instructions here; without, torch emulates 16 bits, far slower than fp32."""
    if dtype == torch.float32:
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()


# --- the compiled kernel ----------------------------------------------------------------------------------------

_no_compiler = threading.Event()
_first_call = threading.Lock()  # threads that call at once would each compile
_compiled: set[int] = set()


def _worth_compiling(num_rows: int, qdata: Tensor) -> bool:
    num_row_tiles, num_col_tiles = qdata.shape[:2]
    if _no_compiler.is_set() or os.environ.get("MBQ_AO_CPU_COMPILE", "1") == "0":
        return False
    if not 0 < num_rows <= MAX_ROWS or min(num_row_tiles, num_col_tiles) < 2:  # a size of 1 would be compiled for apart
        return False
    return num_rows * MIN_WEIGHTS_PER_ROW <= num_row_tiles * num_col_tiles * TILE_N * TILE_K


def _linear_compiled(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> Tensor | None:
    """x @ W.T in fp32, or None, after a warning, where the kernel cannot be compiled."""
    num_row_tiles, num_col_tiles = qdata.shape[:2]
    per_tile = 1 if scale.shape[1] == 1 else max(TILE_K // group_size, 1)
    lanes = torch.empty((x.shape[0], num_row_tiles, 2, 8, _LANES))
    # The mode is a guard of the compiled kernel, and so is the kind of its inputs: they are always the same.
    with torch.inference_mode():
        words = _words(qdata)
        factors = _factors(scale, zero_point, group_size, num_row_tiles, num_col_tiles, per_tile)
        x_lanes, x_sums = _lanes(x, num_col_tiles, per_tile)
        try:
            with _first_call if per_tile not in _compiled else contextlib.nullcontext():
                lanes[0] = _kernel(per_tile)(words, x_lanes[0], x_sums[0], factors)
                _compiled.add(per_tile)
            for row in range(1, x.shape[0]):
                lanes[row] = _kernel(per_tile)(words, x_lanes[row], x_sums[row], factors)
        except RuntimeError as error:
            _no_compiler.set()
            warnings.warn(
                "mbq_ao: torch.compile could not build the 3-bit CPU kernel, so each linear unpacks its weight, "
                f"which is right but slow; is there a C++ compiler? ({type(error).__name__}: {_first_line(error)})",
                stacklevel=2,
            )
            return None
    y = lanes.view(*lanes.shape[:-1], 8, 2).sum(4)  # row, row tile, block, g, up
    return y.transpose(3, 4).reshape(x.shape[0], -1)[:, : scale.shape[0]]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _words(qdata: Tensor) -> Tensor:
    """The halves as int32 (row tile, column tile, plane, g, lane). A slice of columns is copied."""
    if not qdata.is_contiguous() or qdata.storage_offset() % 2:
        qdata = qdata.clone(memory_format=torch.contiguous_format)
    return qdata.view(torch.int32).view(*qdata.shape[:3], 8, _LANES)


def _factors(
    scale: Tensor, zero_point: Tensor, group_size: int, num_row_tiles: int, num_col_tiles: int, per_tile: int
) -> Tensor:
    """scale and scale * zero_point in fp32: (row tile, block, up, g, column tile, group of the tile, 2)."""
    n, num_groups = scale.shape
    scale = scale.float()
    both = torch.view_as_real(torch.complex(scale, scale * zero_point))
    if num_groups == 1:
        both = both.expand(n, num_col_tiles, 2)
    elif group_size > TILE_K:
        both = both.repeat_interleave(group_size // TILE_K, dim=1)[:, :num_col_tiles]
    padding = (0, 0, 0, num_col_tiles * per_tile - both.shape[1], 0, num_row_tiles * TILE_N - n)
    both = torch.nn.functional.pad(both, padding) if any(padding) else both.contiguous()
    return both.view(num_row_tiles, 2, 2, 8, num_col_tiles, per_tile, 2)


def _lanes(x: Tensor, num_col_tiles: int, per_tile: int) -> tuple[Tensor, Tensor]:
    """x in the order of the lanes, for each row of it.

    Returns (rows, column tile, 16 fields, lane), times 2^-bit of the field, and its sums over the fields of a group,
    (rows, column tile, group of the tile, lane).
    """
    num_rows, k = x.shape
    x = torch.nn.functional.pad(x.float(), (0, num_col_tiles * TILE_K - k))
    column, factor = _order_of_lanes()
    lanes = x.reshape(-1, TILE_K).index_select(1, column)
    sums = lanes.view(-1, 2, per_tile, 8 // per_tile, _LANES).sum((1, 3))  # over odd, and the pairs of the group
    lanes *= factor
    return lanes.view(num_rows, num_col_tiles, 16, _LANES), sums.view(num_rows, num_col_tiles, per_tile, _LANES)


@functools.cache
def _order_of_lanes() -> tuple[Tensor, Tensor]:
    """For each (odd, pair, slab; t, hi, up): the column in the tile, and 2^-bit."""
    places = [
        (32 * pair + 8 * t + 4 * slab + 2 * hi + odd, 2.0 ** -(16 * odd + _bit(pair, slab)))
        for odd in range(2)
        for pair in range(4)
        for slab in range(2)
        for t in range(4)
        for hi in range(2)
        for _up in range(2)
    ]
    with torch.inference_mode(False):
        return torch.tensor([column for column, _ in places]), torch.tensor([factor for _, factor in places])


def _bit(pair: int, slab: int) -> int:
    """Where the kernel has the fields of a slab in their half: the lower of its two places, which differ by 9 or 0."""
    return 3 * min(field for _, field in FIELDS[pair][slab])


def _field(planes: tuple[Tensor, ...], plane: int, field: int, bit: int, odd: int) -> Tensor:
    """One field of each word, as fp32, times 2^(16 odd + bit)."""
    if field == _R:
        a, b, c = (p >> 15 - bit & (1 << bit | 1 << 16 + bit) for p in planes)
        # Doubled by adding: a mask or a shift more is a constant more, and those are out of registers already.
        bc = c + c + b
        value = bc + bc + a
    else:
        shift = 3 * field - bit
        value = planes[plane] >> shift if shift else planes[plane]
    return (value & (7 << 16 * odd + bit)).float()


@functools.cache
def _kernel(per_tile: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The kernel for so many groups in a tile; torch.compile compiles it when it is first called."""
    logger.info("compiling the 3-bit CPU kernel for groups of %d columns", TILE_K // per_tile)

    def lanes_of_y(words: Tensor, x: Tensor, x_sums: Tensor, factors: Tensor) -> Tensor:
        """One row of y, (row tile, block, g, lane), to be summed over (t, hi).

        The arguments are what `_words`, `_lanes` (one row of it) and `_factors` return. The last sum is not here:
        with several threads torch 2.13 would start a parallel region for each of its elements.
        """
        num_row_tiles, num_col_tiles = words.shape[:2]
        # Only for its mask: on AVX2 torch 2.13 loads integers through a buffer, at half the speed, unless masked.
        words = torch.nn.functional.pad(words, (0, 0, 0, 0, 0, 0, 0, 1))[:, :num_col_tiles]
        planes = words.unbind(2)
        shape = (num_row_tiles, num_col_tiles, 2, per_tile, 2, 8, 8, 2)  # .., block, group, factor; g, (t, hi), up
        factors = factors.permute(0, 4, 1, 5, 6, 3, 2).unsqueeze(-2).expand(shape).reshape(*shape[:-2], _LANES)
        blocks = []
        for block in range(2):
            groups = []
            for group in range(per_tile):
                slabs = range(8 // per_tile * group, 8 // per_tile * (group + 1))
                chains = []  # two chains of dependent additions overlap
                for odd in range(2):
                    products = [
                        _field(planes, *FIELDS[i // 2][i % 2][block], _bit(i // 2, i % 2), odd)
                        * x[:, 8 * odd + i, None, :]
                        for i in slabs
                    ]
                    chains.append(functools.reduce(operator.add, products))
                scale, offset = factors[:, :, block, group].unbind(2)
                groups.append((chains[0] + chains[1]) * scale - offset * x_sums[:, group, None, :])
            blocks.append(functools.reduce(operator.add, groups).sum(1))  # row tile, g, lane
        return torch.stack(blocks, 1)

    return torch.compile(lanes_of_y, fullgraph=True, dynamic=True, options=_OPTIONS)
