"""The linear layer on a CPU: few rows of x by a kernel that torch.compile writes in C++, many by dequantizing.

The compiled kernel reads the packed tiles where they lie (int3_layout.py): no second copy of the weight. Seen as int32
words of two halves, a plane of a tile is (g, t, hi, up); eight words, two of the four t, are the lanes of the
kernel's vectors. A field's column depends on (t, hi) and its row on up, so, but for the last sum,

    y[16 block + 8 up + g] = sum over (t, hi) of  sum over tiles of  scale * sum over (pair, slab, odd) of field * x

is eight independent lanes: load, mask, convert, multiply and add. Fields are used where they stand in the word, 2^bit
too big, and x comes 2^-bit smaller, which is exact. What the zero points subtract is a small product of its own.

Memory is read in the order in which it lies, so the sum over tiles cannot be in the kernel's loop: it writes a
partial sum a tile, and torch adds those up. Summed inside, each row of a tile is a stride through a whole row of
tiles.

Rows of x are taken four at a time, for which unpacking is done once, and a lone one by itself. So the
number of rows is in no shape, and N and K are dynamic: a model compiles twice for its groups of 128 columns and more,
twice for 64, twice for 32, whatever its layers; another number of threads compiles again.

When: at the first call with few rows for the size of the weight, in eager and inside a compiled model alike. It takes a
quarter of a minute for one row and half of one for four, on a busy machine more, and less once torch has the result on
disk; a model of half a billion parameters loses more by unpacking within the first dozens of tokens. The choice depends
on sizes alone, so that a call always has the same bits. MBQ_AO_CPU_COMPILE=0 in the environment turns it off. Where
torch.compile finds no C++ compiler one warning says so and the weight is unpacked instead.

Rejected: words with N innermost, a layout of its own: no fewer instructions, and it would need the weight twice.
"""

import contextlib
import functools
import itertools
import logging
import operator
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mbq_ao.kernels.int3_layout import FIELDS, TILE_K, TILE_N
from mbq_ao.kernels.reference import as_rows, dequantize_reference

logger = logging.getLogger(__name__)

MAX_ROWS = 16  # beyond, unpacking once is cheaper than unpacking in registers for each row
MIN_WEIGHTS_PER_ROW = 1 << 17  # calling the kernel takes as long as unpacking so many; a toy model compiles nothing
_CHUNK = 1 << 21  # weights dequantized at a time: they stay in the cache until they are multiplied
_R = 5
_LANES = 8  # t (the lower bit), hi, up
_ROWS = 4  # of x in a call; eight were no faster a row, and took longer to compile

# torch.compile must not store the unpacked fields, but make the words, which are used many times, a value of the loop
# (a threshold of 0 reads). FMA halves the rounding and the instructions.
_OPTIONS = {
    "realize_opcount_threshold": 1 << 20,
    "realize_reads_threshold": 0,
    "realize_acc_reads_threshold": 1 << 20,
    "cpp.enable_floating_point_contract_flag": "fast",
}


