"""Finding scale groups by experiment: what is accepted, what is refused, and what is compared."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from models import build_batch, build_model
from torch import Tensor, nn

from mbq_ao import mbq_config, quantize_
from mbq_ao.calibration import mbq
from mbq_ao.calibration.capture import ModuleCall
from mbq_ao.calibration.fold import RowMap, ScaleGroup, Scaling, folded_parameters
from mbq_ao.calibration.scale_groups import BlockProber

C = 12
pytestmark = pytest.mark.filterwarnings("ignore:no vision token found")


class Block(nn.Module):
    """x + down(act(up(norm(x)))), with the ways in which a fold can be impossible as options."""

    def __init__(
        self,
        norm: nn.Module | None = None,
        act: Any = torch.relu,
        norm_is_read: bool = False,
        up_is_read: bool = False,
        tuple_output: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(C) if norm is None else norm
        self.up, self.down = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.act, self.norm_is_read, self.up_is_read = act, norm_is_read, up_is_read
        self.tuple_output = tuple_output
        for p in self.norm.parameters():
            nn.init.normal_(p, 1.0, 0.3)

    def forward(self, hidden_states: Tensor) -> Any:
        h = self.norm(hidden_states)
        up = self.up(h)
        y = hidden_states + self.down(self.act(up))
        if self.norm_is_read:
            y = y + h
        if self.up_is_read:
            y = y + up[..., :C]
        return (y, None) if self.tuple_output else y


def probe(block: nn.Module, x: Tensor | None = None) -> BlockProber:
    torch.manual_seed(1)
    return BlockProber(block, ModuleCall((torch.randn(2, 5, C) if x is None else x,), {}))


def producers(block: nn.Module, x: Tensor | None = None) -> dict[str, tuple[str | None, str | None]]:
    return {", ".join(g.linears): (g.producer, g.fold) for g in probe(block, x).find_all()}


def test_accepted() -> None:
    assert producers(Block()) == {"up": ("norm", "weight"), "down": ("up", "rows")}
    assert producers(Block(nn.LayerNorm(C))) == {"up": ("norm", "weight"), "down": ("up", "rows")}
    assert producers(Block(tuple_output=True)) == {"up": ("norm", "weight"), "down": ("up", "rows")}


def test_a_forward_ends_at_the_linear_that_is_looked_at() -> None:
    prober = probe(Block())
    expected = prober.block.norm(prober.call.hidden).flatten(0, -2)
    ran = []
    for name in ("up", "down"):
        prober.block.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    assert torch.equal(prober.input_of("up", {}), expected) and ran == []
    assert prober.input_of("down", {}).shape == (10, 2 * C) and ran == ["up"]
    assert not any(m._forward_pre_hooks for m in prober.block.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_blocks_are_probed_in_fp32(dtype: torch.dtype) -> None:
    block = Block().to(dtype)
    found = producers(block, torch.randn(1, 5, C, dtype=dtype))
    assert found == {"up": ("norm", "weight"), "down": ("up", "rows")}
    assert {p.dtype for p in block.parameters()} == {dtype}


def test_refused_where_something_else_reads_the_producer() -> None:
    assert producers(Block(norm_is_read=True)) == {"up": (None, None), "down": ("up", "rows")}
    assert producers(Block(up_is_read=True)) == {"up": ("norm", "weight"), "down": (None, None)}


@pytest.mark.parametrize("act", [nn.functional.gelu, nn.functional.silu, torch.tanh])
def test_refused_where_the_activation_does_not_scale(act: Any) -> None:
    assert producers(Block(act=act))["down"] == (None, None)


def test_refused_where_one_linear_has_two_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.linear = nn.RMSNorm(C), nn.RMSNorm(C), nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(self.first(x)) + self.linear(self.second(x + 1))

    assert producers(Twice()) == {"linear": (None, None)}


def test_an_outlier_in_the_residual_hides_no_wrong_fold() -> None:
    torch.manual_seed(2)
    x = torch.randn(2, 5, C)
    x[..., 3] = 1e4
    # Relative to the output, the change that the wrong fold makes is far below fp32's usual tolerances.
    wrong = Block(nn.LayerNorm(C), norm_is_read=True)
    with torch.no_grad():
        wrong.norm.weight.mul_(1e-2)
        wrong.norm.bias.mul_(1e-2)
    group = ScaleGroup(("up",), "norm", "weight", "up")
    prober = probe(wrong, x)
    s = torch.rand(C) + 0.5
    folded = folded_parameters(prober.block, [Scaling(group, s)])
    moved = (prober.call.run(prober.block, folded) - prober.output).norm() / prober.output.norm()
    assert moved < 1e-5
    assert producers(wrong, x)["up"] == (None, None)
    assert producers(Block(nn.LayerNorm(C)), x)["up"] == ("norm", "weight")


def test_dead_channels_say_nothing_about_their_row() -> None:
    block = Block()
    with torch.no_grad():
        block.up.bias[[0, 4, 5, 2 * C - 1]] = -100.0
    (_, down) = probe(block).find_all()
    assert (down.producer, down.fold, down.row_map) == ("up", "rows", RowMap())
    with torch.no_grad():
        block.up.bias.fill_(-100.0)
    assert producers(block)["down"] == (None, None)


class Shared(nn.Module):
    """A producer whose rows are arranged by `rows` before the next linear reads them."""

    def __init__(self, num_rows: int, rows: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.producer, self.linear = nn.Linear(C, num_rows), nn.Linear(rows.numel(), C, bias=False)
        self.register_buffer("rows", rows)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.producer(x)[..., self.rows])


@pytest.mark.parametrize("num_rows", [8, 70, 4200])
@pytest.mark.parametrize(
    "row_map", [RowMap(), RowMap(offset=2), RowMap(0, 2, 3), RowMap(4, 1, 2), RowMap(width=4, repeats=2)]
)
def test_row_maps(row_map: RowMap, num_rows: int) -> None:
    """One, two and three digits of row numbers."""
    num_channels = (num_rows - row_map.offset) // 4 * 4 * row_map.repeats
    block = Shared(num_rows, row_map.offset + row_map.rows(num_channels))
    (group,) = (g for g in probe(block).find_all() if g.linears == ("linear",))
    assert (group.producer, group.row_map) == ("producer", row_map)


def test_a_permutation_is_no_row_map() -> None:
    assert producers(Shared(8, torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])))["linear"] == (None, None)


@pytest.mark.parametrize("num_value_rows", [6, 12])
def test_fused_projections(num_value_rows: int) -> None:
    """Scaling the queries' and keys' rows changes the weights of attention; only the values' may be scaled."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.o = nn.Linear(C, C + 2 * num_value_rows), nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).split([C, num_value_rows, num_value_rows], -1)
            repeats = C // num_value_rows
            k, v = (t.view(*t.shape[:-1], -1, 3).repeat_interleave(repeats, -2).flatten(-2) for t in (k, v))
            return x + self.o((q @ k.mT).softmax(-1) @ v)

    o = probe(Fused()).find_all()[1]
    assert (o.linears, o.producer, o.fold, o.mixes_tokens) == (("o",), "qkv", "rows", True)
    assert o.row_map == (RowMap(offset=24) if num_value_rows == 12 else RowMap(offset=18, width=3, repeats=2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.o = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, h: Tensor) -> Tensor:
        return self.o(self.q(h).softmax(-1) * self.v(h))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.attn = nn.RMSNorm(C), Attention()
        self.mlp = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C))
        self.router = nn.ModuleDict({"fc1": nn.Linear(C, C), "fc2": nn.Linear(C, C), "fc3": nn.Linear(C, C)})
        self.unused = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        x = x + self.mlp(x.clone())
        x = x + self.router["fc1"](torch.tanh(x))
        y = torch.tanh(x)
        return x + self.router["fc2"](y) + self.router["fc3"](y)


