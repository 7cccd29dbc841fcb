"""The linear op against its reference on whatever hypothesis thinks of: shapes, dtypes, views, scales of 0 and NaN.

The bound is derived: kernels round x * w to fp32 at worst K times, may round a dequantized weight once to x's dtype,
and round the output once.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mbq_ao.kernels import int3_cpu
from mbq_ao.kernels.layout import pack_int3
from mbq_ao.kernels.reference import dequantize_reference, int3_linear_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Case:
    x: Tensor
    weight: tuple[Tensor, Tensor, Tensor]
    bias: Tensor | None
    group_size: int

    def arguments(self) -> tuple[object, ...]:
        return (self.x, *self.weight, self.bias, self.group_size)


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
    for bad in draw(st.lists(st.sampled_from([0.0, math.nan]), max_size=2)):
        scale.view(-1)[draw(st.integers(0, scale.numel() - 1))] = bad
    x = torch.randn(m, k, generator=generator)
    x[:, draw(st.integers(0, k - 1))] *= draw(st.sampled_from([1.0, 100.0]))  # an outlier channel
    if m and draw(st.booleans()):
        x[draw(st.integers(0, m - 1)), draw(st.integers(0, k - 1))] = math.nan
    x = x.to(x_dtype)
    view = draw(st.sampled_from(["as it is", "transposed", "a slice", "3-D"]))
    if view == "transposed":
        x = x.t().contiguous().t()
    elif view == "a slice":
        x = torch.cat([x, x.new_full((m, 3), math.nan)], 1)[:, :k]
    elif view == "3-D":
        x = x[:, None]
    bias = torch.randn(n, generator=generator).to(draw(st.sampled_from(DTYPES))) if draw(st.booleans()) else None
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
