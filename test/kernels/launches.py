"""What the tests of all Triton kernels need: where they run, a layer to run them on, and a guard around outputs."""

import contextlib
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from mbq_ao.kernels.int3_layout import pack_int3
from mbq_ao.kernels.int4_layout import pack_int4
from mbq_ao.kernels.launch import interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}

needs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not interpreted(), reason="NEEDS A GPU, OR TRITON_INTERPRET=1 BEFORE TRITON IS IMPORTED"
)


def in_turn(cases: Sequence[tuple], dtypes: Sequence[torch.dtype]) -> list[tuple]:
    """The cases with a dtype each at their end: the interpreter, which takes a second for one, gets the dtypes in turn,
    a GPU each case with all of them."""
    if DEVICE == "cuda":
        return [(*case, dtype) for case in cases for dtype in dtypes]
    return [(*case, dtypes[i % len(dtypes)]) for i, case in enumerate(cases)]


def problem(m: int, n: int, k: int, group_size: int | None, dtype: torch.dtype, outliers: bool = False) -> list:
    """Arguments of int3_linear with bias, quantized at random (no need for the weight they came from)."""
    gen, x, scale, bias, g = _layer(m, n, k, group_size, outliers)
    q = torch.randint(0, 8, (n, k), dtype=torch.uint8, generator=gen)
    zero_point = torch.randint(0, 8, scale.shape, dtype=torch.uint8, generator=gen)
    tensors = [x.to(dtype), pack_int3(q), scale.to(dtype), zero_point, bias.to(dtype)]
    return [t.to(DEVICE) for t in tensors] + [g]


def w4a8_problem(m: int, n: int, k: int, group_size: int | None, dtype: torch.dtype) -> list:
    """Arguments of w4a8_linear with bias and act_pre_scale; among the tokens one of zeros and one with an outlier."""
    gen, x, scale, bias, g = _layer(m, n, k, group_size, outliers=False)
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=gen)
    pre_scale = torch.rand(k, generator=gen) + 0.5
    x[1::7] = 0
    x[2::7, k // 2] = 3000
    tensors = [x.to(dtype), pack_int4(q), scale.to(dtype), bias.to(dtype), pre_scale.to(dtype)]
    return [t.to(DEVICE) for t in tensors] + [g]


def _layer(
    m: int, n: int, k: int, group_size: int | None, outliers: bool
) -> tuple[torch.Generator, Tensor, Tensor, Tensor, int]:
    gen = torch.Generator().manual_seed(m * 7919 + n * 31 + k)
    g = k if group_size is None else group_size
    x = torch.randn(m, k, generator=gen)
    if outliers:  # as language models have them: a few channels, hundreds of times larger, in every row
        x[:, torch.randperm(k, generator=gen)[: max(1, k // 100)]] *= 300
    scale = torch.rand(n, -(-k // g), generator=gen) * 0.02 + 0.001
    return gen, x, scale, torch.randn(n, generator=gen), g


@contextlib.contextmanager
def guarded_outputs(count: int) -> Iterator[None]:
    """`count` calls of torch.empty give NaN (99 in integers), and nothing is written a row before and one after."""
    real_empty, seen = torch.empty, []

    def poisoned(shape: tuple[int, ...], **kwargs) -> Tensor:
        whole = real_empty((shape[0] + 2, *shape[1:]), **kwargs)
        whole.fill_(float("nan") if whole.is_floating_point() else 99)
        seen.append(whole)
        return whole[1:-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield
    assert len(seen) == count
    for whole in seen:
        edges = whole[[0, -1]]
        assert (edges.isnan() if whole.is_floating_point() else edges == 99).all()
