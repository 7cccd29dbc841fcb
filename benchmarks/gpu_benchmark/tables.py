"""Pieces of Markdown that the sections of the report share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

MISSING = "-"
Row = dict[str, Any]
Key = tuple[int, int, int]  # n, k, m


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in (header, rule, *body)]


def rows_of(tasks: list[Row]) -> list[Row]:
    return [row for task in tasks for row in task["rows"]]


def key(row: Row) -> Key:
    return row.get("n", 0), row.get("k", 0), row.get("m", 0)


def ordered(numbers: Iterable[int]) -> list[int]:
    return sorted(set(numbers))


def micros(timed: Row | None) -> str:
    return MISSING if timed is None else f"{timed['us']:.1f} ({timed['low_us']:.1f} to {timed['high_us']:.1f})"


def against(timed: Row | None, base: Row | None) -> str:
    if timed is None:
        return MISSING
    return f"{timed['us']:.1f}" if base is None else f"{base['us'] / timed['us']:.2f}x ({timed['us']:.1f})"


def not_reached(rows: Iterable[Row]) -> list[str]:
    named = [name for row in rows for name in row.get("not_reached", [])]
    return ["", "Not reached in the time allowed: " + "; ".join(named) + "."] if named else []


def errors(rows: Iterable[Row], prefix: str = "") -> list[str]:
    """A line for every row that is an error, in the order they came in."""
    lines = []
    for row in rows:
        if "error" in row:
            at = f"{row['n']} x {row['k']}" + (f", M = {row['m']}" if "m" in row else "")
            what = "".join(f"{row[name]}, " for name in ("column", "cut") if name in row)
            lines.append(f"- {prefix}{what}{at}: {last_line(row['error'])}")
    return ["", *lines] if lines else []


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:300]
