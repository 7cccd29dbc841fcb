"""benchmarks/gpu.py on a CPU: every part of it, and what it does when a part of it fails."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_benchmark import gate, kernels, peers, report, shapes, tasks  # noqa: E402
from gpu_benchmark.measure import Clock, cosine  # noqa: E402

CPU = torch.device("cpu")


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


def test_every_task_of_every_part_is_done(smoke: tuple[dict, str]) -> None:
    results, markdown = smoke
    assert list(results["parts"]) == ["gate", "kernels", "peers", "end_to_end"]
    assert [t for part in results["parts"].values() for t in part if t["status"] != "done"] == []
    assert "What failed" not in markdown
    assert results["seconds"] < 60 or os.getloadavg()[0] > 2, "a smoke run is to take less than a minute"


def test_gate_checks_all_regimes(smoke: tuple[dict, str]) -> None:
    results, markdown = smoke
    assert results["verdict"]["passed"] and results["verdict"]["subnormals_exact"] is True
    assert results["verdict"]["cases"] == 8 * len(gate.SMOKE_SHAPES) * len(gate.SMOKE_ROWS)
    found = [row for task in rows(results, "gate").values() for row in task if "worst" in row]
    assert {row["bias"] for row in found} == {True, False}
    assert "## Correctness gate: passed" in markdown


def test_kernels_are_timed_at_every_shape(smoke: tuple[dict, str]) -> None:
    results, markdown = smoke
    (found,) = rows(results, "kernels").values()
    timed = {(row["n"], row["k"], row["m"]): row for row in found if "m" in row}
    assert set(timed) == {(n, k, m) for n, k in kernels.SMOKE_SHAPES for m in kernels.SMOKE_ROWS}
    for (_, _, m), row in timed.items():
        assert ("ours_fp16" in row) == (m <= kernels.MAX_ROWS_FP16)
        for name in {"linear", "ours_bf16"}:
            assert 0 < row[name]["low_us"] <= row[name]["us"] <= row[name]["high_us"]
    assert timed[64, 256, 1]["packed_bytes"] == 64 * 256 * 3 // 8 + 64 * 2 * (2 + 1)
    assert "### bf16: speed-up over bf16 F.linear" in markdown


def test_peers_are_timed_or_named(smoke: tuple[dict, str]) -> None:
    results, markdown = smoke
    found = rows(results, "peers")
    assert set(found) == {peer.name for peer in peers.PEERS}
    assert sum("us" in row for row in found["cuBLAS bf16"]) == len(kernels.SMOKE_SHAPES) * len(kernels.SMOKE_ROWS)
    for name, task in found.items():
        if not any("us" in row for row in task):
            assert any("missing" in row or "error" in row for row in task), name
            assert f"| {name} | missing: " in markdown or f"- {name} at " in markdown


def test_whole_models_run_in_every_precision(smoke: tuple[dict, str]) -> None:
    results, markdown = smoke
    found = [task[0] | task[1] for task in rows(results, "end_to_end").values()]
    assert [row["precision"] for row in found] == ["bf16", "torchao int4", "mbq_ao int3", "mbq_ao int3"]
    for row in found:
        assert row["same_token_as_eager"] and row["compile"] == "eager" and row["tried"] == []
        assert row["quantized_linears"] == (0 if row["precision"] == "bf16" else 14)  # 7 in each of two layers
        assert row["tokens_per_s"] > 0 and row["vision_s"] > 0 and row["kernels"]
    assert found[2]["weight_bytes"] < found[0]["weight_bytes"]
    assert "| Qwen2.5-VL-7B (68 + 8 tokens) | mbq_ao int3 |" in markdown


def test_markdown_is_made_again_from_the_json(smoke: tuple[dict, str], tmp_path: Path) -> None:
    results, markdown = smoke
    path = tmp_path / "again.json"
    path.write_text(json.dumps(results))
    assert gpu_py("--render", str(path)).returncode == 0
    assert path.with_suffix(".md").read_text() == markdown


def test_without_torchao_only_the_quantized_models_fail(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    blocked = "sys.modules['torchao'] = None"
    done = gpu_py("--smoke", "--only", "gate,kernels,end_to_end", "--output", str(output), before=blocked)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(output.read_text())["parts"]
    status = {task["name"]: task["status"] for part in parts.values() for task in part}
    failed = {name for name, how in status.items() if how != "done"}
    assert failed == {name for name in status if "int" in name}
    reasons = [task["reason"] for task in parts["end_to_end"] if task["status"] != "done"]
    assert len(reasons) == 3 and all("needs torchao, which cannot be imported here" in reason for reason in reasons)


def test_a_wrong_kernel_stops_everything_with_status_1(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    wrong = (
        "from gpu_benchmark import gate\n"
        "gate.compare = lambda y, args, weight, real=gate.compare: real(y * 1.02, args, weight)"
    )
    done = gpu_py("--smoke", "--only", "gate,kernels", "--output", str(output), before=wrong)
    assert done.returncode == 1, done.stderr
    results = json.loads(output.read_text())
    assert list(results["parts"]) == ["gate"]
    assert len(results["verdict"]["failed"]) == 8
    assert "Correctness gate: FAILED, nothing else is timed" in done.stdout


# --- the gate's arithmetic


def layer(m: int, dtype: torch.dtype) -> tuple[torch.Tensor, list, torch.Tensor]:
    torch.manual_seed(0)
    args, weight = gate.random_layer(m, 64, 512, 128, dtype, CPU, outliers=False)
    exact = torch.nn.functional.linear(args[0].double(), weight, args[4].double())
    return exact, args, weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 32])
def test_gate_passes_the_rounded_result_and_no_other(m: int, dtype: torch.dtype) -> None:
    exact, args, weight = layer(m, dtype)
    assert gate.compare(exact.to(dtype), args, weight)["ok"]
    assert not gate.compare((exact * 1.02).to(dtype), args, weight)["ok"]
    for bad in (float("nan"), float("inf")):
        spoiled = exact.to(dtype)
        spoiled[-1, -1] = bad
        assert not gate.compare(spoiled, args, weight)["ok"]


def test_gate_sees_one_wrong_element_and_a_small_error_in_all() -> None:
    exact, args, weight = layer(16, torch.float16)
    one = exact.clone()
    one.view(-1)[one.abs().argmax()] *= 1 + 4 * gate.UNIT_ROUNDOFF[torch.float16]
    found = gate.compare(one.half(), args, weight)
    assert found["worst"] > 1, found
    everywhere = exact + 0.003 * exact.square().mean().sqrt() * torch.randn_like(exact)
    found = gate.compare(everywhere.half(), args, weight)
    assert found["rms"] > 1, found


def result(name: str, *, status: str = "done", ok: bool = True, num_shapes: int = 2, rows: list | None = None) -> dict:
    cases = [{"n": n, "k": 8, "m": m, "worst": 0.1, "ok": ok} for n in range(num_shapes) for m in (1, 2)]
    return {"name": name, "status": status, "rows": cases if rows is None else rows}


def test_verdict() -> None:
    exact = result(gate.TENSOR_CORES, rows=[{"subnormals_exact": True}])
    flushed = result(gate.TENSOR_CORES, rows=[{"subnormals_exact": False}])
    good, bad = result("float16 group 32"), result("float16 group 32", ok=False)
    bf16 = result("bfloat16 group 32")
    assert gate.verdict([exact, good, bf16])["passed"]
    assert gate.verdict([exact, bad, bf16])["failed"] == ["float16 group 32"]
    excused = gate.verdict([flushed, bad, bf16])
    assert excused["passed"] and not excused["fp16"]
    assert not gate.verdict([flushed, good, result("bfloat16 group 32", ok=False)])["passed"]
    assert not gate.verdict([exact, result("float16 group 32", status="failed"), bf16])["passed"]
    assert not gate.verdict([exact, result("float16 group 32", num_shapes=1), bf16])["passed"]
    assert not gate.verdict([exact])["passed"]


# --- processes


def run(*functions, together: bool = False, seconds: float = 20.0) -> list[dict]:
    todo = [tasks.Task(f.__name__, f, seconds) for f in functions]
    context = tasks.Context(smoke=True, fp16=True)
    return tasks.run_together(todo, context) if together else tasks.run_one_by_one(todo, context, 60.0)


def good(context: tasks.Context) -> None:
    context.emit({"n": 1})


def raises(context: tasks.Context) -> None:
    context.emit({"n": 2})
    raise ValueError("the second of them")


def dies(context: tasks.Context) -> None:
    context.emit({"n": 3})
    print("last words", flush=True)
    os._exit(7)


def hangs(context: tasks.Context) -> None:
    context.emit({"n": 4})
    time.sleep(1000)


@pytest.mark.parametrize("together", [False, True])
def test_a_failing_task_loses_nothing_else(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "GRACE", 0.5)
    results = run(raises, dies, hangs, good, together=together, seconds=2.0)
    assert [r["status"] for r in results] == ["failed", "failed", "failed", "done"]
    assert [r["rows"] for r in results] == [[{"n": 2}], [{"n": 3}], [{"n": 4}], [{"n": 1}]]
    assert results[0]["reason"] == "ValueError: the second of them" and "in raises" in results[0]["traceback"]
    assert results[1]["reason"] == "exit code 7" and results[1]["log"] == ["last words"]
    assert results[2]["reason"].startswith("killed: not done after")
    text = report._failures({"peers": results})
    assert "the second of them" in text and "last words" in text


def test_tasks_without_time_are_named() -> None:
    todo = [tasks.Task("late", good, 1.0)]
    (late,) = tasks.run_one_by_one(todo, tasks.Context(smoke=True, fp16=True), seconds=0.0)
    assert (late["status"], late["reason"]) == ("failed", "no time was left to start it")


def turn(context: tasks.Context) -> None:
    context.emit({"prepared": time.monotonic()})
    context.wait_for_turn()
    began = time.monotonic()
    time.sleep(0.3)
    context.emit({"began": began, "ended": time.monotonic(), "remaining": context.remaining()})


def dies_waiting(context: tasks.Context) -> None:
    threading.Timer(0.3, os._exit, [9]).start()
    context.wait_for_turn()
    time.sleep(1000)


def never_ready(context: tasks.Context) -> None:
    time.sleep(1000)


def test_turns_do_not_overlap_and_wait_for_all() -> None:
    todo = [tasks.Task(f.__name__, f, 5.0) for f in (turn, never_ready, raises, turn, dies_waiting)]
    results = tasks.run_in_turns(todo, tasks.Context(smoke=True, fp16=True), prepare=1.5, seconds=20.0)
    assert [r["status"] for r in results] == ["done", "failed", "failed", "done", "failed"]
    assert results[1]["reason"] == "killed: not ready after 2 s"
    assert results[4]["reason"] == "exit code 9"
    (_, first), (prepared, second) = results[0]["rows"], results[3]["rows"]
    assert prepared["prepared"] < first["began"] < first["ended"] <= second["began"]
    assert 4 < first["remaining"] <= 5


# --- the clock and the peers


def test_clock_counts_calls_and_copies() -> None:
    clock, seen = Clock(CPU), []
    timed = clock.time([lambda: seen.append(1), lambda: seen.append(2)])
    assert timed["calls"] == 2 and len(seen) == 2 * (2 + timed["repeats"])
    assert clock.num_copies(clock.l2_bytes) == 3 and clock.num_copies(1 << 40) == 2
    assert cosine(torch.tensor([1.0, 0]), torch.tensor([1.0, 1])) == pytest.approx(0.5**0.5)


def test_clock_on_a_gpu_times_the_second_of_two_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for torch.cuda whose replays take a millisecond each and whose first two are slow."""
    now, replays = [0.0], []

    class Graph:
        def replay(self) -> None:
            replays.append(1)
            now[0] += 1.0 if len(replays) > 2 else 50.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"Stream": lambda device: stream, "current_stream": lambda device: stream, "CUDAGraph": Graph}
    fakes |= {"stream": lambda s: contextlib.nullcontext(), "graph": lambda g: contextlib.nullcontext()}
    fakes |= {"Event": Event, "synchronize": lambda device=None: None}
    fakes |= {"get_device_properties": lambda device: types.SimpleNamespace(L2_cache_size=60_000_000)}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clock, seen = Clock(torch.device("cuda")), []
    timed = clock.time([lambda: seen.append(1), lambda: seen.append(2), lambda: seen.append(3)])
    assert timed["calls"] == 18 and timed["graph"]  # six rounds of three: at least MIN_CALLS
    assert len(seen) == 2 * 18  # once to compile, once captured
    assert timed["us"] == pytest.approx(1000 / 18)
    assert timed["repeats"] == 50 and len(replays) == 1 + 2 * 51
    assert clock.num_copies(6_700_000) == 27 and clock.num_copies(500_000_000) == 2 and clock.num_copies(1000) == 256


