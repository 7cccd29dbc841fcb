"""Group-wise affine quantization in pure torch: choose the grid, round onto it, come back.

Along K, each group of `group_size` columns of a row has a scale d and an integer zero point z (b bits):

    affine       d = clamp(max - min, 1e-5) / (2^b - 1)         z = clamp(-round(min / d), 0, 2^b - 1)
                 q = clamp(round(w / d) + z, 0, 2^b - 1)        w' = (q - z) * d
    symmetric    d = clamp(max |w|, 1e-5) / (2^(b-1) - 1)
                 q = clamp(round(w / d), -2^(b-1), 2^(b-1) - 1)    w' = q * d

The arithmetic is fp32 for every dtype of w and in exactly this order: it agrees bit for bit with the
published MBQ code run in fp32. Where the scale is stored in 16 bits it is rounded first, and z and q are
computed with the rounded scale, so that what is searched is what is served. The last group of a row may be
short: K need not be a multiple of the group size.

Nothing here knows how values are packed; see kernels/int3_layout.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mbq_ao.kernels.reference import dequantize_groups, group_views

_MIN_RANGE = 1e-5  # of a group's max - min: a constant group keeps a usable scale
_SLAB_CPU = 1 << 18  # weights a thread works on at a time: a dozen passes over them find them in its cache
_SLAB = 1 << 24  # of a GPU: enough to keep it busy, and 64 MiB for an fp32 copy of them


def num_groups(k: int, group_size: int) -> int:
    """How many groups of group_size columns cover k columns; the last may be short."""
    return -(-k // group_size)


def by_row_slabs(fn: Callable[[Tensor], tuple[Tensor, ...]], w: Tensor, multiple: int = 1) -> tuple[Tensor, ...]:
    """fn of a few rows of w at a time, in fp32, and its results joined along their first dimension.

    So what fn computes on the way takes memory for a few rows, not for all of w (N, K). Every slab but the last has
    a multiple of `multiple` rows. What fn makes of a row must not depend on the others.
    """
    n, k = w.shape
    slab = _SLAB_CPU * torch.get_num_threads() if w.device.type == "cpu" else _SLAB
    rows = max(slab // max(k * multiple, 1), 1) * multiple
    slabs = w.split(rows)
    parts = fn(slabs[0].to(torch.float32))  # at once: reductions over 16-bit values are twice as slow
    if len(slabs) == 1:
        return parts
    # So many rows of each result come from `rows` of w; the last slab may have fewer.
    joined = tuple(part.new_empty((-(-n * part.shape[0] // rows), *part.shape[1:])) for part in parts)
    places = zip(*(whole.split(part.shape[0]) for whole, part in zip(joined, parts, strict=True)), strict=True)
    for index, (some, some_places) in enumerate(zip(slabs, places, strict=True)):
        parts = fn(some.to(torch.float32)) if index else parts
        for place, part in zip(some_places, parts, strict=True):
            place.copy_(part)
    return joined


def choose_qparams_affine(
    w: Tensor, *, group_size: int, num_bits: int = 3, scale_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The scale, (N, ceil(K / group_size)) in `scale_dtype`, and the zero point, uint8 of the same shape.

    w: (N, K), floating point.  num_bits: of the grid, b above.  scale_dtype: None means w's dtype.
    """
    _check_matrix(w)
    d, z = _choose_qparams(w, group_size, num_bits, w.dtype if scale_dtype is None else scale_dtype)
    return d, z.to(torch.uint8)


def quantize_affine(w: Tensor, scale: Tensor, zero_point: Tensor, *, group_size: int, num_bits: int = 3) -> Tensor:
    """The integers clamp(round(w / scale) + zero_point, 0, 2^b - 1): uint8, (N, K) like w.

    scale, zero_point, group_size, num_bits: as in `choose_qparams_affine`, whose results they may be.
    """
    _check_matrix(w)
    d, z = scale.to(torch.float32), zero_point.to(torch.float32)
    q = w.new_empty(w.shape, dtype=torch.uint8)
    for (columns, groups), (out, _) in zip(group_views(w, group_size), group_views(q, group_size), strict=True):
        out.copy_(_round_to_grid(columns, d[:, groups, None], z[:, groups, None], num_bits))
    return q


