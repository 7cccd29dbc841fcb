"""What the tests of all Triton kernels need: where they run, a layer to run them on, and a guard around outputs."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mbq_ao.kernels.launch import interpreted
from mbq_ao.kernels.layout import pack_int3

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}

needs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not interpreted(), reason="NEEDS A GPU, OR TRITON_INTERPRET=1 BEFORE TRITON IS IMPORTED"
)


def problem(m: int, n: int, k: int, group_size: int | None, dtype: torch.dtype, outliers: bool = False) -> list:
    """Arguments of int3_linear with bias, quantized at random (no need for the weight they came from)."""
    gen = torch.Generator().manual_seed(m * 7919 + n * 31 + k)
    g = k if group_size is None else group_size
    groups = -(-k // g)
    x = torch.randn(m, k, generator=gen)
    if outliers:  # as language models have them: a few channels, hundreds of times larger, in every row
        x[:, torch.randperm(k, generator=gen)[: max(1, k // 100)]] *= 300
    q = torch.randint(0, 8, (n, k), dtype=torch.uint8, generator=gen)
    scale = torch.rand(n, groups, generator=gen) * 0.02 + 0.001
    zero_point = torch.randint(0, 8, (n, groups), dtype=torch.uint8, generator=gen)
    bias = torch.randn(n, generator=gen)
    tensors = [x.to(dtype), pack_int3(q), scale.to(dtype), zero_point, bias.to(dtype)]
    return [t.to(DEVICE) for t in tensors] + [g]


@contextlib.contextmanager
def guarded_outputs(count: int) -> Iterator[None]:
    """`count` calls of torch.empty give NaN, and nothing is written to the memory of a row before and one after."""
    real_empty, seen = torch.empty, []

    def poisoned(shape: tuple[int, ...], **kwargs) -> Tensor:
        whole = real_empty((shape[0] + 2, *shape[1:]), **kwargs).fill_(float("nan"))
        seen.append(whole)
        return whole[1:-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield
    assert len(seen) == count
    for whole in seen:
        assert whole[0].isnan().all()
        assert whole[-1].isnan().all()
