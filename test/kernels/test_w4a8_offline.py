"""The W4A8 kernels, compiled for real GPUs on a machine that may have none."""

import pytest
from offline import report


@pytest.fixture(scope="module")
def everything() -> list[dict]:
    return report("w4a8_sass_report.py", "--quick")


@pytest.fixture
def rows(everything: list[dict]) -> list[dict]:
    return [row for row in everything if "config" in row]


def test_all_generations_are_compiled(rows: list[dict]) -> None:
    assert {row["arch"] for row in rows} == {80, 89, 90, 100, 120}
    assert len(rows) == 50


def test_nothing_spills(everything: list[dict]) -> None:
    assert [row for row in everything if row["spills"] or row.get("stack")] == []


def test_the_integer_tensor_instruction_of_each_generation(rows: list[dict]) -> None:
    # With slices of K the dot product is three-dimensional, and Triton has mma.sync for it on every GPU.
    best = {80: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "UTCIMMA", 120: "IMMA"}
    for row in rows:
        name = best[row["arch"]] if row["config"]["slices"] == 1 else "IMMA"
        assert list(row["tensor_core"]) == [name], row


def test_weights_reach_tensor_cores_from_registers(rows: list[dict]) -> None:
    for row in rows:
        if "UTCIMMA" not in row["tensor_core"]:  # tcgen05 takes A from shared or tensor memory
            assert row["wide_stores"] == 0, row
            assert row["weights_in_registers"], row


def test_packed_weights_and_tokens_are_loaded_by_16_bytes(rows: list[dict]) -> None:
    for row in rows:
        narrow = [name for name in row["loads"] if ".128" not in name]
        assert len(narrow) < len(row["loads"]), row
        # 32 columns of 32 tokens are 8 bytes a thread, and 64 columns of a token, quantized on the way, 4.
        assert not narrow or row["group"] == 32 or row["config"]["fused"], row


def test_instructions_a_weight_are_within_what_memory_leaves_time_for(rows: list[dict]) -> None:
    # Triton 3.9: 1.2 to 2.1 with one scale a row and few tokens, 0.28 of it unpacking. With many tokens, time goes into
    # dot products, and only Hopper's are few enough to be worth a number.
    for row in rows:
        config = row["config"]
        if row["group"] == 0 and config["block_m"] <= 16:
            # 110 instructions a step, with their share of the weights: 0.9 or 1.7 a weight.
            most = 2.15 if not config["fused"] else 2.05 if config["block_n"] == 64 else 3.15
            assert row["per_weight"] <= most, row
            # On a B200 the small fused programs are above it; there the other ones serve all but the smallest layers.
            assert row["per_weight"] <= row["budget"] or (row["arch"], config["block_n"]) == (100, 32), row
            assert row["unpack"] <= 0.3 or config["fused"], row
        elif row["arch"] == 90 and row["group"] == 0:
            assert row["per_weight"] <= 2.3, row


def test_quantizing_tokens(everything: list[dict]) -> None:
    tokens = [row for row in everything if "quantize" in row]
    assert len(tokens) == 5
    for row in tokens:
        assert list(row["loads"]) == ["LDG.E.128"], row
        assert row["per_element"] <= 32, row  # the branch for tokens that are not finite included
