"""benchmarks/gpu.py on a CPU: every part of it, what it does when a part of it fails, and what it writes.

Its parts one by one are test_gpu_benchmark_parts.py.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_benchmark import adapters, cuts, gate, kernels, report  # noqa: E402
from gpu_benchmark.report_targets import targets  # noqa: E402


def gpu_py(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the script; `before` is Python that is run in its process first."""
    code = (
        f"import runpy, sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\nsys.argv = {['gpu.py', *arguments]}\n{before}\n"
    )
    code += f"runpy.run_path({str(BENCHMARKS / 'gpu.py')!r}, run_name='__main__')"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS.parent, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """The results and the Markdown of a run of all parts."""
    output = tmp_path_factory.mktemp("gpu") / "gpu.json"
    done = gpu_py("--smoke", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text()), output.with_suffix(".md").read_text()


def rows(results: dict, part: str) -> dict[str, list[dict]]:
    return {task["name"]: task["rows"] for task in results["parts"][part]}


@pytest.mark.benchmark
def test_every_task_of_every_part_is_done(smoke: tuple[dict, str]) -> None:
    results, markdown = smoke
    assert list(results["parts"]) == ["gate", "kernels", "cuts", "peers", "end_to_end"]
    assert [t for part in results["parts"].values() for t in part if t["status"] != "done"] == []
    assert "What failed" not in markdown
    assert results["seconds"] < 60 or os.getloadavg()[0] > 2, "a smoke run is to take less than a minute"


@pytest.mark.benchmark
def test_gate_checks_all_regimes(smoke: tuple[dict, str]) -> None:
    results, markdown = smoke
    verdict = results["verdict"]
    assert verdict["all"] and verdict["passed"] == ["W3A16", "W4A8"] and verdict["subnormals_exact"] is True
    linears = sum(len(rules.CASES) for rules in gate.RULES.values()) * len(gate.SMOKE_SHAPES) * len(gate.SMOKE_ROWS)
    cuts = gate.CUT_TASKS * len(gate.CUT_SPLITS) * len(gate.CUT_SMOKE_SHAPES)
    assert verdict["cases"] == linears + cuts
    found = [row for task in rows(results, "gate").values() for row in task if "worst" in row]
    for name in gate.RULES:
        assert {row["bias"] for row in found if row["precision"] == name} == {True, False}
    of_cuts = [row for row in found if "cut" in row]
    assert len(of_cuts) == cuts and all(row["tokens"] and row["nan"] for row in of_cuts)
    assert "## Correctness gate: W3A16 passed, W4A8 passed" in markdown


@pytest.mark.benchmark
def test_kernels_are_timed_at_every_shape(smoke: tuple[dict, str]) -> None:
    results, markdown = smoke
    (found,) = rows(results, "kernels").values()
    timed = {(row["n"], row["k"], row["m"]): row for row in found if "linear" in row}
    assert set(timed) == {(n, k, m) for n, k in kernels.SMOKE_SHAPES for m in kernels.SMOKE_ROWS}
    for (_, _, m), row in timed.items():
        assert ("W3A16 fp16" in row) == (m <= kernels.MAX_ROWS_DECODING)
        for name in {"linear", "W3A16 bf16", "W4A8 bf16"}:
            assert 0 < row[name]["low_us"] <= row[name]["us"] <= row[name]["high_us"]
    assert timed[64, 256, 1]["W3A16 bf16"]["packed_bytes"] == 64 * 256 * 3 // 8 + 64 * 2 * (2 + 1)
    assert timed[64, 256, 1]["W4A8 bf16"]["packed_bytes"] == 64 * 256 // 2 + 64 * 2
    quantized = {(row["m"], row["k"]) for row in found if "quantize" in row}
    assert quantized == {(m, k) for m in kernels.SMOKE_ROWS for _, k in kernels.SMOKE_SHAPES}
    for title in ("W3A16 bf16: speed-up over", "W4A8 bf16: TOPS", "W4A8: quantizing the tokens alone"):
        assert f"### {title}" in markdown


@pytest.mark.benchmark
def test_cuts_are_beside_the_default(smoke: tuple[dict, str]) -> None:
    results, markdown = smoke
    (found,) = rows(results, "cuts").values()
    assert [row["m"] for row in found] == list(cuts.SMOKE_ROWS)
    for row in found:
        assert row["default"] in row["us"] and len(row["us"]) >= len(cuts.SPLITS) and not row["failed"]
    assert "| 16 x 128 | 1 | " in markdown


