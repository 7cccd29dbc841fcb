"""A process a task: a crash, a hang or a broken CUDA context costs that task and nothing else.

The parent never touches CUDA. It forks a child for each task (imports are shared, a fork is cheap), and the child
appends what it measured to a file, line by line, so that a child that is killed leaves everything up to there.

Tasks of a group run one after another; or together, where only correctness is asked; or are prepared together and
measured one at a time (`context.wait_for_turn()` ends the preparation), where compiling takes longer than measuring.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_FORK = multiprocessing.get_context("fork")
LOG_LINES = 30
GRACE = 5.0  # seconds


@dataclass
class Context:
    """What a task is given: where to compute, and where its results go."""

    smoke: bool
    fp16: bool  # whether the fp16 path passed the gate
    precisions: tuple[str, ...] = ("W3A16", "W4A8")  # that passed the gate
    deadline: float = 0.0  # of `time.monotonic`
    emit: Callable[[dict[str, Any]], None] = lambda row: None
    wait_for_turn: Callable[[], None] = lambda: None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.smoke else "cuda")

    def remaining(self) -> float:
        """Seconds left of the task's budget."""
        return self.deadline - time.monotonic()


@dataclass
class Task:
    """`run(context)` emits rows; `seconds` is its budget, after which it is killed."""

    name: str
    run: Callable[[Context], None]
    seconds: float


class _Child:
    def __init__(self, task: Task, context: Context, prepare_seconds: float) -> None:
        self.task, self.began = task, time.monotonic()
        self.folder = tempfile.TemporaryDirectory(prefix="gpu_benchmark_")
        self.rows, self.log = (Path(self.folder.name) / name for name in ("rows", "log"))
        self.rows.touch()
        # A pipe and no multiprocessing.Event: setting one that a killed process waited for never returns.
        self.here, self.there = _FORK.Pipe()
        self.killed = ""
        deadline = self.began + prepare_seconds + task.seconds
        self.process = _FORK.Process(target=self._run, args=(context, deadline))
        self.process.start()

    def _run(self, context: Context, deadline: float) -> None:
        os.setsid()  # so that a kill reaches compilers it started as well
        gc.freeze()  # each capture of a CUDA graph collects garbage: not over everything that was imported
        log = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)  # what compilers print
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
        rows = self.rows.open("a", encoding="utf-8")

        def emit(row: dict[str, Any]) -> None:
            rows.write(json.dumps(row) + "\n")
            rows.flush()

        def wait_for_turn() -> None:
            self.there.send("ready")
            self.there.recv()
            context.deadline = time.monotonic() + self.task.seconds

        context.deadline, context.emit, context.wait_for_turn = deadline, emit, wait_for_turn
        code = 0
        try:
            self.task.run(context)
        except BaseException:
            emit({"traceback": traceback.format_exc()})
            code = 1
        sys.stdout.flush()
        os._exit(code)

    def alive(self) -> bool:
        return self.process.is_alive()

    def ready(self) -> bool:
        """Whether it waits for its turn, has had it, or is dead."""
        return self.here.poll() or not self.alive()

    def go(self) -> None:
        """Let it have its turn."""
        with contextlib.suppress(OSError):  # it is dead
            self.here.send("go")

    def join(self, seconds: float) -> None:
        """Wait for its end, at most so long, then kill it."""
        self.process.join(max(seconds, 0.0))
        if self.process.is_alive():
            self.kill(f"killed: not done after {seconds:.0f} s" if seconds > 0 else "killed: no time left for its turn")

    def kill(self, reason: str) -> None:
        self.killed = reason
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # before its setsid, or gone
            self.process.kill()
        self.process.join()

    def result(self) -> dict[str, Any]:
        """Name, status, seconds, rows; and for anything but success the reason, the traceback and the log's end."""
        rows, error = [], None
        for line in self.rows.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # killed while writing
                continue
            if "traceback" in row:
                error = row["traceback"]
            else:
                rows.append(row)
        result: dict[str, Any] = {
            "name": self.task.name,
            "status": "done",
            "seconds": round(time.monotonic() - self.began, 1),
            "rows": rows,
        }
        if self.killed or error or self.process.exitcode:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
            result |= {
                "status": "failed",
                "reason": self.killed or (error or f"exit code {self.process.exitcode}").strip().splitlines()[-1],
                "traceback": error,
                "log": lines[-LOG_LINES:],
            }
        self.folder.cleanup()
        return result


def run_one_by_one(tasks: Sequence[Task], context: Context, seconds: float) -> list[dict[str, Any]]:
    """One after another; a result each. Those that `seconds` do not reach are named in the results."""
    deadline = time.monotonic() + seconds
    results = []
    for task in tasks:
        left = deadline - time.monotonic()
        if left <= 0:
            results.append({"name": task.name, "status": "failed", "seconds": 0.0, "rows": []})
            results[-1]["reason"] = "no time was left to start it"
            continue
        results += run_together([Task(task.name, task.run, min(task.seconds, left))], context)
    return results


def run_together(tasks: Sequence[Task], context: Context) -> list[dict[str, Any]]:
    """All at once, where only correctness is asked and nothing is timed; a result each."""
    children = [_Child(task, context, 0.0) for task in tasks]
    try:
        for child in children:
            child.go()
        for child in children:  # a task that watches its budget ends by itself
            child.join(child.began + child.task.seconds + GRACE - time.monotonic())
        return [child.result() for child in children]
    finally:
        _end(children)


def run_in_turns(tasks: Sequence[Task], context: Context, prepare: float, seconds: float) -> list[dict[str, Any]]:
    """All get ready at once, within `prepare` seconds, then each has its turn alone; a result each.

    seconds: for all the turns.
    """
    children = [_Child(task, context, prepare) for task in tasks]
    try:
        until = time.monotonic() + prepare
        while time.monotonic() < until and not all(child.ready() for child in children):
            time.sleep(0.05)
        for child in children:
            if not child.ready():
                child.kill(f"killed: not ready after {prepare:.0f} s")
        deadline = time.monotonic() + seconds
        for child in children:
            child.go()
            child.join(min(child.task.seconds + GRACE, deadline - time.monotonic()))
        return [child.result() for child in children]
    finally:
        _end(children)


def _end(children: Sequence[_Child]) -> None:
    """Whatever interrupts the parent, no child outlives it."""
    for child in children:
        if child.alive():
            child.kill("killed: the benchmark was interrupted")
