"""What the gate asks of W3A16, y = x @ W.T + bias by `torch.ops.mbq_ao.int3_linear`.

Half of the cases have activations as language models do: one channel in a hundred 300 times larger.

Two bounds, derived, not tuned. u is the unit roundoff of x's dtype, x o w the products of x with the exact weight.

    each element    |error| <= 1.01 u |y|                                      the result is rounded once
                             + 8 u ||x o w||   where M > 16                    the weight may be rounded once as well;
                                               by Hoeffding false once in 10^13
                             + 2 sqrt(K) 2^-24 level max(scale) ||x||_1        sums in fp32; their terms are x q scale
                                                                               and x z scale, in bf16 x (128 + q) scale
    their rms       rms(error) <= u rms(y) [+ u rms(x o w)] + K / 16 2^-23 level max(scale) rms(||x||_2)

Tensor cores truncate where they add, K / 16 times; hence the last term. The second bound is the sharp one: it sees
an error of the size of one rounding in every element, which the first must allow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu_benchmark.gate_bounds import UNIT_ROUNDOFF, parts_of, rms
from gpu_benchmark.precisions import PRECISIONS, Packed

NAME = "W3A16"
CASES = [(dtype, group) for dtype in (torch.float16, torch.bfloat16) for group in (32, 64, 128, None)]
MAX_ROWS_EXACT_WEIGHT = 16  # of x: up to here the weight itself is never rounded


@dataclass
class Layer:
    """Arguments of the op, and the exact weight in fp64."""

    x: Tensor
    packed: Packed
    group_size: int
    bias: Tensor | None
    weight: Tensor

    def __call__(self) -> Tensor:
        return PRECISIONS[NAME].linear(self.x, self.packed, self.group_size, self.bias)


def random_layer(
    m: int, n: int, k: int, group_size: int | None, dtype: torch.dtype, device: torch.device, special: bool, bias: bool
) -> Layer:
    """special: with outliers."""
    precision = PRECISIONS[NAME]
    x = torch.randn(m, k, device=device)
    if special:
        x[:, torch.randperm(k, device=device)[: max(1, k // 100)]] *= 300
    values = precision.values(n, k, group_size, dtype, device)
    some_bias = torch.randn(n, device=device).to(dtype) if bias else None
    return Layer(x.to(dtype), precision.pack(values), values.group_size, some_bias, values.exact())


def compare(y: Tensor, layer: Layer) -> dict[str, Any]:
    """The two bounds of this module's docstring: the largest error as a part of each.

    On a CPU the weight is rounded for any number of rows.
    """
    x, weight, bias = layer.x, layer.weight, layer.bias
    m, k = x.shape
    x64 = x.double()
    expected = torch.nn.functional.linear(x64, weight, None if bias is None else bias.double())
    u, level = UNIT_ROUNDOFF[x.dtype], 135 if x.dtype == torch.bfloat16 else 14
    largest_scale = float(layer.packed[1].double().amax())
    bound = 1.01 * u * expected.abs()
    bound += 2 * k**0.5 * 2.0**-24 * level * largest_scale * x64.abs().sum(-1, keepdim=True)
    rms_bound = u * rms(expected) + k / 16 * 2.0**-23 * level * largest_scale * rms(x64.norm(dim=-1))
    if m > MAX_ROWS_EXACT_WEIGHT or x.device.type == "cpu":
        products = (x64.square() @ weight.square().T).sqrt()
        bound += 8 * u * products
        rms_bound += u * rms(products)
    return parts_of(y.double() - expected, bound, rms_bound)
