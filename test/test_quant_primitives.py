"""Quantization primitives: bit for bit the published quantizer, and the laws that calibration relies on."""

import pathlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mbq_ao.kernels.reference import quantize_tokens
from mbq_ao.quant_primitives import (
    choose_qparams_affine,
    choose_scale_symmetric,
    dequantize_affine,
    fake_quantize_affine,
    num_groups,
    quantize_affine,
    quantize_symmetric,
)

GOLDENS = load_file(pathlib.Path(__file__).parent / "goldens" / "quant_unit.safetensors")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def round_trip(w: Tensor, group_size: int, num_bits: int = 3) -> Tensor:
    scale, zero_point = choose_qparams_affine(w, group_size=group_size, num_bits=num_bits)
    q = quantize_affine(w, scale, zero_point, group_size=group_size, num_bits=num_bits)
    return dequantize_affine(q, scale, zero_point, group_size=group_size, dtype=w.dtype)


@pytest.mark.parametrize("num_bits", [3, 4])
@pytest.mark.parametrize(("name", "group_size"), [("g128", 128), ("row", 256)])
def test_agrees_bit_for_bit_with_the_published_quantizer(name: str, group_size: int, num_bits: int) -> None:
    # Rows of x are corner cases: zeros, constants, ties, one sign only, an outlier, below the smallest range.
    expected = GOLDENS[f"b{num_bits}_{name}"]
    assert torch.equal(round_trip(GOLDENS["x"], group_size, num_bits), expected)
    assert torch.equal(fake_quantize_affine(GOLDENS["x"], group_size=group_size, num_bits=num_bits), expected)


@pytest.mark.parametrize(("name", "group_size"), [("g128", 128), ("row", 256)])
def test_the_symmetric_one_agrees_bit_for_bit(name: str, group_size: int) -> None:
    w = GOLDENS["x"]
    scale = choose_scale_symmetric(w, group_size=group_size)
    q = quantize_symmetric(w, scale, group_size=group_size)
    rounded = dequantize_affine(q, scale, None, group_size=group_size, dtype=w.dtype)
    assert torch.equal(rounded, GOLDENS[f"b4_sym_{name}"])


def test_tokens_agree_bit_for_bit() -> None:
    q, d = quantize_tokens(GOLDENS["x"].view(2, 6, 256))
    assert torch.equal(q * d, GOLDENS["tokens_b8"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [256, 300, 20])
@pytest.mark.parametrize("group_size", [32, 64, 128, 300])
def test_fake_quantize_is_the_round_trip(group_size: int, k: int, dtype: torch.dtype) -> None:
    w = torch.randn(7, k, generator=torch.Generator().manual_seed(k)).to(dtype)
    assert torch.equal(fake_quantize_affine(w, group_size=group_size), round_trip(w, group_size))


def test_a_short_last_group_is_quantized_by_itself() -> None:
    w = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    apart = torch.cat([round_trip(w[:, :64], 64), round_trip(w[:, 64:], 36)], dim=1)
    assert torch.equal(round_trip(w, 64), apart)
    scale, zero_point = choose_qparams_affine(w, group_size=64)
    assert scale.shape == zero_point.shape == (5, num_groups(100, 64)) == (5, 2)
    assert zero_point.dtype == torch.uint8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_half_a_step_within_the_grid(dtype: torch.dtype) -> None:
    w = torch.randn(16, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    scale, _ = choose_qparams_affine(w, group_size=128)
    error = (round_trip(w, 128).float() - w.float()).abs().view(16, 2, 128)
    # A zero point rounded to a whole number moves the grid by up to half a step more.
    step = scale.float()[..., None]
    assert (error <= 1.0 * step + 2 * torch.finfo(dtype).eps * w.float().abs().view(16, 2, 128)).all()


def test_integers_are_chosen_with_the_scale_as_stored() -> None:
    # In bf16 a scale is off by up to 0.4 %: using the unrounded one would choose other integers.
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    scale, zero_point = choose_qparams_affine(w, group_size=128)
    assert scale.dtype == torch.bfloat16
    q = quantize_affine(w, scale, zero_point, group_size=128)
    stored = scale.float()
    expected = (torch.round(w.float() / stored) + zero_point.float()).clamp(0, 7)
    assert torch.equal(q.float(), expected)


@pytest.mark.parametrize("num_bits", [3, 8])
def test_a_scale_is_never_zero(num_bits: int) -> None:
    w = torch.zeros(2, 32, dtype=torch.float16)
    scale, _ = choose_qparams_affine(w, group_size=32, num_bits=num_bits)
    assert (scale > 0).all()
    assert torch.equal(round_trip(w, 32, num_bits), w)


def test_scale_dtype_of_choice() -> None:
    scale, _ = choose_qparams_affine(torch.randn(4, 64), group_size=32, scale_dtype=torch.bfloat16)
    assert scale.dtype == torch.bfloat16


@hypothesis.given(
    n=st.integers(1, 5),
    k=st.integers(1, 70),
    group_size=st.sampled_from([32, 64]),
    num_bits=st.integers(2, 8),
    magnitude=st.floats(-3, 3),
    seed=st.integers(0, 1000),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_quantizing_twice_changes_little(
    n: int, k: int, group_size: int, num_bits: int, magnitude: float, seed: int
) -> None:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 10**magnitude
    scale, zero_point = choose_qparams_affine(w, group_size=group_size, num_bits=num_bits)
    q = quantize_affine(w, scale, zero_point, group_size=group_size, num_bits=num_bits)
    assert int(q.max()) < 2**num_bits
    once = dequantize_affine(q, scale, zero_point, group_size=group_size, dtype=w.dtype)
    again = quantize_affine(once, scale, zero_point, group_size=group_size, num_bits=num_bits)
    assert torch.equal(q, again)  # points of a grid stay where they are


@pytest.mark.parametrize("w", [torch.zeros(3), torch.zeros(2, 3, dtype=torch.int8)], ids=["vector", "int8"])
def test_only_floating_point_matrices(w: Tensor) -> None:
    with pytest.raises(ValueError, match="must be a floating-point matrix"):
        choose_qparams_affine(w, group_size=32)
