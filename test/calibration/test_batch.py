"""Calibration batches: what goes to the model, and which tokens are vision, answer, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, TEXT_ONLY, VIDEO
from models import NUM_ANSWER_TOKENS, build_batch, build_model
from torch import Tensor

from mbq_ao.calibration.batch import CalibrationBatch, collect_batches
from mbq_ao.calibration.settings import RECIPES, Masks


def collect(family: str, *batches: dict[str, Any]) -> list[CalibrationBatch]:
    return collect_batches(build_model(family), batches)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in TEXT_ONLY])
def test_masks_from_the_config_and_the_labels(family: str) -> None:
    raw = build_batch(family)
    (batch,) = collect(family, raw)
    assert torch.equal(batch.vision, raw["input_ids"] == IMAGE) and batch.vision.any()
    assert torch.equal(batch.answer, raw["labels"] != -100) and batch.answer.sum() == NUM_ANSWER_TOKENS
    assert batch.valid.all() and batch.num_tokens == raw["input_ids"].numel()
    # Everything but the labels goes to the model, untouched.
    assert batch.inputs.keys() == raw.keys() - {"labels", "vision_mask"}
    assert all(torch.equal(batch.inputs[key], raw[key]) for key in batch.inputs)


def test_video_tokens_are_vision_tokens() -> None:
    raw = build_batch("qwen2_vl")
    raw["input_ids"][0, 1] = VIDEO
    (batch,) = collect("qwen2_vl", raw)
    assert batch.vision[0, 1]


def test_padding_is_neither_vision_nor_answer() -> None:
    """Some models pad with their image token."""
    raw = build_batch("llava")
    raw["input_ids"][0, :2] = IMAGE
    raw["attention_mask"][0, :2] = 0
    (batch,) = collect("llava", raw)
    assert batch.valid.tolist()[0][:3] == [False, False, True]
    assert not batch.vision[0, :2].any() and batch.vision.sum() == 4
    del raw["labels"]
    with pytest.warns(UserWarning, match="has no labels"):
        (batch,) = collect("llava", raw)
    assert torch.equal(batch.answer, batch.valid & (raw["input_ids"] != IMAGE))
    assert torch.equal(batch.labels, raw["input_ids"].masked_fill(~batch.answer, -100))


def test_given_masks_override() -> None:
    raw = build_batch("llava")
    raw["vision_mask"], raw["answer_mask"] = (torch.zeros_like(raw["labels"], dtype=torch.bool) for _ in range(2))
    raw["vision_mask"][0, 2] = raw["answer_mask"][0, 5:7] = True
    (batch,) = collect("llava", raw)
    assert batch.vision is raw["vision_mask"] and batch.answer is raw["answer_mask"]
    assert torch.equal(batch.labels, raw["labels"])
    assert not batch.inputs.keys() & {"labels", "vision_mask", "answer_mask"}


def test_a_generator_is_read_once() -> None:
    batches = collect_batches(build_model("llava"), (build_batch("llava", n) for n in (6, 8)))
    assert [b.num_tokens for b in batches] == [12, 14]


def as_mask(text: str) -> Tensor:
    return torch.tensor([[c == "x" for c in text]])


def test_what_counts_in_each_recipe() -> None:
    batch = CalibrationBatch({}, torch.empty(0), as_mask(".xx......"), as_mask("...xx.xx."), as_mask("xxxxxxxx."))
    mbq, paper = (Masks.of([batch], RECIPES[name]) for name in ("mbq", "paper"))
    # An answer token is predicted at the position before it; the last one predicts nothing that has a label.
    assert torch.equal(mbq.answer[0], as_mask("..xx.xx.."))
    assert torch.equal(paper.answer[0], batch.answer)
    assert torch.equal(mbq.counted[0], batch.valid)
    assert paper.counted[0].all()
    assert mbq.vision[0] is paper.vision[0] is batch.vision
