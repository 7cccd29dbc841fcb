"""Beds: a vision-language model and its questions, in training, validation and test.

Nothing is chosen on test questions: hyperparameters go by the validation images, which no calibration sees.
"""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

import mbq_ao
from accuracy_bed.digit_scenes import load_digit_vqa
from accuracy_bed.exam import Questions, conversation_questions, packed_questions
from mbq_ao.calibration.labels import tokenizer_of
from mbq_ao.demo.data import IGNORE, VqaRow, calibration_batches, group_by_image, load_easy_vqa
from mbq_ao.demo.model import WEIGHTS, build_demo_vlm
from mbq_ao.pretrained import load_any

DIGITS_WEIGHTS = Path(__file__).with_name("digits_vlm.safetensors")
NUM_TRAIN_SCENES, NUM_TEST_SCENES = 6000, 1000  # the first as in train_digits.py
VALIDATION_SHARE, TEST_SHARE = 0.1, 0.2
TEXT_WINDOWS, TEXT_TOKENS = 8, 256


@dataclass(frozen=True)
class DemoBed:
    """The demo's small model, its trained part from the file `weights`.  load: "train" or "test" -> rows.

    The last training images are the validation split.
    """

    name: str
    weights: Path
    load: Callable[[str], list[VqaRow]]

    def build(self) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
        return build_demo_vlm(weights=self.weights)

    def rows(self, split: str) -> list[VqaRow]:
        """split: "train", "validation" or "test"; the first two have no image in common."""
        if split == "test":
            return self.load("test")
        groups = group_by_image(self.load("train"))
        cut = int(len(groups) * (1 - VALIDATION_SHARE))
        return [row for group in (groups[:cut] if split == "train" else groups[cut:]) for row in group]

    def questions(self, processor: LlavaProcessor, split: str, num_images: int | None) -> Sequence[Questions]:
        return packed_questions(processor, self.rows(split), num_images)

    def calibration(self, processor: LlavaProcessor, samples: int, seed: int) -> list[dict[str, Tensor]]:
        return padded_batches(calibration_batches(processor, self.rows("train"), num_samples=samples, seed=seed))


@dataclass(frozen=True)
class ConversationBed:
    """Any model by hub id or path, and a JSONL file of conversations as `mbq_ao.calibration_data` takes them.

    A fixed draw of a fifth of the rows is the test split, and of a tenth the validation split.
    """

    model: str
    data: Path
    image_folder: Path | None = None
    device: str | None = None  # such as "cuda", for device_map

    @property
    def name(self) -> str:
        return f"{Path(self.model).name}_{self.data.stem}"

    def build(self) -> tuple[Any, Any]:
        from transformers import AutoConfig

        where = {} if self.device is None else {"device_map": self.device}
        model = load_any(self.model, AutoConfig.from_pretrained(self.model), **where)
        return model, AutoProcessor.from_pretrained(self.model)

    def rows(self, split: str) -> list[Any]:
        """Raises ValueError where a split is left without a row."""
        lines = [line for line in self.data.read_text(encoding="utf-8").splitlines() if line.strip()]
        random.Random(0).shuffle(lines)
        test, validation = (int(len(lines) * share) for share in (TEST_SHARE, VALIDATION_SHARE))
        parts = {
            "test": lines[:test],
            "validation": lines[test : test + validation],
            "train": lines[test + validation :],
        }
        if not all(parts.values()):
            raise ValueError(f"{self.data} has {len(lines)} rows; ten are needed for three splits")
        return [json.loads(line) for line in parts[split]]

    def _batches(self, processor: Any, split: str, number: int | None, seed: int = 0) -> list[dict[str, Tensor]]:
        rows = self.rows(split)
        return mbq_ao.calibration_data(
            rows, processor, n_samples=number or len(rows), seed=seed, image_folder=self.image_folder
        )

    def questions(self, processor: Any, split: str, num_images: int | None) -> Sequence[Questions]:
        return conversation_questions(self._batches(processor, split, num_images))

    def calibration(self, processor: Any, samples: int, seed: int) -> list[dict[str, Tensor]]:
        return self._batches(processor, "train", samples, seed)


def _digit_rows(split: str) -> list[VqaRow]:
    return load_digit_vqa(split, NUM_TRAIN_SCENES if split == "train" else NUM_TEST_SCENES)


Bed = DemoBed | ConversationBed
BEDS = {
    "shapes": DemoBed("shapes", WEIGHTS, load_easy_vqa),
    "digits": DemoBed("digits", DIGITS_WEIGHTS, _digit_rows),
}


def padded_batches(samples: list[dict[str, Tensor]], size: int = 8) -> list[dict[str, Tensor]]:
    """Of samples that are one row each: `size` in a batch, those of similar length together, padded on the right."""
    samples = sorted(samples, key=lambda sample: sample["input_ids"].shape[1])
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
    batches = []
    for start in range(0, len(samples), size):
        part, batch = samples[start : start + size], {}
        for name in part[0]:
            rows = [sample[name][0] for sample in part]
            batch[name] = pad_sequence(rows, True, fill[name]) if name in fill else torch.stack(rows)
        batches.append(batch)
    return batches


def plain_samples(processor: Any, number: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of TEXT_TOKENS tokens a row of numpy's docstrings, all of them labels; `number` rows in all."""
    texts = [inspect.getdoc(getattr(np, name)) or "" for name in sorted(np.__all__)]
    tokens = torch.tensor(tokenizer_of(processor).encode("\n\n".join(texts)))
    starts = random.Random(seed).sample(range(0, len(tokens) - TEXT_TOKENS, TEXT_TOKENS), number)
    ids = [tokens[None, start : start + TEXT_TOKENS] for start in starts]
    return padded_batches([{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i} for i in ids])


def plain_text(processor: Any) -> Tensor:
    """(TEXT_WINDOWS, TEXT_TOKENS) tokens of the Python language reference, as every Python brings it along."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = tokenizer_of(processor).encode(text)
    starts = random.Random(0).sample(range(0, len(tokens) - TEXT_TOKENS, TEXT_TOKENS), TEXT_WINDOWS)
    return torch.tensor([tokens[start : start + TEXT_TOKENS] for start in starts])
