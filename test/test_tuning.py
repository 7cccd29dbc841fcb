"""What is measured is remembered and used. The clock is a stand-in, and the kernels are interpreted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mbq_ao import Int3WeightOnlyConfig, fuse_linears_, quantize_, tune

pytest.importorskip("triton")
from mbq_ao.kernels import choice, int3_linear
from mbq_ao.kernels.choice import Dequantize, Problem, choose, default_choice, read_table, table_path
from mbq_ao.kernels.gemm_config import MANY, MOST, GemmConfig
from mbq_ao.kernels.gemv_config import GemvConfig

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for the clock; gpu.py tunes for real")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MBQ_AO_CACHE", str(tmp_path))
    choice._table_of.cache_clear()
    yield tmp_path
    choice._table_of.cache_clear()


def build(*sizes: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(k, n, bias=False) for n, k in sizes)).to(dtype)
    quantize_(model, Int3WeightOnlyConfig(group_size=64))
    return model


def timer_that_likes(favourite: Callable[[Any], bool]) -> Callable[[Sequence[Any]], float]:
    return lambda calls: 1.0 if favourite(calls[0].args[0]) else 2.0


def test_the_fastest_is_used_from_then_on_and_the_rest_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build((96, 128))
    before = choose(3, 96, 128, 64, torch.bfloat16, CPU)
    assert before == default_choice(3, 96, 128, 64, torch.bfloat16, CPU) and before.num_warps != 16
    gains = tune(model, num_rows=[4], timer=timer_that_likes(lambda c: c.num_warps == 16), progress=False)
    assert gains == {"4 x (96, 128), group size 64, bfloat16": 2.0}
    assert choose(3, 96, 128, 64, torch.bfloat16, CPU).num_warps == 16  # 3 rows are served as 4 are
    for rows, n, dtype in ((2, 96, torch.bfloat16), (5, 96, torch.bfloat16), (3, 64, torch.bfloat16)):
        assert choose(rows, n, 128, 64, dtype, CPU) == default_choice(rows, n, 128, 64, dtype, CPU)
    assert choose(3, 96, 128, 64, torch.float16, CPU) == default_choice(3, 96, 128, 64, torch.float16, CPU)

    used = []
    gemv = int3_linear.int3_gemv_triton
    monkeypatch.setattr(int3_linear, "int3_gemv_triton", lambda *args: used.append(args[-1]) or gemv(*args))
    w = model[0].weight
    int3_linear.int3_linear_triton(torch.randn(3, 128, dtype=torch.bfloat16), w.qdata, w.scale, w.zero_point, None, 64)
    assert [config.num_warps for config in used] == [16]


@pytest.mark.parametrize("kind", [MANY, MOST, Dequantize()])
def test_many_rows_may_be_dequantized(kind: object) -> None:
    tune(build((96, 128)), num_rows=[64, 512], timer=timer_that_likes(lambda c: c == kind), progress=False)
    assert choose(300, 96, 128, 64, torch.bfloat16, CPU) == choose(64, 96, 128, 64, torch.bfloat16, CPU) == kind


@pytest.mark.benchmark  # half a minute in the interpreter
def test_every_candidate_computes_the_same() -> None:
    """The real thing but for the clock: all of them run."""
    results: dict[Any, Tensor] = {}

    def run(calls: Sequence[Any]) -> float:
        x, *weight = calls[0].args[1:5]
        reference = torch.nn.functional.linear(
            x.float(), torch.ops.mbq_ao.int3_dequantize(*weight, x.shape[1], 64, torch.float32)
        )
        error = (calls[0]().float() - reference).norm() / reference.norm()
        results[calls[0].args[0]] = error
        return 1.0

    gains = tune(build((40, 300)), num_rows=[1, 17], timer=run, progress=False)
    assert set(gains.values()) == {1.0}
    assert {type(c) for c in results} == {GemvConfig, GemmConfig, Dequantize} and len(results) > 10
    assert max(results.values()) < 1e-2  # bfloat16
    assert choose(1, 40, 300, 64, torch.bfloat16, CPU) == default_choice(1, 40, 300, 64, torch.bfloat16, CPU)


def test_a_candidate_that_does_not_fit_the_gpu_is_passed_over() -> None:
    def timer(calls: Sequence[Any]) -> float:
        if calls[0].args[0].num_warps == 16:
            raise RuntimeError("out of resource: registers")
        return 1.0 if calls[0].args[0].num_warps == 8 else 2.0

    tune(build((96, 128)), num_rows=[1], timer=timer, progress=False)
    assert choose(1, 96, 128, 64, torch.bfloat16, CPU).num_warps == 8


def test_a_default_that_fails_is_an_error_and_writes_nothing(cache: Path) -> None:
    def timer(calls: Sequence[Any]) -> float:
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        tune(build((96, 128)), num_rows=[1], timer=timer, progress=False)
    assert list(cache.iterdir()) == []


def test_tables_grow_and_shapes_are_tuned_once(cache: Path) -> None:
    timer = timer_that_likes(lambda c: c.num_warps == 16)
    assert len(tune(build((96, 128), (96, 128), (64, 128)), num_rows=[1], timer=timer, progress=False)) == 2
    tune(build((32, 256)), num_rows=[1], timer=timer, progress=False)
    (path,) = cache.iterdir()
    assert path == table_path(CPU)
    assert {(p.n, p.k) for p in read_table(path)} == {(96, 128), (64, 128), (32, 256)}


def test_linears_laid_together_are_tuned_together() -> None:
    model = build((32, 128), (64, 128), (32, 128))
    assert fuse_linears_(model) == [["0", "1", "2"]]
    gains = tune(model, num_rows=[1], timer=lambda calls: 1.0, progress=False)
    assert {name.split(",")[0] for name in gains} == {"1 x (32", "1 x (64", "1 x (96", "1 x (128"}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 2, "entries": []}', '{"format": 1}', '{"format": 1, "entries": [{"kernel": "x"}]}'],
)
def test_a_file_that_is_no_table_is_not_used(text: str) -> None:
    table_path(CPU).write_text(text)
    with pytest.warns(UserWarning, match="is not a table of mbq_ao.tune .* delete it, or run mbq_ao.tune again"):
        found = choose(1, 96, 128, 64, torch.bfloat16, CPU)
    assert found == default_choice(1, 96, 128, 64, torch.bfloat16, CPU)


def test_what_a_table_looks_like() -> None:
    problem = Problem.of(3, 96, 128, 10**6, torch.float16)
    choice.write_table(table_path(CPU), {problem: Dequantize()})
    entry = {
        "num_rows": 4,
        "n": 96,
        "k": 128,
        "group_size": 128,
        "dtype": "float16",
        "kernel": "dequantize",
        "config": {},
    }
    assert json.loads(table_path(CPU).read_text()) == {"format": 1, "entries": [entry]}
    assert read_table(table_path(CPU)) == {problem: Dequantize()}


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="tune needs a model with 3-bit weights, got none; call quantize_ first"):
        tune(nn.Linear(3, 3))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="tune measures kernels on one NVIDIA GPU, got 3-bit weights on cpu"):
        tune(build((32, 128)))
    monkeypatch.undo()
    assert tune(build((32, 128), dtype=torch.float32), timer=lambda calls: 1.0, progress=False) == {}
