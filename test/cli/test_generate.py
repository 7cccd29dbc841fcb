"""`mbq-ao generate`: the answer is what the Python calls give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import document, invoke, refusal
from models import build_model
from PIL import Image
from processors import build_processor

from mbq_ao import from_pretrained


@pytest.fixture(autouse=True)
def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBQ_AO_CPU_COMPILE", "0")


@torch.no_grad()
def test_an_image(llava: Path, rounded: Path) -> None:
    """Streamed to stdout; the same text with --json."""
    image = llava / "a.png"
    shown = document("generate", rounded, "--image", image, "--prompt", "What color?", "--max-new-tokens", 4)
    text = "[user]<image>What color?<end>\n[assistant]"
    inputs = build_processor("llava")(text=[text], images=[[Image.open(image)]], return_tensors="pt")
    ids = from_pretrained(rounded).generate(**inputs, max_new_tokens=4, do_sample=False)[0]
    num_prompt_tokens = inputs["input_ids"].shape[1]
    expected = build_processor("llava").tokenizer.decode(ids[num_prompt_tokens:], skip_special_tokens=True)
    assert (shown["text"], shown["num_prompt_tokens"]) == (expected, num_prompt_tokens)
    assert shown["num_new_tokens"] == len(ids) - num_prompt_tokens and shown["images"] == [str(image)]
    done = invoke("generate", rounded, "-i", image, "-p", "What color?", "--max-new-tokens", 4)
    assert done.stdout == f"{expected}\n"


def test_text_alone_and_full_precision(llava: Path) -> None:
    one = document("generate", llava, "-p", "red", "--max-new-tokens", 2)
    two = document("generate", llava, "-p", "red cat", "--max-new-tokens", 2)
    assert one["images"] == [] and one["num_prompt_tokens"] < two["num_prompt_tokens"]


def test_a_language_model(tmp_path: Path) -> None:
    """With a tokenizer for a processor, with and without a chat template."""
    build_model("llama").save_pretrained(tmp_path)
    tokenizer = build_processor("llava").tokenizer
    for template, added in ((None, 0), ("{{ messages[0]['content'] }}[assistant]", len("[assistant]"))):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        shown = document("generate", tmp_path, "-p", "a dog", "--max-new-tokens", 1)
        assert shown["num_prompt_tokens"] == 5 + added
    assert "takes no images" in refusal("generate", tmp_path, "-p", "?", "-i", _image(tmp_path))


def _image(folder: Path) -> Path:
    Image.new("RGB", (8, 8)).save(folder / "image.png")
    return folder / "image.png"


def test_refusals(rounded: Path, tmp_path: Path) -> None:
    assert "no.png" in refusal("generate", rounded, "-p", "?", "-i", "no.png")
    (tmp_path / "text.png").write_text("no image")
    assert "is no image that Pillow can read" in refusal("generate", rounded, "-p", "?", "-i", tmp_path / "text.png")
    assert "there is no folder" in refusal("generate", tmp_path / "none", "-p", "?")
    done = invoke("generate", rounded)
    assert done.exit_code == 2 and "--prompt" in done.stderr
