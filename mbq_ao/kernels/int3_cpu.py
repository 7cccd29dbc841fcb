"""The linear layer on a CPU: few rows of x by a kernel that torch.compile writes in C++, many by dequantizing.

The compiled kernel reads the packed tiles where they lie (int3_layout.py): no second copy of the weight. Seen as int32
words of two halves, a plane of a tile is (g, t, hi, up). The sixteen words of one g, or with vectors of 256 bits eight
of them, are the lanes of the kernel's vectors. A field's column depends on (t, hi) and its row on up, so

    y[16 block + 8 up + g] = sum over (t, hi) of  sum over tiles and their groups of  scale * (p - zero * s)

    p = sum over (pair, slab, odd) of field * x            s = sum over (pair, slab, odd) of x

is, but for the outer sum, arithmetic on independent lanes: load, mask, convert, multiply and add. Fields are used where
they stand in the word, 2^bit too big, and x comes 2^-bit smaller, which is exact.

With 512 bits the sum over tiles is in the kernel's loop: a vector is a cache line. With 256 it would be half of one at
each stride, and so a partial sum a tile is written, in the order in which memory lies, and those are added up.

All is one compiled function, x's order and the last sum too: where other layers' weights have just filled the caches,
calling an operator from Python costs more than these take.

Rows of x are taken four at a time, for which unpacking is done once; what is left is three and one of zeros, two, or
one. So a call's number of rows is in no shape, and N and K are dynamic: a model compiles up to three times for its
groups of 128 columns and more, as often for 64 and for 32, whatever its layers, and again for other numbers of threads.

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
_WORDS = 16  # of one g: (t, hi, up)
_LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8  # of the vectors that Inductor makes
_ROWS = 4  # of x in a call; eight were no faster a row on AVX2, and took longer to compile

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
        if y is not None and y.is_inference() and not torch.is_inference_mode_enabled():
            y = y.clone()  # autograd may not save a tensor of that mode, nor may the caller write to it
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
    n, k = scale.shape[0], x.shape[1]
    per_tile = 1 if scale.shape[1] == 1 else max(TILE_K // group_size, 1)
    # The modes are guards of the compiled kernel, and so is the kind of its inputs: they are always the same.
    with torch.inference_mode():
        words = _words(qdata)
        scales, zeros = (_of_tiles(values, group_size, words, per_tile) for values in (scale.float(), zero_point))
        of_calls = []
        try:
            for rows in _calls(x.shape[0]):
                key = per_tile, 1 << (len(rows) - 1).bit_length()
                padded = torch.zeros((key[1], qdata.shape[1] * TILE_K), dtype=torch.float32)
                padded[: len(rows), :k] = x[rows.start : rows.stop]
                with _first_call if key not in _compiled else contextlib.nullcontext():
                    of_rows = _kernel(*key)(words, scales, zeros, padded, _factors())
                _compiled.add(key)
                of_calls.append(of_rows[: len(rows), :n])
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            return None  # called with more numbers of threads than torch.compile allows for
        except RuntimeError as error:
            _no_compiler.set()
            warnings.warn(
                "mbq_ao: torch.compile could not build the 3-bit CPU kernel, so each linear unpacks its weight, "
                f"which is right but slow; is there a C++ compiler? ({type(error).__name__}: {_first_line(error)})",
                stacklevel=2,
            )
            return None
        return torch.cat(of_calls) if len(of_calls) > 1 else of_calls[0]


def _calls(num_rows: int) -> Iterator[range]:
    """The rows of x of each call: `_ROWS` of them, or what is left."""
    for start in range(0, num_rows, _ROWS):
        yield range(start, min(start + _ROWS, num_rows))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _words(qdata: Tensor) -> Tensor:
    """The halves as int32 (row tile, column tile, plane, g, part, lane). A slice of columns is copied."""
    if not qdata.is_contiguous() or qdata.storage_offset() % 2:
        qdata = qdata.clone(memory_format=torch.contiguous_format)
    return _apart(qdata.view(torch.int32).view(*qdata.shape[:3], 8, -1, _LANES))


def _of_tiles(values: Tensor, group_size: int, words: Tensor, per_tile: int) -> Tensor:
    """Scales or zero points of groups, (N, groups): (row tile, block, up, g, column tile, group of the tile)."""
    (n, num_groups), (num_row_tiles, num_col_tiles) = values.shape, words.shape[:2]
    if num_groups == 1:
        values = values.expand(n, num_col_tiles)
    elif group_size > TILE_K:
        values = values.repeat_interleave(group_size // TILE_K, dim=1)[:, :num_col_tiles]
    padding = (0, num_col_tiles * per_tile - values.shape[1], 0, num_row_tiles * TILE_N - n)
    values = torch.nn.functional.pad(values, padding) if any(padding) else values.contiguous()
    return _apart(values.view(num_row_tiles, 2, 2, 8, num_col_tiles, per_tile))


def _apart(view: Tensor) -> Tensor:
    """The same memory as a tensor of this mode that is no view: torch.compile guards what a view is one of, too."""
    memory = view.untyped_storage()
    return torch.empty(0, dtype=view.dtype).set_(memory, view.storage_offset(), view.shape, view.stride())


@functools.cache
def _factors() -> Tensor:
    """2^-bit of each (odd, pair, slab), (16,)."""
    places = itertools.product(range(2), range(4), range(2))
    with torch.inference_mode():
        factors = [2.0 ** -(16 * odd + _bit(pair, slab)) for odd, pair, slab in places]
        return torch.tensor(factors, dtype=torch.float32)


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


def _stored(values: Tensor) -> Tensor:
    """Values that the kernel computes once, in a loop of their own, and not wherever they are used."""
    values = values.contiguous()
    return values.as_strided(values.shape, values.stride())


def _added(terms: Sequence[Tensor]) -> Tensor:
    """Their sum, halves apart: chains of dependent additions overlap."""
    if len(terms) == 1:
        return terms[0]
    return _added(terms[: len(terms) // 2]) + _added(terms[len(terms) // 2 :])


@functools.cache
def _kernel(per_tile: int, num_rows: int) -> Callable[..., Tensor]:
    """The kernel for so many groups in a tile and rows of x, compiled."""
    logger.info("compiling the 3-bit CPU kernel for groups of %d columns, %d rows", TILE_K // per_tile, num_rows)

    def linear(words: Tensor, scales: Tensor, zeros: Tensor, x: Tensor, factors: Tensor) -> Tensor:
        """(num_rows, N and rows of padding).

        words, scales, zeros: what `_words` and `_of_tiles` return.  x: (num_rows, K and columns of zeros) fp32.
        """
        num_row_tiles, num_col_tiles = words.shape[:2]
        parts = _parts(words.view(num_row_tiles, num_col_tiles, 3, 8, _WORDS // _LANES, _LANES))
        lanes, sums = _lanes_and_sums(x.view(num_rows, num_col_tiles, 4, 4, 2, 2, 2), factors)
        is_up = torch.arange(_LANES, dtype=torch.int32) & 1 > 0

        def of_lanes(values: Tensor) -> Tensor:
            """(row tile, up, g, column tile) -> (row tile, column tile, g, lane)"""
            shape = num_row_tiles, num_col_tiles, 8, _LANES
            lower, upper = (values[:, up].transpose(1, 2)[..., None].float().expand(shape) for up in range(2))
            return torch.where(is_up, upper, lower)

        of_rows = []
        for row, block in itertools.product(range(num_rows), range(2)):
            groups = []
            for group in range(per_tile):
                slabs = range(8 // per_tile * group, 8 // per_tile * (group + 1))
                chains = []
                for (part, planes), odd in itertools.product(enumerate(parts), range(2)):
                    products = [
                        _field(planes, *FIELDS[i // 2][i % 2][block], _bit(i // 2, i % 2), odd)
                        * lanes[row, :, 8 * odd + i, part][:, None, :]
                        for i in slabs
                    ]
                    if odd:
                        zero = of_lanes(zeros[:, block, ..., group])
                        products.append(-zero * sums[row, :, group, part][:, None, :])
                    chains.append(functools.reduce(operator.add, products))
                groups.append(_added(chains) * of_lanes(scales[:, block, ..., group]))
            of_tiles = functools.reduce(operator.add, groups)
            of_rows.append((_stored(of_tiles) if _LANES < _WORDS else of_tiles).sum(1))
        y = torch.stack(of_rows).view(num_rows, 2, num_row_tiles, 8, _LANES // 2, 2)  # .., block, .., g, (t, hi), up
        # Written out: with several threads torch 2.13 starts them all for each of such short sums.
        return _added(y.unbind(4)).permute(0, 2, 1, 4, 3).reshape(num_rows, num_row_tiles * TILE_N)

    def _lanes_and_sums(x: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """In the order of the lanes: x times 2^-bit of the field, (row, column tile, 16 fields, part, lane), and its
        sums over a group's fields, (row, column tile, group, part, lane).

        x: (row, column tile, pair, t, slab, hi, odd).
        """
        x = x.permute(0, 1, 6, 2, 4, 3, 5)[..., None].expand(*x.shape[:2], 2, 4, 2, 4, 2, 2)
        x = x.reshape(num_rows, x.shape[1], 16, _WORDS // _LANES, _LANES)
        sums = x.unflatten(2, (2, per_tile, -1)).sum((2, 4))
        return _stored(x * factors[:, None, None]), _stored(sums)

    def _parts(words: Tensor) -> list[list[Tensor]]:
        """For each part of the words of one g, its planes, (row tile, column tile, g, lane)."""
        first, *others = ([words[:, :, plane, :, part] for plane in range(3)] for part in range(words.shape[4]))
        # On AVX2 torch 2.13 loads integers through a buffer, and waits for it, unless a mask is in the way, as padding
        # makes one. But masked loads alone fetch nothing ahead: the buffer for one half of a cache line, the mask for
        # the other.
        pad = torch.nn.functional.pad
        return [first, *([pad(word, (0, 0, 0, 0, 0, 1))[:, : words.shape[1]] & -1 for word in part] for part in others)]

    # Isolated: torch.compile counts what it compiles a function for, and after eight refuses. Here that is per kernel.
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, options=_OPTIONS, isolate_recompiles=True)
    # Sizes that are equal when it is compiled are taken to be so forever, as both of a square weight.
    rows, columns = 7, 5
    words = torch.zeros((rows, columns, 3, 8, _WORDS // _LANES, _LANES), dtype=torch.int32)
    scales = torch.zeros((rows, 2, 2, 8, columns, per_tile), dtype=torch.float32)
    x = torch.zeros((num_rows, columns * TILE_K), dtype=torch.float32)
    compiled(words, scales, scales.to(torch.uint8), x, _factors())
    return compiled
