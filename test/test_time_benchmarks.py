"""benchmarks/calibration_time.py and overheads.py: a smoke run of each, and what they make of their figures."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import calibration_time  # noqa: E402
import overheads  # noqa: E402


def smoke(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), "--smoke", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def results() -> dict[str, float]:
    return {path.name: path.stat().st_mtime for path in (BENCHMARKS / "results").iterdir()}


@pytest.mark.benchmark
def test_calibration_time_without_a_peer() -> None:
    before = results()
    printed = smoke("calibration_time.py")
    assert "llmcompressor_env/bin/pip install" in printed
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [row["contender"] for row in rows] == ["mbq_ao RTN", "mbq_ao", "mbq_ao, AWQ-like"]
    assert all(row["finite"] and row["seconds"] > 0 for row in rows)
    assert max(row["error"] for row in rows[1:]) < rows[0]["error"]
    assert "| mbq_ao |" in printed and results() == before


def test_a_worker_that_does_not_run_is_shown(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho No module named llmcompressor >&2\nexit 1\n")
    python.chmod(0o755)
    worker = calibration_time.Worker(str(python), tmp_path, argparse.Namespace(threads=1, device="cpu"))
    with pytest.raises(SystemExit, match=r"llm-compressor failed under .*python:\nNo module named llmcompressor"):
        worker.run("llm-compressor", calibration_time.SMOKE)
    worker.close()


def one(contender: str, seconds: float, error: float, **changes: Any) -> dict[str, Any]:
    row = {"contender": contender, "seconds": seconds, "cpu_seconds": 2 * seconds, "error": error, "finite": True}
    return row | {"versions": {}} | changes


RTN = [one("mbq_ao RTN", 0.1, 0.4), one("llm-compressor RTN", 0.1, 0.4)]


def test_ratios_are_of_the_same_round() -> None:
    # The third round was on a machine twice as slow.
    pairs = [(1.0, 1.5), (2.0, 4.0), (4.0, 10.0)]
    runs = RTN + [run for a, b in pairs for run in (one("mbq_ao", a, 0.2), one("llm-compressor", b, 0.3))]
    summary = calibration_time.summarised(runs)
    assert summary["mbq_ao"]["peer_seconds_over_ours"] == 2.0
    assert summary["mbq_ao"]["peer_cpu_seconds_over_ours"] == 2.0
    assert (summary["mbq_ao"]["error_over_rtn"], summary["llm-compressor"]["error_over_rtn"]) == (0.5, 0.75)
    assert "| mbq_ao | 2.0 | 2.0 | 0.2000 | 0.500 |" in calibration_time.table(summary)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (one("mbq_ao", 1.0, 0.5), "leaves an error of 0.5000, RTN 0.4000"),
        (one("llm-compressor", 1.0, 0.0), "leaves an error of 0.0000"),
        (one("mbq_ao", 1.0, 0.2, finite=False), "not finite"),
    ],
)
def test_a_time_for_nothing_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(SystemExit, match=says):
        calibration_time.summarised([*RTN, wrong])


@pytest.mark.benchmark
def test_overheads() -> None:
    before = results()
    found = json.loads(smoke("overheads.py"))
    assert results() == before
    for row in found["imports"].values():
        assert row["other_modules_it_loads"] == 0 and 0 < row["mbq_ao_over_it"] < 0.5
    assert found["groups"]["layers"] == 4 and found["groups"]["layers_probed"] == 1
    assert found["groups"]["share_at_28_layers_128_samples"] < found["groups"]["share_of_calibration"] < 1
    assert [(row["n"], row["k"], row["dtype"]) for row in found["packing"]] == [
        (256, 512, "bfloat16"),
        (256, 512, "float32"),
    ]
    for row in found["packing"]:
        assert row["MBQInt3Tensor"]["packed_bytes_per_weight"] < row["MBQW4A8Tensor"]["packed_bytes_per_weight"] < 0.6
        assert row["MBQInt3Tensor"]["million_weights_per_s"] > 0 and row["MBQInt3Tensor"]["over_clone"] > 0


def test_traffic_counts_what_is_read_and_written() -> None:
    with overheads.Traffic() as traffic:
        a = torch.zeros(10, 10)  # writes 400 bytes
        b = a.view(100)[:50] + 1  # reads 200, writes 200
        b.mul_(2)  # reads 200, and writes them
        a.t().contiguous()  # reads 400, writes 400
    assert (traffic.ops, traffic.bytes) == (4, 400 + 400 + 400 + 800)
