"""Packed weights of both kinds for the tests of all that is done to them, and what it means for two to be the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbq_ao import MBQInt3Tensor, MBQW4A8Tensor
from mbq_ao.kernels.reference import w4a8_linear_reference
from mbq_ao.packed_weight import PackedWeight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
N, K, G = 96, 384, 64  # whole tiles of both kinds
E = 3

Kind = type[PackedWeight]
LINEAR_OPS = {MBQInt3Tensor: torch.ops.mbq_ao.int3_linear, MBQW4A8Tensor: torch.ops.mbq_ao.w4a8_linear}
each_kind = pytest.mark.parametrize("kind", list(LINEAR_OPS), ids=["int3", "w4a8"])


def random_weight(n: int = N, k: int = K, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)).to(dtype)


def quantized(
    kind: Kind, n: int = N, k: int = K, group_size: int | None = G, pre_scale: bool = False, **kwargs
) -> PackedWeight:
    factors = torch.rand(k, generator=torch.Generator().manual_seed(1)) + 0.5 if pre_scale else None
    return kind.from_hp(random_weight(n, k, **kwargs), group_size, act_pre_scale=factors)


def experts(
    kind: Kind,
    e: int = E,
    n: int = N,
    k: int = K,
    group_size: int | None = G,
    pre_scale: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PackedWeight:
    """A (E, N, K) weight."""
    factors = torch.rand(e, k, generator=torch.Generator().manual_seed(1)) + 0.5 if pre_scale else None
    return kind.from_hp(random_experts(e, n, k, dtype), group_size, act_pre_scale=factors)


def random_experts(e: int = E, n: int = N, k: int = K, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(e, n, k, generator=torch.Generator().manual_seed(n + k)).to(dtype)


def random_x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def linear(w: PackedWeight, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=bias, dtype=w.dtype)
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer


def expected_linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, w, bias) as it is defined for w's kind, fp32."""
    if isinstance(w, MBQW4A8Tensor):
        return w4a8_linear_reference(x, w.qdata, w.scale, bias, w.act_pre_scale, w.group_size)
    scaled = x if w.act_pre_scale is None else x * w.act_pre_scale
    return F.linear(scaled.float(), w.dequantize().float(), None if bias is None else bias.float())


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_same_data(a: Tensor, b: Tensor) -> None:
    assert type(a) is type(b)
    assert isinstance(a, PackedWeight)
    (names, attributes), (other_names, other_attributes) = a.__tensor_flatten__(), b.__tensor_flatten__()
    assert (names, attributes) == (other_names, other_attributes)
    for name in names:
        assert_same(getattr(a, name), getattr(b, name))