def int3_linear_cpu(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """`int3_ops.int3_linear` for tensors on a CPU; arguments as checked there. Accumulates in fp32."""
    rows = as_rows(x)
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
    # In bf16 on CPUs with AMX torch 2.13 reads up to 32 columns past the end of a row and multiplies them by zero: a
    # NaN there, in another token or in no tensor at all, would reach this one.
    dtype = x.dtype if _multiplies(x.dtype) and k % 32 == 0 else torch.float32
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
_compiled: set[tuple[int, int]] = set()


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
    # The mode is a guard of the compiled kernel, and so is the kind of its inputs: they are always the same.
    with torch.inference_mode():
        words = _words(qdata)
        scales = _scales(scale, group_size, num_row_tiles, num_col_tiles, per_tile)
        x = _pad_columns(x.float(), num_col_tiles * TILE_K)
        lanes = torch.empty((x.shape[0], num_row_tiles, 2, 8, _LANES))
        try:
            for rows in _calls(x.shape[0]):
                key = per_tile, 1 if len(rows) == 1 else _ROWS
                x_lanes = _lanes(x[rows.start : rows.stop], key[1])
                with _first_call if key not in _compiled else contextlib.nullcontext():
                    parts = _kernel(*key)(words, scales, *x_lanes)
                _compiled.add(key)
                for row, block in itertools.product(range(len(rows)), range(2)):
                    torch.sum(parts[2 * row + block], 1, out=lanes[rows.start + row, :, block])
        except RuntimeError as error:
            _no_compiler.set()
            warnings.warn(
                "mbq_ao: torch.compile could not build the 3-bit CPU kernel, so each linear unpacks its weight, "
                f"which is right but slow; is there a C++ compiler? ({type(error).__name__}: {_first_line(error)})",
                stacklevel=2,
            )
            return None
        y = lanes.view(*lanes.shape[:-1], _LANES // 2, 2).sum(4)  # row, row tile, block, g, up
        y = y.transpose(3, 4).reshape(x.shape[0], -1)[:, : scale.shape[0]]
        return y.sub_(_zero_points_times_x(x, scale, zero_point, group_size))


def _calls(num_rows: int) -> Iterator[range]:
    """The rows of x of each call: `_ROWS` of them, or almost, or one."""
    for start in range(0, num_rows, _ROWS):
        yield range(start, min(start + _ROWS, num_rows))


def _pad_columns(x: Tensor, k: int) -> Tensor:
    return x if x.shape[1] == k else torch.nn.functional.pad(x, (0, k - x.shape[1]))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _words(qdata: Tensor) -> Tensor:
    """The halves as int32 (row tile, column tile, plane, g, upper bit of t, lane). A slice of columns is copied."""
    if not qdata.is_contiguous() or qdata.storage_offset() % 2:
        qdata = qdata.clone(memory_format=torch.contiguous_format)
    return qdata.view(torch.int32).view(*qdata.shape[:3], 8, 2, _LANES)


def _scales(scale: Tensor, group_size: int, num_row_tiles: int, num_col_tiles: int, per_tile: int) -> Tensor:
    """The scales in fp32: (row tile, block, up, g, column tile, group of the tile)."""
    n, num_groups = scale.shape
    scale = scale.to(torch.float32, copy=True)  # a tensor of this mode, or the kernel is compiled anew
    if num_groups == 1:
        scale = scale.expand(n, num_col_tiles)
    elif group_size > TILE_K:
        scale = scale.repeat_interleave(group_size // TILE_K, dim=1)[:, :num_col_tiles]
    padding = (0, num_col_tiles * per_tile - scale.shape[1], 0, num_row_tiles * TILE_N - n)
    scale = torch.nn.functional.pad(scale, padding) if any(padding) else scale.contiguous()
    return scale.view(num_row_tiles, 2, 2, 8, num_col_tiles, per_tile)


def _lanes(x: Tensor, num_rows: int) -> Tensor:
    """x in the order of the lanes, padded to `num_rows`: (rows, column tile, 16 fields, upper bit of t, lane).

    Times 2^-bit of the field.
    """
    column, factor = _order_of_lanes()
    lanes = x.new_zeros((num_rows, x.shape[1] // TILE_K, 16, 2, _LANES))
    torch.index_select(x.reshape(-1, TILE_K), 1, column, out=lanes[: x.shape[0]].view(-1, column.numel()))
    return lanes.mul_(factor)


def _zero_points_times_x(x: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> Tensor:
    """sum over groups of scale * zero_point * (the sum of x over the group), (rows, N).

    x: (rows, K and zeros). A product a row: a row's bits do not depend on the others'.
    """
    group_size = x.shape[1] if scale.shape[1] == 1 else group_size
    sums = _pad_columns(x, -(-x.shape[1] // group_size) * group_size).unflatten(1, (-1, group_size)).sum(2)
    offsets = scale.float() * zero_point
    return torch.stack([offsets @ row for row in sums[:, : scale.shape[1]]])


@functools.cache
def _order_of_lanes() -> tuple[Tensor, Tensor]:
    """For each (odd, pair, slab; t, hi, up): the column in the tile, and 2^-bit in the shape of `_lanes`."""
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
        column, factor = (torch.tensor(values) for values in zip(*places, strict=True))
        return column, factor.view(16, 2, _LANES)


def _bit(pair: int, slab: int) -> int:
    """Where the kernel has the fields of a slab in their half: the lower of its two places, which differ by 9 or 0."""
    return 3 * min(field for _, field in FIELDS[pair][slab])


def _field(planes: Sequence[Tensor], plane: int, field: int, bit: int, odd: int) -> Tensor:
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
def _kernel(per_tile: int, num_rows: int) -> Callable[..., tuple[Tensor, ...]]:
    """The kernel for so many groups in a tile and rows of x; torch.compile compiles it when it is first called."""
    logger.info("compiling the 3-bit CPU kernel for groups of %d columns, %d rows", TILE_K // per_tile, num_rows)

    def sums_of_tiles(words: Tensor, scales: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """For each row of x and block, (row tile, column tile, g, lane), to be summed over tiles and (t, hi).

        The arguments are what `_words`, `_scales` and `_lanes`, row by row, return.
        """
        num_row_tiles, num_col_tiles = words.shape[:2]
        lower, upper = ([words[:, :, plane, :, half] for plane in range(3)] for half in range(2))
        # On AVX2 torch 2.13 loads integers through a buffer, and waits for it, unless a mask is in the way, as padding
        # makes one. But masked loads alone fetch nothing ahead: the buffer for one half of a cache line, the mask for
        # the other.
        upper = [torch.nn.functional.pad(word, (0, 0, 0, 0, 0, 1))[:, :num_col_tiles] & -1 for word in upper]
        shape = (num_row_tiles, num_col_tiles, 8, _LANES // 2, 2)  # g, (t, hi), up
        sums = []
        for x, block in itertools.product(rows, range(2)):
            groups = []
            for group in range(per_tile):
                slabs = range(8 // per_tile * group, 8 // per_tile * (group + 1))
                chains = []  # chains of dependent additions overlap
                for (half, planes), odd in itertools.product(enumerate((lower, upper)), range(2)):
                    products = [
                        _field(planes, *FIELDS[i // 2][i % 2][block], _bit(i // 2, i % 2), odd)
                        * x[:, 8 * odd + i, half][:, None, :]
                        for i in slabs
                    ]
                    chains.append(functools.reduce(operator.add, products))
                scale = scales[:, block, :, :, :, group].permute(0, 3, 2, 1).unsqueeze(-2).expand(shape).flatten(-2)
                groups.append(((chains[0] + chains[1]) + (chains[2] + chains[3])) * scale)
            sums.append(functools.reduce(operator.add, groups))
        return tuple(sums)

    return torch.compile(sums_of_tiles, fullgraph=True, dynamic=True, options=_OPTIONS)
