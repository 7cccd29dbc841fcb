"""Folding: move a channel scale s out of the activations and into the weights, changing nothing.

    linear(x) = W x  =  (W diag(s)) (x / s)

The consumers' columns are multiplied by s; the division is moved into whatever produced x:

    fold               the producer                       becomes
    "weight"           norm(h) * weight (+ bias)          weight / s, bias / s
    "one_plus_weight"  norm(h) * (1 + weight) (+ bias)    (1 + weight) / s - 1, bias / s       (Gemma, Nemotron)
    "rows"             linear: rows that feed x           row / s, its bias / s
    None               nothing can take it                x / s stays an activation scale, on the quantized
                                                          tensor (`act_pre_scale` = 1 / s)

All functions return new tensors. Nothing is changed in place, so an interrupted calibration cannot
leave a model half folded, and one piece of code serves the search, the checks and the final model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Fold = Literal["weight", "one_plus_weight", "rows"]


@dataclass(frozen=True)
class RowMap:
    """Which of the producer's rows feeds channel c of x: offset + (c // (width * repeats)) * width + c % width.

    The identity has repeats = 1. Under grouped-query attention width is the head size and `repeats` the
    number of query heads that share a value head; a fused producer (gate_up_proj) has an offset.
    """

    offset: int = 0
    width: int = 1
    repeats: int = 1

    def rows(self, num_channels: int) -> Tensor:
        """(num_channels,) int64, the producer's row of every channel, without the offset."""
        c = torch.arange(num_channels)
        if self.repeats == 1:
            return c
        return c // (self.width * self.repeats) * self.width + c % self.width

    def tie(self, values: Tensor) -> Tensor:
        """Average (num_channels,) values over the channels that share a row: one row can take one scale only."""
        if self.repeats == 1:
            return values
        return self.expand(self.reduce(values), values.numel())

    def reduce(self, values: Tensor) -> Tensor:
        """(num_channels,) -> (rows,): the mean over the channels of each row."""
        if self.repeats == 1:
            return values
        return values.reshape(-1, self.repeats, self.width).mean(1).reshape(-1)

    def expand(self, values: Tensor, num_channels: int) -> Tensor:
        """(rows,) -> (num_channels,)."""
        return values[self.rows(num_channels).to(values.device)]


@dataclass(frozen=True)
class ScaleGroup:
    """Linears that read the same x, and the producer of x. Names are relative to the block.

    linears: names of the nn.Linear modules, in the order in which they run. Of an expert in a 3-D parameter:
        "mlp.experts.down_proj.3". A router that reads x is among them, as a module with a `weight`.
    producer: name of the norm or linear that takes 1 / s; None to be found out, or if nothing can.
    fold: how it takes it (see the table above); None to be found out, or if there is no producer.
    inspect: name of the module whose output is compared in the search; "" is the block itself. None: the
        smallest module that contains all linears of the group, a single linear itself.
    row_map: which producer row feeds which channel ("rows" only); the identity also stands for "to be found out".
    mixes_tokens: whether tokens are mixed between producer and linears (attention); always found out.
    sensitivity_at: name of the module at whose output the sensitivity is measured; None: of `inspect`. An expert's
        own output has few tokens, so there it is the module around the experts.
    """

    linears: tuple[str, ...]
    producer: str | None = None
    fold: Fold | None = None
    inspect: str | None = None
    row_map: RowMap = RowMap()
    mixes_tokens: bool = False
    sensitivity_at: str | None = None

    @property
    def measured_at(self) -> str:
        return (self.inspect if self.sensitivity_at is None else self.sensitivity_at) or ""

    def weight_names(self) -> list[str]:
        return [f"{name}.weight" for name in self.linears]


@dataclass(frozen=True)
class Scaling:
    """A scale group and the scale found for it: s of shape (in_features,), float."""

    group: ScaleGroup
    s: Tensor


def folded_parameters(
    block: nn.Module, scalings: Iterable[Scaling], *, vectors_only: bool = False
) -> dict[str, Tensor]:
    """The block's parameters after folding, as new tensors: name -> value, only what changes.

    vectors_only: leave out the matrices.

    Scalings are applied in order, as one parameter may change twice (v_proj: columns, then rows).
    Groups without a producer change nothing here: their linears get W diag(s) and `act_pre_scale`
    when they are quantized.
    """
    changed: dict[str, Tensor] = {}

    def apply(name: str, fn: object) -> None:
        value = changed[name] if name in changed else block.get_parameter(name).detach()
        if vectors_only and value.ndim > 1:
            return
        changed[name] = fn(value.to(_compute_dtype(value))).to(value.dtype)  # type: ignore[operator]

    for scaling in scalings:
        group = scaling.group
        if group.producer is None:
            continue
        producer = block.get_submodule(group.producer)
        has_bias = getattr(producer, "bias", None) is not None
        s = scaling.s.to(producer.weight.device)
        if group.fold == "rows":
            r = group.row_map.reduce(s)
            apply(
                f"{group.producer}.weight",
                lambda w, r=r, g=group: _divide_rows(w, r[:, None], g.row_map.offset),
            )
            if has_bias:
                apply(f"{group.producer}.bias", lambda b, r=r, g=group: _divide_rows(b, r, g.row_map.offset))
        elif group.fold in ("weight", "one_plus_weight"):
            added = 1 if group.fold == "one_plus_weight" else 0
            apply(f"{group.producer}.weight", lambda w, s=s, added=added: (added + w) / s - added)
            if has_bias:
                apply(f"{group.producer}.bias", lambda b, s=s: b / s)
        else:
            raise ValueError(f'fold of {group} must be "weight", "one_plus_weight" or "rows"')
        for name in group.weight_names():
            apply(name, lambda w, s=s: w * s)
    return changed


def activation_scales(scalings: Iterable[Scaling]) -> Mapping[str, Tensor]:
    """Name of a linear -> s, for the linears whose 1 / s no producer takes."""
    return {name: scaling.s for scaling in scalings if scaling.group.producer is None for name in scaling.group.linears}


def _compute_dtype(value: Tensor) -> torch.dtype:
    # Half-precision parameters are folded in fp32 and rounded once.
    return value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float32


def _divide_rows(value: Tensor, divisor: Tensor, offset: int) -> Tensor:
    end = offset + divisor.shape[0]
    return torch.cat([value[:offset], value[offset:end] / divisor, value[end:]])