def test_what_is_compared() -> None:
    compared = {", ".join(g.linears): g.inspect for g in probe(Nested()).find_all()}
    assert compared == {
        # Several linears, and the first of a module: the module around them. A later one: itself. `unused` is not run.
        "attn.q, attn.v": "attn",
        "attn.o": "attn.o",
        "mlp.0": "mlp",
        "mlp.2": "mlp.2",
        # A module that only holds them has no output.
        "router.fc1": "router.fc1",
        "router.fc2, router.fc3": "",
    }
    given = probe(Nested()).complete(ScaleGroup(("attn.q", "attn.v"), inspect=""))
    assert (given.inspect, given.producer) == ("", "norm")


class ReadsWeights(nn.Module):
    """One linear that is called, one whose weight is read, one that is neither."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.called, self.read, self.expert = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.called(x) @ self.read.weight


def test_linears_whose_weight_is_read_past_their_forward() -> None:
    assert probe(ReadsWeights()).read_past_forward() == ["read"]
    assert probe(Block()).read_past_forward() == []


def test_a_given_producer_is_the_only_candidate() -> None:
    prober = probe(Block())
    assert prober.complete(ScaleGroup(("down",), "up")).fold == "rows"
    with pytest.raises(ValueError) as error:
        prober.complete(ScaleGroup(("down",), "norm"))
    assert str(error.value) == (
        "scaling down and folding 1/s into norm changes the block's output: "
        "name another producer, or leave producer, fold and row_map to be found"
    )


class MiddleOfThree(nn.Module):
    """A fused producer whose foldable rows probing does not find: it tries all rows, the last and the last half."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.producer, self.linear = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.producer(x).chunk(3, -1)
        return x + self.linear(torch.tanh(a) * b * torch.tanh(c))


