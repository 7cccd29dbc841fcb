"""Where the four bits of weight (n, k) live: two to a byte, in the order of the integer tensor core's fragments.

A tile is 16 rows x 64 columns = 1024 weights = 512 contiguous bytes, and

    qdata: int8 (ceil(N / 16), ceil(K / 64), 32, 16)      (row tile, column tile, lane, byte)

Dimension 0 runs with N and dimension 1 with K, so a tensor-parallel shard of 16 rows or 64 columns is a plain slice.
Rows and columns beyond N and K are zeros. A weight is a two's complement nibble, -8..7. The low nibble of a byte
belongs to columns 0..31 of the tile, the high one to columns 32..63, and each half of the nibbles is operand A of one
`mma.m16n8k32` (s8):

    row    n = 8 up + g                      lane = 4 g + t        (g = 0..7, t = 0..3)
    column k = 32 high + 16 hi + 4 t + i     byte = 8 hi + 4 up + i    (i = 0..3)

Why this way. One 16-byte load a lane is two whole fragments: no shared memory, no shuffle. Unpacking is three
operations for eight weights: `w & 0xf0f0f0f0` already is four int8 numbers, sixteen times the high nibbles, and
`w << 4 & 0xf0f0f0f0` those of the low ones; the factor leaves with the scale. 16 rows are the rows of a warp in
wgmma, too, so the accumulator has the rows in their order.

Rejected: columns in an order that lets a lane load its part of the activation at once. The activation is written by us,
quantized, so there it can have any order; the weight is stored in the one that both mma and wgmma read.
"""

import torch
from torch import Tensor

from mbq_ao.kernels.int3_layout import padded

TILE_N = 16
TILE_K = 64
TILE_SHAPE = (32, 16)  # lane, byte


def packed_shape(*shape: int) -> tuple[int, ...]:
    """Shape of `qdata` for an (n, k) weight, or for the (experts, n, k) of several."""
    *experts, n, k = shape
    return (*experts, -(-n // TILE_N), -(-k // TILE_K), *TILE_SHAPE)


def pack_int4(q: Tensor) -> Tensor:
    """Pack (N, K) int8 values -8..7 into int8 (ceil(N / 16), ceil(K / 64), 32, 16).

    Only the low four bits of a value are kept. Raises ValueError if `q` is not an int8 matrix.
    """
    if q.dim() != 2 or q.dtype != torch.int8:
        raise ValueError(f"pack_int4 packs an int8 matrix, got {q.dtype} of shape {tuple(q.shape)}")
    num_row_tiles, num_col_tiles = packed_shape(*q.shape)[:2]
    q = padded(q, TILE_N, TILE_K)
    # Four bytes at a time, the columns i: row tile, up, g, column tile, high, hi, t.
    words = q.view(torch.int32).view(num_row_tiles, 2, 8, num_col_tiles, 2, 2, 4)
    low, high = words.permute(4, 0, 3, 2, 6, 5, 1).unbind(0)  # row tile, column tile, g, t, hi, up
    packed = (low & 0x0F0F0F0F) | ((high & 0x0F0F0F0F) << 4)
    return packed.contiguous().view(torch.int8).view(num_row_tiles, num_col_tiles, *TILE_SHAPE)


def unpack_int4(qdata: Tensor, n: int, k: int) -> Tensor:
    """The (n, k) int8 values -8..7 that `pack_int4` packed.

    Raises ValueError if `qdata` is not the packing of an (n, k) matrix.
    """
    check_int4_qdata(qdata, n, k)
    return _unpack(qdata)[:n, :k]


def unpack_int4_rows(qdata: Tensor, rows: Tensor, k: int) -> Tensor:
    """Rows `rows` (R,) of the unpacked matrix, (R, k) int8, without unpacking the others."""
    tiles = qdata.reshape(*qdata.shape[:2], 8, 4, 2, 2, 4)  # row tile, column tile, g, t, hi, up, i
    row = rows % TILE_N
    picked = tiles[rows // TILE_N, :, row % 8, :, :, row // 8]  # R, column tile, t, hi, i
    low, high = _nibbles(picked)
    q = torch.stack([low, high], 2).transpose(3, 4)  # R, column tile, high, hi, t, i
    return q.flatten(1)[:, :k]


def check_int4_qdata(qdata: Tensor, *shape: int) -> None:
    """Raise ValueError unless `qdata` is int8 and has the shape of a packed (n, k) or (experts, n, k) weight."""
    if qdata.dtype != torch.int8 or tuple(qdata.shape) != packed_shape(*shape):
        raise ValueError(
            f"qdata of a {' x '.join(map(str, shape))} weight must be int8 {packed_shape(*shape)}, got {qdata.dtype} "
            f"{tuple(qdata.shape)}; make it with pack_int4"
        )


def _unpack(qdata: Tensor) -> Tensor:
    num_row_tiles, num_col_tiles = qdata.shape[:2]
    low, high = _nibbles(qdata.reshape(num_row_tiles, num_col_tiles, 8, 4, 2, 2, 4))  # .., g, t, hi, up, i
    q = qdata.new_empty((num_row_tiles, 2, 8, num_col_tiles, 2, 2, 4, 4))
    places = q.permute(4, 0, 3, 2, 6, 5, 1, 7)  # high; row tile, column tile, g, t, hi, up, i
    places[0], places[1] = low, high
    return q.view(num_row_tiles * TILE_N, num_col_tiles * TILE_K)


def _nibbles(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high nibbles of int8, as signed numbers."""
    return (packed << 4) >> 4, packed >> 4
