"""Calibration data from what users have: files and datasets of conversations, through the model's own processor.

Rows become conversations in conversations.py and model inputs with labels in labels.py; here they are read, drawn,
joined, and the bad ones counted.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mbq_ao.calibration.conversations import COLUMNS, BadRow, load_media, read_row
from mbq_ao.calibration.labels import Rendered, chat_template_of, encode, render, tokenizer_of

NUM_BETWEEN = 512
"""Text tokens between two pairs in mode "interleave", as in the paper."""

_MODES = ("single", "interleave", "few_shot")
_NAMED_ROWS = 5  # as many bad rows are described; the rest is counted


def calibration_data(
    source: str | os.PathLike[str] | Sequence[Any],
    processor: Any,
    *,
    n_samples: int = 128,
    seed: int = 0,
    image_folder: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
    mode: Literal["single", "interleave", "few_shot"] = "single",
    texts: str | Sequence[str] | None = None,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = False,
) -> list[dict[str, Any]]:
    """What `mbq_config(calib_data)` takes, made of the user's own conversations by the model's own processor.

    Every key that the processor returns is kept; `labels` (1, T) int64 are -100 on all but the answers of the
    assistant and the token that ends each. Batches are of one, and need no padding.

    source: a path to .json or .jsonl, a sequence of rows, or a datasets.Dataset. A row is one of
        {"image": path or list, "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, ...]} (LLaVA,
        ShareGPT4V); a list of chat messages as in transformers, with images as PIL images, paths or URLs, or a row
        {"messages": [...], "images": [...]}; columns {"image", "question", "answer"}. Videos likewise, as a list of
        frames, an array (T, H, W, 3), or a file if the processor reads it. A row without either is text.
    processor: what AutoProcessor.from_pretrained gives for the model. A tokenizer will do for text.
    n_samples: rows to draw, in random order. Joined, two of them make one batch.
    seed: of the draw.
    image_folder: what paths of images and videos are relative to.
    columns: our name -> the row's, for image, video, question, answer, messages, conversations.
    mode: "single" is one row a batch. "few_shot" joins two. "interleave" joins two with 512 tokens of `texts` between
        them, which count as answer. Both as in the paper; they cost more memory, being longer.
    texts: for "interleave"; the published code takes documents of the Pile. Shorter texts are put together.
    max_length: leave out batches of more tokens. Nothing is cut: an image or an answer cut in two calibrates badly.
    dtype: of pixel values and other floating-point inputs, such as the model's; None leaves the processor's, float32.
    strict: raise for the first bad row that is drawn instead of skipping it.

    A bad row (a missing or broken image, no answer, images that do not match their places, a line that is not JSON)
    is skipped and another one drawn; one warning names the bad rows and counts them. Warns when fewer than n_samples
    rows could be used, and when there is no image.

    Raises TypeError or ValueError for arguments outside these choices, a file that is no list of rows, or when no row
    could be used; FileNotFoundError; ImportError for a package that is missing, such as Pillow.
    """
    _check_processor(processor)
    _check_choices(n_samples, mode, texts, max_length, image_folder, columns)
    rows = _read_source(source)
    reader = _Reader(processor, image_folder, columns or {}, max_length, strict)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    good = reader.read(rows, order)
    batches: list[dict[str, Any]] = []
    if mode == "single":
        batches += (batch for _, _, batch in itertools.islice(good, n_samples))
    else:
        fillers = _Fillers([texts] if isinstance(texts, str) else texts, tokenizer_of(processor))
        while len(batches) < n_samples // 2 and len(pair := list(itertools.islice(good, 2))) == 2:
            (first_name, first, _), (second_name, second, _) = pair
            joined = first + second if mode == "few_shot" else first + fillers.between(first, second) + second
            if (batch := reader.encode(f"{first_name} with {second_name}", joined)) is not None:
                batches.append(batch)
    per_batch = 1 if mode == "single" else 2
    reader.report(len(batches) * per_batch, n_samples // per_batch * per_batch, len(rows))
    return [with_dtype(batch, dtype) for batch in batches]


@dataclass
class _Reader:
    """Rows to batches, remembering which were bad."""

    processor: Any
    image_folder: str | os.PathLike[str] | None
    columns: Mapping[str, str]
    max_length: int | None
    strict: bool
    bad: list[str] = field(default_factory=list)
    num_too_long: int = 0
    has_media: bool = False

    def read(self, rows: _Rows, order: Sequence[int]) -> Iterator[tuple[str, Rendered, dict[str, Any]]]:
        """Name, text and batch of every row that can be used."""
        for index in order:
            name = rows.name(index)
            try:
                conversation = load_media(read_row(rows[index], self.columns), self.image_folder)
                rendered = render(self.processor, conversation)
            except BadRow as error:
                self._skip(name, error)
                continue
            # In the joined modes as well, so that a row that cannot be encoded is known by its own name.
            if (batch := self.encode(name, rendered)) is not None:
                self.has_media |= bool(rendered.images or rendered.videos)
                yield name, rendered, batch

    def encode(self, name: str, rendered: Rendered) -> dict[str, Any] | None:
        try:
            batch = encode(self.processor, rendered)
        except BadRow as error:
            self._skip(name, error)
            return None
        if self.max_length is not None and batch["input_ids"].shape[1] > self.max_length:
            self.num_too_long += 1
            return None
        return batch

    def _skip(self, name: str, error: BadRow) -> None:
        self.bad.append(f"{name}: {error}")
        if self.strict:
            raise ValueError(f"{self.bad[-1]} (strict=False skips such rows)") from error

    def report(self, num_used: int, num_wanted: int, num_rows: int) -> None:
        """Raises ValueError when nothing could be used; else warns of what was lost."""
        bad = [f"  {reason}" for reason in self.bad[:_NAMED_ROWS]]
        if len(self.bad) > _NAMED_ROWS:
            bad.append(f"  and {len(self.bad) - _NAMED_ROWS} more")
        lost = [f"{len(self.bad)} bad:", *bad] if bad else []
        if self.num_too_long:
            lost.insert(0, f"{self.num_too_long} of more than max_length={self.max_length} tokens")
        if not num_used:
            reasons = "\n".join(lost) or "two rows are needed for a batch"
            raise ValueError(f"none of the {num_rows} rows can be used for calibration; {reasons}")
        if num_used < num_wanted:
            lost.insert(0, f"n_samples={num_wanted} wanted, {num_used} used: the source has {num_rows} rows")
        if lost:
            warnings.warn("calibration data: " + "\n".join(lost), stacklevel=3)
        if not self.has_media:
            warnings.warn(
                "calibration data: no row has an image or a video. Text alone calibrates, but without the modality "
                "balance, and nothing is fitted to vision tokens, most of what a vision-language model "
                "reads: expect lower accuracy on images. Add rows with images",
                stacklevel=3,
            )


class _Fillers:
    """Stretches of NUM_BETWEEN text tokens, the texts put together and begun anew as need be."""

    def __init__(self, texts: Sequence[str] | None, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.texts = itertools.cycle(texts or [])

    def between(self, first: Rendered, second: Rendered) -> Rendered:
        """As text, which the processor reads as NUM_BETWEEN tokens, or as near to it as the texts' tokens come."""
        # Decoded text need not give the same tokens again, at its ends above all, so a few more or less may be needed.
        num, spare = NUM_BETWEEN, 64
        ids: list[int] = []
        while len(ids) < num + spare:
            text = " ".join(next(self.texts).split(" ")[: 4 * num])  # no need to read a whole book
            ids += self.tokenizer.encode(("\n\n" if ids else "") + text.strip(), add_special_tokens=False)
        for attempt in range(spare // 2):
            # Of a text with long characters no number of tokens may do: then begin a little later.
            start = max(0, attempt - 4)
            # A stretch that begins or ends inside a character has the replacement character there.
            text = self.tokenizer.decode(ids[start : start + num], skip_special_tokens=True).strip("\ufffd \n\t")
            excess = self._count(first.text + text + second.text) - self._count(first.text + second.text) - NUM_BETWEEN
            if not excess:
                break
            num -= excess
        return Rendered(text, ((0, len(text)),), [], [])

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))


