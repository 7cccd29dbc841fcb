"""The vision-language models that mbq_ao is meant for."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor

from families.parts import (
    CLIP,
    GLM_IDS,
    GLM_VISION,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    MROPE,
    PIXTRAL,
    QWEN2_5_VISION,
    QWEN_IDS,
    QWEN_VISION,
    SIGLIP,
    TEXT,
    TILES,
    TWO_MASKS,
    VIDEO,
    VISION,
    Family,
    Pixels,
    image,
    patches,
    sized_image,
    text,
    typed_image,
)


def _mllama_inputs(ids: Tensor, pixels: Pixels) -> dict[str, Tensor]:
    b, t = ids.shape
    seen = torch.zeros(b, t, 1, 2, dtype=torch.long)
    seen[:, 3:, 0, 0] = 1
    return {
        "pixel_values": pixels(1, 2, 3, 28, 28),
        "aspect_ratio_ids": torch.ones(b, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([[[1, 0]]] * b),
        "cross_attention_mask": seen,
    }


def _phi4_inputs(ids: Tensor, pixels: Pixels) -> dict[str, Tensor]:
    return {
        "image_pixel_values": pixels(2, 3, 56, 56),
        "image_sizes": torch.tensor([[56, 56]] * len(ids)),
        "image_attention_mask": torch.ones(len(ids), 2, 4, 4),
    }


MULTIMODAL: dict[str, Family] = {
    "llava": Family(
        lambda: tf.LlavaConfig(
            vision_config=CLIP, text_config=text("llama"), image_token_index=IMAGE, image_seq_length=4
        ),
        image(3, 28, 28),
    ),
    "llava_pixtral": Family(
        lambda: tf.LlavaConfig(
            vision_config=PIXTRAL,
            text_config=text("mistral"),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        sized_image(3, 56, 56),
        num_image_tokens=16,
    ),
    "llava_next": Family(
        lambda: tf.LlavaNextConfig(vision_config=CLIP, text_config=text("llama"), image_token_index=IMAGE, **TILES),
        sized_image(2, 3, 28, 28),
        num_image_tokens=10,
    ),
    "llava_onevision": Family(
        lambda: tf.LlavaOnevisionConfig(
            vision_config=SIGLIP,
            text_config=text("qwen2"),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            **TILES,
        ),
        sized_image(2, 3, 28, 28),
        num_image_tokens=10,
    ),
    "qwen2_vl": Family(
        lambda: tf.Qwen2VLConfig(
            text_config=text(rope_parameters=MROPE),
            vision_config={**QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
            **QWEN_IDS,
        ),
        patches,
    ),
    "qwen2_5_vl": Family(
        lambda: tf.Qwen2_5_VLConfig(text_config=text(rope_parameters=MROPE), vision_config=QWEN2_5_VISION, **QWEN_IDS),
        patches,
    ),
    "qwen3_vl": Family(
        lambda: tf.Qwen3VLConfig(
            text_config=text(rope_parameters={**MROPE, "mrope_interleaved": True}),
            vision_config={
                **QWEN_VISION,
                "hidden_size": 32,
                "out_hidden_size": 64,
                "intermediate_size": 64,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            **QWEN_IDS,
        ),
        patches,
    ),
    "internvl": Family(
        lambda: tf.InternVLConfig(
            vision_config=VISION,
            text_config=text("qwen2"),
            image_token_id=IMAGE,
            image_seq_length=1,
            downsample_ratio=0.5,
        ),
        image(3, 28, 28),
        num_image_tokens=1,
    ),
    "gemma3": Family(
        lambda: tf.Gemma3Config(
            text_config=text(**TWO_MASKS),
            vision_config=VISION,
            mm_tokens_per_image=4,
            image_token_id=IMAGE,
            image_token_index=IMAGE,
            boi_token_index=IMAGE_START,
            eoi_token_index=IMAGE_END,
        ),
        typed_image,
    ),
    "smolvlm": Family(
        lambda: tf.SmolVLMConfig(vision_config=VISION, text_config=text("llama"), image_token_id=IMAGE, scale_factor=2),
        image(1, 3, 28, 28),
        num_image_tokens=1,
        layers="model.text_model.layers",
    ),
    "idefics3": Family(
        lambda: tf.Idefics3Config(
            vision_config=VISION, text_config=text("llama"), image_token_id=IMAGE, scale_factor=2
        ),
        image(1, 3, 28, 28),
        num_image_tokens=1,
        layers="model.text_model.layers",
    ),
    "paligemma": Family(
        lambda: tf.PaliGemmaConfig(
            vision_config={**SIGLIP, "projection_dim": 64},
            text_config=text("gemma", num_image_tokens=4),
            image_token_index=IMAGE,
            projection_dim=64,
            hidden_size=64,
        ),
        typed_image,
    ),
    "mistral3": Family(
        lambda: tf.Mistral3Config(
            vision_config=PIXTRAL, text_config=text("mistral"), image_token_index=IMAGE, spatial_merge_size=2
        ),
        sized_image(3, 56, 56),
    ),
    "mllama": Family(
        lambda: tf.MllamaConfig(
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1], [1, 2]],
                "max_num_tiles": 2,
            },
            text_config=text(
                num_hidden_layers=3,
                cross_attention_layers=[1],
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            ),
            image_token_index=IMAGE,
        ),
        _mllama_inputs,
        num_image_tokens=1,
    ),
    "glm4v": Family(
        lambda: tf.Glm4vConfig(text_config=text(rope_parameters=MROPE), vision_config=GLM_VISION, **GLM_IDS),
        patches,
    ),
    "glm46v": Family(
        lambda: tf.Glm46VConfig(
            text_config=text("glm4v_text", rope_parameters=MROPE),
            vision_config={**GLM_VISION, "model_type": "glm4v_vision"},
            **GLM_IDS,
        ),
        patches,
    ),
    "phi4_multimodal": Family(
        lambda: tf.Phi4MultimodalConfig(
            **TEXT,
            vision_config={
                **VISION,
                "num_hidden_layers": 2,
                "image_size": 56,
                "crop_size": 56,
                "image_token_id": IMAGE,
            },
            audio_config={
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "ext_pw_out_channel": 32,
                "depthwise_separable_out_channel": 32,
                "nemo_conv_channels": 32,
                "input_size": 8,
                "audio_token_id": 124,
            },
        ),
        _phi4_inputs,
        num_image_tokens=13,
        layers="model.layers",
        auto=tf.AutoModelForCausalLM,
    ),
}
