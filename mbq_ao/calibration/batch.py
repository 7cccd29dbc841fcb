"""Calibration data: model inputs, and which tokens are vision, answer and padding.

A user hands over what a transformers processor returns, plus `labels`. Every key but `labels`,
`vision_mask` and `answer_mask` goes to the model's own forward untouched, so that position ids
(M-RoPE), token types and image tiling are those of inference. Guessing which keys matter was
rejected: Qwen2.5-VL computes other positions, silently, when `mm_token_type_ids` is dropped.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from mbq_ao.calibration.residency import Placement

IGNORE_INDEX = -100
"""The label of a token that is not part of the answer, as everywhere in transformers."""

OWN_KEYS = ("labels", "vision_mask", "answer_mask")
_VISION_TOKEN_FIELDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass
class CalibrationBatch:
    """One batch, on the model's device, or in the host's memory until it is computed with.

    inputs: keyword arguments of the model's forward.
    labels: (B, T) int64, -100 where a token is not answer.
    vision: (B, T) bool, tokens that stand for image or video patches.
    answer: (B, T) bool, tokens of the answer (labels != -100 unless overridden).
    valid: (B, T) bool, tokens that are not padding.
    index: its place in calib_data.
    """

    inputs: dict[str, Any]
    labels: Tensor
    vision: Tensor
    answer: Tensor
    valid: Tensor
    index: int = 0

    @property
    def num_tokens(self) -> int:
        return self.valid.numel()

    def on(self, placement: Placement) -> CalibrationBatch:
        """The batch where it is computed with."""
        return CalibrationBatch(**{f.name: placement.fetch(getattr(self, f.name)) for f in fields(self)})

    def predicts_answer(self) -> Tensor:
        """(B, T) bool: positions whose output is the next answer token, i.e. `answer` shifted left by one.

        The last token of an answer predicts nothing that the loss sees, so its gradient is zero.
        """
        shifted = torch.zeros_like(self.answer)
        shifted[:, :-1] = self.answer[:, 1:]
        return shifted


def collect_batches(
    model: nn.Module, calib_data: Iterable[Mapping[str, Any]], device: torch.device | None = None
) -> list[CalibrationBatch]:
    """Read `calib_data` once, move it to `device` (None: the model's), and find the masks of every batch.

    Raises TypeError for something that is not an iterable of mappings, ValueError for data without a
    batch, masks of the wrong shape, and labels without a single answer token. Warns when there are no
    labels (every token that is neither vision nor padding then counts as answer) and when no batch
    has a vision token (the modality balance is then off).
    """
    device = device or next(model.parameters()).device
    batches = [_make_batch(model, raw, index, device) for index, raw in enumerate(_iterate_mappings(calib_data))]
    if not batches:
        raise ValueError(
            "calib_data is empty: got no batch; pass at least one dict as a transformers processor returns "
            "it (a generator that was read before is exhausted: pass a list)"
        )
    # The token at position 0 is predicted by nothing.
    unlabelled = [i for i, b in enumerate(batches) if not b.predicts_answer().any()]
    if unlabelled:
        raise ValueError(
            f"labels of calibration batch {unlabelled[0]} are all {IGNORE_INDEX} after the first token: no answer to "
            f"calibrate for ({len(unlabelled)} of {len(batches)} batches); label the answer tokens with "
            "their ids, or drop the batch"
        )
    if not any(b.vision.any() for b in batches):
        warnings.warn(
            "no vision token found in any calibration batch: the modality balance is off and every token "
            "counts alike. Calibrate with images, or pass a bool `vision_mask` of shape (B, T) with each batch",
            stacklevel=2,
        )
    return batches


def _iterate_mappings(calib_data: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    if isinstance(calib_data, Mapping) or not isinstance(calib_data, Iterable):
        raise TypeError(
            f"calib_data must be an iterable of dicts, got {type(calib_data).__name__}; "
            "pass a list of what the processor returns"
        )
    for index, raw in enumerate(calib_data):
        if not isinstance(raw, Mapping):
            raise TypeError(f"calibration batch {index} must be a dict of model inputs, got {type(raw).__name__}")
        yield raw


def _make_batch(model: nn.Module, raw: Mapping[str, Any], index: int, device: torch.device) -> CalibrationBatch:
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in raw.items()}
    inputs = {k: v for k, v in batch.items() if k not in OWN_KEYS}
    ids = batch.get("input_ids")
    tokens = batch.get("inputs_embeds") if ids is None else ids
    if tokens is None:
        raise ValueError(f"calibration batch {index} has neither input_ids nor inputs_embeds, got keys {sorted(batch)}")
    if tokens.ndim != (3 if ids is None else 2):
        raise ValueError(
            f"calibration batch {index} needs input_ids of shape (B, T) or inputs_embeds of shape (B, T, C), "
            f"got {tuple(tokens.shape)}"
        )
    shape = tuple(tokens.shape[:2])

    padding_mask = batch.get("attention_mask")
    if isinstance(padding_mask, Tensor) and tuple(padding_mask.shape) == shape:
        valid = padding_mask.bool()
    else:
        valid = torch.ones(shape, dtype=torch.bool, device=device)

    if (vision := _checked_mask(batch, "vision_mask", shape, index)) is None:
        vision = _find_vision_tokens(model, ids, valid)
    answer = _checked_mask(batch, "answer_mask", shape, index)
    labels = batch.get("labels")
    if labels is not None and tuple(labels.shape) != shape:
        raise ValueError(
            f"labels of calibration batch {index} must have the shape {shape} of the inputs, got {tuple(labels.shape)}"
        )
    if labels is None:
        if ids is None:
            raise ValueError(
                f"calibration batch {index} has inputs_embeds and no labels: the loss has no target; pass labels (B, T)"
            )
        if answer is None:
            warnings.warn(
                f"calibration batch {index} has no labels: all text tokens (neither vision nor padding) are "
                f"used as answer. Pass labels with {IGNORE_INDEX} on the prompt to calibrate for the answers",
                stacklevel=4,
            )
            answer = valid & ~vision
        labels = ids.masked_fill(~answer, IGNORE_INDEX)
    labels = labels.long()
    if answer is None:
        answer = labels != IGNORE_INDEX
    return CalibrationBatch(inputs, labels, vision, answer, valid, index)


def _checked_mask(batch: Mapping[str, Any], key: str, shape: tuple[int, ...], index: int) -> Tensor | None:
    mask = batch.get(key)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{key} of calibration batch {index} must be a bool tensor of shape {shape}, got {got}")
    return mask


def _find_vision_tokens(model: nn.Module, ids: Tensor | None, valid: Tensor) -> Tensor:
    """Positions of the placeholder tokens that the model's own config names, or its vision part (Phi-4-multimodal)."""
    config = getattr(model, "config", None)
    configs = (config, getattr(config, "vision_config", None))
    token_ids = {getattr(c, field, None) for c in configs for field in _VISION_TOKEN_FIELDS}
    vision = torch.zeros_like(valid)
    if ids is not None:
        for token_id in token_ids - {None}:
            vision |= ids == token_id
    return vision & valid