@pytest.mark.benchmark
def test_peers_are_timed_or_named(smoke: tuple[dict, str]) -> None:
    results, markdown = smoke
    found = rows(results, "peers")
    assert set(found) == {peer.name for peer in adapters.PEERS}
    assert sum("us" in row for row in found["cuBLAS bf16"]) == len(kernels.SMOKE_SHAPES) * len(kernels.SMOKE_ROWS)
    assert [row["m"] for row in found["torchao W8A8"] if "us" in row] == [64, 64]
    for name, task in found.items():
        if not any("us" in row for row in task):
            assert any("missing" in row or "error" in row for row in task), name
            assert f"| {name} | missing: " in markdown or f"- {name} at " in markdown


@pytest.mark.benchmark
def test_whole_models_run_in_every_precision(smoke: tuple[dict, str]) -> None:
    results, markdown = smoke
    found = [task[0] | task[1] | task[2] for task in rows(results, "end_to_end").values()]
    precisions = ["bf16", "torchao int4", "mbq_ao W3A16", "mbq_ao W4A8"]
    assert [row["precision"] for row in found] == [*precisions, "mbq_ao W4A8"]
    for row in found:
        assert row["same_token_as_eager"] and row["compile"] == "eager" and row["tried"] == []
        assert row["quantized_linears"] == (0 if row["precision"] == "bf16" else 14)  # 7 in each of two layers
        assert row["tokens_per_s"] > 0 and row["vision_s"] > 0 and row["prompt_graph_s"] > 0 and row["kernels"]
        assert row["prompt_tokens"] == row["image_tokens"] + 64
    assert found[2]["weight_bytes"] < found[3]["weight_bytes"] < found[0]["weight_bytes"]
    assert "| Qwen2.5-VL-7B (68 + 8 tokens) | mbq_ao W4A8 |" in markdown
    assert "| Qwen2.5-VL-7B, image of 4 tokens: first token (vision and prompt) over bf16 | 1.2x |" in markdown


@pytest.mark.benchmark
def test_markdown_is_made_again_from_the_json(smoke: tuple[dict, str], tmp_path: Path) -> None:
    results, markdown = smoke
    path = tmp_path / "again.json"
    path.write_text(json.dumps(results))
    assert gpu_py("--render", str(path)).returncode == 0
    assert path.with_suffix(".md").read_text() == markdown


NO_TORCHAO = "sys.modules['torchao'] = None"


@pytest.mark.benchmark
def test_without_torchao_only_the_quantized_models_fail(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    done = gpu_py("--smoke", "--only", "end_to_end", "--output", str(output), before=NO_TORCHAO)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())["parts"]["end_to_end"]
    failed = [task for task in found if task["status"] != "done"]
    assert [task["name"] for task in failed] == [task["name"] for task in found if "bf16" not in task["name"]]
    assert len(failed) == 4
    assert all("needs torchao, which cannot be imported here" in task["reason"] for task in failed)


@pytest.mark.benchmark
def test_a_wrong_kernel_is_not_timed_and_the_status_is_1(tmp_path: Path) -> None:
    """Without torchao, which neither the gate nor the kernels need."""
    output = tmp_path / "gpu.json"
    wrong = (
        "from gpu_benchmark import gate_w4a8\n"
        "gate_w4a8.compare = lambda y, layer, *_, real=gate_w4a8.compare, **__: real(y * 1.02, layer)"
    )
    done = gpu_py("--smoke", "--only", "gate,kernels,cuts", "--output", str(output), before=f"{NO_TORCHAO}\n{wrong}")
    assert done.returncode == 1, done.stderr
    results = json.loads(output.read_text())
    assert [task for part in results["parts"].values() for task in part if task["status"] != "done"] == []
    assert results["verdict"]["passed"] == ["W3A16"]
    failed = results["verdict"]["precisions"]["W4A8"]["failed"]
    assert len(failed) == len(gate.RULES["W4A8"].CASES) + gate.CUT_TASKS
    assert "Correctness gate: W3A16 passed, W4A8 FAILED, not timed" in done.stdout
    (kernel,) = results["parts"]["kernels"]
    assert any("W3A16 bf16" in row for row in kernel["rows"])
    assert not any("W4A8 bf16" in row or "quantize" in row for row in kernel["rows"])
    assert results["parts"]["cuts"] == []


