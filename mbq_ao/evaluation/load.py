"""Models and processors by name or path, whoever made the checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor

from mbq_ao.pretrained import hub_arguments, load_any

DEMO = "demo"


def load(name_or_path: str | os.PathLike[str], processor: Any = None, **kwargs: Any) -> tuple[Any, Any]:
    """(model in eval mode, processor) of a checkpoint: ours, or any that the Auto classes load.

    name_or_path: a folder or a hub name; "demo" is the small model that comes with this package, where there is no
        folder of that name.
    processor: if the checkpoint has none, or another is wanted.
    kwargs: as `from_pretrained` takes them (device_map, dtype, revision, ...).

    Raises ValueError if the checkpoint has no processor, or is damaged; OSError if there is none.
    """
    name = os.fspath(name_or_path)
    if name == DEMO and not Path(name).exists():
        return _load_demo(**kwargs)
    hub = hub_arguments(kwargs)
    config = AutoConfig.from_pretrained(name, **hub)
    processor = processor or _load_processor(name, **hub)
    return load_any(name, config, **kwargs), processor


def _load_demo(device_map: Any = None, dtype: Any = None, **ignored: Any) -> tuple[Any, Any]:
    from mbq_ao.demo.model import build_demo_vlm

    model, processor = build_demo_vlm(dtype if isinstance(dtype, torch.dtype) else torch.float32)
    return model.to(device_map or "cpu"), processor


def _load_processor(name: str, **hub: Any) -> Any:
    try:
        return AutoProcessor.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} has no processor (or tokenizer) that can be loaded: save the original model's beside it, "
            f"AutoProcessor.from_pretrained(ORIGINAL).save_pretrained({name!r}), or pass processor= ({error})"
        ) from error