def test_a_given_folding_is_tried_as_it_is() -> None:
    prober = probe(MiddleOfThree())
    assert prober.complete(ScaleGroup(("linear",))).producer is None
    group = ScaleGroup(("linear",), "producer", "rows", row_map=RowMap(offset=C))
    found = prober.complete(group)
    assert (found.producer, found.fold, found.row_map) == ("producer", "rows", RowMap(offset=C))
    wrong = replace(group, row_map=RowMap(offset=C - 1))
    with pytest.raises(ValueError, match=r"into producer \(fold='rows', RowMap\(offset=11, .*\) changes the block's"):
        prober.complete(wrong)


def test_a_given_fold_or_row_map_is_not_replaced() -> None:
    row_map = RowMap(offset=2)
    prober = probe(Shared(8, 2 + torch.arange(4)))
    for group in (ScaleGroup(("linear",), "producer", "rows"), ScaleGroup(("linear",), row_map=row_map)):
        assert prober.complete(group).row_map == row_map  # what is left open is found
    assert prober.complete(ScaleGroup(("linear",), row_map=RowMap(offset=1))).producer is None
    with pytest.raises(ValueError, match=r"into norm .*one_plus_weight.* changes the block's output"):
        probe(Block()).complete(ScaleGroup(("up",), "norm", "one_plus_weight"))


