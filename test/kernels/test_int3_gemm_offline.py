"""The kernel for many rows of x, compiled for real GPUs on a machine that may have none."""

import pytest
from offline import report


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return report("gemm_sass_report.py", "--quick")


def test_all_generations_are_compiled(rows: list[dict]) -> None:
    assert {row["arch"] for row in rows} == {80, 89, 90, 100, 120}
    assert len(rows) == 15


def test_nothing_spills(rows: list[dict]) -> None:
    assert [row for row in rows if row["spills"] or row["stack"]] == []


def test_the_tensor_instruction_of_each_generation(rows: list[dict]) -> None:
    # With slices of K the dot product is three-dimensional, and Triton has mma.sync for it on every GPU.
    best = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
    for row in rows:
        name = best[row["arch"]] if row["config"]["slices"] == 1 else "HMMA"
        assert list(row["tensor_core"]) == [name], row


def test_weights_reach_tensor_cores_from_registers(rows: list[dict]) -> None:
    # Of what is stored to shared memory in the loop, 16 wide stores a thread would be the weights: 128 of 16 bits.
    for row in rows:
        if row["arch"] == 100 and row["config"]["slices"] == 1:
            continue  # tcgen05 takes A from shared or tensor memory, and Triton 3.9 chooses the former
        of_x = row["config"]["block_m"] // 8 if "HGMMA" in row["tensor_core"] else 0
        assert of_x <= row["wide_stores"] <= of_x + 1, row  # one of scales
        assert row["weights_in_registers"], row


def test_packed_weights_and_x_are_loaded_by_16_bytes(rows: list[dict]) -> None:
    for row in rows:
        assert all(".128" in name for name in row["loads"]), row
        config = row["config"]
        of_x = config["block_m"] * config["slices"] // (2 * config["num_warps"])
        assert sum(row["loads"].values()) == 3 + of_x, row  # a plane each


def test_instructions_a_weight(rows: list[dict]) -> None:
    # Triton 3.9: 3.3 in the cut for few rows, on Hopper 3.1 with 64 rows of x and, in groups of 32, 4.5 with 128. Its
    # tensor cores take 512 and 1,024 cycles for a step, and a scheduler issues one warp's 390 and 570 instructions.
    on_hopper = {0: 3.4, 2: 3.2, -1: 4.6}
    for row in rows:
        if row["arch"] == 90:
            assert row["per_weight"] <= on_hopper[row["cut"]], row
        if row["arch"] != 100:  # whose loop has branches that are not taken
            assert row["dequantize"] <= 2.4, row