def test_shapes_are_those_of_the_published_configs() -> None:
    found = shapes.all_shapes()
    assert list(found)[:3] == [(4096, 4096), (14336, 4096), (28672, 8192)]
    expected = {(3584, 3584), (512, 3584), (18944, 3584), (3584, 18944), (6144, 4096), (4096, 14336), (8192, 8192)}
    expected |= {(1024, 8192), (29568, 8192), (8192, 29568), (2048, 2048), (256, 2048), (11008, 2048), (2048, 11008)}
    assert set(found) == expected | set(shapes.TARGETS)


class Zero(peers.Peer):
    name, bits, package, modules = "zero", 4, "torch", ("torch",)

    def prepare(self, weight: torch.Tensor) -> tuple[peers.Layer, int]:
        if weight.shape[0] == 96:
            raise RuntimeError("not this shape")
        return lambda x: torch.zeros(x.shape[0], weight.shape[0]), weight.nbytes


def test_a_peer_with_wrong_results_is_not_timed() -> None:
    context, found = tasks.Context(smoke=True, fp16=True, deadline=time.monotonic() + 60), []
    context.emit = found.append
    peers.measure(context, peer=Zero())
    errors = [row for row in found if "error" in row]
    assert [row for row in found if "us" in row] == []
    assert sum("not timed" in row["error"] for row in errors) == len(kernels.SMOKE_ROWS)
    assert sum("not this shape" in row["error"] for row in errors) == 1


