"""Several processes share a calibration: the model of one process bit for bit, or all models as they were.

The processes are real and speak through gloo, as under torchrun (processes.py).
"""

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline as expect
from models import assert_unchanged, build_batch, build_model, snapshot
from processes import on_ranks
from results import Result, assert_same, parts_of
from torch.distributed.fsdp import fully_shard
from torchao.quantization import Int8WeightOnlyConfig

from mbq_ao import mbq_config, quantize_
from mbq_ao.calibration import block, mbq, plan, ranks
from mbq_ao.calibration.ranks import ALONE, SeveralRanks, joined_ranks

KILLED = f"exit code {-signal.SIGKILL}"


def calib_data(family: str, number: int = 5) -> list[dict[str, Any]]:
    """Batches of one, two and three samples and of several lengths."""
    sizes = [(9, 1), (14, 2), (7, 1), (11, 3), (9, 1)]
    return [build_batch(family, text, samples, seed=i) for i, (text, samples) in enumerate(sizes[:number])]


def calibrated(
    rank: int = 0,
    *,
    family: str = "llava",
    number: int = 5,
    work_dir: Path | None = None,
    distributed: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    **options: Any,
) -> Result:
    model = build_model(family, dtype)
    data = calib_data(family, number)
    if dtype != torch.float32:
        data = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()} for batch in data]
    config = mbq_config(data, **{"recipe": "mbq", "group_size": 32, "n_grid": 3, **options})
    report = quantize_(model, config, device=device, progress=False, work_dir=work_dir, distributed=distributed)
    assert report is not None
    return parts_of(model), report


@contextlib.contextmanager
def going_wrong(kind: str, where: str) -> Iterator[None]:
    owner, name, at_call = {
        "reading the data": (mbq, "collect_batches", 0),
        "capture": (mbq, "capture_streams", 0),
        "sensitivity": (mbq, "modality_sensitivity", 0),
        "search": (block, "search_scale", 2),
        "between two blocks": (block.BlockCalibrator, "advance", 0),
        "check": (mbq, "check_logits", 0),
        "setting the plan": (plan, "is_traceable_wrapper_subclass", 5),
        "moving the model": (mbq.nn.Module, "to", 0),
        "passing values": (dist, "all_gather_object", 9),
    }[where]
    original, calls = getattr(owner, name), iter(range(10**9))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at_call:
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt if kind == "interrupted" else RuntimeError("CUDA out of memory")
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield


def refusals(rank: int, kind: str, places: list[str]) -> list[str]:
    """What this rank raises when something goes wrong on rank 1, place by place; its model is what it was each time."""
    texts = []
    model = build_model("llava")
    before = snapshot(model)
    for where in places:
        with pytest.raises(BaseException) as caught, contextlib.ExitStack() as stack:
            if rank == 1:
                stack.enter_context(going_wrong(kind, where))
            quantize_(
                model,
                mbq_config(calib_data("llava"), group_size=32, n_grid=2, recipe="mbq"),
                progress=False,
                device="cpu",
            )
        assert_unchanged(model, before)
        assert all(not m.training for m in model.modules())
        texts.append(f"{caught.typename}: {caught.value}")
    return texts


# Bit for bit what one process makes


CASES = {
    2: [
        {},
        {"family": "qwen2_vl", "propagate_error": True},
        {"recipe": "paper", "loss": "mse"},
        {"recipe": "smoothquant", "precision": "w4a8", "n_grid": 20},
        {"recipe": "gptq", "balance": True, "n_grid": 20},
        {"family": "qwen3_vl_moe", "recipe": "best", "precision": "w4a8", "n_grid": 20},
        {"balance": False},
        {"family": "mllama"},  # the image is another sequence than the text
        {"family": "qwen3_vl_moe", "propagate_error": True},
        {"vision": Int8WeightOnlyConfig(), "device": "cpu"},
        {"dtype": torch.bfloat16},
        {"number": 1},
        {"family": "qwen3_vl", "targets": "decoder+vision", "propagate_error": True},
    ],
    3: [
        {"precision": "w4a8"},
        {"family": "qwen2_vl", "precision": "w4a8", "propagate_error": True},
        {"family": "llama4", "precision": "w4a8"},
        {"number": 2},  # one rank has no batch of its own
        {"number": 2, "targets": "decoder+vision"},
        {"number": 2, "targets": "decoder+vision", "recipe": "best", "n_grid": 20},
    ],
}


def all_of(rank: int, cases: list[dict[str, Any]]) -> list[Result]:
    return [calibrated(**case) for case in cases]


