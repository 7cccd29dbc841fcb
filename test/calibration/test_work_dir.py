"""A calibration that is killed, or fails to write, or finds something else in its folder; and the call after it.

The processes that are killed are real. A fork server that has imported everything makes them, so each takes a second.
"""

import errno
import functools
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from expecttest import assert_expected_inline as expect
from models import assert_unchanged, build_batch, build_model, snapshot
from refusals import refused
from results import Result, assert_same, parts_of
from torch import nn
from tqdm.auto import tqdm

from mbq_ao import Int3WeightOnlyConfig, MBQInt3Tensor, mbq_config, quantize_
from mbq_ao.calibration import block, mbq, work_dir

NUM_LAYERS = 3
STEPS = ["run", "sensitivity", *(f"block_{i:04}" for i in range(NUM_LAYERS))]
KINDS: dict[str, dict[str, Any]] = {
    "w3a16": {},
    "w3a16 propagated": {"propagate_error": True},
    "w4a8": {"precision": "w4a8"},
    "w4a8 propagated": {"precision": "w4a8", "propagate_error": True},
    "best": {"recipe": "best", "balance": True, "n_grid": 20},
}
each_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
LAYERS = "model.language_model.layers"


def build() -> nn.Module:
    return build_model("llava", num_hidden_layers=NUM_LAYERS)


def calib_data() -> list[dict[str, Any]]:
    return [build_batch("llava", seed=1), build_batch("llava", num_text=12, seed=2)]


def calibrated(
    folder: Path | None, model: nn.Module | None = None, device: str | None = None, **options: Any
) -> Result:
    """Everything in the model after one call, and its report."""
    model = model or build()
    config = mbq_config(calib_data(), **{"recipe": "mbq", "group_size": 32, "n_grid": 2, **options})
    report = quantize_(model, config, device=device, progress=False, work_dir=folder)
    assert report is not None
    return parts_of(model), report


@functools.cache
def uninterrupted(**options: Any) -> Result:
    return calibrated(None, **options)


def calibrate_and_stop(folder: Path, options: dict[str, Any], function: str, call: int, with_signal: int) -> None:
    """What a process of its own does: it gets the signal just before this call of this function of `os`."""
    original, calls = getattr(os, function), iter(range(10**9))

    def stopping(*args: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), with_signal)
        return original(*args)

    setattr(os, function, stopping)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    calibrated(folder, **options)


def started(
    folder: Path, options: dict[str, Any], function: str = "fsync", call: int = -1, with_signal: int = signal.SIGKILL
) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_work_dir", "transformers.models.llava.modeling_llava"])
    process = context.Process(target=calibrate_and_stop, args=(folder, options, function, call, with_signal))
    process.start()
    return process


# Every file is written as: fsync of the file (call 2 n), replace (call n), fsync of the folder (call 2 n + 1).
@pytest.mark.parametrize(
    ("function", "call", "num_resumed"),
    [
        ("ftruncate", 0, 0),  # the lock is there, and nothing else
        ("fsync", 0, 0),
        ("replace", 0, 0),
        ("fsync", 1, 0),  # the run file is in place
        ("replace", 2, 0),  # the first block is searched, and its file not in place
        ("fsync", 5, 1),  # it is in place
        ("replace", 4, 2),
        ("fsync", 9, 3),  # all of them are
    ],
)
def test_killed_around_a_rename(function: str, call: int, num_resumed: int, tmp_path: Path) -> None:
    process = started(tmp_path, {}, function, call)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert_same(calibrated(tmp_path), uninterrupted(), num_resumed)
    assert not list(tmp_path.glob("*.partial"))


@each_kind
def test_killed_at_random_points(options: dict[str, Any], tmp_path: Path) -> None:
    """Three times in one folder, at any time; then a call that is left alone."""
    for _ in range(3):
        process = started(tmp_path, options)
        process.join(random.uniform(0.1, 0.7))
        process.kill()
        process.join()
        found = sorted(path.name for path in tmp_path.iterdir())
        print("exit code", process.exitcode, "leaving", *found)
        assert process.exitcode in (0, -signal.SIGKILL)
    num_resumed = sum(name.startswith("block") and name.endswith(".safetensors") for name in found)
    assert_same(calibrated(tmp_path, **options), uninterrupted(**options), num_resumed)


