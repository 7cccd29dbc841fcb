"""Round a weight column by column, and let the columns that follow make up for each one's error (GPTQ).

    argmin_Q  sum_t w_t |(W - Q) x_t|^2  =  tr (W - Q) H (W - Q)^T          H = sum_t w_t x_t x_t^T

Q on the grid of the weight's tensor. Frantar et al., arXiv 2210.17323, in the form with the upper Cholesky factor U of
the inverse, H^-1 = U^T U: column j is rounded, and what it lost, divided by U_jj, is taken off the columns k > j in
proportion to U_jk. A group's grid is chosen when its first column is reached, from what the weight is by then.

The weight w_t of a token is the modality's (r on a vision token, 1 on a text token), so that the error which remains
lies where the loss does not feel it. With w = 1 this is GPTQ as published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Grid = tuple[Tensor, ...]  # of each group: scale, and zero point if there is one
COLUMNS = 128  # that are rounded before what they lost reaches the rest of the weight
_SHRINKS = [1 - i / 10 for i in range(6)]  # of either end of a group's range
ENTRIES = 2**18  # of a weight's columns, rounded on several grids, that are in work at a time


@dataclass(frozen=True)
class GridOf:
    """How a tensor's grid is chosen, and what it is.

    choose: (N, K) fp32 -> the grid of each of its groups, (N, groups) each.  searched: try narrower ranges, too, the
    ends apart from each other, and keep for each group the one with the least error, each column counting by its own
    input's size alone.
    """

    choose: Callable[[Tensor], Grid]
    num_bits: int
    group_size: int
    searched: bool = False

    def of(self, w: Tensor, importance: Tensor) -> Grid:
        """The grids of whole groups.  w: (N, columns) fp32.  importance: (columns,) diagonal of H."""
        if not self.searched:
            return self.choose(w)
        groups = w.split(self.group_size, 1)
        return tuple(
            torch.cat(parts, 1)
            for parts in zip(
                *map(self._search, groups, importance.split(self.group_size)),
                strict=True,
            )
        )

    def _search(self, w: Tensor, importance: Tensor) -> Grid:
        low, high = w.amin(1), w.amax(1)
        # A grid depends on a group's ends alone. Of values with one sign the end next to zero stays.
        lows, highs = (torch.stack([end * share for share in _SHRINKS]) for end in (low, high))
        pairs = torch.cartesian_prod(*(torch.arange(len(_SHRINKS), device=w.device),) * 2)
        ends = torch.stack([low.maximum(lows)[pairs[:, 0]], high.minimum(highs)[pairs[:, 1]]], -1)
        grids = tuple(part.view(*ends.shape[:2], 1) for part in self.choose(ends.flatten(0, 1)))
        at_once = max(1, ENTRIES // w.numel())
        errors = [
            round_to_grid(w, scale, zero, self.num_bits).sub_(w).square_() @ importance
            for scale, zero in zip(*(part.split(at_once) for part in self.scale_and_zero(grids)), strict=True)
        ]
        best = torch.cat(errors).nan_to_num_(nan=torch.inf, posinf=torch.inf).argmin(0)  # the first of equals
        return tuple(part[best, torch.arange(len(w), device=w.device)] for part in grids)

    def rounded(self, w: Tensor, grid: Grid) -> Tensor:
        """The nearest points of the grids of whole groups.  w: (N, columns) fp32."""
        scale, zero = (p.repeat_interleave(self.group_size, 1)[:, : w.shape[1]] for p in self.scale_and_zero(grid))
        return round_to_grid(w, scale, zero, self.num_bits)

    def scale_and_zero(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """In fp32. A symmetric grid is the asymmetric one with its zero in the middle."""
        scale = grid[0].float()
        return scale, grid[1].float() if len(grid) > 1 else torch.full_like(scale, 2 ** (self.num_bits - 1))


def round_to_grid(w: Tensor, scale: Tensor, zero: Tensor, num_bits: int) -> Tensor:
    """The nearest points of the grid, as weights."""
    return (w / scale).round_().add_(zero).clamp_(0, 2**num_bits - 1).sub_(zero).mul_(scale)


def compensate(
    weight: Tensor, hessian: Tensor, grid_of: GridOf, *, act_order: bool = False, damping: float = 0.01
) -> tuple[Tensor, Grid]:
    """The weight on its grid, (N, K) fp32, and the grid, (N, groups) each.

    weight: (N, K) fp32.  hessian: (K, K) fp32; it is overwritten.  act_order: round the columns with the largest inputs
    first, while the others can still make up for all of it; all grids are then chosen beforehand.  damping: share of
    the mean of H's diagonal that is added to the diagonal.
    Raises ValueError if the hessian is not finite.
    """
    k, g = weight.shape[1], grid_of.group_size
    importance = hessian.diagonal().clone()
    order = torch.arange(k, device=weight.device)
    if act_order:
        order = importance.argsort(descending=True)
        hessian = hessian[order][:, order]
    factor = _inverse_factor(hessian, damping)
    w = weight.T[order]  # columns in a row of memory
    rounded = torch.empty_like(w)
    grids: list[Grid] = []
    if act_order:
        grids += map(tuple, zip(*(p.split(1, 1) for p in grid_of.of(weight, importance)), strict=True))
    group_of = (order // g).tolist()
    step = COLUMNS if act_order or g % COLUMNS == 0 or g >= k else min(g, COLUMNS)
    for start in range(0, k, step):
        end = min(start + step, k)
        if not act_order and start % g == 0:
            columns = slice(start, start + g)
            grids.append(grid_of.of(w[columns].T, importance[columns]))
        scales = [[p.flatten() for p in grid_of.scale_and_zero(grid)] for grid in grids]
        lost = torch.empty_like(w[start:end])
        for j in range(start, end):
            scale, zero = scales[group_of[j]]
            q = round_to_grid(w[j], scale, zero, grid_of.num_bits)
            rounded[j] = q
            torch.sub(w[j], q, out=lost[j - start]).div_(factor[j, j])
            w[j + 1 : end].addr_(factor[j, j + 1 : end], lost[j - start], alpha=-1)
        w[end:].addmm_(factor[start:end, end:].T, lost, alpha=-1)
    result = torch.empty_like(rounded)
    result[order] = rounded
    return result.T.contiguous(), tuple(torch.cat(parts, 1) for parts in zip(*grids, strict=True))


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with U^T U = (H + damping * mean(diag H))^-1. H is overwritten: three of its size, of 3.5 GB
    for the widest layers of a 72B model, are held at a time.

    Channels that are always zero would make H singular; they have nothing to make up for, nor anything to do it with.
    """
    if not hessian.isfinite().all():
        raise ValueError("the inputs of the layer hold NaN or infinite values")
    diagonal = hessian.diagonal()
    silent = diagonal == 0
    diagonal[silent] = 1
    added = damping * diagonal[~silent].mean() if (~silent).any() else torch.tensor(damping)

    def of_inverse(h: Tensor) -> tuple[Tensor, Tensor]:
        factor, failed = torch.linalg.cholesky_ex(h)
        return (factor, failed) if failed else torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)

    return damped(hessian, added, of_inverse)


def damped(hessian: Tensor, added: Tensor, factor_of: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """A factor of H with `added` on its diagonal, or with more of it where that is not enough. H is overwritten.

    factor_of: -> the factor, and whether there is none.
    Raises ValueError if there is none with thousands of times as much.
    """
    for _ in range(8):
        hessian.diagonal().add_(added.to(hessian.device))
        factor, failed = factor_of(hessian)
        if not failed:
            return factor
        added = 4 * added  # few tokens, or nearly parallel ones
    raise ValueError("the inputs of the layer are too nearly parallel to compensate for rounding")
