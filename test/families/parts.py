"""What the tiny configs of all families are made of, and what processors return for an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor

IMAGE, VIDEO, IMAGE_START, IMAGE_END = 120, 121, 122, 123

Pixels = Callable[..., Tensor]
"""pixels(*shape) -> (B, *shape), normally distributed."""


@dataclass(frozen=True)
class Family:
    """A model family.

    config: of its tiny model. inputs: what the batch has beside text, given input_ids (B, T); None: text only.
    num_image_tokens: places of the image in input_ids. layers: where the decoder layers are expected.
    auto: the auto class that builds it. vision_mask: the config names no image token, so that the user has to.
    """

    config: Callable[[], tf.PretrainedConfig]
    inputs: Callable[[Tensor, Pixels], dict[str, Tensor]] | None = None
    num_image_tokens: int = 4
    layers: str = "model.language_model.layers"
    auto: Any = tf.AutoModelForImageTextToText
    vision_mask: bool = False


TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CLIP = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32, "num_hidden_layers": 2}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
PIXTRAL = {**VISION, "model_type": "pixtral", "image_size": 56, "head_dim": 16}
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN2_5_VISION = {
    **QWEN_VISION,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 64,
    "fullatt_block_indexes": [0],
    "window_size": 56,
}
GLM_VISION = {**QWEN_VISION, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "image_size": 56}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
QWEN_IDS = {**IDS, "vision_start_token_id": IMAGE_START, "vision_end_token_id": IMAGE_END}
GLM_IDS = {
    **IDS,
    "image_start_token_id": IMAGE_START,
    "image_end_token_id": IMAGE_END,
    "video_start_token_id": 124,
    "video_end_token_id": 125,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
TWO_MASKS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
TILES = {"image_grid_pinpoints": [[28, 28], [28, 56]]}


def text(model_type: str | None = None, **changes: Any) -> dict[str, Any]:
    return {**TEXT, **({} if model_type is None else {"model_type": model_type}), **changes}


def image(*shape: int) -> Callable[[Tensor, Pixels], dict[str, Tensor]]:
    """Just pixel values."""
    return lambda ids, pixels: {"pixel_values": pixels(*shape)}


def sized_image(*shape: int) -> Callable[[Tensor, Pixels], dict[str, Tensor]]:
    """Pixel values and the image's original size."""
    return lambda ids, pixels: {
        "pixel_values": pixels(*shape),
        "image_sizes": torch.tensor([shape[-2:]] * len(ids)),
    }


def typed_image(ids: Tensor, pixels: Pixels) -> dict[str, Tensor]:
    return {"pixel_values": pixels(3, 28, 28), "token_type_ids": (ids == IMAGE).long()}


def patches(ids: Tensor, pixels: Pixels, patch_size: int = 2 * 14 * 14) -> dict[str, Tensor]:
    """4 x 4 patches an image, all images in one row (Qwen-VL)."""
    return {
        "pixel_values": pixels(16, 3 * patch_size).flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(ids)),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def language(config: Callable[[], tf.PretrainedConfig], layers: str = "model.layers") -> Family:
    """Text only."""
    return Family(config, layers=layers, auto=tf.AutoModelForCausalLM)
