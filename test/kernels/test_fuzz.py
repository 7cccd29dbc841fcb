"""The linear ops against their reference on whatever hypothesis thinks of: shapes, dtypes, views, scales of 0 and NaN.

The bounds are derived. W3A16: kernels round x * w to fp32 at worst K times, may round a dequantized weight once to x's
dtype, and round the output once. W4A8: the sums of a group are exact; what follows is rounded a few times a group.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mbq_ao.kernels import int3_cpu
from mbq_ao.kernels.int3_layout import pack_int3
from mbq_ao.kernels.int4_layout import pack_int4
from mbq_ao.kernels.reference import (
    dequantize_reference,
    int3_linear_reference,
    int4_dequantize_reference,
    quantize_tokens,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Case:
    x: Tensor
    weight: tuple[Tensor, Tensor, Tensor]
    bias: Tensor | None
    group_size: int

    def arguments(self) -> tuple[object, ...]:
        return (self.x, *self.weight, self.bias, self.group_size)


def draw_bias(draw: st.DrawFn, generator: torch.Generator, n: int) -> Tensor | None:
    return torch.randn(n, generator=generator).to(draw(st.sampled_from(DTYPES))) if draw(st.booleans()) else None


def draw_view(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same values with other strides, or with a dimension more."""
    view = draw(st.sampled_from(["as it is", "transposed", "a slice", "3-D"]))
    if view == "transposed":
        return x.t().contiguous().t()
    if view == "a slice":
        return torch.cat([x, x.new_full((x.shape[0], 3), math.nan)], 1)[:, : x.shape[1]]
    return x[:, None] if view == "3-D" else x


def spoil(draw: st.DrawFn, values: Tensor, *bad: float) -> None:
    """Put up to two of `bad` anywhere, in place."""
    for value in draw(st.lists(st.sampled_from(bad), max_size=2 if values.numel() else 0)):
        values.view(-1)[draw(st.integers(0, values.numel() - 1))] = value


@st.composite
def cases(
    draw: st.DrawFn,
    max_rows: int,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    group_sizes: tuple[int, ...] = (32, 64, 128, 256),
) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    m, n, k = draw(st.integers(0, max_rows)), draw(st.integers(1, 100)), draw(st.integers(1, 400))
    group_size = draw(st.sampled_from([g for g in group_sizes if g < k] + [k]))
    x_dtype, scale_dtype = draw(st.sampled_from(dtypes)), draw(st.sampled_from(DTYPES))
    num_groups = math.ceil(k / group_size)
    q = torch.randint(0, 8, (n, k), generator=generator, dtype=torch.uint8)
    zero_point = torch.randint(0, 8, (n, num_groups), generator=generator, dtype=torch.uint8)
    scale = torch.rand(n, num_groups, generator=generator) + 0.1
    spoil(draw, scale, 0.0, math.nan)
    x = torch.randn(m, k, generator=generator)
    x[:, draw(st.integers(0, k - 1))] *= draw(st.sampled_from([1.0, 100.0]))  # an outlier channel
    if m and draw(st.booleans()):
        x[draw(st.integers(0, m - 1)), draw(st.integers(0, k - 1))] = math.nan
    x = draw_view(draw, x.to(x_dtype))
    bias = draw_bias(draw, generator, n)
    return Case(x, (pack_int3(q), scale.to(scale_dtype), zero_point), bias, group_size)


def assert_right(y: Tensor, case: Case) -> None:
    x, k = case.x, case.x.shape[-1]
    expected = int3_linear_reference(*case.arguments())
    assert y.shape == expected.shape and y.dtype == x.dtype
    # NaN in a scale reaches its own column of y, in x its own row, and nothing else.
    assert torch.equal(y.isnan(), expected.isnan())
    scale = case.weight[1].float().nan_to_num()[:, :, None].expand(-1, -1, case.group_size).flatten(1)[:, :k]
    size = x.float().nan_to_num().abs() @ (8 * scale).t()  # the sums that kernels really form are of up to q = 7
    if x.dtype == torch.bfloat16:
        size = 17 * size  # 128 + q instead of q, taken off again
    exact = dequantize_reference(*case.weight, k, case.group_size, torch.float32).nan_to_num().abs()
    rounded = x.float().nan_to_num().abs() @ exact.t() + (0 if case.bias is None else case.bias.float().abs())
    bound = 4 * k**0.5 * 2**-24 * size + 2 * torch.finfo(x.dtype).eps * rounded + 1e-6
    assert ((y.float() - expected).nan_to_num().abs() <= bound).all()


@given(cases(max_rows=70))
@settings(max_examples=150, derandomize=True, deadline=None)
def test_cpu(case: Case) -> None:
    assert_right(torch.ops.mbq_ao.int3_linear(*case.arguments()), case)