def test_a_spent_budget_is_said() -> None:
    for measure in (kernels.measure, lambda c: peers.measure(c, peer=peers.Cublas())):
        context, found = tasks.Context(smoke=True, fp16=True, deadline=time.monotonic() - 1), []
        context.emit = found.append
        measure(context)
        assert found[-1]["not_reached"]
        assert report._not_reached(found)


def test_rounding_to_a_grid_passes_the_check_of_a_peer() -> None:
    torch.manual_seed(0)
    weight, x = torch.rand(32, 256) * 2 - 1, torch.randn(8, 256)
    for highest in (7, 15):
        q, scale, zero = peers.round_to_grid(weight, highest)
        assert int(q.min()) == 0 and int(q.max()) == highest
        rounded = ((q.view(32, 2, 128) - zero) * scale).view(32, 256)
        assert (rounded - weight).abs().max() <= 0.501 * scale.max() + (7.5 / highest - 0.5) * 1e-6
        assert peers.MIN_COSINE < cosine(x @ rounded.T, x @ weight.T) < 0.9999


def test_bitplanes_are_those_of_any_precision() -> None:
    """As any_precision/quantization/pack.py packs: bits of a plane in order, then its bytes permuted by thread."""
    torch.manual_seed(0)
    for k in (1024, 2048, 1024 + 96):
        q = torch.randint(0, 8, (3, k), dtype=torch.uint8)
        words = peers.pack_bitplanes(q, 3)
        assert words.shape == (3, 3, k // 32) and words.dtype == torch.int32
        for plane in range(3):
            bits = (q >> (2 - plane)) & 1
            packed = (bits.view(3, k // 8, 8) << (7 - torch.arange(8))).sum(-1)  # np.packbits
            expected = torch.empty_like(packed)
            for start in range(0, k // 8, 128):
                threads = min(128, k // 8 - start) // 4
                for i in range(4 * threads):
                    place = (i // threads) ^ 3  # the byte of the thread's little-endian word
                    expected[:, start + i % threads * 4 + place] = packed[:, start + i]
            got = words[plane].contiguous().view(torch.uint8).view(3, k // 8)
            assert torch.equal(got.long(), expected)


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
                        {**at, "packed_bytes": 8_000_000, "linear": timed(10.0), "ours_bf16": timed(4.0)},
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
