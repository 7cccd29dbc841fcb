"""The questions of a bed, what the model in full precision answers, and how far another one is from that."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mbq_ao.demo.data import IGNORE, VqaRow, group_by_image
from mbq_ao.demo.packing import PackedBatch, pack, packed_logits
from mbq_ao.evaluation.answers import clustered_standard_error

BATCH = 8  # images at once
MEASURES = ("nll", "kl", "correct", "cosine")


class Questions(Protocol):
    """Some questions with their replies, L tokens in all.

    labels: (L,) the tokens of the replies.  reply: (L,) to which reply each belongs.  image_ids: of each reply, the
    image that it is about.
    """

    labels: Tensor
    reply: Tensor
    image_ids: list[int]

    def logits(self, model: Any) -> Tensor:
        """(L, V), where the tokens of the replies are predicted."""


@dataclass
class PackedQuestions:
    """About a few images of the demo model's; an image and all that is asked about it make a row."""

    batch: PackedBatch
    pixels: Tensor
    labels: Tensor
    reply: Tensor
    image_ids: list[int]

    def logits(self, model: LlavaForConditionalGeneration) -> Tensor:
        return packed_logits(model, self.batch, self.pixels)


@dataclass
class ConversationQuestions:
    """One conversation, a batch of one; all its replies count as one.  places: (L,) where they are predicted."""

    inputs: dict[str, Tensor]
    places: Tensor
    labels: Tensor
    reply: Tensor
    image_ids: list[int]

    def logits(self, model: Any) -> Tensor:
        moved = {name: value.to(model.device) for name, value in self.inputs.items()}
        return model(**moved, use_cache=False).logits[0, self.places.to(model.device)]


def pixels_of(processor: LlavaProcessor, groups: list[list[VqaRow]]) -> Tensor:
    return processor.image_processor([group[0].image for group in groups], return_tensors="pt")["pixel_values"]


def packed_questions(
    processor: LlavaProcessor, rows: list[VqaRow], num_images: int | None = None
) -> list[PackedQuestions]:
    """num_images: drawn at random, always the same ones; None: all, in order."""
    groups = group_by_image(rows)
    if num_images is not None:
        groups = random.Random(0).sample(groups, num_images)
    found = []
    for i in range(0, len(groups), BATCH):
        part = groups[i : i + BATCH]
        batch = pack(processor, part)
        labels = batch.labels[batch.labels != IGNORE]
        # Replies follow one another, each closed by the end of the turn.
        ends = (labels == processor.tokenizer.eos_token_id).long()
        image_ids = [row.image_id for group in part for row in group]
        found.append(PackedQuestions(batch, pixels_of(processor, part), labels, ends.cumsum(0) - ends, image_ids))
    return found


def conversation_questions(batches: Iterable[dict[str, Tensor]]) -> list[ConversationQuestions]:
    """Of batches of one conversation each, as `mbq_ao.calibration_data` makes them."""
    found = []
    for index, batch in enumerate(batches):
        labels = batch["labels"][0, 1:]
        places = (labels != IGNORE).nonzero().flatten()
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        found.append(ConversationQuestions(inputs, places, labels[places], torch.zeros_like(places), [index]))
    return found


@dataclass
class Exam:
    """expected: of each part, logits (L, V) fp32 by the model that others are compared with.

    text: (B, T) tokens of plain text, or None.
    """

    parts: Sequence[Questions]
    expected: list[Tensor]
    text: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, parts: Sequence[Questions], text: Tensor | None = None) -> Exam:
        return cls(parts, [part.logits(model).float().cpu() for part in parts], text)

    @torch.no_grad()
    def take(self, model: nn.Module) -> Scores:
        found: dict[str, list[Tensor]] = {name: [] for name in MEASURES}
        for part, expected in zip(self.parts, self.expected, strict=True):
            logits = part.logits(model).float().cpu()
            log_p, log_q = expected.log_softmax(-1), logits.log_softmax(-1)
            number = torch.bincount(part.reply).float()

            def by_reply(values: Tensor, reply: Tensor = part.reply, size: int = len(number)) -> Tensor:
                return torch.zeros(size).index_add_(0, reply, values)

            found["nll"].append(by_reply(F.nll_loss(log_q, part.labels, reduction="none")))
            found["kl"].append(by_reply((log_p.exp() * (log_p - log_q)).sum(-1)))
            found["correct"].append((by_reply((log_q.argmax(-1) != part.labels).float()) == 0).float())
            found["cosine"].append(by_reply(F.cosine_similarity(logits, expected, dim=-1)) / number)
        image_ids = [i for part in self.parts for i in part.image_ids]
        text_nll = None if self.text is None else self._text_nll(model, self.text)
        return Scores(*(torch.cat(found[name]) for name in MEASURES), image_ids, text_nll)

    def _text_nll(self, model: Any, text: Tensor) -> float:
        losses = []
        for part in text.to(model.device).split(BATCH):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
            losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"))
        return float(torch.cat(losses).mean())


@dataclass
class Scores:
    """Of each reply: NLL and KL to full precision, in nats, whether it is right token by token, and the mean cosine
    between its logits and those of full precision.

    text_nll: nats a token of plain text.
    """

    nll: Tensor
    kl: Tensor
    correct: Tensor
    cosine: Tensor
    image_ids: list[int]
    text_nll: float | None = None

    def summary(self) -> dict[str, float]:
        """Means, and their standard errors over the draw of images."""
        found = {}
        for name in MEASURES:
            values = getattr(self, name).tolist()
            found[name] = sum(values) / len(values)
            found[f"{name}_se"] = clustered_standard_error(values, self.image_ids)
        return found