@given(cases(max_rows=8, group_sizes=(128, 256)))  # one kernel to compile
@settings(max_examples=60, derandomize=True, deadline=None)
def test_compiled_on_cpu(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int3_cpu, "MIN_WEIGHTS_PER_ROW", 0)
        assert_right(torch.ops.mbq_ao.int3_linear(*case.arguments()), case)


@given(cases(max_rows=24, dtypes=(torch.float16, torch.bfloat16)))
@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_triton(case: Case) -> None:
    pytest.importorskip("triton")
    from mbq_ao.kernels.int3_linear import int3_linear_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = [a.to(device) if isinstance(a, Tensor) else a for a in case.arguments()]
    assert_right(int3_linear_triton(*arguments).cpu(), case)


@st.composite
def w4a8_cases(draw: st.DrawFn) -> tuple:
    """Arguments of w4a8_linear: tokens, and single entries of them, of every size from 1e-30 to 1e38."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    m, n, k = draw(st.integers(0, 9)), draw(st.integers(1, 50)), draw(st.integers(1, 300))
    g = draw(st.sampled_from([g for g in (32, 64, 128, 256) if g < k] + [k]))
    x_dtype, other_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    largest = torch.finfo(x_dtype).max
    sizes = st.floats(-30, 38).map(lambda power: 10.0**power)
    x = torch.randn(m, k, generator=generator)
    for row in x:
        row.mul_(draw(sizes))
    if m and draw(st.booleans()):
        x[draw(st.integers(0, m - 1)), draw(st.integers(0, k - 1))] = draw(sizes)
    x = x.clamp_(-largest, largest)
    spoil(draw, x, 0.0, largest, -largest, *draw(st.sampled_from([(), (math.nan, math.inf, -math.inf)])))
    q = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    # A scale of 1e30 is beyond what any weight has; there, the terms of a row would be infinities of both signs.
    scale = ((torch.rand(n, math.ceil(k / g), generator=generator) + 0.1) * min(draw(sizes), 1e25)).to(other_dtype)
    scale = scale.clamp_(max=torch.finfo(other_dtype).max)
    factors = torch.randn(k, generator=generator) * draw(sizes)
    largest = torch.finfo(other_dtype).max
    act_pre_scale = factors.clamp_(-largest, largest).to(other_dtype) if draw(st.booleans()) else None
    return draw_view(draw, x.to(x_dtype)), pack_int4(q), scale, draw_bias(draw, generator, n), act_pre_scale, g


def assert_w4a8_right(y: Tensor, arguments: tuple) -> None:
    x, qdata, scale, bias, act_pre_scale, g = arguments
    assert y.shape == (*x.shape[:-1], scale.shape[0]) and y.dtype == x.dtype
    # NaN in a token is NaN in its row; nothing finite becomes NaN.
    bad = ~x.isfinite().all(-1, keepdim=True)
    assert torch.equal(y.isnan(), bad.expand_as(y))
    xq, d = quantize_tokens(x, act_pre_scale)
    assert (xq.abs().amax(-1, keepdim=True) <= 127).all()
    xq, d = xq.double(), d.double().masked_fill(bad, 0)
    q = int4_dequantize_reference(qdata, scale, x.shape[-1], g, torch.float32).double()
    exact = xq @ q.t() * d + (0 if bias is None else bias.double())
    size = xq.abs() @ q.abs().t() * d + (0 if bias is None else bias.double().abs())
    bound = (4 + 2 * scale.shape[1]) * 2**-24 * size + torch.finfo(x.dtype).eps * exact.abs()
    bound += torch.finfo(x.dtype).smallest_normal + 2**-126 * d  # what underflows at the end, and on the way
    # An infinity is right where the exact result is beyond the dtype, or too near its end to tell.
    largest = torch.finfo(x.dtype).max
    assert (exact.abs() + bound >= largest)[y.isinf()].all()
    assert torch.equal(y.sign()[y.isinf()], exact.sign().to(y.dtype)[y.isinf()])
    assert ((y.double() - exact).abs() <= bound)[y.isfinite()].all()
    assert (exact.abs() - bound <= largest)[y.isfinite()].all()


@given(w4a8_cases())
@settings(max_examples=300, derandomize=True, deadline=None)
def test_w4a8_cpu(arguments: tuple) -> None:
    assert_w4a8_right(torch.ops.mbq_ao.w4a8_linear(*arguments), arguments)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|underflow) encountered")  # numpy's, in the interpreter
@given(w4a8_cases())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_w4a8_triton(arguments: tuple) -> None:
    pytest.importorskip("triton")
    from mbq_ao.kernels.w4a8_gemm import w4a8_linear_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    assert_w4a8_right(w4a8_linear_triton(*moved).cpu(), arguments)
