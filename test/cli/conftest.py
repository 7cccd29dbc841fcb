"""Tiny models on disk, as users have them: with their processor, images and conversations beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import build_model
from PIL import Image
from processors import build_processor
from torchao.quantization import quantize_ as torchao_quantize_

from mbq_ao import Int3WeightOnlyConfig, save_pretrained


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA in full precision, its processor, two images and conversations.jsonl."""
    folder = tmp_path_factory.mktemp("llava")
    build_model("llava").save_pretrained(folder)
    build_processor("llava").save_pretrained(folder)
    lines = []
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (28, 28), color).save(folder / name)
        turns = [{"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": f"It is {color}."}]
        lines.append(json.dumps({"image": name, "conversations": turns}))
    (folder / "conversations.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def rounded(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with 3-bit weights by plain rounding, in groups of 32, in several shards."""
    model = build_model("llava")
    torchao_quantize_(
        model, Int3WeightOnlyConfig(group_size=32), lambda m, fqn: "language_model" in fqn and fqn.endswith("proj")
    )
    folder = tmp_path_factory.mktemp("rounded") / "llava-w3"
    save_pretrained(model, folder, max_shard_size="60KB")
    build_processor("llava").save_pretrained(folder)
    return folder
