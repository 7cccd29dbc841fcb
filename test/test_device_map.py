"""accelerate's device_map: layers on another device, and layers that come from the host when they are called.

The other device is that of test/second_device, in a process of its own: torch knows it for good once it is registered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import build_batch, build_model, model_inputs
from second_device import counted_device
from second_device.process import process_with_device
from torch import Tensor, nn
from torchao.quantization import quantize_ as torchao_quantize_

from mbq_ao import Int3WeightOnlyConfig, Int8DynamicActivationInt4WeightMBQConfig, from_pretrained, save_pretrained

LAYERS = "model.language_model.layers"


def rounded(path: Path) -> nn.Module:
    """Two layers, one in W3A16 and one in W4A8."""
    model = build_model("llava")
    for config, layer in (
        (Int3WeightOnlyConfig(group_size=32), "0"),
        (Int8DynamicActivationInt4WeightMBQConfig(), "1"),
    ):
        within = f"{LAYERS}.{layer}."
        torchao_quantize_(model, config, lambda m, fqn, within=within: isinstance(m, nn.Linear) and within in fqn)
    save_pretrained(model, path)
    return model


@torch.no_grad()
def logits(model: nn.Module, device: torch.device) -> Tensor:
    batch = {name: value.to(device) for name, value in model_inputs(build_batch("llava")).items()}
    return model(**batch).logits.cpu()


def with_device_map(path: Path, layers: dict[str, str]) -> dict[str, Any]:
    device = counted_device().device
    device_map = {"model.vision_tower": device, "model.multi_modal_projector": device, "lm_head": device}
    device_map |= {f"model.language_model.{name}": device for name in ("embed_tokens", "norm", "rotary_emb")}
    device_map |= {f"{LAYERS}.{layer}": where for layer, where in layers.items()}
    model = from_pretrained(path, device_map=device_map)
    found = [logits(model, device), logits(model, device)]
    devices = {layer: model.get_submodule(f"{LAYERS}.{layer}.mlp.up_proj").weight.device.type for layer in layers}
    if "cpu" in layers.values():
        with pytest.raises(ValueError, match=r"layers\.0.*q_proj\.weight is offloaded by accelerate"):
            model.save_pretrained(path.parent / "again")
    return {"logits": found, "devices": devices}


def test_device_maps(tmp_path: Path) -> None:
    model = rounded(tmp_path / "m")
    expected = logits(model, torch.device("cpu"))
    with process_with_device() as call:
        for layers, devices in (
            ({"0": "counted", "1": "counted"}, {"0": "counted", "1": "counted"}),
            ({"0": "cpu", "1": "cpu"}, {"0": "meta", "1": "meta"}),  # where accelerate leaves what it brings each time
        ):
            result = call(with_device_map, tmp_path / "m", layers)
            assert result["devices"] == devices
            for found in result["logits"]:
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