@pytest.mark.parametrize(("passed", "parts"), [((), ["gate"]), (("W4A8",), ["gate", "kernels"])])
def test_the_parts_after_the_gate(
    passed: tuple[str, ...], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = importlib.import_module("gpu")
    seen = []
    run = {"gate": lambda context, seconds: [], "kernels": lambda context, seconds: seen.append(context) or []}
    precisions = {name: {"passed": name in passed, "failed": []} for name in gate.RULES}
    verdict = {"precisions": precisions, "passed": list(passed), "all": False, "fp16": True}
    verdict |= {"subnormals_exact": True, "cases": 0, "not_run": [], "wrong": []}
    monkeypatch.setattr(gpu, "RUN", run)
    monkeypatch.setattr(gpu, "about", lambda context: {"smoke": True, "versions": {}})
    monkeypatch.setattr(gate, "verdict", lambda results: verdict)
    output = tmp_path / "gpu.json"
    asked = argparse.Namespace(smoke=True, only=("gate", "kernels"), output=output, minutes=1.0, compile_mode=None)
    assert gpu.run(asked) == 1
    assert list(json.loads(output.read_text())["parts"]) == parts
    assert [context.precisions for context in seen] == ([passed] if passed else [])


# --- the report


def test_report_of_a_gpu_run() -> None:
    def timed(us: float, graph: bool = True) -> dict:
        return {"us": us, "low_us": us, "high_us": us, "graph": graph}

    at = {"n": 4096, "k": 4096, "m": 1}
    found = {
        "about": {"device": "NVIDIA X", "date": "today", "versions": {"torch": "2"}},
        "verdict": None,
        "parts": {
            "kernels": [
                {
                    "name": "kernels",
                    "status": "done",
                    "rows": [
                        {"copy_bandwidth": 4e12},
                        {**at, "linear": timed(10.0), "W3A16 bf16": {**timed(4.0), "packed_bytes": 8_000_000}},
                    ],
                }
            ],
            "peers": [
                {"name": "slow W4", "status": "done", "rows": [{"configuration": "c"}, {**at, **timed(5.0, False)}]},
                {"name": "gone", "status": "done", "rows": [{"configuration": "c", "missing": "no module"}]},
            ],
        },
    }
    text = report.render(found)
    assert "| 4096 x 4096 | 50% |" in text
    assert "| 4096 x 4096 | 2.50x |" in text
    assert "| 4096 x 4096 | 10.0 (10.0 to 10.0) | 2.50x (4.0) | 2.00x (5.0) |" in text
    assert "missing: no module" in text and "no CUDA graph" in text
    assert "Smoke" not in text
    assert "Targets" not in text


def test_targets() -> None:
    def timed(us: float) -> dict:
        return {"us": us, "low_us": us, "high_us": us}

    def kernel(n: int, k: int, m: int, us: float) -> dict:
        return {"n": n, "k": k, "m": m, "linear": timed(16.0), "W4A8 bf16": {**timed(us), "packed_bytes": 8_000_000}}

    seven = [(3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)]
    measured = [{"copy_bandwidth": 4e12}, kernel(14336, 4096, 1, 4.0)]
    measured += [kernel(*shape, 1024, 8.0) for shape in seven]
    measured += [kernel(*shape, 2048, 8.0 if shape[0] > 512 else 12.8) for shape in seven]
    measured += [kernel(*shape, 4096, 10.0) for shape in seven[:3]]
    models = [
        {
            "rows": [
                {"model": "Qwen2.5-VL-7B", "precision": p, "image_tokens": 1500, "tokens_per_s": 1, "first_token_s": s}
            ]
        }
        for p, s in (("bf16", 0.060), ("mbq_ao W4A8", 0.052))
    ]
    text = targets(measured, report.models(models))
    assert text.count("over bf16 F.linear at each linear") == 3
    assert "| 1.3x (stretch 1.6x) | 2.00x (3584 x 3584) to 2.00x (3584 x 3584) | yes, stretch too |" in text
    assert "| 1.3x (stretch 1.6x) | 1.25x (512 x 3584) to 2.00x (3584 x 3584) | no |" in text
    assert "1.60x (3584 x 3584), 3 of 4 | not known |" in text
    assert "over the copy bandwidth | 65% | 50% | no |" in text
    assert "1500 tokens: first token (vision and prompt) over bf16 | 1.2x | 1.15x | no |" in text
