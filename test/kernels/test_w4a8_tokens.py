"""What W4A8 makes of tokens that are hard to quantize: zeros, outliers, the ends of fp32, NaN and infinities."""

from collections.abc import Callable

import pytest
import torch
from launches import DEVICE, needs_kernels
from torch import Tensor

from mbq_ao.kernels.int4_layout import pack_int4
from mbq_ao.kernels.reference import quantize_tokens, w4a8_linear_reference

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # numpy's, in the interpreter
N, K = 24, 96
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Linear = Callable[..., Tensor]


def rounded_reference(x: Tensor, *args: object) -> Tensor:
    return w4a8_linear_reference(x, *args).to(x.dtype)


def triton_kernel(*args: object) -> Tensor:
    from mbq_ao.kernels.w4a8_gemm import w4a8_linear_triton

    return w4a8_linear_triton(*(a.to(DEVICE) if isinstance(a, Tensor) else a for a in args)).cpu()


each_linear = pytest.mark.parametrize(
    "linear",
    [rounded_reference, torch.ops.mbq_ao.w4a8_linear, pytest.param(triton_kernel, marks=needs_kernels)],
    ids=["reference", "op", "triton"],
)
each_group_size = pytest.mark.parametrize("g", [32, K])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def weight(g: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    q = torch.randint(-8, 8, (N, K), dtype=torch.int8, generator=gen)
    return pack_int4(q), torch.rand(N, K // g, generator=gen) * 0.1 + 0.01


def random_x(m: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(m, K, generator=torch.Generator().manual_seed(1)).to(dtype)


BIAS = torch.randn(N, generator=torch.Generator().manual_seed(2))


@each_linear
@each_group_size
@each_dtype
def test_a_token_of_zeros_gives_the_bias(dtype: torch.dtype, g: int, linear: Linear) -> None:
    x = random_x(3, dtype)
    x[1] = 0
    for factors in (None, torch.rand(K)):
        assert torch.equal(linear(x, *weight(g), BIAS, factors, g)[1], BIAS.to(dtype))
        assert torch.equal(linear(x, *weight(g), None, factors, g)[1], torch.zeros(N, dtype=dtype))
    zero_factors = torch.zeros(K)
    assert torch.equal(linear(x, *weight(g), BIAS, zero_factors, g), BIAS.to(dtype).expand(3, N))


@each_linear
@each_group_size
@each_dtype
def test_beside_a_huge_outlier_all_else_is_zero(dtype: torch.dtype, g: int, linear: Linear) -> None:
    x = random_x(2, dtype)
    x[0, 40] = huge = 3e4 if dtype == torch.float16 else 1e30
    xq, d = quantize_tokens(x)
    assert xq[0].nonzero().tolist() == [[40]]
    assert xq[0, 40] == 127 and d[0].item() == pytest.approx(huge / 127, rel=1e-2)
    y = linear(x, *weight(g), BIAS, None, g)
    column = torch.ops.mbq_ao.int4_dequantize(*weight(g), K, g, torch.float32)[:, 40]
    torch.testing.assert_close(y[0].float(), (x[0, 40].float() * column + BIAS).to(dtype).float())
    torch.testing.assert_close(y[1:], linear(x[1:], *weight(g), BIAS, None, g))


@each_linear
@each_group_size
def test_the_largest_tokens_of_fp32(g: int, linear: Linear) -> None:
    x = random_x(4, torch.float32).sign()
    x[:2] *= 1e38
    x[1] *= 3.4
    qdata, scale = weight(g)
    plain = torch.ops.mbq_ao.int4_dequantize(qdata, scale, K, g, torch.float32)
    for factor in (1.0, 1e-3):
        y = linear(x, qdata, scale * factor, BIAS, None, g)
        exact = x.double() @ (plain * factor).double().t() + BIAS  # signs are quantized exactly
        fits = exact.abs() <= torch.finfo(torch.float32).max
        torch.testing.assert_close(y[fits], exact[fits].float(), rtol=1e-5, atol=0)
        assert torch.equal(y[~fits], exact[~fits].sign().float() * torch.inf)
    assert not fits.logical_not().any()  # as the weights are small there


@each_linear
@each_group_size
def test_a_product_with_act_pre_scale_beyond_fp32_is_its_largest(g: int, linear: Linear) -> None:
    x = random_x(2, torch.float32).sign() * 1e38
    x[1] = 1
    qdata, scale = weight(g)
    scale = scale * 1e-3
    y = linear(x, qdata, scale, BIAS, torch.full((K,), 10.0), g)
    largest = x.sign() * torch.finfo(torch.float32).max
    torch.testing.assert_close(y[0], linear(largest, qdata, scale, BIAS, None, g)[0])
    torch.testing.assert_close(y[1], linear(10 * x, qdata, scale, BIAS, None, g)[1])


@each_linear
@each_group_size
@each_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(bad: float, dtype: torch.dtype, g: int, linear: Linear) -> None:
    x = random_x(4, dtype)
    for factors in (None, torch.rand(K), torch.zeros(K)):
        expected = linear(x, *weight(g), BIAS, factors, g)
        for columns in ([5], [0, K - 1], list(range(K))):
            broken = x.clone()
            broken[2, columns] = bad
            y = linear(broken, *weight(g), BIAS, factors, g)
            assert y[2].isnan().all()
            assert torch.equal(y[[0, 1, 3]], expected[[0, 1, 3]])


@each_linear
@each_group_size
def test_infinities_of_both_signs_and_nan_in_one_token(g: int, linear: Linear) -> None:
    x = random_x(2, torch.float32)
    x[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    y = linear(x, *weight(g), None, None, g)
    assert y[0].isnan().all() and y[1].isfinite().all()


@each_linear
@each_dtype
def test_no_rows(dtype: torch.dtype, linear: Linear) -> None:
    assert linear(random_x(0, dtype), *weight(K), BIAS, torch.ones(K), K).shape == (0, N)
