"""Bad calibration data: a clear error each (the thing, the value, the rule, the way out), and the model untouched."""

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline as expect
from models import build_batch, build_model
from refusals import refused
from torch import nn

from mbq_ao import mbq_config, quantize_


@pytest.mark.parametrize("calib_data", [[], iter(())], ids=["empty list", "exhausted generator"])
def test_no_batches(model: nn.Module, calib_data: Any) -> None:
    expect(
        refused(model, calib_data),
        """\
calib_data is empty: got no batch; pass at least one dict as a transformers processor returns it (a generator that \
was read before is exhausted: pass a list)""",
    )


def test_one_dict_instead_of_a_list(model: nn.Module) -> None:
    expect(
        refused(model, build_batch("llava"), TypeError),
        """calib_data must be an iterable of dicts, got dict; pass a list of what the processor returns""",
    )


def test_a_batch_that_is_no_dict(model: nn.Module) -> None:
    expect(
        refused(model, [build_batch("llava"), torch.zeros(3)], TypeError),
        """calibration batch 1 must be a dict of model inputs, got Tensor""",
    )


def test_a_batch_without_tokens(model: nn.Module) -> None:
    expect(
        refused(model, [{"pixel_values": torch.zeros(1, 3, 28, 28)}]),
        """calibration batch 0 has neither input_ids nor inputs_embeds, got keys ['pixel_values']""",
    )


def test_input_ids_without_a_batch_dimension(model: nn.Module) -> None:
    expect(
        refused(model, [{"input_ids": torch.ones(5, dtype=torch.long)}]),
        """\
calibration batch 0 needs input_ids of shape (B, T) or inputs_embeds of shape (B, T, C), got (5,)""",
    )


def test_labels_without_an_answer(model: nn.Module) -> None:
    batch = build_batch("llava")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["labels"][:, 0] = 5  # nothing predicts it
    expect(
        refused(model, [build_batch("llava"), batch]),
        """\
labels of calibration batch 1 are all -100 after the first token: no answer to calibrate for (1 of 2 batches); label \
the answer tokens with their ids, or drop the batch""",
    )


def test_labels_of_another_shape(model: nn.Module) -> None:
    batch = build_batch("llava")
    batch["labels"] = batch["labels"][:, 1:]
    expect(
        refused(model, [batch]),
        """labels of calibration batch 0 must have the shape (1, 15) of the inputs, got (1, 14)""",
    )


@pytest.mark.parametrize("key", ["vision_mask", "answer_mask"])
def test_masks_of_another_shape_or_dtype(model: nn.Module, key: str) -> None:
    batch = build_batch("llava")
    length = batch["input_ids"].shape[1]
    text = refused(model, [{**batch, key: torch.ones(1, length - 1, dtype=torch.bool)}])
    assert text == f"{key} of calibration batch 0 must be a bool tensor of shape (1, 15), got torch.bool (1, 14)"
    text = refused(model, [{**batch, key: torch.ones(1, length)}])
    assert text == f"{key} of calibration batch 0 must be a bool tensor of shape (1, 15), got torch.float32 (1, 15)"


def test_embeddings_without_labels(model: nn.Module) -> None:
    expect(
        refused(model, [{"inputs_embeds": torch.randn(1, 6, 64)}]),
        """calibration batch 0 has inputs_embeds and no labels: the loss has no target; pass labels (B, T)""",
    )


def test_batches_without_labels_use_all_text_and_say_so(model: nn.Module) -> None:
    batch = build_batch("llava")
    labelled = dict(batch)
    del batch["labels"]
    with pytest.warns(UserWarning) as caught:
        report = quantize_(model, mbq_config([batch], group_size=32, n_grid=3, recipe="mbq"), progress=False)
    expect(
        str(caught[0].message),
        """\
calibration batch 0 has no labels: all text tokens (neither vision nor padding) are used as answer. Pass labels \
with -100 on the prompt to calibrate for the answers""",
    )
    ids = labelled["input_ids"]
    labelled["labels"] = ids.masked_fill(ids == 120, -100)
    other = quantize_(
        build_model("llava"), mbq_config([labelled], group_size=32, n_grid=3, recipe="mbq"), progress=False
    )
    assert report is not None and other is not None
    assert [g.losses for g in report.groups] == [g.losses for g in other.groups]


def test_no_vision_token_switches_the_balance_off_and_says_so() -> None:
    batches = [build_batch("llama")]
    with pytest.warns(UserWarning) as caught:
        report = quantize_(
            build_model("llama"), mbq_config(batches, group_size=32, n_grid=3, recipe="mbq"), progress=False
        )
    expect(
        str(caught[0].message),
        """\
no vision token found in any calibration batch: the modality balance is off and every token counts alike. Calibrate \
with images, or pass a bool `vision_mask` of shape (B, T) with each batch""",
    )
    assert report is not None and all(g.sensitivity is None for g in report.groups)


def test_labels_of_int32_are_labels(model: nn.Module) -> None:
    batch = build_batch("llava")
    wide, narrow = (
        quantize_(
            build_model("llava"),
            mbq_config([{**batch, "labels": labels}], group_size=32, n_grid=2, recipe="mbq"),
            progress=False,
        )
        for labels in (batch["labels"], batch["labels"].int())
    )
    assert [g.losses for g in wide.groups] == [g.losses for g in narrow.groups]
