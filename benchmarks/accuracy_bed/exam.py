"""The questions of a bed, what the model in full precision answers, and how far another one is from that."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mbq_ao.demo.data import IGNORE, VqaRow, group_by_image
from mbq_ao.demo.packing import PackedBatch, pack, packed_logits
from mbq_ao.evaluation.answers import clustered_standard_error

BATCH = 8  # images at once


def pixels_of(processor: LlavaProcessor, groups: list[list[VqaRow]]) -> Tensor:
    return processor.image_processor([group[0].image for group in groups], return_tensors="pt")["pixel_values"]


@dataclass
class Exam:
    """Questions, several images a batch.

    log_p: of each batch, (labels, V), by the model that is compared with. text: (B, T) tokens of plain text.
    """

    groups: list[list[VqaRow]]
    batches: list[tuple[PackedBatch, Tensor]]
    log_p: list[Tensor]
    end_of_turn: int
    text: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        rows: list[VqaRow],
        num_images: int | None = None,
        text: Tensor | None = None,
    ) -> Exam:
        """num_images: drawn at random, always the same ones; None: all, in order."""
        groups = group_by_image(rows)
        if num_images is not None:
            groups = random.Random(0).sample(groups, num_images)
        parts = [groups[i : i + BATCH] for i in range(0, len(groups), BATCH)]
        batches = [(pack(processor, part), pixels_of(processor, part)) for part in parts]
        log_p = [packed_logits(model, *batch).log_softmax(-1) for batch in batches]
        return cls(groups, batches, log_p, processor.tokenizer.eos_token_id, text)

    @torch.no_grad()
    def take(self, model: LlavaForConditionalGeneration) -> Scores:
        nll, kl, correct = [], [], []
        for (batch, pixels), log_p in zip(self.batches, self.log_p, strict=True):
            log_q, labels = packed_logits(model, batch, pixels).log_softmax(-1), batch.labels[batch.labels != IGNORE]
            # Replies follow one another, each closed by the end of the turn.
            ends = labels == self.end_of_turn
            reply = ends.cumsum(0) - ends.long()
            number = int(ends.sum())

            def by_reply(values: Tensor, reply: Tensor = reply, number: int = number) -> Tensor:
                return torch.zeros(number).index_add_(0, reply, values)

            nll.append(by_reply(F.nll_loss(log_q, labels, reduction="none")))
            kl.append(by_reply((log_p.exp() * (log_p - log_q)).sum(-1)))
            correct.append((by_reply((log_q.argmax(-1) != labels).float()) == 0).float())
        text_nll = None if self.text is None else self._text_nll(model, self.text)
        return Scores(*(torch.cat(x) for x in (nll, kl, correct)), self.image_ids, text_nll)

    @cached_property
    def image_ids(self) -> list[int]:
        return [row.image_id for group in self.groups for row in group]

    def _text_nll(self, model: LlavaForConditionalGeneration, text: Tensor) -> float:
        losses = []
        for part in text.split(BATCH):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1]
            losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"))
        return float(torch.cat(losses).mean())


@dataclass
class Scores:
    """Of each question: NLL of the reply and KL to full precision, in nats a reply, and whether it is right.

    text_nll: nats a token of plain text.
    """

    nll: Tensor
    kl: Tensor
    correct: Tensor
    image_ids: list[int]
    text_nll: float | None = None

    def summary(self) -> dict[str, float]:
        """Means, and their standard errors over the draw of images."""
        found = {}
        for name in ("nll", "kl", "correct"):
            values = getattr(self, name).tolist()
            found[name] = sum(values) / len(values)
            found[f"{name}_se"] = clustered_standard_error(values, self.image_ids)
        return found
