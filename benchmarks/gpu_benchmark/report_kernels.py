"""The kernels, the cuts and the peers in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpu_benchmark.shapes import MAX_ROWS_DECODING
from gpu_benchmark.tables import MISSING, Key, Row, against, errors, key, micros, not_reached, ordered, rows_of, table

COLUMNS = ("W3A16 bf16", "W3A16 fp16", "W4A8 bf16")


def kernels(rows: list[Row]) -> str:
    bandwidth = next((row["copy_bandwidth"] for row in rows if "copy_bandwidth" in row), None)
    cells = {key(row): row for row in rows if "linear" in row}
    if not cells or not bandwidth:
        return "\n".join(["## Kernels", "", "Not measured.", *errors(rows)])
    lines = [
        "## Kernels",
        "",
        "Cold L2, in CUDA graphs; W3A16 in groups of 128, W4A8 with one scale a row. "
        f"Copy bandwidth of this machine: {bandwidth / 1e12:.2f} TB/s.",
    ]

    def grid(title: str, cell: Callable[[Row], str], name: str, columns: Sequence[int]) -> None:
        if not columns:
            return
        body = [
            [f"{n} x {k}", *(cell(row) if (row := cells.get((n, k, m))) and name in row else MISSING for m in columns)]
            for n, k in dict.fromkeys((n, k) for n, k, _ in cells)
        ]
        lines.extend(["", f"### {title}", "", *table(["N x K", *(f"M = {m}" for m in columns)], body)])

    for name in COLUMNS:
        ms = ordered(m for (_, _, m), row in cells.items() if name in row)
        few, many = ([m for m in ms if (m <= MAX_ROWS_DECODING) == first] for first in (True, False))
        share = share_of(name, bandwidth)
        grid(f"{name}: packed bytes a second over the copy bandwidth", lambda r, f=share: f"{f(r):.0%}", name, few)
        speed = speed_up_of(name)
        grid(f"{name}: speed-up over bf16 F.linear", lambda r, f=speed: f"{f(r):.2f}x", name, ms)
        grid(f"{name}: TOPS", lambda r, name=name: f"{_tops(r, name):.0f}", name, many)
        title = f"{name}: microseconds, median (10th to 90th percentile)"
        grid(title, lambda r, name=name: micros(r[name]), name, ms)
    ms = ordered(m for _, _, m in cells)
    title = "bf16 F.linear: microseconds, median (10th to 90th percentile)"
    grid(title, lambda r: micros(r["linear"]), "linear", ms)
    return "\n".join([*lines, *_quantizing(rows), *errors(rows), *not_reached(rows)])


def share_of(name: str, bandwidth: float) -> Callable[[Row], float]:
    """Of a row that has the column: packed bytes a second over the copy bandwidth."""
    return lambda row: row[name]["packed_bytes"] / (row[name]["us"] * 1e-6) / bandwidth


def speed_up_of(name: str) -> Callable[[Row], float]:
    """Of a row that has the column: over bf16 F.linear."""
    return lambda row: row["linear"]["us"] / row[name]["us"]


def _tops(row: Row, name: str) -> float:
    return 2 * row["m"] * row["n"] * row["k"] / row[name]["us"] / 1e6


def _quantizing(rows: list[Row]) -> list[str]:
    found = {(row["k"], row["m"]): row["quantize"] for row in rows if "quantize" in row}
    if not found:
        return []
    ms = ordered(m for _, m in found)
    body = [[str(k), *(micros(found.get((k, m))) for m in ms)] for k in ordered(k for k, _ in found)]
    title = "### W4A8: quantizing the tokens alone, microseconds, median (10th to 90th percentile)"
    return ["", title, "", *table(["K", *(f"M = {m}" for m in ms)], body)]


def cuts(rows: list[Row]) -> str:
    """The best cut of each shape and number of rows beside the default one."""
    body, failed = [], []
    for row in rows:
        failed += [f"- {name} at {row['n']} x {row['k']}, M = {row['m']}: failed" for name in row.get("failed", {})]
        if times := row.get("us"):
            best = min(times, key=times.__getitem__)
            default = times.get(row["default"])
            ratio = MISSING if default is None else f"{default / times[best]:.2f}"
            shown = MISSING if default is None else f"{default:.1f}"
            at = [f"{row['n']} x {row['k']}", str(row["m"])]
            body.append([*at, best, f"{times[best]:.1f}", row["default"], shown, ratio])
    header = ["N x K", "M", "best cut", "microseconds", "default cut", "microseconds", "default / best"]
    lines = ["## Cuts of the W4A8 kernel", "", "block_n x block_m x columns of a step; one scale a row, bf16.", ""]
    lines += [*table(header, body)] if body else ["Not measured."]
    return "\n".join([*lines, *(["", *failed] if failed else []), *not_reached(rows)])


def peers(tasks: list[Row], kernel_rows: list[Row]) -> str:
    lines = ["## Beside other kernels", "", *_peer_list(tasks)]
    peers = {task["name"]: {key(row): row for row in task["rows"] if "us" in row} for task in tasks}
    baseline = {key(row): row["linear"] for row in kernel_rows if "linear" in row} or peers.get("cuBLAS bf16", {})
    columns: dict[str, dict[Key, Row]] = {
        f"mbq_ao {name}": {key(row): row[name] for row in kernel_rows if name in row} for name in COLUMNS
    }
    columns |= {name: rows for name, rows in peers.items() if name != "cuBLAS bf16"}
    columns = {name: rows for name, rows in columns.items() if rows}
    for m in ordered(m for rows in columns.values() for _, _, m in rows):
        of_peers = [rows for name, rows in columns.items() if not name.startswith("mbq_ao")] or [*columns.values()]
        shapes = dict.fromkeys((n, k) for rows in of_peers for n, k, at in rows if at == m)
        if not shapes:
            continue
        body = []
        for n, k in shapes:
            base = baseline.get((n, k, m))
            timed = [rows.get((n, k, m)) for rows in columns.values()]
            body.append([f"{n} x {k}", micros(base), *(against(row, base) for row in timed)])
        lines += ["", f"### M = {m}: speed-up over bf16 F.linear (microseconds)", ""]
        lines += table(["N x K", "bf16 F.linear", *columns], body)
    for task in tasks:
        lines += errors(task["rows"], task["name"] + " at ")
    return "\n".join([*lines, *not_reached(rows_of(tasks))])


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
    return table(["kernel", "version", "x", "configuration", "timed"], body)