@pytest.mark.parametrize(
    ("group", "text"),
    [
        (ScaleGroup(("norm",)), "scale group names 'norm', which is not a linear that this block runs"),
        (ScaleGroup(("fc9",)), "scale group names 'fc9', which is not a linear that this block runs"),
        (ScaleGroup(("up",), "act"), "producer 'act' is not a norm or linear that this block runs"),
        (ScaleGroup(("up",), inspect="down"), "inspect of a scale group must be a module that contains 'up'"),
        (ScaleGroup(("up", "down")), "must read the same input, got different widths"),
        (ScaleGroup(("up",), "norm", "rows"), 'fold="rows" is for a linear, the other folds are for a norm'),
        (ScaleGroup(("down",), "up", "weight"), 'fold="rows" is for a linear, the other folds are for a norm'),
        (ScaleGroup(("down",), "norm", "weight"), "does not fit: norm has 12 rows, x 24 channels"),
        (ScaleGroup(("down",), "up", "rows", row_map=RowMap(offset=1)), "does not fit: up has 24 rows, x 24 channels"),
        (ScaleGroup(("down",), "up", "rows", row_map=RowMap(width=5, repeats=2)), "does not fit"),
    ],
)
def test_groups_that_name_the_wrong_things(group: ScaleGroup, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        probe(Block()).complete(group)


def test_probing_leaves_the_block_alone() -> None:
    block = Block().train()
    before = {n: (p, p.detach().clone(), p.requires_grad) for n, p in block.named_parameters()}
    probe(block).find_all()
    for name, parameter in block.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
        assert parameter.requires_grad == before[name][2] and parameter.grad is None
    assert block.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


def test_a_forward_that_a_copy_does_not_follow() -> None:
    block = Block()
    forward = block.forward
    block.forward = lambda *args: forward(*args)
    with pytest.raises(ValueError, match="a copy of this Block runs none of its linears"):
        probe(block)
    block.forward = partial(Block.forward, block)
    assert producers(block) == {"up": ("norm", "weight"), "down": ("up", "rows")}


def quantize(family: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, list[Scaling]]:
    """The report, and the scalings of all blocks."""
    scalings: list[Scaling] = []
    check_logits = mbq.check_logits

    def spy(model: Any, blocks: Any, found: dict[str, list[Scaling]], *rest: Any) -> float:
        scalings.extend(s for of_block in found.values() for s in of_block)
        return check_logits(model, blocks, found, *rest)

    monkeypatch.setattr(mbq, "check_logits", spy)
    config = mbq_config([build_batch(family)], group_size=32, n_grid=4, **({"recipe": "mbq"} | options))
    return quantize_(build_model(family), config, progress=False), scalings


def test_explicit_groups_replace_the_search_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [ScaleGroup(("mlp.down_proj",), "mlp.up_proj"), ScaleGroup(("self_attn.o_proj",))]
    report, _ = quantize("llava", monkeypatch, scale_groups=groups)
    layer = "model.language_model.layers."
    found = [(g.block.removeprefix(layer), g.linears, g.producer) for g in report.groups]
    assert found == [
        (str(i), linears, producer)
        for i in range(2)
        for linears, producer in ((["mlp.down_proj"], "mlp.up_proj"), (["self_attn.o_proj"], "self_attn.v_proj"))
    ]
    rest = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    assert report.not_scaled == [f"{layer}{i}.{name}" for i in range(2) for name in rest]
    assert report.num_linears == 14 and report.logits_error < 1e-5


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_heads_that_share_values_share_a_scale(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report, scalings = quantize(family, monkeypatch)
    tied = [s for s in scalings if s.group.row_map.repeats > 1]
    assert [s.group.linears for s in tied] == [("self_attn.o_proj",)] * 2
    scaled = 0
    for scaling, group in zip(tied, (g for g in report.groups if g.linears == ["self_attn.o_proj"]), strict=True):
        heads = scaling.s.view(2, 2, 16)  # value heads, query heads of each, channels
        assert torch.equal(heads[:, 0], heads[:, 1])
        if group.alpha > 0:
            scaled += 1
            assert heads.unique().numel() > 16
    assert scaled  # on these models at least one o_proj is better off with a scale
    assert report.logits_error < 1e-5


@pytest.mark.parametrize(
    ("family", "scaled"),
    [
        ("llama_mha", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("llama", {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}),
        ("olmo2", {"down_proj"}),
        ("starcoder2", {"q_proj", "k_proj", "v_proj", "c_fc"}),
    ],
)
def test_paper_mode_scales_less(family: str, scaled: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = quantize(family, monkeypatch, recipe="paper")
    assert {name.rpartition(".")[2] for g in report.groups for name in g.linears} == scaled
    assert all(g.producer for g in report.groups)
    assert not {name.rpartition(".")[2] for name in report.not_scaled} & scaled
