"""Linear layers as hypothesis thinks of them (shapes, dtypes, views, scales of 0, NaN), and how exact they must be."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from mbq_ao.kernels.int3_layout import pack_int3
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