class _Rows:
    """Rows by index, each with a name to report it by."""

    def __init__(self, rows: Sequence[Any], lines: Sequence[int] | None = None, file: str = "") -> None:
        self.rows, self.lines, self.file = rows, lines, file

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"row {index}" if self.lines is None else f"{self.file} line {self.lines[index]}"

    def __getitem__(self, index: int) -> Any:
        try:
            row = self.rows[index]
            return row if self.lines is None else json.loads(row)
        except json.JSONDecodeError as error:
            raise BadRow(f"not JSON: {error.msg} at column {error.colno}") from error
        except ImportError:
            raise
        except Exception as error:  # a dataset decodes the image here, and may raise whatever the decoder does
            raise BadRow(f"cannot be read: {type(error).__name__}: {error}") from error


def _read_source(source: Any) -> _Rows:
    if isinstance(source, str | os.PathLike):
        rows = _read_file(Path(source))
    elif not _has_rows(source):
        raise TypeError(
            "source must be a path, a sequence of rows or a datasets.Dataset (one split of it), got "
            f"{type(source).__name__}; of a stream, take some rows first, list(itertools.islice(stream, 1000)), of a "
            "pandas frame its frame.to_dict('records')"
        )
    else:
        # Only of lists: the first row of a dataset may be the one that cannot be read.
        first = source[0] if isinstance(source, list | tuple) and source else None
        one_conversation = isinstance(first, Mapping) and "role" in first
        rows = _Rows([source] if one_conversation else source)
    if not len(rows):
        raise ValueError("source has no rows")
    return rows


