"""W4A8 on the CPU: sums of integers are exact both ways, and so is the linear layer, row by row."""

import pytest
import torch
from torch import Tensor

from mbq_ao.kernels import w4a8_cpu
from mbq_ao.kernels.int4_layout import pack_int4
from mbq_ao.kernels.reference import quantize_tokens, w4a8_linear_reference
from mbq_ao.kernels.w4a8_cpu import sum_products

# torch._int_mm is slow on the CPUs where it is not used, but right.
both_ways = pytest.mark.parametrize("int8_matmul", [True, False], ids=["_int_mm", "fp32 matmul"], indirect=True)


@pytest.fixture
def int8_matmul(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(w4a8_cpu, "has_int8_matmul", lambda: request.param)
    return request.param


def integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(sum(shape)))


@both_ways
@pytest.mark.parametrize("k", [0, 1, 17, 16_384, 16_385, 40_000])
@pytest.mark.parametrize(("m", "n"), [(0, 3), (1, 1), (5, 7)])
def test_sums_are_exact_and_rounded_once(m: int, n: int, k: int, int8_matmul: bool) -> None:
    xq, q = integers(-127, 128, m, k), integers(-8, 8, n, k)
    sums = sum_products(xq, q)
    assert sums.dtype == torch.float32
    assert torch.equal(sums, (xq.long() @ q.long().t()).float())


@both_ways
@pytest.mark.parametrize("k", [16_384, 16_385, 40_001])
def test_the_largest_sums_are_exact(k: int, int8_matmul: bool) -> None:
    # One odd weight: beyond 2^24 fp32 would lose it on the way.
    xq, q = torch.full((2, k), 127, dtype=torch.int8), torch.full((3, k), -8, dtype=torch.int8)
    q[:, -1] = 7
    xq[1] = -127
    total = 127 * (7 - 8 * (k - 1))
    assert torch.equal(sum_products(xq, q), torch.tensor([[total], [-total]]).expand(2, 3).float())


@both_ways
def test_a_slice_of_columns(int8_matmul: bool) -> None:
    xq, q = integers(-127, 128, 5, 96), integers(-8, 8, 7, 96)
    expected = (xq[:, 32:64].long() @ q[:, 32:64].long().t()).float()
    assert torch.equal(sum_products(xq[:, 32:64], q[:, 32:64]), expected)


@both_ways
@pytest.mark.parametrize("k", [100, 20_000])
def test_a_scale_a_row_is_the_reference_bit_for_bit(k: int, int8_matmul: bool) -> None:
    x, bias = torch.randn(5, k).bfloat16(), torch.randn(33)
    arguments = (x, pack_int4(integers(-8, 8, 33, k)), torch.rand(33, 1), bias, torch.rand(k), k)
    assert torch.equal(torch.ops.mbq_ao.w4a8_linear(*arguments), w4a8_linear_reference(*arguments).bfloat16())


@pytest.mark.parametrize("magnitude", [1.0, 3e35], ids=["", "whose sums could overflow"])
def test_in_fp32_it_is_the_published_simulation(magnitude: float) -> None:
    x, bias = torch.randn(5, 100) * magnitude, torch.randn(33)
    weight = (pack_int4(integers(-8, 8, 33, 100)), torch.rand(33, 1))
    y = torch.ops.mbq_ao.w4a8_linear(x, *weight, bias, None, 100)
    xq, d = quantize_tokens(x)
    plain = torch.ops.mbq_ao.int4_dequantize(*weight, 100, 100, torch.float32)
    same = torch.equal(y, torch.nn.functional.linear(xq * d, plain, bias))
    assert same == (magnitude == 1.0)
    torch.testing.assert_close(y, w4a8_linear_reference(x, *weight, bias, None, 100), rtol=1e-5, atol=1e-4 * magnitude)
