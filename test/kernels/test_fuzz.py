"""The linear ops against their reference on whatever hypothesis thinks of: shapes, dtypes, views, scales of 0 and NaN.

The bounds are derived. W3A16: kernels round x * w to fp32 at worst K times, may round a dequantized weight once to x's
dtype, and round the output once. W4A8: the sums of a group are exact; what follows is rounded a few times a group.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_cases import DTYPES, Case, assert_right, cases, draw_bias, draw_view, spoil
from torch import Tensor

from mbq_ao.kernels.int4_layout import pack_int4
from mbq_ao.kernels.reference import int4_dequantize_reference, quantize_tokens


@given(cases(max_rows=70))
@settings(max_examples=150, derandomize=True, deadline=None)
def test_cpu(case: Case) -> None:
    assert_right(torch.ops.mbq_ao.int3_linear(*case.arguments()), case)


@given(cases(max_rows=24, dtypes=(torch.float16, torch.bfloat16)))
@settings(max_examples=16, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
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
