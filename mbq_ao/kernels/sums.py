# mypy: disable-error-code="no-untyped-def"
# (what a jitted function takes and returns has types only to Triton)
"""Sums of parts of K: of the slices of a program, and of several programs. In a fixed order, so that results repeat."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sum_slices(v):
    """The sum over dimension 0, as a tree; `tl.sum` exchanges one register of every warp at a time."""
    LEVELS: tl.constexpr = 3 if v.shape[0] == 8 else 2 if v.shape[0] == 4 else 1
    v = v.permute(1, 2, 0)
    for _ in tl.static_range(LEVELS):
        u, w = tl.split(v.reshape(v.shape[0], v.shape[1], v.shape[2] // 2, 2))
        v = u + w
    return v.reshape(v.shape[0], v.shape[1])


@triton.jit(do_not_specialize=["count", "num_splits"])
def _sum_splits_kernel(parts, bias, y, count, N, num_splits, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    """y = the sum of num_splits matrices of `count` elements, in their order, + bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    total = tl.zeros([BLOCK], tl.float32)
    parts += at
    for _ in range(num_splits):
        total += tl.load(parts, mask=mask, other=0.0)
        parts += count
    if HAS_BIAS:
        total += tl.load(bias + at % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)


def sum_splits(parts: Tensor, num_splits: int, bias: Tensor | None, y: Tensor) -> None:
    """y (M, N) = the sum of `parts`, fp32 (num_splits * M, N), over the splits, + bias."""
    count, n = y.numel(), y.shape[1]
    _sum_splits_kernel[(triton.cdiv(count, 1024),)](
        parts,
        parts if bias is None else bias.contiguous(),
        y,
        count,
        n,
        num_splits,
        BLOCK=1024,
        HAS_BIAS=bias is not None,
        num_warps=4,
    )
