"""The parts of benchmarks/gpu.py one by one: what the gate lets pass, processes, the clock, shapes and peers."""

import contextlib
import dataclasses
import os
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from gpu_benchmark import adapters, cuts, gate, gate_w3a16, gate_w4a8, kernels, peers, report, shapes, tables, tasks
from gpu_benchmark.gate_bounds import UNIT_ROUNDOFF
from gpu_benchmark.measure import Clock, cosine

import mbq_ao  # noqa: F401  (registers the ops)

CPU = torch.device("cpu")


# --- the gate's arithmetic


BOTH = pytest.mark.parametrize("rules", [gate_w3a16, gate_w4a8], ids=lambda rules: rules.NAME)


def layer(rules: types.ModuleType, m: int, dtype: torch.dtype, group_size: int | None = 128, special: bool = False):
    """A layer, and its exact result in fp64."""
    torch.manual_seed(0)
    made = rules.random_layer(m, 64, 512, group_size, dtype, CPU, special=special, bias=True)
    x = made.x.double()
    if rules is gate_w4a8:
        xq, d = gate_w4a8.quantized_tokens(made)
        x = xq.double() * d.double()
    return made, torch.nn.functional.linear(x, made.weight, made.bias.double())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 32])
def test_gate_passes_the_rounded_result_and_no_other(rules: types.ModuleType, m: int, dtype: torch.dtype) -> None:
    made, exact = layer(rules, m, dtype)
    assert rules.compare(exact.to(dtype), made)["ok"]
    assert not rules.compare((exact * 1.02).to(dtype), made)["ok"]
    for bad in (float("nan"), float("inf")):
        spoiled = exact.to(dtype)
        spoiled[-1, -1] = bad
        assert not rules.compare(spoiled, made)["ok"]


@BOTH
def test_gate_sees_one_wrong_element_and_a_small_error_in_all(rules: types.ModuleType) -> None:
    made, exact = layer(rules, 16, torch.float16)
    one = exact.clone()
    one.view(-1)[one.abs().argmax()] *= 1 + 6 * UNIT_ROUNDOFF[torch.float16]
    found = rules.compare(one.half(), made)
    assert found["worst"] > 1, found
    everywhere = exact + 0.003 * exact.square().mean().sqrt() * torch.randn_like(exact)
    found = rules.compare(everywhere.half(), made)
    assert found["rms"] > 1, found


def test_gate_sees_integers_that_are_wrong_by_one() -> None:
    made, exact = layer(gate_w4a8, 16, torch.float32, group_size=None)
    assert gate_w4a8.compare(exact.float(), made)["ok"]
    _, d = gate_w4a8.quantized_tokens(made)
    found = gate_w4a8.compare((exact + d.double() * made.packed[1].double().t()).float(), made)
    assert found["worst"] > 1 and found["rms"] > 1, found


def test_gate_asks_for_nan_in_the_rows_of_bad_tokens_and_nowhere_else() -> None:
    made, exact = layer(gate_w4a8, 8, torch.bfloat16, group_size=None, special=True)
    y = exact.bfloat16()
    bad = y.isnan().all(1)
    assert bad.sum() == 2 and (made.x == 0).all(1).sum() == 1
    assert gate_w4a8.compare(y, made)["ok"]
    assert torch.equal(made().isnan(), y.isnan())
    for row, value in ((int(bad.nonzero()[0]), 1.0), (int((~bad).nonzero()[0]), float("nan"))):
        spoiled = y.clone()
        spoiled[row, 3] = value
        assert not gate_w4a8.compare(spoiled, made)["ok"]
    alone = dataclasses.replace(made, x=made.x[bad])
    assert gate_w4a8.compare(y[bad], alone)["ok"] and not gate_w4a8.compare(torch.zeros_like(y[bad]), alone)["ok"]


def result(name: str, *, status: str = "done", ok: bool = True, num_shapes: int = 2, rows: list | None = None) -> dict:
    cases = [{"n": n, "k": 8, "m": m, "worst": 0.1, "ok": ok} for n in range(num_shapes) for m in (1, 2)]
    return {"name": name, "status": status, "rows": cases if rows is None else rows}


