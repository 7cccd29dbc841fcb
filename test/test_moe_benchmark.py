"""benchmarks/moe.py: a smoke run, and what it makes of its figures."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

pytest.importorskip("easy_vqa")
import moe  # noqa: E402


@pytest.mark.benchmark
def test_smoke(tmp_path: Path) -> None:
    before = sorted(path.stat().st_mtime for path in moe.RESULTS.iterdir())
    command = [sys.executable, str(BENCHMARKS / "moe.py"), "--smoke", "--models", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["seed0.safetensors"]
    assert sorted(path.stat().st_mtime for path in moe.RESULTS.iterdir()) == before
    lines = done.stdout.splitlines()
    runs = [json.loads(x.removeprefix("model 0: ")) for x in lines if x.startswith("model 0: ")]
    assert [run["variant"] for run in runs] == ["RTN", *moe.VARIANTS]
    for run in runs:
        assert run["kl"] > 0 and math.isfinite(run["nll"]) and 0 <= run["correct"] <= 1
    assert all(len(run["experts_exponents"]) == 4 * 8 for run in runs[1:])
    rtn, awq, awq_routed, mbq, mbq_routed = runs
    assert len({rtn["kl"], awq["kl"], mbq["kl"]}) == 3
    # Routing is nearly even in an untrained model: the loss shows it, the scales found may be the same.
    assert awq["loss_over_rtn"] != awq_routed["loss_over_rtn"] and mbq["loss_over_rtn"] != mbq_routed["loss_over_rtn"]
    assert "| 0 | full precision | 0 |" in done.stdout
    assert "| MBQ, routed - MBQ |" in done.stdout and "## Routing of test tokens" in done.stdout


def run(variant: str, draw: int, kl: float) -> dict[str, Any]:
    return {"precision": "w3a16", "variant": variant, "draw": draw, "kl": kl, "nll": 2 * kl, "correct": 1 - kl}


def test_variants_are_compared_draw_by_draw() -> None:
    # The second draw is worse for all, the second model has half the difference.
    gains = [(0.1, 0.4), (0.05, 0.45)]
    models = []
    for gain, worse in gains:
        runs = [{**run("RTN", 0, 1.0), "draw": None}]
        for draw in (0, 1):
            base = 0.1 + draw * worse
            runs += [run(variant, draw, base + (gain if variant == "MBQ" else 0.0)) for variant in moe.VARIANTS]
        models.append({"runs": runs})
    first, second, third = moe.compared(models, "w3a16")
    assert (first["first"], first["second"]) == ("MBQ", "AWQ-like")
    assert first["kl"]["mean"] == pytest.approx(0.075) and first["kl"]["of_models"] == pytest.approx([0.1, 0.05])
    assert first["nll"]["mean"] == pytest.approx(0.15) and first["correct"]["mean"] == pytest.approx(-0.075)
    assert first["kl"]["standard_error"] == pytest.approx(0.0288675 / 2, rel=1e-4)
    assert (first["kl"]["lower_in"], second["kl"]["lower_in"], third["kl"]["lower_in"]) == (0, 4, 0)
    assert first["kl"]["of"] == 4
