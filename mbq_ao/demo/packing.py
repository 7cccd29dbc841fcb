"""All questions of an image in one training row, equivalent to one prompt a question at a third of the cost.

    [system, <image> x 64 | question 1, reply 1 | question 2, reply 2 | ...]        about 255 instead of 9 x 105 tokens

A question sees the prefix and itself (block mask), and its positions follow the prefix directly, so every logit is
the one that question would get alone in its chat prompt; the test holds it to that.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mbq_ao.demo.data import IGNORE, VqaRow, prompt_parts
from mbq_ao.demo.model import IMAGE_TOKEN, NUM_PATCHES


@dataclass(frozen=True)
class PackedBatch:
    """One row an image, padded on the right to the longest, T.

    ids, position_ids: (B, T) int64.  attention: (B, 1, T, T) float32, 0 where row t may look and the lowest float
    elsewhere.  labels: (B, T) int64, the token that position t has to predict (already shifted), else IGNORE.
    """

    ids: Tensor
    position_ids: Tensor
    attention: Tensor
    labels: Tensor


def pack(processor: LlavaProcessor, groups: list[list[VqaRow]]) -> PackedBatch:
    """Packs the rows of each group, which must share their image."""
    columns: list[tuple[list[int], ...]] = []
    for group in groups:
        parts = [prompt_parts(processor, row) for row in group]
        head = processor.tokenizer.encode(parts[0][0].replace(IMAGE_TOKEN, IMAGE_TOKEN * NUM_PATCHES))
        ids, segments, positions, labels = list(head), [0] * len(head), [*range(len(head))], [IGNORE] * len(head)
        for segment, (_, question, reply) in enumerate(parts, 1):
            length = len(question) + len(reply)
            ids += question + reply
            segments += [segment] * length
            positions += range(len(head), len(head) + length)
            labels += [IGNORE] * (len(question) - 1) + reply + [IGNORE]
        columns.append((ids, segments, positions, labels))
    longest = max(len(ids) for ids, *_ in columns)
    ids_, segments_, positions_, labels_ = (
        torch.tensor([column[k] + [fill] * (longest - len(column[k])) for column in columns])
        for k, fill in enumerate((0, -1, 0, IGNORE))
    )
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    allowed = causal & ((segments_[:, :, None] == segments_[:, None, :]) | (segments_[:, None, :] == 0))
    attention = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return PackedBatch(ids_, positions_, attention[:, None], labels_)


def packed_logits(model: LlavaForConditionalGeneration, batch: PackedBatch, pixels: Tensor) -> Tensor:
    """Logits (number of labels, V) at the labelled positions of `batch`.  pixels: (B, 3, 64, 64)."""
    vision = model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    is_image = (batch.ids == model.config.image_token_id)[..., None]
    hidden = model.model.language_model(
        inputs_embeds=model.get_input_embeddings()(batch.ids).masked_scatter(is_image, torch.cat(list(vision))),
        attention_mask=batch.attention,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[batch.labels != IGNORE])


def packed_loss(model: LlavaForConditionalGeneration, batch: PackedBatch, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean NLL over the tokens of all replies, and which of them are the arg max."""
    logits, labels = packed_logits(model, batch, pixels), batch.labels[batch.labels != IGNORE]
    return F.cross_entropy(logits, labels), logits.argmax(-1) == labels


def similar_batches(groups: list[list[VqaRow]], size: int, rng: random.Random) -> list[list[int]]:
    """One epoch: batches of indices of images with about equally many questions, so that little is padding."""
    order = sorted(rng.sample(range(len(groups)), len(groups)), key=lambda i: len(groups[i]))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    return rng.sample(batches, len(batches))
