"""easy-VQA as rows of (image, question, answer), and calibration batches in the form a processor returns them.

easy-VQA (PyPI `easy-vqa`) has 4,000 train and 1,000 test images of 64x64 pixels, one coloured shape each, with
38,575 and 9,673 questions (107 distinct texts) and 13 answers.  Guessing from the question alone gives about 67%.
About nine questions share an image, so the questions of one image are not independent draws: evaluate.py's standard
error and calibration_batches' choice of rows both go by image.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from mbq_ao.calibration.conversations import Conversation
from mbq_ao.calibration.labels import encode, render
from mbq_ao.demo.model import package_directory

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
IGNORE = -100  # the label torch.nn.functional.cross_entropy skips


@dataclass(frozen=True)
class VqaRow:
    """One question about one image; rows of the same image_id hold the same image object."""

    image: Image.Image
    question: str
    answer: str
    image_id: int


def load_easy_vqa(split: str) -> list[VqaRow]:
    """All rows of split "train" or "test", in the order of the package.  Raises ImportError without easy-vqa."""
    package_directory("easy_vqa", "easy-vqa")
    import easy_vqa

    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    questions, answers, image_ids = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    images = {}
    for image_id, path in paths.items():
        with Image.open(path) as file:
            images[image_id] = file.convert("RGB")
    return [VqaRow(images[i], q, a, i) for q, a, i in zip(questions, answers, image_ids, strict=True)]


def group_by_image(rows: Sequence[VqaRow]) -> list[list[VqaRow]]:
    """Rows of one image together, images and rows in order of first appearance."""
    groups: dict[int, list[VqaRow]] = {}
    for row in rows:
        groups.setdefault(row.image_id, []).append(row)
    return list(groups.values())


def chat_messages(question: str, answer: str | None = None) -> list[dict[str, Any]]:
    """One user turn of image and question, and the assistant's turn if an answer is given."""
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    if answer is None:
        return [user]
    return [user, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def prompt_parts(processor: ProcessorMixin, row: VqaRow) -> tuple[str, list[int], list[int]]:
    """The prompt's text up to and with its image, the token ids of the rest of the prompt, and those of the reply.

    For processors whose chat template renders an image as the one special token `processor.image_token`, after which
    tokenization starts afresh.  The reply is the answer and the end-of-turn token.
    """
    tokenizer = processor.tokenizer
    prompt = processor.apply_chat_template(chat_messages(row.question), add_generation_prompt=True)
    head, question = prompt.split(processor.image_token)
    reply = [*tokenizer.encode(row.answer), tokenizer.eos_token_id]
    return head + processor.image_token, tokenizer.encode(question), reply


def labelled_inputs(processor: ProcessorMixin, row: VqaRow) -> dict[str, Tensor]:
    """What the processor returns for image, question and answer (batch of one), plus `labels` (1, T) int64.

    labels[0, t] is input_ids[0, t] where that token is one the model has to generate, the answer and the
    end-of-turn token that closes it, and IGNORE elsewhere; the shift by one is left to the loss, as transformers does.
    Raises ValueError if the chat template's prompt is not a prefix of the whole conversation.
    """
    return encode(processor, render(processor, Conversation(chat_messages(row.question, row.answer), [row.image])))


def calibration_batches(
    processor: ProcessorMixin, rows: Sequence[VqaRow], num_samples: int = 32, seed: int = 0
) -> list[dict[str, Tensor]]:
    """labelled_inputs of one random question from each of num_samples random images.

    Distinct images, because questions of one image would bring the same vision tokens again.  Raises ValueError if
    the rows have fewer images.
    """
    groups = group_by_image(rows)
    if num_samples > len(groups):
        raise ValueError(f"num_samples must be at most the number of distinct images, {len(groups)}, got {num_samples}")
    rng = random.Random(seed)
    return [labelled_inputs(processor, rng.choice(group)) for group in rng.sample(groups, num_samples)]
