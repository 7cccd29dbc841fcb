"""Folds: every branch preserves the function, wrong ones are refused, half precision is rounded once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mbq_ao.calibration.fold import RowMap, ScaleGroup, Scaling, activation_scales, folded_parameters

IDENTITY = RowMap()


class OnePlusNorm(nn.Module):
    """Gemma's norm: (1 + weight) * normalised."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_channels) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:]) * (1 + self.weight)


class NormBlock(nn.Module):
    """norm -> two linears that read it."""

    def __init__(self, norm: nn.Module, num_channels: int) -> None:
        super().__init__()
        self.norm, self.a, self.b = norm, nn.Linear(num_channels, 5), nn.Linear(num_channels, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.cat([self.a(x), self.b(x)], -1)


class RowsBlock(nn.Module):
    """linear -> a channel map that commutes with scaling -> linear."""

    def __init__(self, row_map: RowMap, num_shared: int, bias: bool, num_after: int = 0) -> None:
        super().__init__()
        self.row_map, self.num_channels = row_map, num_shared * row_map.repeats
        self.up = nn.Linear(4, row_map.offset + num_shared + num_after, bias=bias)
        self.down = nn.Linear(self.num_channels, 3)
        self.register_buffer("rows", row_map.offset + row_map.rows(self.num_channels))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.up(x)
        # What is not fed to `down` is read as well, so scaling a wrong row shows.
        others = [i for i in range(rows.shape[-1]) if i not in set(self.rows.tolist())]
        return torch.cat([self.down(rows[..., self.rows].relu()), rows[..., others]], -1)


def random_s(num_channels: int, generator: torch.Generator, row_map: RowMap = IDENTITY) -> Tensor:
    return row_map.tie(torch.rand(num_channels, generator=generator) * 3.9 + 0.1)


def assert_function_preserved(block: nn.Module, scalings: list[Scaling], num_channels: int) -> dict[str, Tensor]:
    x = torch.randn(7, num_channels, dtype=next(block.parameters()).dtype)
    expected = block(x)
    parameters = folded_parameters(block, scalings)
    actual = torch.func.functional_call(block, parameters, (x,))
    torch.testing.assert_close(actual, expected)
    columns_only = {n: parameters[n] for s in scalings for n in s.group.weight_names()}
    assert not torch.allclose(torch.func.functional_call(block, columns_only, (x,)), expected, rtol=1e-3)
    return parameters


def make_norm(kind: str, num_channels: int) -> nn.Module:
    if kind == "layer_norm":
        norm = nn.LayerNorm(num_channels)
    elif kind == "layer_norm_no_bias":
        norm = nn.LayerNorm(num_channels, bias=False)
    elif kind == "rms_norm":
        norm = nn.RMSNorm(num_channels)
    else:
        return OnePlusNorm(num_channels)
    for p in norm.parameters():
        nn.init.normal_(p, 0.8, 0.4)
    return norm


@pytest.mark.parametrize(
    "kind,fold,changed",
    [
        ("layer_norm", "weight", {"norm.weight", "norm.bias"}),
        ("layer_norm_no_bias", "weight", {"norm.weight"}),
        ("rms_norm", "weight", {"norm.weight"}),
        ("one_plus_norm", "one_plus_weight", {"norm.weight"}),
    ],
)
def test_norm(kind: str, fold: str, changed: set[str]) -> None:
    torch.manual_seed(0)
    block = NormBlock(make_norm(kind, 8), 8).double()
    s = random_s(8, torch.Generator().manual_seed(1)).double()
    before = {n: p.detach().clone() for n, p in block.named_parameters()}
    group = ScaleGroup(("a", "b"), "norm", fold)
    parameters = assert_function_preserved(block, [Scaling(group, s)], 8)
    assert parameters.keys() == changed | {"a.weight", "b.weight"}
    assert torch.equal(parameters["a.weight"], before["a.weight"] * s)
    # New tensors: the block is not touched.
    assert all(torch.equal(p, before[n]) for n, p in block.named_parameters())


def test_norm_of_the_other_kind_changes_the_function() -> None:
    torch.manual_seed(0)
    block = NormBlock(OnePlusNorm(8), 8).double()
    s = random_s(8, torch.Generator().manual_seed(1)).double()
    with pytest.raises(AssertionError, match="not close"):
        assert_function_preserved(block, [Scaling(ScaleGroup(("a", "b"), "norm", "weight"), s)], 8)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_after", [0, 3])
@pytest.mark.parametrize("row_map", [RowMap(), RowMap(offset=5), RowMap(2, 3, 4), RowMap(width=6, repeats=2)])
def test_rows(row_map: RowMap, num_after: int, bias: bool) -> None:
    torch.manual_seed(0)
    block = RowsBlock(row_map, 6, bias, num_after).double()
    s = random_s(block.num_channels, torch.Generator().manual_seed(1), row_map).double()
    group = ScaleGroup(("down",), "up", "rows", row_map=row_map)
    parameters = assert_function_preserved(block, [Scaling(group, s)], 4)
    assert parameters.keys() == {"up.weight", "down.weight"} | ({"up.bias"} if bias else set())
    untouched = [i for i in range(block.up.out_features) if i not in set(block.rows.tolist())]
    assert torch.equal(parameters["up.weight"][untouched], block.up.weight[untouched])


def test_one_parameter_changes_twice() -> None:
    """v_proj: its columns with the norm's s, then its rows with o_proj's."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.v, self.o = nn.RMSNorm(4), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.v(self.norm(x)))

    torch.manual_seed(0)
    block, generator = Chain().double(), torch.Generator().manual_seed(1)
    first = Scaling(ScaleGroup(("v",), "norm", "weight"), random_s(4, generator).double())
    second = Scaling(ScaleGroup(("o",), "v", "rows"), random_s(6, generator).double())
    parameters = assert_function_preserved(block, [first, second], 4)
    torch.testing.assert_close(parameters["v.weight"], block.v.weight * first.s / second.s[:, None])


def test_no_producer() -> None:
    block = NormBlock(nn.RMSNorm(8), 8)
    s = torch.full((8,), 2.0)
    scalings = [Scaling(ScaleGroup(("a", "b")), s), Scaling(ScaleGroup(("b",), "norm", "weight"), s)]
    assert folded_parameters(block, scalings[:1]) == {}
    assert activation_scales(scalings) == {"a": s, "b": s}
    assert activation_scales(scalings[1:]) == {}


def test_unknown_fold() -> None:
    group = ScaleGroup(("a", "b"), "norm")
    with pytest.raises(ValueError) as error:
        folded_parameters(NormBlock(nn.RMSNorm(8), 8), [Scaling(group, torch.ones(8))])
    expected = f'fold of {group} must be "weight", "one_plus_weight" or "rows"'
    assert str(error.value) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind,fold", [("layer_norm", "weight"), ("one_plus_norm", "one_plus_weight")])
def test_half_precision_is_rounded_once(dtype: torch.dtype, kind: str, fold: str) -> None:
    torch.manual_seed(0)
    block = NormBlock(make_norm(kind, 64), 64).to(dtype)
    s = random_s(64, torch.Generator().manual_seed(1))
    parameters = folded_parameters(block, [Scaling(ScaleGroup(("a", "b"), "norm", fold), s)])
    assert {p.dtype for p in parameters.values()} == {dtype}
    w = block.norm.weight.float()
    expected = (1 + w) / s - 1 if fold == "one_plus_weight" else w / s
    assert torch.equal(parameters["norm.weight"], expected.to(dtype))
    assert torch.equal(parameters["a.weight"], (block.a.weight.float() * s).to(dtype))


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 4),
    heads=st.integers(1, 4),
    repeats=st.integers(1, 4),
    offset=st.integers(0, 5),
    num_after=st.integers(0, 3),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_rows_preserve_the_function(
    width: int, heads: int, repeats: int, offset: int, num_after: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    row_map = RowMap(offset, width, repeats)
    block = RowsBlock(row_map, width * heads, bias, num_after).double()
    generator = torch.Generator().manual_seed(seed)
    s = random_s(block.num_channels, generator, row_map).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    scaling = Scaling(ScaleGroup(("down",), "up", "rows", row_map=row_map), s)
    actual = torch.func.functional_call(block, folded_parameters(block, [scaling]), (x,))
    torch.testing.assert_close(actual, block(x))


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["layer_norm", "layer_norm_no_bias", "rms_norm", "one_plus_norm"]),
    num_channels=st.integers(2, 9),
    seed=st.integers(0, 1000),
)
def test_norms_preserve_the_function(kind: str, num_channels: int, seed: int) -> None:
    torch.manual_seed(seed)
    block = NormBlock(make_norm(kind, num_channels), num_channels).double()
    s = random_s(num_channels, torch.Generator().manual_seed(seed)).double()
    fold = "one_plus_weight" if kind == "one_plus_norm" else "weight"
    x = torch.randn(5, num_channels, dtype=torch.float64)
    scaling = Scaling(ScaleGroup(("a", "b"), "norm", fold), s)
    actual = torch.func.functional_call(block, folded_parameters(block, [scaling]), (x,))
    torch.testing.assert_close(actual, block(x))


@settings(max_examples=50, deadline=None)
@given(width=st.integers(1, 4), heads=st.integers(1, 4), repeats=st.integers(1, 4))
def test_row_map(width: int, heads: int, repeats: int) -> None:
    row_map, num_rows = RowMap(width=width, repeats=repeats), width * heads
    num_channels = num_rows * repeats
    # repeat_kv of transformers: every value head is repeated for its query heads.
    rows = torch.arange(num_rows, dtype=torch.float64)
    repeated = rows.view(heads, 1, width).expand(heads, repeats, width).reshape(-1)
    assert torch.equal(row_map.rows(num_channels), repeated.long())
    assert torch.equal(row_map.expand(rows, num_channels), repeated)
    assert torch.equal(row_map.reduce(repeated), rows)
    values = torch.rand(num_channels, dtype=torch.float64)
    tied = row_map.tie(values)
    torch.testing.assert_close(tied, row_map.expand(row_map.reduce(values), num_channels))
    torch.testing.assert_close(row_map.tie(tied), tied)  # tying twice is tying once
    torch.testing.assert_close(tied.mean(), values.mean())
    for row in range(num_rows):
        same = tied[repeated == row]
        assert (same == same[0]).all() and same.numel() == repeats
