# mypy: disable-error-code="no-untyped-def, assignment, operator"
# (what a jitted function takes and returns, and a tuple it grows, has types only to Triton)
"""What a warp of the decoding kernel, int3_gemv.py, loads: words of the weight, x, scales and zero points.

Loads are of two dimensions, rows of what lies side by side, and reshaped afterwards: which of several outer dimensions
follows the lanes differs between versions of Triton, and the wrong one costs a trip through shared memory a fragment.

Words are explained in int3_gemv.py.
"""

import triton
import triton.language as tl


@triton.jit
def load_planes(words, chunk, num_tiles, WARPS: tl.constexpr, COL_TILES: tl.constexpr, EVEN: tl.constexpr):
    """The planes, (WARPS, 32, 8), of COL_TILES tiles of every row tile, three a tile, from the first warp's chunk on.

    A tile beyond the last is the last one again: its x is zero.
    """
    loaded = ()
    first = (chunk + tl.arange(0, WARPS)) * COL_TILES
    for j in tl.static_range(COL_TILES):
        tile = (first if EVEN else tl.minimum(first, num_tiles - 1 - j)) * 768
        for r in tl.static_range(len(words)):
            for plane in tl.static_range(3):
                at = words[r] + tile[:, None] + (j * 768 + plane * 256)
                loaded += (tl.load(at, eviction_policy="evict_first").reshape(WARPS, 32, 8),)
    return loaded


@triton.jit
def load_x(
    x, chunk, M, K, stride_xm, WARPS: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr, COL_UNITS: tl.constexpr, SET: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Operand B of a set before masking, one (WARPS, 8, 4, 8) for each 32 columns of a unit, for each 8 columns.

    Column n is row n // SPAN of x and unit n % SPAN of the set.  chunk: the first warp's.
    """
    SPAN: tl.constexpr = 8 // ROWS if ROWS < 8 else 1
    n = tl.arange(0, WARPS * 8)[:, None] % 8
    first = (chunk + tl.arange(0, WARPS * 8)[:, None] // 8) * COL_UNITS
    unit = SET * SPAN + n % SPAN
    k = (first + unit) * UNIT + tl.arange(0, 32)[None, :]
    at = x + k
    loaded = ()
    for m0 in tl.static_range(0, ROWS, 8):
        rows = at
        if ROWS > 1:
            rows += tl.minimum(m0 + n // SPAN, M - 1).to(tl.int64) * stride_xm
        for column in tl.static_range(0, UNIT, 32):
            if EVEN and (SET + 1) * SPAN <= COL_UNITS:
                v = tl.load(rows + column)
            else:
                v = tl.load(rows + column, mask=(k + column < K) & (unit < COL_UNITS), other=0.0)
            loaded += (v.reshape(WARPS, 8, 4, 8),)
    return loaded


@triton.jit
def load_scales(
    scales, zeros, rows, chunk, K, stride_scale, stride_zero, WARPS: tl.constexpr,
    GROUP: tl.constexpr, UNIT: tl.constexpr, SPAN: tl.constexpr, COL_UNITS: tl.constexpr, EVEN: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Scales and zero points of a chunk, of each 8 rows 8 i + g one a set, as the lane (g, t) needs them.

    SPAN = 1, a column is a row of x: (WARPS, 8, 4), the same for all t.
    Else, for columns 2 t and 2 t + 1: (WARPS, 8, 4, 2).
    """
    loaded = ()
    for i in tl.static_range(len(rows)):
        # What VECTOR promises of the strides, said so that Triton sees it.
        at = rows[i] * (stride_scale // VECTOR * VECTOR)
        loaded = loaded + _load_groups(scales[i // 4], at, chunk, K, WARPS, GROUP, UNIT, SPAN, COL_UNITS, EVEN, VECTOR)
        at = rows[i] * (stride_zero // VECTOR * VECTOR)
        loaded = loaded + _load_groups(zeros[i // 4], at, chunk, K, WARPS, GROUP, UNIT, SPAN, COL_UNITS, EVEN, VECTOR)
    return loaded


@triton.jit
def _load_groups(
    p, row, chunk, K, WARPS: tl.constexpr,
    GROUP: tl.constexpr, UNIT: tl.constexpr, SPAN: tl.constexpr, COL_UNITS: tl.constexpr, EVEN: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """What the rows p + row, one a lane (32 * WARPS,), hold for each set of a chunk."""
    loaded = ()
    lane = tl.arange(0, WARPS * 32)
    first = tl.max_contiguous((chunk + lane // 32) * COL_UNITS + lane % 4 * 2 % SPAN, [1])
    for start in tl.static_range(0, COL_UNITS, VECTOR if SPAN == 1 else SPAN):
        if SPAN == 1 or start + SPAN <= COL_UNITS:
            at = _group_at(p, row, first, start, K, GROUP, UNIT, EVEN)
            next_at = _group_at(p, row, first, start + 1, K, GROUP, UNIT, EVEN)
        else:  # x of a column without a unit is zero; what it is scaled by must be finite
            unit = start + lane % 4 * 2 % SPAN
            own = first + tl.minimum(unit, COL_UNITS - VECTOR) - unit
            at = _group_at(p, row, own, start, K, GROUP, UNIT, EVEN)
            own = first + tl.minimum(unit + 1, COL_UNITS - 1) - unit - 1
            next_at = _group_at(p, row, own, start + 1, K, GROUP, UNIT, EVEN)
        if VECTOR == 1:
            v = tl.load(at).reshape(WARPS, 8, 4)
            loaded += (v if SPAN == 1 else tl.join(v, tl.load(next_at).reshape(WARPS, 8, 4)),)
        else:
            several = tl.load(at[:, None] + tl.arange(0, VECTOR)[None, :]).reshape(WARPS, 8, 4, VECTOR)
            if SPAN > 1:
                loaded += (several,)
            elif VECTOR == 2:
                loaded += tl.split(several)
            else:
                even, odd = tl.split(several.reshape(WARPS, 8, 4, 2, 2))
                v0, v2 = tl.split(even)
                v1, v3 = tl.split(odd)
                loaded += (v0, v1, v2, v3)
    return loaded


@triton.jit
def _group_at(
    p, row, first, UNIT_OFFSET: tl.constexpr, K, GROUP: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Pointers to the groups of units first + UNIT_OFFSET, which is kept apart where it can be part of a load."""
    if GROUP == 0:
        return p + (row + first * 0)
    elif GROUP == UNIT and EVEN:
        return p + (row + first) + UNIT_OFFSET
    else:
        group = (first + UNIT_OFFSET) // (GROUP // UNIT)
        return p + (row + tl.minimum(group, (K - 1) // GROUP))
