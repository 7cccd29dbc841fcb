"""MBQInt3Tensors for the tests of all that is done to them, and what it means for two to be the same."""

import torch
from torch import Tensor, nn

from mbq_ao import MBQInt3Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
N, K, G = 96, 384, 64


def random_weight(n: int = N, k: int = K, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)).to(dtype)


def quantized(n: int = N, k: int = K, group_size: int | None = G, pre_scale: bool = False, **kwargs) -> MBQInt3Tensor:
    factors = torch.rand(k, generator=torch.Generator().manual_seed(1)) + 0.5 if pre_scale else None
    return MBQInt3Tensor.from_hp(random_weight(n, k, **kwargs), group_size, act_pre_scale=factors)


def random_x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def linear(w: MBQInt3Tensor, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=bias, dtype=w.dtype)
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_same_data(a: Tensor, b: Tensor) -> None:
    assert type(a) is type(b) is MBQInt3Tensor
    (names, attributes), (other_names, other_attributes) = a.__tensor_flatten__(), b.__tensor_flatten__()
    assert (names, attributes) == (other_names, other_attributes)
    for name in names:
        assert_same(getattr(a, name), getattr(b, name))
