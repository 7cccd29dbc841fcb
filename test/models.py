"""Tiny randomly initialised models of many families, and hand-made calibration batches for them.

Every parameter is perturbed, so that no norm weight is 1 and no bias is 0. A batch begins with two text
tokens, then the image, then the question, and ends with the answer, which alone has labels.
"""

from __future__ import annotations

from typing import Any

import torch
from families import FAMILIES, IMAGE, IMAGE_END, IMAGE_START, MIXTURES, Family
from torch import Tensor, nn

NUM_ANSWER_TOKENS = 3


def build_model(family: str | Family, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A model of the family in eval mode; `changes` are attributes of its text config."""
    family = (FAMILIES | MIXTURES)[family] if isinstance(family, str) else family
    config = family.config()
    for name, value in changes.items():
        setattr(config.get_text_config(decoder=True), name, value)
    torch.manual_seed(0)
    model = family.auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model if dtype == torch.float32 else model.to(dtype)  # which makes complex buffers (Llama4) real


def build_batch(family: str | Family, num_text: int = 9, batch_size: int = 1, seed: int = 1) -> dict[str, Any]:
    """What a processor would return, plus labels: `num_text` text tokens, the last three the answer."""
    family = (FAMILIES | MIXTURES)[family] if isinstance(family, str) else family
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (batch_size, num_text), generator=generator)
    if family.inputs is not None:
        image = torch.tensor([IMAGE_START, *[IMAGE] * family.num_image_tokens, IMAGE_END]).expand(batch_size, -1)
        ids = torch.cat([ids[:, :2], image, ids[:, 2:]], 1)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["labels"] = ids.clone()
    batch["labels"][:, :-NUM_ANSWER_TOKENS] = -100
    if family.inputs is not None:
        batch |= family.inputs(ids, lambda *shape: torch.randn(batch_size, *shape, generator=generator))
    if family.vision_mask:
        batch["vision_mask"] = ids == IMAGE
    return batch


def pad_right(batch: dict[str, Any], length: int) -> dict[str, Any]:
    """A text batch with padding tokens appended up to `length`."""
    missing = length - batch["input_ids"].shape[1]
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {k: nn.functional.pad(batch[k], (0, missing), value=v) for k, v in fill.items()}


def float_inputs(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The batch with its floating-point inputs (pixel values) in another dtype."""
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in batch.items() if k not in ("labels", "vision_mask", "answer_mask")}


def snapshot(model: nn.Module) -> dict[str, tuple[object, Tensor]]:
    """Every parameter and buffer: the object itself and a copy of its values."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: (value, value.detach().clone()) for name, value in state.items()}


def assert_unchanged(model: nn.Module, before: dict[str, tuple[object, Tensor]]) -> None:
    """The same parameter objects, bit for bit the same values, no gradients, hooks or forward attributes."""
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert after.keys() == before.keys()
    for name, (value, copy) in before.items():
        assert after[name] is value, name
        assert value.dtype == copy.dtype and value.device == copy.device, name
        if value.device.type != "meta":
            assert torch.equal(torch.nan_to_num(value.detach()), torch.nan_to_num(copy)), name
    assert_nothing_left(model)


def assert_nothing_left(model: nn.Module) -> None:
    """No gradients, no replaced forward, and no hook of ours (transformers has hooks of its own)."""
    for name, module in model.named_modules():
        assert "forward" not in module.__dict__, name
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        ours = [h for h in hooks if getattr(h, "func", h).__module__.startswith("mbq_ao")]
        assert not ours, (name, ours)
    assert all(p.grad is None for p in model.parameters())