def _has_rows(source: Any) -> bool:
    by_name = isinstance(source, Mapping) or hasattr(source, "iloc")  # indexed by split, or by column
    return hasattr(source, "__len__") and hasattr(source, "__getitem__") and not by_name


def _read_file(path: Path) -> _Rows:
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"source must be a .json or .jsonl file, got {str(path)!r}")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        # Not splitlines: JSON texts may hold the rarer line separators.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return _Rows([line for _, line in lines], [number for number, _ in lines], path.name)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} line {error.lineno} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path.name} must hold a list of rows, got {type(rows).__name__}")
    return _Rows(rows)


def _check_processor(processor: Any) -> None:
    if not callable(processor) or not hasattr(processor, "apply_chat_template"):
        raise TypeError(
            "processor must be the model's own, AutoProcessor.from_pretrained(name), got "
            f"{'None' if processor is None else type(processor).__name__}"
        )
    if chat_template_of(processor) is None:
        raise ValueError(
            f"{type(processor).__name__} has no chat template, which says how a question and its answer are written; "
            "set processor.chat_template, or make the batches by hand (see mbq_config)"
        )


def _check_choices(
    n_samples: int,
    mode: str,
    texts: str | Sequence[str] | None,
    max_length: int | None,
    image_folder: str | os.PathLike[str] | None,
    columns: Mapping[str, str] | None,
) -> None:
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, _MODES))}, got {mode!r}")
    least = 1 if mode == "single" else 2
    if not isinstance(n_samples, int) or n_samples < least:
        raise ValueError(f"n_samples must be an integer of at least {least} in mode {mode!r}, got {n_samples!r}")
    if mode == "interleave" and not (texts and any(text.strip() for text in texts)):
        raise ValueError('mode="interleave" puts text between two pairs: pass texts=[...], documents of any kind')
    if mode != "interleave" and texts is not None:
        raise ValueError(f'texts are for mode="interleave", got mode={mode!r}')
    if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
        raise ValueError(f"max_length must be a positive integer or None, got {max_length!r}")
    if image_folder is not None and not Path(image_folder).is_dir():
        raise FileNotFoundError(f"image_folder is no folder: {image_folder}")
    if unknown := set(columns or {}) - set(COLUMNS):
        raise ValueError(f"columns knows the names {', '.join(COLUMNS)}, got {', '.join(sorted(unknown))}")


def with_dtype(batch: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The batch with its floating-point inputs, pixel values above all, in this dtype. None: as they are."""
    if dtype is None:
        return batch
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
