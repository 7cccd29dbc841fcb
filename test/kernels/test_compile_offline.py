"""The shipped kernels, compiled for real GPUs on a machine that may have none: what the interpreter cannot see.

The numbers hold for Triton 3.9 and are allowed 3%, for another ptxas or a repair; the whole table is in
benchmarks/README.md.
"""

import pytest
from offline import report

PER_WEIGHT = {"fp16": 1.25, "bf16": 1.35}  # instructions a weight of the whole kernel, one row of x
ALU = 0.68  # of the pipe of half the rate
LOOP_OF_8_ROWS = 1.45
ALLOWED = 1.03


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return report("sass_report.py", "--gate")


def test_all_generations_are_compiled(rows: list[dict]) -> None:
    one_row = [(row["arch"], row["dtype"]) for row in rows if row["rows"] == 1]
    assert one_row == [(arch, dtype) for arch in (80, 89, 90, 100, 120) for dtype in ("fp16", "bf16")]
    assert [row["arch"] for row in rows if row["rows"] == 8] == [90]


def test_nothing_spills(rows: list[dict]) -> None:
    assert [row for row in rows if row["spills"] or row["stack"]] == []


def test_instructions_a_weight(rows: list[dict]) -> None:
    for row in rows:
        if row["rows"] == 1:
            assert row["per_weight"] <= PER_WEIGHT[row["dtype"]] * ALLOWED, row
            assert row["alu"] <= ALU * ALLOWED, row
            assert row["loop"] is None, row
        else:
            assert row["loop"] <= LOOP_OF_8_ROWS * ALLOWED, row


def test_every_generation_is_below_what_its_memory_allows(rows: list[dict]) -> None:
    for row in rows:
        assert row["per_weight"] < row["budget"], row


def test_weights_are_loaded_ahead_and_go_straight_to_the_tensor_cores(rows: list[dict]) -> None:
    for row in rows:
        # All of a warp's K at one row of x: 8 tiles of 3 planes. Half at eight rows.
        assert row["loads"] == (24 if row["rows"] == 1 else 12), row
        assert row["shared_before_last_dot"] == 0, row
        # 8 tiles of 16 dots and one sum of x, or 4 tiles of 16 dots and 8 for a sum of x each.
        assert row["tensor_core"] == (96 if row["rows"] == 8 else 128 + (8 if row["dtype"] == "fp16" else 16)), row
