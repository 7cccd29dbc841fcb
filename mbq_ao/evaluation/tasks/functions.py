"""What the YAML files of this folder call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet


def _load(name: str) -> dict[str, datasets.Dataset]:
    # Not datasets.load_dataset: that copies the file to a cache, and may ask the network for its loader.
    table = pyarrow.parquet.read_table(Path(__file__).with_name(name))
    return {"test": datasets.Dataset(datasets.table.InMemoryTable(table))}


def easy_vqa(**ignored: Any) -> dict[str, datasets.Dataset]:
    return _load("easy_vqa.parquet")


def text(**ignored: Any) -> dict[str, datasets.Dataset]:
    return _load("text.parquet")


def images(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def answer_nll(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """nll: -log p(answer) in nats, all its tokens; acc: whether each of them is the arg max given those before it."""
    ((loglikelihood, is_greedy),) = results
    return {"nll": -loglikelihood, "acc": float(is_greedy)}
