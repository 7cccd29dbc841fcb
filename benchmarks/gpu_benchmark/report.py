"""Markdown from the results of benchmarks/gpu.py: a function of the JSON alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

MISSING = "-"
Row = dict[str, Any]
Key = tuple[int, int, int]  # n, k, m


def render(results: dict[str, Any]) -> str:
    """All tables of the parts that ran, then what failed."""
    parts = results["parts"]
    sections = [_about(results)]
    if "gate" in parts:
        sections.append(_gate(results))
    if "kernels" in parts:
        sections.append(_kernels(_rows(parts["kernels"])))
    if "peers" in parts:
        sections.append(_peers(parts["peers"], _rows(parts.get("kernels", []))))
    if "end_to_end" in parts:
        sections.append(_end_to_end(parts["end_to_end"]))
    sections.append(_failures(parts))
    return "\n\n".join(section for section in sections if section) + "\n"


def _about(results: dict[str, Any]) -> str:
    about = results["about"]
    title = "# mbq_ao on a GPU"
    if about.get("smoke"):
        title += (
            "\n\n**Smoke run on a CPU with tiny shapes: it shows that the script works. Its numbers mean nothing.**"
        )
    lines = [f"- {name}: {value}" for name, value in about.items() if name not in ("smoke", "versions")]
    lines.append("- versions: " + ", ".join(f"{k} {v}" for k, v in about["versions"].items()))
    return title + "\n\n" + "\n".join(lines)


def _gate(results: dict[str, Any]) -> str:
    verdict = results["verdict"]
    exact = {
        True: "Tensor cores take fp16 subnormals exactly.",
        False: "Tensor cores do NOT take fp16 subnormals exactly: bf16 is the fallback, and fp16 is not timed.",
        None: "Whether tensor cores take fp16 subnormals exactly is not known: its check failed.",
    }
    lines = [
        "## Correctness gate: " + ("passed" if verdict["passed"] else "FAILED, nothing else is timed"),
        "",
        f"{verdict['cases']} cases against fp64. {exact[verdict['subnormals_exact']]}",
        "",
        *_table(
            ["case", "cases", "wrong", "largest error / bound", "largest rms / bound", "status"],
            [_gate_row(task) for task in results["parts"]["gate"]],
        ),
    ]
    for row in verdict["wrong"]:
        lines.append(f"- wrong: {row}")
    if verdict["failed"]:
        lines.append("- failed: " + ", ".join(verdict["failed"]))
    return "\n".join([*lines, *_not_reached(_rows(results["parts"]["gate"]))])


def _gate_row(task: Row) -> list[str]:
    cases = [row for row in task["rows"] if "worst" in row]
    if not cases:
        return [task["name"], "0", MISSING, MISSING, MISSING, task["status"]]
    wrong = sum(not row["ok"] for row in cases)
    largest = [f"{max(row[name] for row in cases):.2f}" for name in ("worst", "rms")]
    return [task["name"], str(len(cases)), str(wrong), *largest, task["status"]]


def _kernels(rows: list[Row]) -> str:
    bandwidth = next((row["copy_bandwidth"] for row in rows if "copy_bandwidth" in row), None)
    cells = {_key(row): row for row in rows if "linear" in row}
    if not cells or not bandwidth:
        return "\n".join(["## Kernels", "", "Not measured.", *_errors(rows)])
    ms = _ordered(m for _, _, m in cells)
    names = [name for name in ("ours_bf16", "ours_fp16") if any(name in row for row in cells.values())]
    lines = [
        "## Kernels",
        "",
        f"Cold L2, in CUDA graphs, group size 128. Copy bandwidth of this machine: {bandwidth / 1e12:.2f} TB/s.",
    ]

    def grid(title: str, cell: Any, columns: Sequence[int]) -> None:
        shapes = dict.fromkeys((n, k) for n, k, _ in cells)
        body = [[f"{n} x {k}", *(cell(cells.get((n, k, m))) for m in columns)] for n, k in shapes]
        lines.extend(["", f"### {title}", "", *_table(["N x K", *(f"M = {m}" for m in columns)], body)])

    for name in names:
        dtype = name.removeprefix("ours_")
        columns = [m for m in ms if any(name in row for (_, _, at), row in cells.items() if at == m)]
        few = [m for m in columns if m <= 16]

        def share(row: Row | None, name: str = name) -> str:
            if row is None or name not in row:
                return MISSING
            return f"{row['packed_bytes'] / (row[name]['us'] * 1e-6) / bandwidth:.0%}"

        def speed_up(row: Row | None, name: str = name) -> str:
            return MISSING if row is None or name not in row else f"{row['linear']['us'] / row[name]['us']:.2f}x"

        def micros(row: Row | None, name: str = name) -> str:
            return MISSING if row is None or name not in row else _micros(row[name])

        grid(f"{dtype}: packed bytes a second over the copy bandwidth", share, few)
        grid(f"{dtype}: speed-up over bf16 F.linear", speed_up, columns)
        grid(f"{dtype}: microseconds, median (10th to 90th percentile)", micros, columns)
    grid("bf16 F.linear: microseconds, median (10th to 90th percentile)", lambda r: _micros(r and r["linear"]), ms)
    return "\n".join([*lines, *_errors(rows), *_not_reached(rows)])


def _peers(tasks: list[Row], kernel_rows: list[Row]) -> str:
    lines = ["## Beside other kernels", "", *_peer_list(tasks)]
    peers = {task["name"]: {_key(row): row for row in task["rows"] if "us" in row} for task in tasks}
    baseline = {_key(row): row["linear"] for row in kernel_rows if "linear" in row} or peers.get("cuBLAS bf16", {})
    columns: dict[str, dict[Key, Row]] = {
        f"mbq_ao W3 {dtype}": {_key(row): row[f"ours_{dtype}"] for row in kernel_rows if f"ours_{dtype}" in row}
        for dtype in ("bf16", "fp16")
    }
    columns |= {name: rows for name, rows in peers.items() if name != "cuBLAS bf16"}
    columns = {name: rows for name, rows in columns.items() if rows}
    for m in _ordered(m for rows in columns.values() for _, _, m in rows):
        shapes = dict.fromkeys((n, k) for rows in columns.values() for n, k, at in rows if at == m)
        body = []
        for n, k in shapes:
            base = baseline.get((n, k, m))
            timed = [rows.get((n, k, m)) for rows in columns.values()]
            body.append([f"{n} x {k}", _micros(base), *(_against(row, base) for row in timed)])
        lines += ["", f"### M = {m}: speed-up over bf16 F.linear (microseconds)", ""]
        lines += _table(["N x K", "bf16 F.linear", *columns], body)
    for task in tasks:
        lines += _errors(task["rows"], task["name"] + " at ")
    return "\n".join([*lines, *_not_reached(_rows(tasks))])


def _peer_list(tasks: list[Row]) -> list[str]:
    body = []
    for task in tasks:
        about = next((row for row in task["rows"] if "configuration" in row), {})
        state = f"missing: {about['missing']}" if "missing" in about else about.get("version", MISSING)
        if task["status"] != "done":
            state += f"; {task['status']}: {task['reason']}"
        timed = [row for row in task["rows"] if "us" in row]
        if any(not row["graph"] for row in timed):
            state += "; no CUDA graph, so launches from the host are in its times"
        body.append([task["name"], state, about.get("dtype", MISSING), about.get("configuration", ""), str(len(timed))])
    return _table(["kernel", "version", "x", "configuration", "timed"], body)


def _end_to_end(tasks: list[Row]) -> str:
    header = [
        "model", "weights", "tokens/s", "over bf16", "first token (ms)", "of it vision", "of it prompt",
        "decode step (ms)", "weights (GB)", "peak memory (GB)", "decode step runs",
    ]  # fmt: skip
    found = []
    for task in tasks:
        row: Row = {}
        for part in task["rows"]:
            row |= part
        if "tokens_per_s" in row:
            found.append(row)
    bf16 = {row["model"]: row["tokens_per_s"] for row in found if row["precision"] == "bf16"}
    body = []
    for row in found:
        base = bf16.get(row["model"])
        milliseconds = [f"{row[name] * 1e3:.1f}" for name in ("first_token_s", "vision_s", "prompt_s")]
        way = f"torch.compile {row['compile']}" if row["compile"] else "eager"
        body.append([
            f"{row['model']} ({row['prompt_tokens']} + {row['new_tokens']} tokens)", row["precision"],
            f"{row['tokens_per_s']:.1f}", f"{row['tokens_per_s'] / base:.2f}x" if base else MISSING, *milliseconds,
            f"{1e3 / row['tokens_per_s']:.2f}", f"{row['weight_bytes'] / 1e9:.2f}", f"{row['peak_bytes'] / 1e9:.2f}",
            way + (", CUDA graph" if row["graph"] else ""),
        ])  # fmt: skip
    lines = ["## End to end", "", "Random weights, one sequence, greedy, static cache.", "", *_table(header, body)]
    for row in found:
        if not row["same_token_as_eager"]:
            lines.append(f"- {row['model']}, {row['precision']}: this step's first token is not the eager step's")
        for tried in row["tried"]:
            lines.append(
                f"- {row['model']}, {row['precision']}: {tried['mode']}, graph {tried['graph']} failed: "
                f"{_last_line(tried['error'])}"
            )
    for row in found:
        if any("us" in kernel for kernel in row["kernels"]):
            top = [[kernel["name"], str(kernel["calls"]), f"{kernel['us']:.0f}"] for kernel in row["kernels"]]
            lines += ["", f"### Where a decode step goes: {row['model']}, {row['precision']}", ""]
            lines += _table(["kernel", "calls", "microseconds"], top)
    return "\n".join(lines)


def _failures(parts: dict[str, list[Row]]) -> str:
    failed = [(part, task) for part, tasks in parts.items() for task in tasks if task["status"] != "done"]
    if not failed:
        return ""
    same: dict[str, list[str]] = {}
    for part, task in failed:
        detail = (task.get("traceback") or "\n".join(task.get("log", []))).strip()
        shown = "\n".join(["```", *detail.splitlines()[-15:], "```"])
        same.setdefault(f"{task['reason']}\n\n{shown}", []).append(f"{part}, {task['name']} ({task['seconds']} s)")
    lines = ["## What failed"]
    for text, names in same.items():
        lines += ["", f"**{'; '.join(names)}**: {text}"]
    return "\n".join(lines)


def _table(header: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in (header, rule, *body)]


def _rows(tasks: list[Row]) -> list[Row]:
    return [row for task in tasks for row in task["rows"]]


def _key(row: Row) -> Key:
    return row.get("n", 0), row.get("k", 0), row.get("m", 0)


def _ordered(numbers: Iterable[int]) -> list[int]:
    return sorted(set(numbers))


def _micros(timed: Row | None) -> str:
    return MISSING if timed is None else f"{timed['us']:.1f} ({timed['low_us']:.1f} to {timed['high_us']:.1f})"


def _against(timed: Row | None, base: Row | None) -> str:
    if timed is None:
        return MISSING
    return f"{timed['us']:.1f}" if base is None else f"{base['us'] / timed['us']:.2f}x ({timed['us']:.1f})"


def _not_reached(rows: Iterable[Row]) -> list[str]:
    named = [name for row in rows for name in row.get("not_reached", [])]
    return ["", "Not reached in the time allowed: " + "; ".join(named) + "."] if named else []


def _errors(rows: Iterable[Row], prefix: str = "") -> list[str]:
    """A line for every row that is an error, in the order they came in."""
    lines = []
    for row in rows:
        if "error" in row:
            at = f"{row['n']} x {row['k']}" + (f", M = {row['m']}" if "m" in row else "")
            lines.append(f"- {prefix}{at}: {_last_line(row['error'])}")
    return ["", *lines] if lines else []


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:300]
