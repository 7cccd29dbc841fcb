"""Beds: a small vision-language model and its questions, in training, validation and test.

Nothing is chosen on test questions: hyperparameters go by the validation images, the last ones of the training images,
which no calibration sees.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mbq_ao.demo.data import IGNORE, VqaRow, calibration_batches, group_by_image, load_easy_vqa
from mbq_ao.demo.model import WEIGHTS, build_demo_vlm

VALIDATION_SHARE = 0.1
TEXT_WINDOWS, TEXT_TOKENS = 8, 256


@dataclass(frozen=True)
class Bed:
    """weights: of the trained part. load: "train" or "test" -> rows."""

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

    def calibration(
        self, processor: LlavaProcessor, samples: int, seed: int, texts: int = 0
    ) -> list[dict[str, Tensor]]:
        """Batches: pairs of image and question, and so many samples of plain text beside them."""
        pairs = calibration_batches(processor, self.rows("train"), num_samples=samples, seed=seed)
        return padded_batches(pairs) + padded_batches(plain_samples(processor, texts, seed))


BEDS = {
    "shapes": Bed("shapes", WEIGHTS, load_easy_vqa),
}


def padded_batches(samples: list[dict[str, Tensor]], size: int = 8) -> list[dict[str, Tensor]]:
    """Of samples that are one row each: `size` in a batch, those of similar length together, padded on the right."""
    samples = sorted(samples, key=lambda sample: sample["input_ids"].shape[1])
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}

    def joined(part: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        rows = {name: [sample[name][0] for sample in part] for name in part[0]}
        return {
            name: pad_sequence(values, batch_first=True, padding_value=fill[name])
            if name in fill
            else torch.stack(values)
            for name, values in rows.items()
        }

    return [joined(samples[i : i + size]) for i in range(0, len(samples), size)]


def plain_samples(processor: LlavaProcessor, number: int, seed: int) -> list[dict[str, Tensor]]:
    """(1, TEXT_TOKENS) tokens each of numpy's docstrings, all of them labels."""
    texts = [inspect.getdoc(getattr(np, name)) or "" for name in sorted(np.__all__)]
    tokens = torch.tensor(processor.tokenizer.encode("\n\n".join(texts)))
    starts = random.Random(seed).sample(range(0, len(tokens) - TEXT_TOKENS, TEXT_TOKENS), number)
    ids = [tokens[None, start : start + TEXT_TOKENS] for start in starts]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i} for i in ids]


def plain_text(processor: LlavaProcessor) -> Tensor:
    """(TEXT_WINDOWS, TEXT_TOKENS) tokens of the Python language reference, as every Python brings it along."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = processor.tokenizer.encode(text)
    starts = random.Random(0).sample(range(0, len(tokens) - TEXT_TOKENS, TEXT_TOKENS), TEXT_WINDOWS)
    return torch.tensor([tokens[start : start + TEXT_TOKENS] for start in starts])