@pytest.mark.parametrize(
    "size", [pytest.param(2, marks=pytest.mark.benchmark), 3]
)  # two take three quarters of a minute
def test_the_same_as_one_process(size: int, tmp_path: Path) -> None:
    results = on_ranks(size, tmp_path, all_of, cases=CASES[size])
    for i, case in enumerate(CASES[size]):
        print(case)
        expected = calibrated(**case)
        for result in results:
            assert_same(result[i], expected)


def passed(rank: int) -> dict[str, Any]:
    with joined_ranks(True) as found:
        assert isinstance(found, SeveralRanks)
        found.split([5, 40, 30, 5, 10, 10, 4])
        own = found.mine(range(7))
        tensors = found.gather([(torch.full((2,), float(i)), i) for i in own])
        assert [i for _, i in tensors] == [*range(7)] and all((t == i).all() for t, i in tensors)
        return {
            "own": own,
            "each": found.each(rank * 10),
            "rank 0": found.on_one(lambda: rank),
            "least": found.on_one(lambda: rank, keys=[abs(i - 4) for i in own]),
        }


def test_what_passes(tmp_path: Path) -> None:
    results = on_ranks(3, tmp_path, passed)
    # 40, 30 + 4, and 5 + 5 + 10 + 10 tokens
    assert [result.pop("own") for result in results] == [[1], [2, 6], [0, 3, 4, 5]]
    assert results == [{"each": [0, 10, 20], "rank 0": 0, "least": 2}] * 3


def test_without_torch_distributed() -> None:
    with joined_ranks(True) as found:
        assert found is ALONE


def alone_on_rank_0(rank: int) -> Result | None:
    with pytest.raises(ValueError, match="the same as"), joined_ranks(False) as found:
        assert found is ALONE
        raise ValueError("the same as without ranks")
    return calibrated(distributed=False) if rank == 0 else None


def test_opting_out(tmp_path: Path) -> None:
    result, nothing = on_ranks(2, tmp_path, alone_on_rank_0)
    assert nothing is None
    assert_same(result, calibrated())


def late(rank: int) -> list[str]:
    ranks._PATIENCE = 0.2
    with warnings.catch_warnings(record=True) as caught:
        time.sleep(rank)
        with joined_ranks(True):
            pass
    return [str(w.message) for w in caught]


def test_a_rank_that_waits_for_the_others_says_so(tmp_path: Path) -> None:
    waiting, not_waiting = on_ranks(2, tmp_path, late)
    assert waiting == [
        "rank 0 waits for the others: with torch.distributed initialised, all 2 ranks have to call quantize_, and "
        "share the work; pass distributed=False to quantize on one rank alone"
    ]
    assert not_waiting == []


# A rank that fails


def test_a_rank_that_fails(tmp_path: Path) -> None:
    places = ["reading the data", "capture", "sensitivity", "search", "between two blocks", "check"]
    places += ["setting the plan", "moving the model"]
    first, second, third = on_ranks(3, tmp_path, refusals, kind="failed", places=places)
    assert second == ["RuntimeError: CUDA out of memory"] * len(places)
    told = "quantize_ failed on rank 1: RuntimeError: CUDA out of memory. The model is as it was on this rank as well"
    assert first == third == [f"RuntimeError: {told}"] * len(places)


def test_a_rank_that_is_interrupted(tmp_path: Path) -> None:
    """Where values pass it cannot tell the others; they take it for gone, and the next call works again."""
    places = ["search", "passing values", "search"]
    first, second = on_ranks(2, tmp_path, refusals, kind="interrupted", places=places)
    assert second == ["KeyboardInterrupt: "] * 3
    told = "RuntimeError: quantize_ failed on rank 1: KeyboardInterrupt. The model is as it was on this rank as well"
    assert first[0] == first[2] == told
    assert first[1].startswith("RuntimeError: rank 0 lost the other ranks: one has died, was interrupted, or took")


@pytest.mark.parametrize("where", ["search", "check"])
def test_a_rank_that_is_killed(where: str, tmp_path: Path) -> None:
    first, second, third = on_ranks(3, tmp_path, refusals, kind="killed", places=[where])
    assert second == KILLED
    for rank, (text,) in ((0, first), (2, third)):
        assert text.startswith(
            f"RuntimeError: rank {rank} lost the other ranks: one has died, was interrupted, or took"
        )
        assert text.endswith("The model is as it was")


def once_more(rank: int) -> Result:
    refusals(rank, "failed", ["search"])
    return calibrated()


def test_the_next_call_after_a_failure(tmp_path: Path) -> None:
    for result in on_ranks(2, tmp_path, once_more):
        assert_same(result, calibrated())


# Ranks that were called with different things