def test_verdict() -> None:
    exact = result(gate.TENSOR_CORES, rows=[{"subnormals_exact": True}])
    flushed = result(gate.TENSOR_CORES, rows=[{"subnormals_exact": False}])
    good, bad = result("W3A16 float16 group 32"), result("W3A16 float16 group 32", ok=False)
    bf16, w4a8 = result("W3A16 bfloat16 group 32"), result("W4A8 float16 group 32")
    assert gate.verdict([exact, good, bf16, w4a8])["passed"] == ["W3A16", "W4A8"]
    wrong = gate.verdict([exact, bad, bf16, w4a8])
    assert wrong["passed"] == ["W4A8"] and not wrong["all"]
    assert wrong["precisions"]["W3A16"]["failed"] == ["W3A16 float16 group 32"]
    excused = gate.verdict([flushed, bad, bf16, w4a8])
    assert excused["all"] and not excused["fp16"]
    other = gate.verdict([exact, good, bf16, result("W4A8 float16 group 32", ok=False)])
    assert other["passed"] == ["W3A16"] and not other["all"]
    for failing in (
        [flushed, good, result("W3A16 bfloat16 group 32", ok=False)],
        [exact, result("W3A16 float16 group 32", status="failed"), bf16],
        [exact, result("W3A16 float16 group 32", num_shapes=1), bf16],
        [exact],
    ):
        assert "W3A16" not in gate.verdict(failing)["passed"]


def test_a_cut_that_does_not_run_is_named_and_stops_nothing() -> None:
    broken = result("W4A8 cuts 1 of 4")
    broken["rows"].append({"n": 1, "k": 8, "m": 1, "cut": "the broken one", "error": "OutOfResources: too much"})
    found = gate.verdict([broken, result("W3A16 bfloat16 group 32")])
    assert found["passed"] == ["W3A16", "W4A8"] and found["not_run"] == ["the broken one"] and not found["all"]


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
    assert set(shapes.SEVEN_B) <= set(shapes.peer_shapes()) <= set(found) and set(shapes.CUT_SHAPES) <= set(found)


def test_decoding_is_measured_for_every_shape_before_prefill_is_for_any() -> None:
    plan = shapes.in_two_passes([(1, 2), (3, 4)], [1, 16, 64, 512])
    assert plan == [((1, 2), [1, 16]), ((3, 4), [1, 16]), ((1, 2), [64, 512]), ((3, 4), [64, 512])]
    assert shapes.in_two_passes([(1, 2)], [1]) == [((1, 2), [1])]
    assert shapes.names(plan[:1]) == ["1 x 2, M = 1, 16"]


class Zero(adapters.Peer):
    name, bits, package, modules = "zero", 4, "torch", ("torch",)

    def prepare(self, weight: torch.Tensor) -> tuple[adapters.Layer, int]:
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
    for measure in (kernels.measure, cuts.measure, lambda c: peers.measure(c, peer=adapters.Cublas())):
        context, found = tasks.Context(smoke=True, fp16=True, deadline=time.monotonic() - 1), []
        context.emit = found.append
        measure(context)
        assert found[-1]["not_reached"]
        assert tables.not_reached(found)


def test_rounding_to_a_grid_passes_the_check_of_a_peer() -> None:
    torch.manual_seed(0)
    weight, x = torch.rand(32, 256) * 2 - 1, torch.randn(8, 256)
    for highest in (7, 15):
        q, scale, zero = adapters.round_to_grid(weight, highest)
        assert int(q.min()) == 0 and int(q.max()) == highest
        rounded = ((q.view(32, 2, 128) - zero) * scale).view(32, 256)
        assert (rounded - weight).abs().max() <= 0.501 * scale.max() + (7.5 / highest - 0.5) * 1e-6
        assert peers.MIN_COSINE < cosine(x @ rounded.T, x @ weight.T) < 0.9999


def test_bitplanes_are_those_of_any_precision() -> None:
    """As any_precision/quantization/pack.py packs: bits of a plane in order, then its bytes permuted by thread."""
    torch.manual_seed(0)
    for k in (1024, 2048, 1024 + 96):
        q = torch.randint(0, 8, (3, k), dtype=torch.uint8)
        words = adapters.pack_bitplanes(q, 3)
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
