"""Where the three bits of weight (n, k) live: exactly 3.0 bits a weight, in tensor-core fragment order.

A tile is 32 rows x 128 columns = 4096 weights = 1536 contiguous bytes, and

    qdata: int16 (ceil(N / 32), ceil(K / 128), 3, 32, 8)      (row tile, column tile, plane, lane, half)

Dimension 0 runs with N and dimension 1 with K, so a tensor-parallel shard of 32 rows or 128 columns is a
plain slice. Rows and columns beyond N and K are zeros.

A 16-bit half has five 3-bit fields and one spare bit. Three halves, one of each plane a, b, c, hold fifteen
fields, and their three spare bits are the sixteenth, R:

    bit     15  14 13 12  11 10  9   8  7  6   5  4  3   2  1  0
           [ r |   f4   |   f3   |   f2   |   f1   |   f0   ]       R = ra | rb << 1 | rc << 2

The sixteen fields of one (lane, half) are sixteen operand fragments of `mma.m16n8k16`, weights as operand A:
2 blocks of 16 rows x 8 slabs of 16 columns, a pair of slabs being 32 columns of the matrix:

    rows        columns 0..31      32..63       64..95       96..127
    0..15          a0 c0           a1 c1        a2 c2         a3 a4         (slab 0, slab 1)
    16..31         b0 c3           b1 c4        b2 R          b3 b4

    row    n = 16 block + 8 up + g         lane = 4 g + t   (g = 0..7, t = 0..3)
    column k = 32 pair + 8 t + 4 slab + 2 hi + odd          half = 4 hi + 2 up + odd

Why this way. One 16-byte load a lane and plane is a whole fragment: no shared memory, no shuffle. `w & 0x00070007`
already is a pair of fp16 numbers, the exact subnormals q * 2^-24, so unpacking is a mask, and one shift by 9
exposes f3 and f4. In a lane the eight columns 8t..8t+7 of a pair of slabs are contiguous, so an activation
fragment is one 16-byte load as well. A field's place is its bit class (f0 f3: 2^0, f1 f4: 2^3, f2 R: 2^6), and
both row blocks of a slab have the same class, so three accumulators of 32 rows serve the tile; the same holds
for bf16, where a magic exponent is or-ed in (classes 2^0 and 2^3 only).

Rejected: 16 rows x 256 columns. It counts the same, but K = 896, 576 or 4304 would pad up to a third of the
weight, and an activation fragment would serve one row block instead of two. A bit stream along K: twenty
instructions a weight to take apart. Ten fields in an int32: simpler, 3.2 bits.
"""

import torch
from torch import Tensor

TILE_N = 32
TILE_K = 128
TILE_SHAPE = (3, 32, 8)  # plane, lane, half

# FIELDS[pair][slab][block] = (plane, field); field 5 is R, one bit from each plane.
FIELDS = (
    (((0, 0), (1, 0)), ((2, 0), (2, 3))),
    (((0, 1), (1, 1)), ((2, 1), (2, 4))),
    (((0, 2), (1, 2)), ((2, 2), (0, 5))),
    (((0, 3), (1, 3)), ((0, 4), (1, 4))),
)
_R = 5
_PLACES = [(pair, slab, block) for pair in range(4) for slab in range(2) for block in range(2)]


