"""Rounding with compensation: against the textbook form of the same method, and what must hold for any input."""

from functools import partial

import pytest
import torch
from torch import Tensor

from mbq_ao.calibration.error_compensation import GridOf, compensate, round_to_grid
from mbq_ao.quant_primitives import (
    choose_qparams_affine,
    choose_scale_symmetric,
    dequantize_affine,
    fake_quantize_affine,
)


def asymmetric(group_size: int, searched: bool = False) -> GridOf:
    return GridOf(partial(choose_qparams_affine, group_size=group_size), 3, group_size, searched)


def symmetric(group_size: int) -> GridOf:
    return GridOf(lambda w: (choose_scale_symmetric(w, group_size=group_size),), 4, group_size)


def problem(n: int = 12, k: int = 96, tokens: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and H of inputs whose channels go together and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) * torch.rand(k, generator=generator).mul(3).exp()
    x = torch.randn(tokens, k, generator=generator) @ mixing
    return torch.randn(n, k, generator=generator), x.T @ x


def error(w: Tensor, q: Tensor, h: Tensor) -> float:
    return float(torch.einsum("nk,kl,nl->", w - q, h, w - q))


def surgeon(weight: Tensor, hessian: Tensor, grid_of: GridOf, damping: float = 0.01) -> Tensor:
    """Optimal brain surgery, column by column: the inverse of the Hessian of the columns that are left, each time."""
    w, h = weight.double(), hessian.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    q = torch.empty_like(w)
    for j in range(w.shape[1]):
        if j % grid_of.group_size == 0:
            columns = slice(j, j + grid_of.group_size)
            scale, zero = grid_of.scale_and_zero(grid_of.of(w[:, columns].float(), hessian.diagonal()[columns]))
        q[:, j] = round_to_grid(w[:, j : j + 1].float(), scale, zero, grid_of.num_bits)[:, 0].double()
        inverse = torch.linalg.inv(h[j:, j:])
        w[:, j:] -= ((w[:, j] - q[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    return q.float()


@pytest.mark.parametrize(
    "grid_of", [asymmetric(32), asymmetric(96), asymmetric(64), symmetric(96), asymmetric(32, True)]
)
def test_agrees_with_the_textbook_form(grid_of: GridOf) -> None:
    w, h = problem()
    q, grid = compensate(w, h.clone(), grid_of)
    expected = surgeon(w, h, grid_of)
    # Where a value lies between two points, the last bit decides and all that follows differs.
    assert (q - expected).abs().gt(1e-4).float().mean() < 0.02
    assert grid[0].shape == (12, -(-96 // grid_of.group_size))
    assert error(w, q, h) == pytest.approx(error(w, expected, h), rel=0.05)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("k, group_size", [(256, 32), (300, 128), (300, 300), (130, 64)])
def test_values_lie_on_their_grid(k: int, group_size: int, act_order: bool) -> None:
    w, h = problem(k=k, tokens=40)  # fewer tokens than channels
    q, (scale, zero_point) = compensate(w, h.clone(), asymmetric(group_size), act_order=act_order)
    columns = torch.arange(k) // group_size
    codes = (q / scale[:, columns] + zero_point[:, columns]).round().to(torch.uint8)
    assert codes.max() <= 7
    assert torch.equal(dequantize_affine(codes, scale, zero_point, group_size=group_size, dtype=torch.float32), q)


@pytest.mark.parametrize("seed", range(3))
def test_less_error_than_plain_rounding(seed: int) -> None:
    w, h = problem(seed=seed)
    plain = error(w, fake_quantize_affine(w, group_size=32), h)
    ordered = error(w, compensate(w, h.clone(), asymmetric(32), act_order=True)[0], h)
    found = error(w, compensate(w, h.clone(), asymmetric(32))[0], h)
    assert found < 0.75 * plain
    assert ordered < 0.75 * plain


def test_independent_channels_have_nothing_to_make_up_for() -> None:
    w, h = problem()
    q, _ = compensate(w, torch.diag(h.diagonal()), asymmetric(32))
    assert torch.equal(q, fake_quantize_affine(w, group_size=32))
    q, _ = compensate(w, torch.zeros_like(h), asymmetric(32))  # nor has a layer that never saw anything
    assert torch.equal(q, fake_quantize_affine(w, group_size=32))


def test_a_token_that_weighs_more_has_less_error() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    w, first, second = torch.randn(12, 96, generator=generator), x[:200], x[200:]
    of_first = [
        ((w - compensate(w, first.T @ first + weight * second.T @ second, asymmetric(32))[0]) @ first.T).norm()
        for weight in (0.0, 1.0, 100.0)
    ]
    assert of_first[0] < of_first[1] < of_first[2]


def test_a_searched_grid_has_less_error() -> None:
    w, h = problem()
    w[:, 5] *= 4  # an outlier in a group of small inputs
    h[5] *= 0.01
    h[:, 5] *= 0.01
    importance = torch.diag(h.diagonal())
    plain, searched = (compensate(w, importance.clone(), asymmetric(32, searched))[0] for searched in (False, True))
    assert error(w, searched, importance) < 0.9 * error(w, plain, importance)


def test_silent_channels_and_bad_inputs() -> None:
    w, h = problem()
    h[7], h[:, 7] = 0, 0
    q, _ = compensate(w, h.clone(), asymmetric(32))
    assert q.isfinite().all()
    assert (q[:, 7] - w[:, 7]).abs().max() < 1  # rounded, not dropped
    h[3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        compensate(w, h.clone(), asymmetric(32))