def disagreeing(rank: int, what: str) -> str:
    model, data, options = build_model("llava"), calib_data("llava"), {"group_size": 32, "n_grid": 2}
    if rank == 1:
        if what == "data":
            data = data[:-1]
        elif what == "model":
            model.get_decoder().layers[1].mlp.up_proj.weight.data[0, 0] += 1
        elif what == "settings":
            options["n_grid"] = 3
        elif what == "vision":
            options["vision"] = Int8WeightOnlyConfig()
    before = snapshot(model)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        quantize_(model, mbq_config(data, **({"recipe": "mbq"} | options)), progress=False)
    assert_unchanged(model, before)
    return str(caught.value)


@pytest.mark.parametrize("what", ["data", "model", "settings"])
def test_ranks_that_disagree(what: str, tmp_path: Path) -> None:
    first, *others = on_ranks(3, tmp_path, disagreeing, what=what)
    assert others == [first] * 2
    message, _, found = first.partition(" What differs:\n")
    expect(
        message,
        """\
rank 1 differs from rank 0: every rank takes its share of the same work, so call quantize_ with the same model, \
config and all of calib_data on each (no distributed sampler), or pass distributed=False.""",
    )
    if what == "data":
        assert (
            found
            == "  calibration batch 4['input_ids'], calibration batch 4['attention_mask'] and 5 more: only on rank 0"
        )
    elif what == "model":
        assert found == "  model.language_model.layers.1.mlp.up_proj.weight: other values"
    else:
        assert found == "  n_grid: 2 on rank 0, 3 on rank 1"


def test_ranks_with_different_results(tmp_path: Path) -> None:
    first, second = on_ranks(2, tmp_path, disagreeing, what="vision")
    assert first == second
    assert first.startswith("rank 1 differs from rank 0: their devices or options differ (`vision`?); nothing was set")
    assert "vision_tower" in first and "only on rank 1" in first


# With a folder that remembers the steps


def killed_at(rank: int, folder: Path, call: int, **options: Any) -> Result:
    """Rank 0, which writes, is killed before this call of os.replace; the others learn of it."""
    original, calls = os.replace, iter(range(10**9))

    def stopping(*args: Any) -> None:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args)

    os.replace = stopping  # type: ignore[assignment]
    return calibrated(work_dir=folder, **options)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_killed_and_resumed_by_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    folder, options = tmp_path / "work", {"propagate_error": True}
    # Its third file, the first block's, is in place, and the second block's is not.
    died = on_ranks(before, tmp_path, killed_at, folder=folder, call=3, **options)
    assert died[0] == KILLED
    expected = calibrated(**options)
    for result in on_ranks(after, tmp_path, calibrated, work_dir=folder, **options):
        assert_same(result, expected, num_resumed=1)
    for result in on_ranks(after, tmp_path, calibrated, work_dir=folder, **options):
        assert_same(result, expected, num_resumed=2)


def work_dir_of_rank_0(rank: int, folder: Path) -> Result:
    return calibrated(work_dir=folder if rank == 0 else None)


def test_only_rank_0_needs_the_folder(tmp_path: Path) -> None:
    for result in on_ranks(2, tmp_path, work_dir_of_rank_0, folder=tmp_path / "work"):
        assert_same(result, calibrated(), num_resumed=0)
    assert (tmp_path / "work" / "block_0001.safetensors").exists()


def refused_folder(rank: int, folder: Path) -> str:
    model = build_model("llava")
    before = snapshot(model)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        quantize_(model, mbq_config(calib_data("llava"), group_size=32, recipe="mbq"), progress=False, work_dir=folder)
    assert_unchanged(model, before)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_folder_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "other").touch()
    first, second = on_ranks(2, tmp_path, refused_folder, folder=tmp_path / "work")
    assert first.startswith("ValueError: work_dir") and "holds files but no calibration" in first
    assert second.startswith("RuntimeError: quantize_ failed on rank 0: ValueError: work_dir")


# Models that are distributed already


def wrapped(rank: int) -> list[str]:
    texts = []
    model = build_model("llava")
    for sharded in (torch.nn.parallel.DistributedDataParallel(model), fully_shard(model)):
        with pytest.raises(ValueError) as caught:
            quantize_(sharded, mbq_config(calib_data("llava"), group_size=32, recipe="mbq"), progress=False)
        texts.append(str(caught.value))
    return texts


def test_models_that_are_distributed_already(tmp_path: Path) -> None:
    first, second = on_ranks(2, tmp_path, wrapped)
    assert first == second
    assert first[0] == (
        "the model is wrapped in DistributedDataParallel: call quantize_ with the model itself, and wrap it after"
    )
    assert "is a DTensor, of which this rank has a part" in first[1]
