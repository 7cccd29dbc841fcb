"""Linears that read one input: laid together in memory, merged under torch.compile, and taken apart again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from models import build_batch, build_model, model_inputs
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from mbq_ao import (
    Int3WeightOnlyConfig,
    Int8DynamicActivationInt4WeightMBQConfig,
    MBQInt3Tensor,
    compile_options,
    fuse_linears_,
    quantize_,
    unfuse_linears_,
)

K = 64
CONFIGS = {
    "int3": Int3WeightOnlyConfig(group_size=32),
    "w4a8": Int8DynamicActivationInt4WeightMBQConfig(group_size=32),
}
KINDS = pytest.mark.parametrize("kind", list(CONFIGS))


class Readers(nn.Module):
    """Linears of one input, one of another, with and without a bias."""

    def __init__(self, sizes: tuple[int, ...] = (96, 32, 40), bias: bool = False, kind: str = "int3"):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(K, n, bias) for n in sizes)
        self.after = nn.Linear(K, K, bias)
        quantize_(self, CONFIGS[kind])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.a(x), self.b(x), self.c(x), self.after(x.sigmoid())


def storages(model: nn.Module) -> dict[int, int]:
    """Address -> bytes of the memory that weights and biases lie in."""
    tensors = [getattr(m.weight, n) for m in model.modules() if isinstance(m, nn.Linear) for n in ("qdata", "scale")]
    tensors += [m.bias for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def counted(model: nn.Module, x: Tensor) -> tuple[Any, Counter[str]]:
    """The compiled model's result, and how often it calls each of our ops."""
    torch._dynamo.reset()
    compiled = torch.compile(model, options=compile_options(), fullgraph=True)
    with torch.no_grad():
        result, (code, *_) = run_and_get_code(compiled, x)
    names = [f"{kind}_linear{group}" for kind in CONFIGS for group in ("", "_group")]
    return result, Counter({name: n for name in names if (n := code.count(f"torch.ops.mbq_ao.{name}.default("))})


@torch.no_grad()
@KINDS
@pytest.mark.parametrize("bias", [False, True])
def test_laid_together_and_taken_apart(bias: bool, kind: str) -> None:
    model = Readers(bias=bias, kind=kind)
    x = torch.randn(3, K)
    expected, before = model(x), storages(model)
    assert fuse_linears_(model) == [["a", "b", "c"]]  # c's 40 rows end within a tile, so `after` lies alone
    fused = storages(model)
    assert len(fused) == (6 if bias else 4) and len(before) == (12 if bias else 8)
    assert sum(fused.values()) == sum(before.values())
    for ours, theirs in zip(model(x), expected, strict=True):
        assert torch.equal(ours, theirs)
    unfuse_linears_(model)
    assert len(storages(model)) == len(before)
    assert sum(storages(model).values()) == sum(before.values())
    assert model.a.weight.qdata.storage_offset() == 0 == model.b.weight.qdata.storage_offset()
    for ours, theirs in zip(model(x), expected, strict=True):
        assert torch.equal(ours, theirs)


@KINDS
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_calls_on_one_input_become_one(bias: bool, rows: int, kind: str) -> None:
    model, x = Readers(bias=bias, kind=kind), torch.randn(rows, K)
    expected = model(x)
    fuse_linears_(model)
    results, calls = counted(model, x)
    assert calls == {f"{kind}_linear_group": 1, f"{kind}_linear": 1}
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert ours.is_contiguous() and ours.shape == theirs.shape


