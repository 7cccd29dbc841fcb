"""Reports on the kernels compiled for real GPUs, on a machine that may have none."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


def report(script: str, *options: str) -> list[dict]:
    """What a script of benchmarks/ prints with --json, or a skip where it cannot compile.

    In a process of its own: conftest.py has set Triton's interpreter up in this one.
    """
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("TRITON IS NOT INSTALLED: the kernels are not compiled for any GPU here")
    tools = pathlib.Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    missing = [name for name in ("ptxas", "nvdisasm", "cuobjdump") if not (tools / name).exists()]
    if missing:
        pytest.skip(f"TRITON WITHOUT {', '.join(missing).upper()}: the kernels are not compiled for any GPU here")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / script), "--json", *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]
