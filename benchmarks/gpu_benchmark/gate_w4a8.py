"""What the gate asks of W4A8, y = (xq @ q.T) * scale * d + bias by `torch.ops.mbq_ao.w4a8_linear`.

xq and d, a token's integers and its scale, have to be those of `reference.quantize_tokens` bit for bit. That is asked
of a CPU: torch on CUDA divides by a number by multiplying by its reciprocal, which is not what a division gives.

From there on two bounds, derived, not tuned. u is the unit roundoff of x's dtype, p the products (xq d) o w in a
group, A the fp32 additions of a result: one for each group where there are groups, and at most 8 splits.

    each element    |error| <= 1.01 u |y|                      the result is rounded once
                             + (A + 4) 2^-24 (||p||_1 + |bias|)    sums of integers are exact; rounded are the sum as
                                                               fp32, times scale, times d, plus bias, and each of
                                                               the additions, all of numbers no larger than this
                             + 2^-25 in fp16                   half of its smallest number
    their rms       rms(error) <= u rms(y) + 2^-24 sqrt(A + 4) (rms(||p||_2) + rms(bias))    the same roundings,
                                                               independent, of partial sums of random signs

Half of the cases have tokens of zeros, one with an outlier, one with a NaN and one with an infinity among them. The
last two have to be NaN in their own rows, and in no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu_benchmark.gate_bounds import UNIT_ROUNDOFF, parts_of, rms
from gpu_benchmark.precisions import PRECISIONS, Packed

NAME = "W4A8"
# The dtype of x matters where tokens are read and results written, the group size in between: not every pair is asked.
CASES = [
    *((torch.bfloat16, group) for group in (None, 128, 64, 32)),
    *((torch.float16, group) for group in (None, 64)),
    *((torch.float32, group) for group in (None, 32)),
]
MAX_SPLITS = 8


@dataclass
class Layer:
    """Arguments of the op, and the exact weight in fp64."""

    x: Tensor
    packed: Packed
    group_size: int
    bias: Tensor | None
    act_pre_scale: Tensor | None
    weight: Tensor

    def __call__(self) -> Tensor:
        return PRECISIONS[NAME].linear(self.x, self.packed, self.group_size, self.bias, self.act_pre_scale)

    def by(self, config: Any) -> Tensor:
        """By the Triton kernels in one of their cuts."""
        from mbq_ao.kernels.w4a8_gemm import w4a8_linear_triton

        return w4a8_linear_triton(self.x, *self.packed, self.bias, self.act_pre_scale, self.group_size, config)


def random_layer(
    m: int, n: int, k: int, group_size: int | None, dtype: torch.dtype, device: torch.device, special: bool, bias: bool
) -> Layer:
    """special: with tokens of zeros, an outlier, a NaN and an infinity.  bias: and act_pre_scale."""
    precision = PRECISIONS[NAME]
    x = torch.randn(m, k, device=device)
    if special:
        first = int(torch.randint(4, ()))
        for i in range(min(m, 4)):
            row = x[7 * i % m]
            kind = (first + i) % 4
            if kind == 0:
                row.zero_()
            else:
                row[k // 2] = (3000.0, float("nan"), float("-inf"))[kind - 1]
    values = precision.values(n, k, group_size, dtype, device)
    some_bias = torch.randn(n, device=device).to(dtype) if bias else None
    factors = (torch.rand(k, device=device) + 0.5).to(dtype) if bias else None
    return Layer(x.to(dtype), precision.pack(values), values.group_size, some_bias, factors, values.exact())


def compare(y: Tensor, layer: Layer, by_kernel: bool | None = None) -> dict[str, Any]:
    """The bounds of this module's docstring: the largest error as a part of each, and whether NaN is where it must be.

    by_kernel: whether the Triton kernel quantized the tokens, and is to be checked; None: on a GPU.
    """
    x, bias, device = layer.x, layer.bias, layer.x.device
    xq, d = quantized_tokens(layer)
    by_kernel = device.type == "cuda" if by_kernel is None else by_kernel
    row: dict[str, Any] = {"tokens": tokens_agree(layer, xq, d)} if by_kernel else {}
    good = d.isfinite()[:, 0].to(device)
    row["nan"] = bool(y[~good].isnan().all())
    if not good.any():
        return {"worst": 0.0, "rms": 0.0, "ok": all(row.values()), **row}
    tokens = (xq.to(device).double() * d.to(device).double())[good]
    bias64 = torch.zeros((), dtype=torch.float64, device=device) if bias is None else bias.double()
    expected = tokens @ layer.weight.T + bias64
    groups = layer.packed[1].shape[1]
    additions = MAX_SPLITS + (groups if groups > 1 else 0)
    u = UNIT_ROUNDOFF[x.dtype]
    bound = 1.01 * u * expected.abs() + (2.0**-25 if x.dtype == torch.float16 else 0)
    bound += (additions + 4) * 2.0**-24 * (tokens.abs() @ layer.weight.abs().T + bias64.abs())
    products = (tokens.square() @ layer.weight.square().T).sqrt()
    rms_bound = u * rms(expected) + 2.0**-24 * (additions + 4) ** 0.5 * (rms(products) + rms(bias64))
    # A token of zeros without bias: zero, which nothing is a part of.
    tiny = torch.finfo(torch.float64).tiny
    found = parts_of(y[good].double() - expected, bound + tiny, rms_bound + tiny)
    return found | row | {"ok": found["ok"] and all(row.values())}


def quantized_tokens(layer: Layer) -> tuple[Tensor, Tensor]:
    """What the reference makes of the tokens, on the CPU."""
    from mbq_ao.kernels.reference import quantize_tokens

    factors = layer.act_pre_scale
    return quantize_tokens(layer.x.cpu(), None if factors is None else factors.cpu())


def tokens_agree(layer: Layer, xq: Tensor, d: Tensor) -> bool:
    """Whether the kernel gives the same integers and scales, and zeros beyond them."""
    from mbq_ao.kernels.w4a8_gemm import quantize_tokens_triton

    k = layer.x.shape[1]
    got, scale = quantize_tokens_triton(layer.x, layer.act_pre_scale, -(-k // 64) * 64)
    same = torch.equal(got[:, :k].cpu(), xq) and not got[:, k:].any()
    return same and torch.equal(scale.cpu().nan_to_num(), d[:, 0].nan_to_num())