@KINDS
def test_one_launch_where_the_weights_lie_together(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mbq_ao.kernels import int3_ops, w4a8_ops

    model, x = Readers(kind=kind), torch.randn(2, K)
    module = int3_ops if kind == "int3" else w4a8_ops
    rows: list[int] = []

    def spy(x: Tensor, qdata: Tensor, *rest: Any) -> Tensor:
        rows.append(rest[0].shape[0])
        return original(x, qdata, *rest)

    original = getattr(module, f"{kind}_linear")
    monkeypatch.setattr(module, f"{kind}_linear", spy)

    def group(*linears: nn.Linear) -> Tensor:
        lists = [[getattr(m.weight, n) for m in linears] for n in linears[0].weight.tensor_data_names]
        if kind == "int3":
            return torch.ops.mbq_ao.int3_linear_group(x, *lists, [], 32)
        return torch.ops.mbq_ao.w4a8_linear_group(x, *lists, [], None, 32)

    apart = group(model.a, model.b, model.c)
    assert rows == [96, 32, 40]
    fuse_linears_(model)
    assert torch.equal(group(model.a, model.b, model.c), apart)
    assert rows[3:] == [168]
    assert torch.equal(group(model.a, model.c), torch.cat([apart[:, :96], apart[:, 128:]], 1))  # not neighbours
    assert rows[4:] == [96, 40]


def test_weights_that_end_within_a_tile_are_not_read_as_one() -> None:
    """Laid together by hand: 60 and 40 rows are two tiles each, 100 would be one view of four."""
    model = Readers((60, 40, 32))
    x = torch.randn(2, K)
    expected = torch.cat([model.a(x), model.b(x)], 1)
    lists = []
    for name in ("qdata", "scale", "zero_point"):
        parts = [getattr(m.weight, name) for m in (model.a, model.b)]
        lists.append(torch.cat(parts).split([p.shape[0] for p in parts]))
    assert torch.equal(torch.ops.mbq_ao.int3_linear_group(x, *lists, [], 32), expected)


@KINDS
def test_the_group_op_keeps_the_laws_of_custom_ops(kind: str) -> None:
    model = Readers(bias=True, kind=kind)
    fuse_linears_(model)
    linears = (model.a, model.b)
    lists = [[getattr(m.weight, n) for m in linears] for n in model.a.weight.tensor_data_names]
    arguments = [*lists, [m.bias.detach() for m in linears], *([] if kind == "int3" else [torch.ones(K)]), 32]
    op = getattr(torch.ops.mbq_ao, f"{kind}_linear_group").default
    torch.library.opcheck(op, (torch.randn(2, K), *arguments))
    with pytest.raises(ValueError, match="K is the last dimension of x"):
        op(torch.randn(2, 3 * K), *arguments)


def test_what_is_not_laid_together() -> None:
    def fused(*linears: nn.Module) -> list[list[str]]:
        return fuse_linears_(nn.Sequential(*linears))

    def linear(n: int = 32, k: int = K, group_size: int = 32, bias: bool = False, dtype: Any = torch.float32) -> Any:
        module = nn.Linear(k, n, bias, dtype=dtype)
        quantize_(module, Int3WeightOnlyConfig(group_size=group_size))
        return module

    assert fused(linear(), linear()) == [["0", "1"]]
    assert fused(linear(), nn.Identity(), linear()) == []
    assert fused(linear(40), linear()) == []
    assert fused(linear(40), linear(), linear(40), linear()) == [["1", "2"]]
    assert fused(linear(), linear(k=128)) == []
    assert fused(linear(), linear(group_size=64)) == []
    assert fused(linear(), linear(bias=True)) == []
    assert fused(linear(), linear(dtype=torch.bfloat16)) == []
    assert fused(nn.Linear(K, 32), nn.Linear(K, 32)) == []


def test_kinds_are_not_mixed() -> None:
    model = nn.Sequential(*(nn.Linear(K, 48) for _ in range(5)))
    quantize_(model, CONFIGS["w4a8"], filter_fn=lambda module, name: name in ("0", "1", "3"))
    quantize_(model, CONFIGS["int3"], filter_fn=lambda module, name: name in ("2", "4"))
    before = {name: id(p) for name, p in model.named_parameters()}
    assert fuse_linears_(model) == [["0", "1"]]  # 48 rows are whole tiles of W4A8
    after = {name: id(p) for name, p in model.named_parameters()}
    assert {name for name in before if before[name] != after[name]} == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_only_calls_of_one_kind_and_one_pre_scale_are_merged() -> None:
    model = Readers(kind="w4a8")
    model.c = nn.Linear(K, 32)
    quantize_(model.c, CONFIGS["int3"])
    weight = model.b.weight._replace(act_pre_scale=torch.full((K,), 0.5))
    model.b.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(3, K)
    results, calls = counted(model, x)
    assert calls == {"w4a8_linear": 3, "int3_linear": 1}
    for ours, theirs in zip(results, model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_model_of_many_layers() -> None:
    model, inputs = build_model("qwen2_5_vl"), model_inputs(build_batch("qwen2_5_vl"))
    language_model = model.model.language_model
    quantize_(language_model, Int3WeightOnlyConfig(group_size=32))
    with torch.no_grad():
        expected = model(**inputs).logits
        names = fuse_linears_(model)
        assert len(names) == 4 and names[0] == [
            f"model.language_model.layers.0.self_attn.{n}_proj" for n in ("q", "k", "v")
        ]
        assert torch.equal(model(**inputs).logits, expected)
    layer = language_model.layers[0]
    hidden = torch.randn(1, 1, K)
    result, calls = counted(layer.mlp, hidden)
    assert calls == {"int3_linear_group": 1, "int3_linear": 1}
    torch.testing.assert_close(result, layer.mlp(hidden), rtol=1e-5, atol=1e-5)


def test_nothing_is_changed_if_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Readers()
    before = {name: id(p) for name, p in model.named_parameters()}
    replace, calls = MBQInt3Tensor._replace, iter(range(100))

    def failing(self: MBQInt3Tensor, **changes: Any) -> MBQInt3Tensor:
        if next(calls) == 2:
            raise MemoryError
        return replace(self, **changes)

    monkeypatch.setattr(MBQInt3Tensor, "_replace", failing)
    with pytest.raises(MemoryError):
        fuse_linears_(model)
    assert {name: id(p) for name, p in model.named_parameters()} == before


def test_a_state_dict_survives(tmp_path: Any) -> None:
    model = Readers(bias=True)
    expected = model(torch.ones(2, K))
    fuse_linears_(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = Readers(bias=True)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), assign=True)
    for ours, theirs in zip(other(torch.ones(2, K)), expected, strict=True):
        assert torch.equal(ours, theirs)
