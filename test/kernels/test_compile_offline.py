"""The shipped kernels, compiled for real GPUs on a machine that may have none: what the interpreter cannot see.

In a process of its own: conftest.py has set Triton's interpreter up in this one.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

REPORT = pathlib.Path(__file__).parents[2] / "benchmarks" / "sass_report.py"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("TRITON IS NOT INSTALLED: the kernels are not compiled for any GPU here")
    tools = pathlib.Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    missing = [name for name in ("ptxas", "nvdisasm", "cuobjdump") if not (tools / name).exists()]
    if missing:
        pytest.skip(f"TRITON WITHOUT {', '.join(missing).upper()}: the kernels are not compiled for any GPU here")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(REPORT), "--json", "--quick"], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_all_generations_are_compiled(rows: list[dict]) -> None:
    assert {row["arch"] for row in rows} == {80, 89, 90, 100}
    assert len(rows) == 8


def test_nothing_spills(rows: list[dict]) -> None:
    assert [row for row in rows if row["spills"] or row["stack"]] == []


def test_tensor_cores_and_wide_loads(rows: list[dict]) -> None:
    for row in rows:
        assert row["tensor_core"] >= 16, row  # 2 row blocks x 8 slabs
        assert row["loads_128"] >= 3, row  # a plane each


def test_no_shared_memory_between_weights_and_tensor_cores(rows: list[dict]) -> None:
    # Scales may pass through shared memory; operands would need wide stores or ldmatrix.
    for row in rows:
        assert not [o for o in row["opcodes"] if o.startswith(("LDSM", "STSM", "STS.128", "STS.64"))], row


def test_instructions_a_weight(rows: list[dict]) -> None:
    # 1.9 to 2.3 with Triton 3.9, depending on the target; above 3.2 an H200 would be bound by arithmetic.
    for row in rows:
        assert row["per_weight"] <= 2.6, row
