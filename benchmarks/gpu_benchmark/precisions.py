"""W3A16 and W4A8 in one form: random values of a weight, how they are packed, and the ops that take them.

A packed weight is a tuple of what the ops take after x: W3A16 (qdata, scale, zero_point), W4A8 (qdata, scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Packed = tuple[Tensor, ...]


@dataclass
class Values:
    """A weight before it is packed: w = (q - zero_point) * scale, both for group_size columns."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_size: int

    def exact(self) -> Tensor:
        """The weight in fp64."""
        q = self.q.double()
        return (q if self.zero_point is None else q - self._spread(self.zero_point)) * self._spread(self.scale)

    def _spread(self, t: Tensor) -> Tensor:
        return t.double().repeat_interleave(self.group_size, 1)[:, : self.q.shape[1]]


class Precision:
    """One of the two. `group_size` is the one that is timed; `timed`: column of the tables -> dtype of x."""

    name: str
    group_size: int | None
    timed: dict[str, torch.dtype]

    def values(self, n: int, k: int, group_size: int | None, dtype: torch.dtype, device: torch.device) -> Values:
        """At random, scales of `dtype`. group_size=None: one scale a row."""
        g = group_size or k
        scale = torch.rand(n, -(-k // g), device=device) * 0.02 + 0.001
        q, zero_point = self._random(n, k, scale)
        return Values(q, scale.to(dtype), zero_point, g)

    def _random(self, n: int, k: int, scale: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def pack(self, values: Values) -> Packed:
        raise NotImplementedError

    def linear(self, x: Tensor, packed: Packed, group_size: int, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def dequantize(self, packed: Packed, k: int, group_size: int, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def tensor(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Any:
        """What quantizing a linear's weight gives, of random values whose spread is that of an untrained one, 0.02."""
        values = self.values(n, k, self.group_size, dtype, device)
        if values.zero_point is not None:
            values.zero_point = values.zero_point % 2 + 3
        values.scale = (0.02 * values.scale / values.scale.mean() / values.q.float().std()).to(dtype)
        return self._tensor(self.pack(values), [1, values.group_size], (n, k))

    def _tensor(self, packed: Packed, block_size: list[int], shape: tuple[int, int]) -> Any:
        raise NotImplementedError


class W3A16(Precision):
    name, group_size = "W3A16", 128
    timed = {"W3A16 bf16": torch.bfloat16, "W3A16 fp16": torch.float16}  # noqa: RUF012

    def _random(self, n: int, k: int, scale: Tensor) -> tuple[Tensor, Tensor]:
        q = torch.randint(0, 8, (n, k), dtype=torch.uint8, device=scale.device)
        return q, torch.randint(0, 8, scale.shape, dtype=torch.uint8, device=scale.device)

    def pack(self, values: Values) -> Packed:
        from mbq_ao.kernels.int3_layout import pack_int3

        assert values.zero_point is not None
        return pack_int3(values.q), values.scale, values.zero_point

    def linear(self, x: Tensor, packed: Packed, group_size: int, bias: Tensor | None = None) -> Tensor:
        return torch.ops.mbq_ao.int3_linear(x, *packed, bias, group_size)

    def dequantize(self, packed: Packed, k: int, group_size: int, dtype: torch.dtype) -> Tensor:
        return torch.ops.mbq_ao.int3_dequantize(*packed, k, group_size, dtype)

    def _tensor(self, packed: Packed, block_size: list[int], shape: tuple[int, int]) -> Any:
        from mbq_ao import MBQInt3Tensor

        return MBQInt3Tensor(*packed, block_size, shape)


class W4A8(Precision):
    name, group_size = "W4A8", None
    timed = {"W4A8 bf16": torch.bfloat16}  # noqa: RUF012

    def _random(self, n: int, k: int, scale: Tensor) -> tuple[Tensor, None]:
        return torch.randint(-8, 8, (n, k), dtype=torch.int8, device=scale.device), None

    def pack(self, values: Values) -> Packed:
        from mbq_ao.kernels.int4_layout import pack_int4

        return pack_int4(values.q), values.scale

    def linear(
        self,
        x: Tensor,
        packed: Packed,
        group_size: int,
        bias: Tensor | None = None,
        act_pre_scale: Tensor | None = None,
    ) -> Tensor:
        return torch.ops.mbq_ao.w4a8_linear(x, *packed, bias, act_pre_scale, group_size)

    def dequantize(self, packed: Packed, k: int, group_size: int, dtype: torch.dtype) -> Tensor:
        return torch.ops.mbq_ao.int4_dequantize(*packed, k, group_size, dtype)

    def _tensor(self, packed: Packed, block_size: list[int], shape: tuple[int, int]) -> Any:
        from mbq_ao import MBQW4A8Tensor

        return MBQW4A8Tensor(*packed, block_size, shape)


PRECISIONS: dict[str, Precision] = {precision.name: precision for precision in (W3A16(), W4A8())}
