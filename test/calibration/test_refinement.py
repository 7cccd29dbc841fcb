"""Refining a rounded weight: against the same written out, and what must hold for any input."""

from functools import partial

import pytest
import torch
from test_error_compensation import error, problem
from torch import Tensor

from mbq_ao.calibration.error_compensation import Grid, GridOf, compensate, round_to_grid
from mbq_ao.calibration.refinement import refine
from mbq_ao.quant_primitives import choose_qparams_affine, choose_scale_symmetric


def grid_of(precision: str, group_size: int, dtype: torch.dtype = torch.float32) -> GridOf:
    if precision == "w3a16":
        return GridOf(partial(choose_qparams_affine, group_size=group_size, scale_dtype=dtype), 3, group_size)
    return GridOf(lambda w: (choose_scale_symmetric(w, group_size=group_size, scale_dtype=dtype),), 4, group_size)


def written_out(w: Tensor, q: Tensor, grid: Grid, h: Tensor, of: GridOf, rounds: int) -> Tensor:
    """Row by row and value by value, in double precision."""
    h = h.double()
    result = []
    for row, start, *parts in zip(w.double(), q.double(), *of.scale_and_zero(grid), strict=True):
        scale, zero = (p.double() for p in parts)
        groups = torch.arange(len(row)) // of.group_size
        point = start.clone()
        for turn in range(rounds + 1):
            if turn:
                for j, g in enumerate(groups.tolist()):
                    others = (point - row) @ h[:, j] - (point[j] - row[j]) * h[j, j]
                    wanted = row[j] - others / h[j, j]
                    point[j] = round_to_grid(wanted, scale[g], zero[g], of.num_bits)
            u = torch.zeros(len(row), len(scale), dtype=torch.double)
            u[torch.arange(len(row)), groups] = (point / scale[groups]).round()
            scale = torch.linalg.lstsq(u.T @ h @ u, u.T @ h @ row, driver="gelsd").solution
            point = u @ scale
        result.append(point)
    return torch.stack(result).float()


@pytest.mark.parametrize("precision, group_size", [("w3a16", 32), ("w3a16", 64), ("w4a8", 96), ("w4a8", 32)])
@pytest.mark.parametrize("k", [96, 160])
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_agrees_with_what_is_written_out(precision: str, group_size: int, k: int, rounds: int) -> None:
    w, h = problem(k=k)
    of = grid_of(precision, min(group_size, k))
    q, grid = compensate(w, h.clone(), of)
    found, _ = refine(w, q, grid, h, of, rounds)
    expected = written_out(w, q, grid, h, of, rounds)
    # Where a value lies between two points, the last bit decides and all that follows in its row differs.
    close = (found - expected).abs() < 1e-3 * w.abs().max()
    assert close.all(1).float().mean() > 0.7
    assert error(w, found, h) == pytest.approx(error(w, expected, h), rel=0.02)


@pytest.mark.parametrize("precision", ["w3a16", "w4a8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_round_has_less_error_and_values_lie_on_their_grid(precision: str, dtype: torch.dtype) -> None:
    w, h = problem(k=300, tokens=900)
    of = grid_of(precision, 64, dtype)
    q, grid = compensate(w, h.clone(), of)
    errors = [error(w, q, h)]
    for rounds in range(4):
        found, (scale, *rest) = refine(w, q, grid, h, of, rounds)
        assert scale.dtype == dtype and scale.shape == grid[0].shape and (scale > 0).all()
        assert all(torch.equal(a, b) for a, b in zip(rest, grid[1:], strict=True))
        s, z = (p.repeat_interleave(64, 1)[:, :300] for p in of.scale_and_zero((scale, *rest)))
        codes = found / s + z
        assert (codes - codes.round()).abs().max() < 1e-3
        assert codes.round().min() >= 0 and codes.round().max() <= 2**of.num_bits - 1
        errors.append(error(w, found, h))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0], errors


def test_silent_channels_and_groups_stay() -> None:
    w, h = problem()
    h[7], h[:, 7] = 0, 0
    h[32:64], h[:, 32:64] = 0, 0
    of = grid_of("w3a16", 32)
    q, grid = compensate(w, h.clone(), of)
    found, (scale, _) = refine(w, q, grid, h, of, 2)
    assert found.isfinite().all() and error(w, found, h) < error(w, q, h)
    assert torch.equal(found[:, 32:64], q[:, 32:64]) and torch.equal(scale[:, 1], grid[0][:, 1])
    # The silent channel has its place on the grid, whose scale has moved.
    assert torch.equal((found[:, 7] / scale[:, 0]).round(), (q[:, 7] / grid[0][:, 0]).round())
