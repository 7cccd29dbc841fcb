"""What was asked of W4A8, beside what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpu_benchmark.report_kernels import share_of, speed_up_of
from gpu_benchmark.shapes import SEVEN_B, TARGETS
from gpu_benchmark.tables import MISSING, Row, key, ordered, table

COLUMN = "W4A8 bf16"
MIN_ROWS_PREFILL = 1024
PREFILL, PREFILL_STRETCH = 1.3, 1.6
DECODING_SHAPE, DECODING_SHARE = TARGETS[1], 0.65
FIRST_TOKEN = 1.2
MODEL, PRECISION = "Qwen2.5-VL-7B", "mbq_ao W4A8"  # with an image of 1,500 tokens


def targets(kernel_rows: list[Row], models: list[Row]) -> str:
    """A table; nothing where nothing of it was measured."""
    body = [*_prefill(kernel_rows), *_decoding(kernel_rows), *_first_token(models)]
    if not body:
        return ""
    return "\n".join(["## Targets of W4A8", "", *table(["what", "asked", "measured", "met"], body)])


def models(tasks: Iterable[Row]) -> list[Row]:
    """The rows of each model and precision as one, of those that were timed."""
    found: list[Row] = []
    for task in tasks:
        row: Row = {}
        for part in task["rows"]:
            row |= part
        if "tokens_per_s" in row:
            found.append(row)
    return found


def speed_up(row: Row, models: list[Row], name: str) -> float | None:
    """Of a time of the model over that in bf16."""
    bf16 = (other for other in models if other["model"] == row["model"] and other["precision"] == "bf16")
    return next((other[name] / row[name] for other in bf16), None)


def _prefill(rows: list[Row]) -> list[list[str]]:
    cells = {key(row): row for row in rows if COLUMN in row}
    speed = speed_up_of(COLUMN)
    body = []
    for m in ordered(m for _, _, m in cells if m >= MIN_ROWS_PREFILL):
        found = {f"{n} x {k}": speed(cells[n, k, m]) for n, k in SEVEN_B if (n, k, m) in cells}
        if not found:
            continue
        low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
        measured = f"{found[low]:.2f}x ({low}) to {found[high]:.2f}x ({high})"
        met: Any = "no"
        if found[low] >= PREFILL:
            met = "yes" + (", stretch too" if found[low] >= PREFILL_STRETCH else "")
        if len(found) < len(SEVEN_B):
            measured, met = f"{measured}, {len(found)} of {len(SEVEN_B)}", "not known" if met != "no" else met
        what = f"M = {m}: speed-up over bf16 F.linear at each linear of a 7B decoder"
        body.append([what, f"{PREFILL}x (stretch {PREFILL_STRETCH}x)", measured, met])
    return body


def _decoding(rows: list[Row]) -> list[list[str]]:
    bandwidth = next((row["copy_bandwidth"] for row in rows if "copy_bandwidth" in row), None)
    row = next((row for row in rows if COLUMN in row and key(row) == (*DECODING_SHAPE, 1)), None)
    if not bandwidth or not row:
        return []
    share = share_of(COLUMN, bandwidth)(row)
    n, k = DECODING_SHAPE
    what = f"M = 1, {n} x {k}: packed bytes a second over the copy bandwidth"
    return [[what, f"{DECODING_SHARE:.0%}", f"{share:.0%}", "yes" if share >= DECODING_SHARE else "no"]]


def _first_token(models: list[Row]) -> list[list[str]]:
    row = next((row for row in models if (row["model"], row["precision"]) == (MODEL, PRECISION)), None)
    if not row:
        return []
    found = speed_up(row, models, "first_token_s")
    what = f"{MODEL}, image of {row['image_tokens']} tokens: first token (vision and prompt) over bf16"
    met = "not known" if found is None else "yes" if found >= FIRST_TOKEN else "no"
    return [[what, f"{FIRST_TOKEN}x", MISSING if found is None else f"{found:.2f}x", met]]
