"""`mbq-ao quantize`: what it saves is what the Python calls give, and what it refuses it refuses before the work."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from command_line import document, invoke, refusal
from models import build_model
from processors import build_processor
from torch import nn
from transformers import AutoProcessor

from mbq_ao import CalibrationReport, MBQInt3Tensor, calibration_data, from_pretrained, mbq_config, quantize_
from mbq_ao.packed_weight import PackedWeight


def weights(model: nn.Module) -> dict[str, tuple[str, torch.Tensor]]:
    return {n: (repr(p), p.dequantize()) for n, p in model.named_parameters() if isinstance(p, PackedWeight)}


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    a, b = weights(found), weights(expected)
    assert a and a.keys() == b.keys()
    for name, (text, values) in a.items():
        assert text == b[name][0] and torch.equal(values, b[name][1]), name


def data_options(llava: Path) -> list[object]:
    return ["--data", llava / "conversations.jsonl", "--image-folder", llava, "--samples", 2]


def test_it_does_what_the_python_calls_do(llava: Path, tmp_path: Path) -> None:
    """And its report is kept as numbers, from which the table and the picture can be made again."""
    out = tmp_path / "new" / "w3"
    shown = document("quantize", llava, *data_options(llava), "--group-size", 32, "--seed", 1, "-o", out)
    assert shown["num_weights"] == 14 and shown["nbytes_after"] < shown["nbytes_before"] / 4
    assert shown["settings"]["group_size"] == 32 and shown["calibration"]["num_batches"] == 2

    expected = build_model("llava")
    data = calibration_data(
        llava / "conversations.jsonl", build_processor("llava"), image_folder=llava, n_samples=2, seed=1
    )
    report = quantize_(expected, mbq_config(data, group_size=32), progress=False)
    assert report is not None
    assert_same_weights(from_pretrained(out), expected)
    assert AutoProcessor.from_pretrained(out).chat_template == build_processor("llava").chat_template

    kept = CalibrationReport.from_json(out / "mbq_report.json")
    assert kept.groups == report.groups and kept.settings == report.settings
    assert str(kept).splitlines()[:-2] == str(report).splitlines()[:-2]  # the last two have seconds
    assert str(kept) in (out / "README.md").read_text()


def test_options_reach_mbq_config(llava: Path, tmp_path: Path) -> None:
    shown = document(
        *("quantize", llava, *data_options(llava), "-o", tmp_path / "m", "--precision", "w4a8", "--recipe"),
        *("smoothquant", "--vision", "w3a16", "--dtype", "bfloat16", "--work-dir", tmp_path / "work"),
        *("--mode", "few_shot", "--device", "cpu", "--max-length", 500),
    )
    settings = {"precision": "w4a8", "recipe": "smoothquant", "group_size": None, "vision": "Int3WeightOnlyConfig"}
    assert settings.items() <= shown["settings"].items() and shown["calibration"]["num_batches"] == 1
    assert any((tmp_path / "work").iterdir())
    model = from_pretrained(tmp_path / "m")
    assert model.dtype == torch.bfloat16
    kinds = {name.split(".")[1]: text.partition("(")[0] for name, (text, _) in weights(model).items()}
    assert kinds == {"vision_tower": "MBQInt3Tensor", "language_model": "MBQW4A8Tensor"}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_plain_rounding(family: str, tmp_path: Path) -> None:
    """Of what calibration would quantize: experts, too, but no routers. It needs no processor."""
    model = build_model(family)
    model.save_pretrained(tmp_path / "full")
    with pytest.warns(UserWarning, match="saved without a processor"):
        done = invoke("quantize", tmp_path / "full", "--no-data", "-o", tmp_path / "w3", "--group-size", "row")
    assert done.exit_code == 0, (done.output, done.exception)
    assert not (tmp_path / "w3" / "mbq_report.json").exists()
    found = dict(from_pretrained(tmp_path / "w3").named_parameters())
    full = {n: p for n, p in model.named_parameters() if ".layers." in n and p.ndim > 1 and "mlp.gate.w" not in n}
    assert {name for name, p in found.items() if isinstance(p, MBQInt3Tensor)} == full.keys()
    for name, parameter in full.items():
        assert torch.equal(found[name].dequantize(), MBQInt3Tensor.from_hp(parameter, None).dequantize()), name


def test_experts_of_which_nothing_is_known_are_named(tmp_path: Path) -> None:
    build_model("llama4").save_pretrained(tmp_path / "full")
    build_processor("llava").save_pretrained(tmp_path / "full")
    with pytest.warns(
        UserWarning, match=r"left as it is: language_model.model.layers.1.feed_forward.experts.down_proj"
    ):
        assert invoke("quantize", tmp_path / "full", "--no-data", "-o", tmp_path / "w3").exit_code == 0


def one_of_two(rank: int, port: int, arguments: list[object], done: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    result = invoke(*arguments)
    done.with_suffix(f".{rank}").write_text(result.stdout if result.exit_code == 0 else result.stderr)


def test_two_processes_save_what_one_does(llava: Path, tmp_path: Path) -> None:
    """As torchrun starts them; only the first prints."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["command_line", "mbq_ao.calibration.mbq", "mbq_ao.pretrained"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["quantize", llava, *data_options(llava), "--group-size", 32, "--json", "-o"]
    arguments = (port, [*command, tmp_path / "two"], tmp_path / "done")
    processes = [context.Process(target=one_of_two, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    shown = (tmp_path / "done.0").read_text()
    assert json.loads(shown)["num_weights"] == 14 and (tmp_path / "done.1").read_text() == ""
    document(*command[:-2], "-o", tmp_path / "one")
    assert_same_weights(from_pretrained(tmp_path / "two"), from_pretrained(tmp_path / "one"))


def test_refusals(llava: Path, rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them before a model is loaded."""
    monkeypatch.setattr("mbq_ao.cli.quantize.load_model", None)
    out, data = tmp_path / "out", data_options(llava)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"image": "none.png", "question": "?", "answer": "!"}\n')
    (tmp_path / "file").write_text("")
    assert refusal("quantize", "./none", *data, "-o", out).startswith("there is no folder ./none; MODEL is")
    assert refusal("quantize", tmp_path, *data, "-o", out).startswith(f"cannot load {tmp_path}: ")
    assert "--data: there is no file" in refusal("quantize", llava, "--data", tmp_path / "no.jsonl", "-o", out)
    assert "there is no folder none" in refusal("quantize", llava, *data[:2], "--image-folder", "none", "-o", out)
    assert "none of the 1 rows can be used" in refusal("quantize", llava, "--data", bad, "-o", out)
    assert "must be a .json or .jsonl file" in refusal("quantize", llava, "--data", tmp_path / "file", "-o", out)
    assert "is quantized already (mbq)" in refusal("quantize", rounded, *data, "-o", out)
    assert "is a file" in refusal("quantize", llava, *data, "-o", tmp_path / "file")
    assert "is the model itself" in refusal("quantize", llava, *data, "-o", llava)
    assert "holds a checkpoint; give another" in refusal("quantize", llava, *data, "-o", rounded)
    assert "cannot write to /proc" in refusal("quantize", llava, *data, "-o", "/proc/out")
    assert "--device tpu:7 cannot be used here" in refusal("quantize", llava, *data, "-o", out, "--device", "tpu:7")
    assert not out.exists()


def test_usage_errors(llava: Path, tmp_path: Path) -> None:
    out = ["-o", tmp_path / "out"]
    for arguments, told in (
        (["quantize", llava, *out], "or --no-data"),
        (["quantize", llava, *data_options(llava), "--no-data", *out], "not both"),
        (["quantize", llava, "--no-data", "--recipe", "paper", *out], "leave out --recipe"),
        (["quantize", llava, "--no-data", "--work-dir", "w", *out], "leave out --work-dir"),
        (["quantize", llava, *data_options(llava), "--precision", "w2", *out], "w3a16"),
        (["quantize", llava, *data_options(llava)], "--output"),
    ):
        done = invoke(*arguments)
        assert (done.exit_code, done.stdout) == (2, ""), done.output
        assert told in done.stderr.replace("\n", " "), done.stderr


def test_overwriting(llava: Path, tmp_path: Path) -> None:
    """A checkpoint without a report does not keep the report of the one before it."""
    out = tmp_path / "out"
    assert invoke("quantize", llava, *data_options(llava), "-o", out, "--group-size", 32).exit_code == 0
    assert (out / "mbq_report.json").exists()
    assert invoke("quantize", llava, "--no-data", "-o", out, "--overwrite").exit_code == 0
    assert not (out / "mbq_report.json").exists()
