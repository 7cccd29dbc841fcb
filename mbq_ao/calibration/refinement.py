"""Lower the error of a weight that is on its grid already: scales by least squares, then value by value, in turn.

    tr (W - Q) H (W - Q)^T          Q = s (q - z), with a scale s and a zero point z of each group

Compensation (error_compensation.py) decides each column once, before those behind it are known, on a grid that was
chosen by the inputs' sizes alone. Here all values are known: with q fixed, the scales of a row are the solution of a
linear system, and with the scales fixed, each column in turn goes to the nearest point of where the others want it
(coordinate descent). Neither can raise the error.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mbq_ao.calibration.error_compensation import COLUMNS, Grid, GridOf, round_to_grid

_RIDGE = 1e-4  # of the systems' mean diagonal: groups that are all zero, or whose inputs are, keep their scales
_ENTRIES = 2**24  # of the systems, or of the weight, that are in work at a time


def refine(
    weight: Tensor, rounded: Tensor, grid: Grid, hessian: Tensor, grid_of: GridOf, rounds: int
) -> tuple[Tensor, Grid]:
    """Q of less error, (N, K) fp32, and its grid, (N, groups) each; zero points stay.

    weight, rounded: W and Q (N, K) fp32.  hessian: H (K, K) fp32.  rounds: how often all columns are gone through.
    """
    scale, *rest = grid
    zero = grid_of.scale_and_zero(grid)[1]
    rounded, scale = _least_squares_scales(weight, rounded, scale, hessian, grid_of.group_size)
    for _ in range(rounds):
        rounded = _settle(weight, rounded, scale.float(), zero, hessian, grid_of)
        rounded, scale = _least_squares_scales(weight, rounded, scale, hessian, grid_of.group_size)
    return rounded, (scale, *rest)


def _settle(weight: Tensor, rounded: Tensor, scale: Tensor, zero: Tensor, hessian: Tensor, grid_of: GridOf) -> Tensor:
    """Every column once to the nearest points of where the error is least, given all others."""
    points, lost = rounded.T.contiguous(), (rounded - weight).T.contiguous()  # columns in a row of memory
    scales, zeros = scale.T.contiguous(), zero.T.contiguous()
    wants = hessian.diagonal().clamp(min=torch.finfo(hessian.dtype).tiny)  # a silent channel stays
    for start in range(0, len(points), COLUMNS):
        end = min(start + COLUMNS, len(points))
        slope = hessian[start:end] @ lost
        for j in range(start, end):
            group = j // grid_of.group_size
            wanted = points[j] - slope[j - start] / wants[j]
            moved = round_to_grid(wanted, scales[group], zeros[group], grid_of.num_bits) - points[j]
            slope[j + 1 - start :].addr_(hessian[j, j + 1 : end], moved)
            points[j] += moved
            lost[j] += moved
    return points.T.contiguous()


def _least_squares_scales(
    weight: Tensor, rounded: Tensor, scale: Tensor, hessian: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """Q with the scales that fit its integers best, and those, in the dtype of `scale` (N, groups).

    A row where one of the scales would not be a positive number keeps its own.
    """
    (_, k), groups = rounded.shape, scale.shape[1]
    rows_at_once = max(1, _ENTRIES // max(groups**2, k))
    found, scales = [], []
    for w, q, s in zip(*(x.split(rows_at_once) for x in (weight, rounded, scale)), strict=True):
        steps = (q / _of_columns(s, group_size, q)).round_()  # q - z
        system = q.new_zeros(len(q), groups, groups)
        for i, (part, rows) in enumerate(zip(steps.split(group_size, 1), hessian.split(group_size), strict=True)):
            start = i * group_size  # the system is symmetric: one half is enough
            system[:, i:, i] = _of_groups((part @ rows[:, start:]).mul_(steps[:, start:]), group_size)
        system += system.tril(-1).mT
        # Of the difference, not as one of sums, which could leave little of it where products have fewer digits (TF32).
        missing = _of_groups(((w - q) @ hessian).mul_(steps), group_size)[..., None]
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal += (_RIDGE * diagonal.mean(1, keepdim=True)).clamp(min=torch.finfo(q.dtype).tiny)
        factor, failed = torch.linalg.cholesky_ex(system)
        better = (s.float() + torch.cholesky_solve(missing, factor)[..., 0]).to(s.dtype)
        usable = (better.isfinite() & (better > 0)).all(1, keepdim=True) & (failed == 0)[:, None]
        scales.append(torch.where(usable, better, s))
        found.append(torch.where(usable, steps * _of_columns(scales[-1], group_size, q), q))
    return torch.cat(found), torch.cat(scales)


def _of_groups(values: Tensor, group_size: int) -> Tensor:
    """The sums of groups of columns: (N, K) -> (N, groups), of which the last may be narrower."""
    k = values.shape[1]
    return F.pad(values, (0, -k % group_size)).view(len(values), -1, group_size).sum(-1)


def _of_columns(scale: Tensor, group_size: int, like: Tensor) -> Tensor:
    """(N, groups) -> (N, K) fp32"""
    return scale.float().repeat_interleave(group_size, 1)[:, : like.shape[1]]