def choose_scale_symmetric(
    w: Tensor, *, group_size: int, num_bits: int = 4, scale_dtype: torch.dtype | None = None
) -> Tensor:
    """The scale of a symmetric grid, (N, ceil(K / group_size)) in `scale_dtype`.

    w: (N, K), floating point.  num_bits: of the grid, b above.  scale_dtype: None means w's dtype.
    """
    _check_matrix(w)
    # Of the minimum and the maximum, not of |w|, which would be a copy.
    low, high = _extremes(w, group_size)
    absmax = torch.maximum(-low, high).clamp_(min=_MIN_RANGE)
    return _stored(absmax / (2 ** (num_bits - 1) - 1), w.dtype if scale_dtype is None else scale_dtype)


def quantize_symmetric(w: Tensor, scale: Tensor, *, group_size: int, num_bits: int = 4) -> Tensor:
    """The integers clamp(round(w / scale), -2^(b-1), 2^(b-1) - 1): int8, (N, K) like w.

    scale, group_size, num_bits: as in `choose_scale_symmetric`, whose result it may be.
    """
    _check_matrix(w)
    d, q_max = scale.to(torch.float32), 2 ** (num_bits - 1) - 1
    q = w.new_empty(w.shape, dtype=torch.int8)
    for (columns, groups), (out, _) in zip(group_views(w, group_size), group_views(q, group_size), strict=True):
        out.copy_((columns.to(torch.float32) / d[:, groups, None]).round_().clamp_(-q_max - 1, q_max))
    return q


def dequantize_affine(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, *, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The weight (q - zero_point) * scale, computed in fp32, then rounded to `dtype`: (N, K) like q.

    q: integers.  scale, zero_point: (N, ceil(K / group_size)); zero_point=None is 0.
    """
    return dequantize_groups(q, scale, zero_point, group_size, dtype)


def fake_quantize_affine(w: Tensor, *, group_size: int, num_bits: int = 3) -> Tensor:
    """What w becomes by quantizing and dequantizing with scales in w's dtype, bit for bit, in w's dtype.

    The integers, of num_bits each, stay fp32 in place: no uint8, no packing. Calibration calls this in its loop.
    group_size: columns that share a scale; at least K for one scale a row.
    """
    _check_matrix(w)

    def fake_quantize(x: Tensor) -> tuple[Tensor]:
        scale, z = _choose_qparams(x, group_size, num_bits, w.dtype)
        d = scale.to(torch.float32)
        pieces = []
        for columns, groups in group_views(x, group_size):
            d_, z_ = d[:, groups, None], z[:, groups, None]
            pieces.append(_round_to_grid(columns, d_, z_, num_bits).sub_(z_).mul_(d_).flatten(1))
        return ((pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)).to(w.dtype),)

    return by_row_slabs(fake_quantize, w)[0]


def _choose_qparams(w: Tensor, group_size: int, num_bits: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale in `scale_dtype`, zero point as whole numbers in fp32."""
    q_max = 2**num_bits - 1
    low, high = _extremes(w, group_size)
    scale = _stored((high - low).clamp_(min=_MIN_RANGE) / q_max, scale_dtype)
    zero_point = (low / scale.to(torch.float32)).round_().neg_().clamp_(0, q_max)
    return scale, zero_point


def _extremes(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of every group, (N, groups) fp32."""
    groups = [columns for columns, _ in group_views(w, group_size)]
    low = torch.cat([columns.amin(2) for columns in groups], dim=1).to(torch.float32)
    high = torch.cat([columns.amax(2) for columns in groups], dim=1).to(torch.float32)
    return low, high


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """In 16 bits a scale could round to zero; the smallest subnormal stands in for it."""
    return scale.to(dtype).clamp_(min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)


def _round_to_grid(w: Tensor, d: Tensor, z: Tensor, num_bits: int) -> Tensor:
    """clamp(round(w / d) + z, 0, 2^b - 1) as whole numbers in fp32: a new tensor."""
    return (w.to(torch.float32) / d).round_().add_(z).clamp_(0, 2**num_bits - 1)


def _check_matrix(w: Tensor) -> None:
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(f"a weight must be a floating-point matrix (N, K), got {w.dtype} of shape {tuple(w.shape)}")
