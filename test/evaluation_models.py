"""Tiny checkpoints with processors, to evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models import build_model
from processors import build_processor
from torch import nn

from mbq_ao import Int3WeightOnlyConfig, quantize_, save_pretrained


def tiny_vlm(*, quantized: bool = False) -> tuple[Any, Any]:
    """A LLaVA of random weights, and its processor."""
    model: Any = build_model("llava")
    if quantized:
        config = Int3WeightOnlyConfig(group_size=32)
        quantize_(model, config, lambda module, fqn: isinstance(module, nn.Linear) and "language_model.layers" in fqn)
    return model, build_processor("llava")


def save_tiny_vlm(folder: Path, *, quantized: bool = False) -> Path:
    model, processor = tiny_vlm(quantized=quantized)
    if quantized:
        save_pretrained(model, folder)
    else:
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