@each_kind
def test_finished_before(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call finishes from the folder: nothing is searched, and no gradient is computed."""
    assert_same(calibrated(tmp_path, **options), uninterrupted(**options), 0)
    assert sorted(os.listdir(tmp_path)) == sorted(["mbq_ao.lock", *(f"{step}.safetensors" for step in STEPS)])
    monkeypatch.delattr(block.BlockCalibrator, "search")
    monkeypatch.delattr(mbq, "modality_sensitivity")
    monkeypatch.delattr(mbq, "fit_weights")
    result = calibrated(tmp_path, **options)
    assert_same(result, uninterrupted(**options), NUM_LAYERS)
    assert "layers taken from work_dir: 3" in result[1].summary()


@pytest.mark.gpu
@each_kind
def test_finished_before_on_a_gpu(options: dict[str, Any], tmp_path: Path) -> None:
    options = options | {"device": "cuda"}
    first = calibrated(tmp_path, **options)
    (tmp_path / "block_0001.safetensors").unlink()
    assert_same(calibrated(tmp_path, **options), first, NUM_LAYERS - 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, to be copied or to be refused."""
    folder = tmp_path_factory.mktemp("finished")
    calibrated(folder)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def test_what_does_not_matter(copied: Path, tmp_path: Path) -> None:
    """The same model by way of a checkpoint, buffers that are not part of one, and the vision tower's precision."""
    build().save_pretrained(tmp_path / "checkpoint")
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint")
    model.register_buffer("memory", torch.rand(1), persistent=False)
    config = mbq_config(
        iter(calib_data()), group_size=32, n_grid=2, vision=Int3WeightOnlyConfig(group_size=32), recipe="mbq"
    )
    report = quantize_(model, config, progress=False, work_dir=str(copied))
    assert report is not None and report.num_resumed == NUM_LAYERS and report.vision


# On each file at least one; a flipped bit at the end of a block's file is in a scale, of the others in the record.
@pytest.mark.parametrize(
    ("step", "change", "num_resumed"),
    [
        ("block_0001", lambda content: content[: len(content) // 2], 2),
        ("block_0001", lambda content: b"", 2),
        ("block_0001", lambda content: content[:-2] + bytes([content[-2] ^ 1]) + content[-1:], 2),
        ("block_0002", lambda content: content.replace(b"alpha", b"alphb"), 2),
        ("block_0000", lambda content: content.replace(b"checksum", b"checksun"), 2),
        ("sensitivity", lambda content: content[:-1], 3),
        ("sensitivity", lambda content: content.replace(b"0.", b"1.", 1), 3),
        ("run", lambda content: b"\0" * len(content), 3),
    ],
)
def test_a_damaged_file(
    step: str, change: Callable[[bytes], bytes], num_resumed: int, copied: Path, tmp_path: Path
) -> None:
    path = copied / f"{step}.safetensors"
    content = path.read_bytes()
    assert change(content) != content
    path.write_bytes(change(content))
    with pytest.warns(UserWarning, match=f"{step}.safetensors cannot be used and is computed again"):
        assert_same(calibrated(copied), uninterrupted(), num_resumed)
    assert path.read_bytes() == content


def test_files_of_other_blocks_and_runs(copied: Path, tmp_path: Path) -> None:
    calibrated(tmp_path / "other", n_grid=3)
    shutil.copy(copied / "block_0000.safetensors", copied / "block_0001.safetensors")
    shutil.copy(tmp_path / "other" / "block_0002.safetensors", copied / "block_0002.safetensors")
    with pytest.warns(UserWarning, match=r"cannot be used and is computed again \(ValueError: it is of another run\)"):
        assert_same(calibrated(copied), uninterrupted(), 1)


def test_what_a_block_follows_from(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sensitivities are lost, and come out otherwise than the scales in the folder were searched with."""
    (copied / "sensitivity.safetensors").unlink()
    measure = mbq.modality_sensitivity
    monkeypatch.setattr(
        mbq, "modality_sensitivity", lambda *args, **kwargs: {k: 2 * r for k, r in measure(*args, **kwargs).items()}
    )
    with pytest.warns(UserWarning, match="it is of another run"):
        result = calibrated(copied)
    assert_same(result, calibrated(None), 0)


def test_another_model(finished: Path) -> None:
    model = build()
    with torch.no_grad():
        for name in (f"{LAYERS}.1.mlp.up_proj.weight", "lm_head.weight"):
            model.get_parameter(name)[0, 0] += 1
    text = refused(model, calib_data(), work_dir=finished).replace(str(finished), "FOLDER")
    expect(
        text,
        """\
work_dir 'FOLDER' is of another run; pass another folder, or delete this one. What differs:
  model.language_model.layers.1.mlp.up_proj.weight, lm_head.weight: other values""",
    )
    model = build()
    model.register_buffer("bias", torch.rand(1))
    assert "  bias: only in this call" in refused(model, calib_data(), work_dir=finished)
    model = build_model("llava", num_hidden_layers=2, rms_norm_eps=1e-5)
    text = refused(model, calib_data(), work_dir=finished).replace(str(finished), "FOLDER")
    expect(
        text,
        """\
work_dir 'FOLDER' is of another run; pass another folder, or delete this one. What differs:
  model config text_config.num_hidden_layers: 3 in work_dir, 2 in this call
  model config text_config.rms_norm_eps: 1e-06 in work_dir, 1e-05 in this call
  model.vision_tower.embeddings.class_embedding, model.vision_tower.embeddings.patch_embedding.weight and 62 more: \
other values
  model.language_model.layers.2.self_attn.q_proj.weight, model.language_model.layers.2.self_attn.k_proj.weight and \
14 more: only in work_dir""",
    )
    text = refused(build().bfloat16(), calib_data(), work_dir=finished)
    assert "embeddings.class_embedding, model.vision_tower.pre_layrnorm.weight and 21 more: float32 (32,) in" in text


def test_other_data(finished: Path) -> None:
    data = calib_data()
    data[0]["pixel_values"][0, 0, 0, 0] += 1
    data[1]["labels"][0, -3] = -100
    data.append(build_batch("llava"))
    expect(
        refused(build(), data, work_dir=finished).replace(str(finished), "FOLDER"),
        """\
work_dir 'FOLDER' is of another run; pass another folder, or delete this one. What differs:
  calibration batch 0['pixel_values'], calibration batch 1['labels'] and 1 more: other values
  calibration batch 2['input_ids'], calibration batch 2['attention_mask'] and 5 more: only in this call""",
    )


def test_another_config(finished: Path) -> None:
    text = refused(
        build(),
        calib_data(),
        filter_fn=lambda module, name: not name.endswith("1.mlp.down_proj"),
        work_dir=finished,
        precision="w4a8",
        recipe="paper",
        balance=False,
        loss="mse",
        propagate_error=True,
        n_grid=5,
    )
    expect(
        text.replace(str(finished), "FOLDER"),
        """\
work_dir 'FOLDER' is of another run; pass another folder, or delete this one. What differs:
  recipe: 'mbq' in work_dir, 'paper' in this call
  quantizer: W3A16Quantizer(group_size=32) in work_dir, W4A8Quantizer(group_size=None) in this call
  balance: True in work_dir, False in this call
  loss: 'mae' in work_dir, 'mse' in this call
  propagate_error: False in work_dir, True in this call
  n_grid: 2 in work_dir, 5 in this call
  quantized linear model.language_model.layers.1.mlp.down_proj: only in work_dir""",
    )


def test_other_versions_warn(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_dir.mbq_ao, "__version__", "9.9")
    with pytest.warns(UserWarning) as caught:
        assert_same(calibrated(copied), uninterrupted(), NUM_LAYERS)
    expect(
        str(caught[0].message).replace(str(copied), "FOLDER"),
        """\
work_dir 'FOLDER' was begun under other conditions, so that the last bits of the result may differ from an \
uninterrupted run's:
  mbq_ao: 0.1.0.dev0 in work_dir, 9.9 in this call""",
    )


def test_folders_that_are_none(tmp_path: Path, model: nn.Module) -> None:
    (tmp_path / "thesis.tex").touch()
    expect(
        refused(model, calib_data(), work_dir=tmp_path).replace(str(tmp_path), "FOLDER"),
        """\
work_dir 'FOLDER' holds files but no calibration; pass a new or empty folder, so that it can be deleted as a whole""",
    )
    assert os.listdir(tmp_path) == ["thesis.tex"]
    expect(
        refused(model, calib_data(), work_dir=tmp_path / "thesis.tex").replace(str(tmp_path), "FOLDER"),
        """work_dir must be a folder, but 'FOLDER/thesis.tex' is a file""",
    )
    with pytest.raises(ValueError) as error:
        quantize_(model, Int3WeightOnlyConfig(), work_dir=tmp_path / "new")
    expect(
        str(error.value),
        """work_dir is for calibration, but Int3WeightOnlyConfig calibrates nothing; leave it out""",
    )
    assert not (tmp_path / "new").exists()


def test_data_that_cannot_be_compared(model: nn.Module, tmp_path: Path) -> None:
    batch = build_batch("llava") | {"output_attentions": threading.Lock()}
    expect(
        refused(model, [batch], work_dir=tmp_path / "new"),
        """\
calibration batch 0['output_attentions'] is a lock that cannot be pickled, so it cannot be told whether it is the \
same in the next call (work_dir) or on the other ranks; pass tensors and numbers""",
    )


@pytest.mark.parametrize("step", ["run", "sensitivity", "block_0001"])
def test_a_full_disk(step: str, tmp_path: Path) -> None:
    # What is written through it ends in the kernel's own "no space left".
    (tmp_path / "mbq_ao.lock").touch()
    (tmp_path / f"{step}.safetensors.partial").symlink_to("/dev/full")
    text = refused(build(), calib_data(), OSError, work_dir=tmp_path).replace(str(tmp_path), "FOLDER")
    expect(
        text,
        """\
[Errno 28] No space left on device: work_dir 'FOLDER' cannot be written. The model is as it was, and the decoder \
layers finished before are kept: repair that (make room, change the permissions) and call quantize_ again with the \
same work_dir""",
    )
    assert_same(calibrated(tmp_path), uninterrupted(), int(step == "block_0001"))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_fails_late(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = getattr(os, function), iter(range(10**9))

    def failing(*args: Any) -> Any:
        if next(calls) == {"fsync": 6, "replace": 3}[function]:  # of the second block
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing)
        assert "Input/output error" in refused(build(), calib_data(), OSError, work_dir=tmp_path)
    assert_same(calibrated(tmp_path), uninterrupted(), 1)


def test_a_folder_that_cannot_be_made(tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    text = refused(model, calib_data(), OSError, work_dir=tmp_path / "file" / "folder")
    assert text.startswith("[Errno 20] Not a directory: work_dir")


def test_interrupted_with_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is let go of, and the same process, with the very same model, goes on."""
    model, calls, advance = build(), iter(range(10**9)), block.BlockCalibrator.advance

    def interrupted(self: block.BlockCalibrator) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        advance(self)

    before = snapshot(model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(block.BlockCalibrator, "advance", interrupted)
        calibrated(tmp_path, model)
    assert_unchanged(model, before)
    assert_same(calibrated(tmp_path, model), uninterrupted(), 2)


def test_two_processes_with_one_folder(tmp_path: Path) -> None:
    process = started(tmp_path, {}, "replace", 2, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "block_0000.safetensors.partial").exists():
            assert time.monotonic() < deadline and process.is_alive()
            time.sleep(0.02)
        text = refused(build(), calib_data(), work_dir=tmp_path)
    finally:
        process.kill()
    process.join()
    text = text.replace(str(tmp_path), "FOLDER").replace(str(process.pid), "PID").replace(os.uname().nodename, "HOST")
    expect(
        text,
        """\
work_dir 'FOLDER' is in use by another call of quantize_ (process PID on HOST); wait for it, or pass another \
folder""",
    )
    assert_same(calibrated(tmp_path), uninterrupted(), 0)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*args: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match="see to it that no other process uses it"):
        assert_same(calibrated(tmp_path), uninterrupted(), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_the_hash_of_a_tensor(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    text = work_dir.tensor_text(tensor)
    assert text == work_dir.tensor_text(tensor.T.contiguous().T)
    other = tensor.clone()
    other[0, 0] = 1
    different = [other, tensor.reshape(4, 3), tensor[0, 0], tensor[:0], tensor.to(torch.float16)]
    assert len({text, *map(work_dir.tensor_text, different)}) == 1 + len(different)


def test_the_hash_of_a_quantized_tensor() -> None:
    weights = [torch.ones(32, 64), torch.eye(32, 64), torch.ones(32, 64)]
    texts = [work_dir.tensor_text(MBQInt3Tensor.from_hp(weight, 32)) for weight in weights]
    assert texts[0] == texts[2] != texts[1]
