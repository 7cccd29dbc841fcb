"""A conversation as model inputs with labels: where in a processor's tokens the answers are.

The answers are found twice. In the rendered text: by the template's own {% generation %} marks where it has them, else
as what the conversation up to an answer adds to the prompt before it. In the tokens: the processor is run a second time
with every answer replaced by one special token that the text does not have, and what lies around those tokens is found
again in the first run. Both runs see all images, so it does not matter how a processor expands, tiles or resizes them
(LLaVA-OneVision tiles an image only while it is alone), nor whether its tokenizer knows offsets.

Rejected: counting the tokens of the prompt alone (without the later images the earlier ones may expand otherwise), and
transformers' own assistant mask (wrong for processors that expand images in code of their own).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mbq_ao.calibration.batch import IGNORE_INDEX
from mbq_ao.calibration.conversations import BadRow, Conversation

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as the processor's chat template writes it.

    answers: (start, end) of each labelled stretch of `text`, in order and apart from each other.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    images: list[Any]
    videos: list[Any]

    def __add__(self, other: Rendered) -> Rendered:
        """One text after the other; stretches that touch become one."""
        shift = len(self.text)
        answers = list(self.answers)
        for start, end in other.answers:
            if answers and answers[-1][1] == start + shift:
                start = answers.pop()[0] - shift
            answers.append((start + shift, end + shift))
        return Rendered(self.text + other.text, tuple(answers), self.images + other.images, self.videos + other.videos)


def tokenizer_of(processor: Any) -> Any:
    """The processor's tokenizer, or the tokenizer that was passed as a processor of text alone."""
    return getattr(processor, "tokenizer", processor)


def chat_template_of(processor: Any) -> str | None:
    template = getattr(processor, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def render(processor: Any, conversation: Conversation) -> Rendered:
    """Raises BadRow where the template refuses the conversation or does not lead from a prompt to its answer."""
    messages = conversation.messages
    if tokenizer_of(processor) is processor:  # templates of language models take a message's content as one text
        messages = [{**m, "content": _flat(m["content"])} for m in messages]
    template = chat_template_of(processor)
    try:
        if template is not None and _GENERATION.search(template):
            text, answers = _marked_answers(processor, template, messages)
        else:
            text, answers = _added_answers(processor, messages)
    except (ImportError, BadRow):
        raise
    except Exception as error:  # jinja's errors, those that templates raise themselves, and a missing key's
        raise BadRow(f"the chat template refuses the conversation: {type(error).__name__}: {error}") from error
    answers = [answer for answer in (_trimmed(text, *answer) for answer in answers) if answer[1] > answer[0]]
    if not answers:
        raise BadRow("no answer: the chat template writes none of the assistant's turns")
    return Rendered(text, tuple(answers), conversation.images, conversation.videos)


def _flat(content: Any) -> str:
    if isinstance(content, str):
        return content
    if any(part["type"] != "text" for part in content):
        raise BadRow("an image or a video, but a tokenizer was passed as the processor: pass the model's AutoProcessor")
    return "\n".join(part["text"] for part in content)


def _marked_answers(processor: Any, template: str, messages: list[Any]) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, answers = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer_of(processor).special_tokens_map,
    )
    return texts[0], [(start, end) for start, end in answers[0]]