def packed_shape(*shape: int) -> tuple[int, ...]:
    """Shape of `qdata` for an (n, k) weight, or for the (experts, n, k) of several."""
    *experts, n, k = shape
    return (*experts, -(-n // TILE_N), -(-k // TILE_K), *TILE_SHAPE)


def pack_int3(q: Tensor) -> Tensor:
    """Pack (N, K) uint8 values 0..7 into int16 (ceil(N / 32), ceil(K / 128), 3, 32, 8).

    Only the low three bits of a value are kept. Raises ValueError if `q` is not a uint8 matrix.
    """
    if q.dim() != 2 or q.dtype != torch.uint8:
        raise ValueError(f"pack_int3 packs a uint8 matrix, got {q.dtype} of shape {tuple(q.shape)}")
    num_row_tiles, num_col_tiles = packed_shape(*q.shape)[:2]
    q = padded(q, TILE_N, TILE_K)
    # Four bytes at a time, the columns (hi, odd): row tile, block, up, g, column tile, pair, t, slab. Only words are
    # moved, before and after; what is done sixteen times runs along contiguous memory.
    words = q.view(torch.int32).view(num_row_tiles, 2, 2, 8, num_col_tiles, 4, 4, 2) & 0x07070707
    words = words.permute(5, 7, 1, 0, 2, 3, 4, 6).contiguous()  # pair, slab, block; row tile, up, g, column tile, t
    values = words.view(torch.uint8)
    planes = q.new_zeros((3, *values.shape[3:]), dtype=torch.int16)
    for pair, slab, block in _PLACES:
        plane, field = FIELDS[pair][slab][block]
        value = values[pair, slab, block].to(torch.int16)
        if field == _R:
            for bit in range(3):
                planes[bit] |= value >> bit << 15
        else:
            planes[plane] |= value << 3 * field
    pairs = planes.view(torch.int32).view(3, num_row_tiles, 2, 8, num_col_tiles, 4, 2)  # the halves of an `odd`
    pairs = pairs.permute(1, 4, 0, 3, 5, 6, 2).contiguous()  # row tile, column tile, plane, g, t, hi, up
    return pairs.view(torch.int16).view(num_row_tiles, num_col_tiles, *TILE_SHAPE)


def padded(q: Tensor, tile_n: int, tile_k: int) -> Tensor:
    """The matrix with zeros up to whole tiles, contiguous, and where four bytes can be read at a time."""
    n, k = q.shape
    pad = (0, -k % tile_k, 0, -n % tile_n)
    q = torch.nn.functional.pad(q, pad) if any(pad) else q.contiguous()
    return q.clone() if q.storage_offset() % 4 else q


def unpack_int3(qdata: Tensor, n: int, k: int) -> Tensor:
    """The (n, k) uint8 values that `pack_int3` packed.

    Raises ValueError if `qdata` is not the packing of an (n, k) matrix.
    """
    check_qdata(qdata, n, k)
    num_row_tiles, num_col_tiles = qdata.shape[:2]
    # Four halves at a time, (up, odd): row tile, column tile, plane, g, t, hi.
    words = _inner_contiguous(qdata).view(torch.int64).view(num_row_tiles, num_col_tiles, 3, 8, 4, 2)
    # The columns (hi, odd) are four bytes of the result: row tile, block, up, g, column tile, pair, t, slab.
    q = qdata.new_empty((num_row_tiles, 2, 2, 8, num_col_tiles, 4, 4, 2), dtype=torch.int32)
    places = q.permute(5, 7, 1, 0, 4, 3, 6, 2)  # pair, slab, block; row tile, column tile, g, t, up
    for pair, slab, block in _PLACES:
        value = _field(words, *FIELDS[pair][slab][block], ones=0x0001000100010001)
        value = (value | value >> 8) & 0x0000FFFF0000FFFF  # both halves of an `up` beside each other
        both = value[..., 0] | value[..., 1] << 16
        places[pair, slab, block] = both.unsqueeze(-1).view(torch.int32)
    return q.view(torch.uint8).view(num_row_tiles * TILE_N, num_col_tiles * TILE_K)[:n, :k]


def unpack_int3_rows(qdata: Tensor, rows: Tensor, k: int) -> Tensor:
    """Rows `rows` (R,) of the unpacked matrix, (R, k) uint8, without unpacking the others."""
    num_row_tiles, num_col_tiles = qdata.shape[:2]
    words = _inner_contiguous(qdata).view(num_row_tiles, num_col_tiles, 3, 8, 4, 2, 2, 2)  # .., g, t, hi, up, odd
    row = rows % TILE_N
    words = words[rows // TILE_N, :, :, row % 8, :, :, row // 8 % 2, :]  # R, column tile, plane, t, hi, odd
    q = qdata.new_empty((rows.numel(), num_col_tiles, 4, 4, 2, 2, 2), dtype=torch.uint8)  # .., pair, t, slab, hi, odd
    upper = (row >= 16).view(-1, 1, 1, 1, 1)
    for pair in range(4):
        for slab in range(2):
            low, high = (_field(words, *FIELDS[pair][slab][block]) for block in range(2))
            q[:, :, pair, :, slab] = torch.where(upper, high, low)
    return q.view(rows.numel(), num_col_tiles * TILE_K)[:, :k]


def check_qdata(qdata: Tensor, *shape: int) -> None:
    """Raise ValueError unless `qdata` is int16 and has the shape of a packed (n, k) or (experts, n, k) weight."""
    if qdata.dtype != torch.int16 or tuple(qdata.shape) != packed_shape(*shape):
        raise ValueError(
            f"qdata of a {' x '.join(map(str, shape))} weight must be int16 {packed_shape(*shape)}, got {qdata.dtype} "
            f"{tuple(qdata.shape)}; make it with pack_int3"
        )


def _field(words: Tensor, plane: int, field: int, ones: int = 1) -> Tensor:
    """One field of every half; dimension 2 of `words` is the plane. `ones` has the lowest bit of each half set."""
    a, b, c = words.unbind(2)
    if field == _R:
        return ((a >> 15) & ones) | ((b >> 14) & 2 * ones) | ((c >> 13) & 4 * ones)
    return ((a, b, c)[plane] >> 3 * field) & 7 * ones


def _inner_contiguous(qdata: Tensor) -> Tensor:
    """A slice of whole tiles is read in place; anything else is copied."""
    return qdata if qdata.stride()[2:] == (256, 8, 1) and qdata.storage_offset() % 4 == 0 else qdata.contiguous()