def _added_answers(processor: Any, messages: list[Any]) -> tuple[str, list[tuple[int, int]]]:
    def written(count: int, ask: bool) -> str:
        return processor.apply_chat_template(messages[:count], add_generation_prompt=ask, tokenize=False)

    text, answers = written(len(messages), False), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise BadRow("the conversation begins with an answer: no prompt leads to it")
        prompt = written(index, True)
        if not text.startswith(prompt):
            raise BadRow(
                f"the chat template does not continue its own prompt: turn {index} is asked for after "
                f"{prompt[-40:]!r}, which the whole conversation does not have there"
            )
        # A template may end the last turn otherwise than those before it.
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, written(index + 1, False), strict=False))
        answers.append((len(prompt), max(len(prompt), sum(1 for _ in same))))
    return text, answers


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Without the white space that templates put after a turn; with the blank before it, part of many a first token."""
    end = start + len(text[start:end].rstrip())
    while 0 < start < end and text[start - 1] == " ":
        start -= 1
    return start, end


def encode(processor: Any, rendered: Rendered) -> dict[str, Any]:
    """Everything the processor returns for a batch of one, plus `labels` (1, T) int64, -100 outside the answers.

    Raises BadRow where the processor refuses the row, or where the answers cannot be found in its tokens.
    """
    try:
        inputs = process(processor, rendered, rendered.text)
        if rendered.videos and not hasattr(processor, "video_processor") and not any("video" in key for key in inputs):
            raise BadRow(f"{type(processor).__name__} takes no videos")  # it ignores them, saying nothing
        ids = inputs["input_ids"]
        labels = torch.full_like(ids, IGNORE_INDEX)
        for start, end in _find_answers(processor, rendered, ids[0].tolist()):
            labels[0, start:end] = ids[0, start:end]
    except (ImportError, BadRow):
        raise
    except Exception as error:  # a processor's own, for the number of image tokens, an image's shape, ...
        raise BadRow(f"{type(processor).__name__} refuses the row: {type(error).__name__}: {error}") from error
    return {**inputs, "labels": labels}


def process(processor: Any, rendered: Rendered, text: str) -> dict[str, Any]:
    """What the processor returns for a batch of one: this text with the images and videos of `rendered`."""
    # Nested by conversation: the one layout that every processor takes.
    media = {name: [m] for name, m in (("images", rendered.images), ("videos", rendered.videos)) if m}
    # As processor.apply_chat_template does: a template that writes the first token itself must not get two of them.
    bos = tokenizer_of(processor).bos_token
    options = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
    return dict(processor(text=[text], **media, return_tensors="pt", **options))


def _find_answers(processor: Any, rendered: Rendered, ids: list[int]) -> list[tuple[int, int]]:
    """(start, end) in `ids` of each of the rendered answers."""
    tokenizer = tokenizer_of(processor)
    text, answers = rendered.text, rendered.answers
    mark, mark_id = _unused_token(processor, text, ids)
    edges = [0, *(edge for answer in answers for edge in answer), len(text)]
    between = [text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
    pieces: list[list[int]] = [[]]
    for token in process(processor, rendered, mark.join(between))["input_ids"][0].tolist():
        if token == mark_id:
            pieces.append([])
        else:
            pieces[-1].append(token)
    if len(pieces) != len(answers) + 1 or ids[: len(pieces[0])] != pieces[0]:
        raise BadRow("the tokens of the prompt change with the answer that follows, so the answer cannot be told apart")

    found: list[tuple[int, int]] = []
    start = len(pieces[0])
    for index, (begin, stop) in enumerate(answers):
        piece = pieces[index + 1]
        near = start + len(tokenizer.encode(text[begin:stop], add_special_tokens=False))
        end = _find_piece(ids, piece, start + 1, near, at_end=index == len(answers) - 1)
        if end is None and piece:
            # A tokenizer may begin text after a special token otherwise than text after text.
            piece = piece[1:]
            end = _find_piece(ids, piece, start + 1, near, at_end=index == len(answers) - 1)
        if end is None:
            raise BadRow("the tokens after an answer change with it, so the answer cannot be told apart")
        found.append((start, end))
        start = end + len(piece)
    return found


def _find_piece(ids: Sequence[int], piece: Sequence[int], low: int, near: int, *, at_end: bool) -> int | None:
    """Where `piece` is in `ids`, at or after `low`: at the very end, or as near as can be to `near`."""
    last = len(ids) - len(piece)
    places = range(max(low, last), last + 1) if at_end else range(low, last + 1)
    fits = [i for i in places if ids[i : i + len(piece)] == piece]
    return min(fits, key=lambda i: abs(i - near), default=None)


def _unused_token(processor: Any, text: str, ids: Sequence[int]) -> tuple[str, int]:
    """A special token, and its id, that neither the text nor the tokens have, and that stands for no medium."""
    tokenizer = tokenizer_of(processor)
    media = {getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")}
    seen = set(ids)
    for token in dict.fromkeys([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]):
        token_ids = tokenizer.encode(token, add_special_tokens=False)
        if token not in text and token not in media and len(token_ids) == 1 and token_ids[0] not in seen:
            return token, token_ids[0]
    raise BadRow("the tokenizer has no special token that the conversation does not use, which finding answers needs")
