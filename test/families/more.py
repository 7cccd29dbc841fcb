"""Further vision-language models whose decoder layers are those of Llama or Qwen."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor

from families.parts import (
    CLIP,
    IDS,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    MROPE,
    PIXTRAL,
    QWEN2_5_VISION,
    QWEN_IDS,
    SIGLIP,
    TEXT,
    TILES,
    VIDEO,
    VISION,
    Family,
    Pixels,
    image,
    patches,
    sized_image,
    text,
)

SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 128,
    "patch_size": 16,
    "mlp_dim": 64,
    "window_size": 4,
    "global_attn_indexes": [0],
}
QFORMER = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "cross_attention_frequency": 1,
}
VQ = {"latent_channels": 16, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}


def _flat_patches(ids: Tensor, pixels: Pixels) -> dict[str, Tensor]:
    return patches(ids, pixels, patch_size=14 * 14)


def _square_patches(ids: Tensor, pixels: Pixels) -> dict[str, Tensor]:
    inputs = patches(ids, pixels, patch_size=14 * 14)
    return {**inputs, "pixel_values": inputs["pixel_values"].unflatten(1, (3, 14, 14))}


def _untyped_patches(ids: Tensor, pixels: Pixels) -> dict[str, Tensor]:
    inputs = patches(ids, pixels)
    del inputs["mm_token_type_ids"]
    return inputs


MORE: dict[str, Family] = {
    "llava_next_video": Family(
        lambda: tf.LlavaNextVideoConfig(
            vision_config=CLIP,
            text_config=text("llama"),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            **TILES,
        ),
        sized_image(2, 3, 28, 28),
        num_image_tokens=10,
    ),
    "vipllava": Family(
        lambda: tf.VipLlavaConfig(
            vision_config=CLIP,
            text_config=text("llama"),
            image_token_index=IMAGE,
            vision_feature_layer=[-1, -2],
        ),
        image(3, 28, 28),
    ),
    "video_llava": Family(
        lambda: tf.VideoLlavaConfig(
            vision_config=CLIP, text_config=text("llama"), image_token_index=IMAGE, video_token_index=VIDEO
        ),
        lambda ids, pixels: {"pixel_values_images": pixels(3, 28, 28)},
    ),
    "deepseek_vl": Family(
        lambda: tf.DeepseekVLConfig(vision_config=SIGLIP, text_config=text("llama"), image_token_id=IMAGE),
        image(3, 28, 28),
    ),
    "deepseek_vl_hybrid": Family(
        lambda: tf.DeepseekVLHybridConfig(
            vision_config=SIGLIP,
            text_config=text("llama"),
            image_token_id=IMAGE,
            high_res_vision_config={**SAM, "model_type": "sam_vision_model"},
        ),
        lambda ids, pixels: {"pixel_values": pixels(3, 28, 28), "high_res_pixel_values": pixels(3, 128, 128)},
    ),
    "janus": Family(
        lambda: tf.JanusConfig(
            text_config=text("llama"),
            vision_config={**VISION, "mlp_ratio": 2, "projection_dim": 64, "num_image_tokens": 4},
            vq_config={**VQ, "num_embeddings": 16, "latent_channels": 32, "projection_dim": 64},
            image_token_id=IMAGE,
        ),
        image(3, 28, 28),
    ),
    "emu3": Family(
        lambda: tf.Emu3Config(
            text_config=TEXT,
            vq_config={**VQ, "codebook_size": 4, "latent_channels": 4, "hidden_size": 32, "attn_resolutions": []},
            vocabulary_map={
                "<image>": IMAGE,
                "<|extra_200|>": 100,
                **{f"<|visual token {i:06d}|>": 60 + i for i in range(4)},
            },
        ),
        sized_image(3, 8, 8),
        num_image_tokens=20,
        layers="model.text_model.layers",
    ),
    "chameleon": Family(
        lambda: tf.ChameleonConfig(
            **TEXT,
            vq_config={**VQ, "embed_dim": 16, "num_embeddings": 4, "resolution": 8},
            vocabulary_map={"<image>": IMAGE, **{f"IMGIMG{c}Z": 60 + i for i, c in enumerate("ABCD")}},
        ),
        image(3, 8, 8),
        num_image_tokens=16,
        layers="model.layers",
    ),
    "got_ocr2": Family(
        lambda: tf.GotOcr2Config(vision_config=SAM, text_config=text("qwen2"), image_token_index=IMAGE),
        image(3, 128, 128),
    ),
    "lighton_ocr": Family(
        lambda: tf.LightOnOcrConfig(vision_config=PIXTRAL, text_config=text("qwen3"), image_token_id=IMAGE),
        sized_image(3, 56, 56),
    ),
    "qianfan_ocr": Family(
        lambda: tf.QianfanOCRConfig(vision_config=VISION, text_config=text("qwen3"), image_token_id=IMAGE),
        image(3, 28, 28),
        num_image_tokens=1,
    ),
    "paddleocr_vl": Family(
        lambda: tf.PaddleOCRVLConfig(
            text_config=text(rope_parameters=MROPE),
            vision_config={**VISION, "spatial_merge_size": 2, "image_size": 56},
            **QWEN_IDS,
        ),
        _square_patches,
    ),
    "hunyuan_vl": Family(
        lambda: tf.HunYuanVLConfig(
            text_config=text(rope_parameters={**MROPE, "mrope_section": [2, 2, 2, 2]}),
            vision_config={
                **VISION,
                "out_hidden_size": 64,
                "text_hidden_size": 64,
                "max_image_size": 56,
                "min_image_size": 28,
            },
            image_token_id=IMAGE,
        ),
        _flat_patches,
        num_image_tokens=8,
    ),
    "hyperclovax_vision_v2": Family(
        lambda: tf.HyperCLOVAXVisionV2Config(
            text_config=text("hyperclovax"), vision_config={**QWEN2_5_VISION, "model_type": "qwen2_5_vl_vision"}, **IDS
        ),
        patches,
    ),
    "ovis2": Family(
        lambda: tf.Ovis2Config(
            vision_config={**VISION, "vocab_size": 32},
            text_config=text("qwen2"),
            image_token_id=IMAGE,
            visual_indicator_token_ids=[IMAGE_START, IMAGE_END, 124, 125, 126],
            vocab_size=128,
            hidden_size=64,
        ),
        image(3, 28, 28),
    ),
    "video_llama_3": Family(
        lambda: tf.VideoLlama3Config(vision_config=VISION, text_config=text("qwen2"), **IDS),
        lambda ids, pixels: {
            **_flat_patches(ids, pixels),
            "image_merge_sizes": torch.tensor([2] * len(ids)),
        },
    ),
    "qwen2_5_omni_thinker": Family(
        lambda: tf.Qwen2_5OmniThinkerConfig(
            text_config=text(rope_parameters=MROPE),
            vision_config=QWEN2_5_VISION,
            audio_config={
                "d_model": 32,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "output_dim": 64,
                "num_mel_bins": 8,
                "max_source_positions": 8,
            },
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            audio_token_index=124,
            vision_start_token_id=IMAGE_START,
        ),
        _untyped_patches,
    ),
    "molmo2": Family(
        lambda: tf.Molmo2Config(
            text_config=text(additional_vocab_size=8),
            vision_config={
                **VISION,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "image_size": [28, 28],
                "num_hidden_layers": 2,
            },
            adapter_config={
                "vision_feature_layer": [0, 1],
                "hidden_size": 32,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "intermediate_size": 32,
                "text_hidden_size": 64,
            },
            image_start_token_id=IMAGE_START,
            image_end_token_id=IMAGE_END,
            image_patch_id=IMAGE,
            low_res_image_start_token_id=124,
            frame_start_token_id=125,
            frame_end_token_id=126,
        ),
        lambda ids, pixels: {
            "pixel_values": pixels(4, 14 * 14 * 3),
            "image_token_pooling": torch.arange(4 * len(ids))[:, None],
            "image_grids": torch.tensor([[2, 2, 0, 0]] * len(ids)),
            "image_num_crops": torch.ones(len(ids), dtype=torch.long),
        },
    ),
    "granite4_vision": Family(
        lambda: tf.Granite4VisionConfig(
            text_config=TEXT,
            vision_config={**CLIP, "hidden_size": 64, "image_size": 56},
            image_token_index=IMAGE,
            image_grid_pinpoints=[[56, 56]],
            downsample_rate="1/2",
            deepstack_layer_map=[[-1, 0], [-2, 1]],
            spatial_target_layers=[],
            qformer_config={**QFORMER, "model_type": "blip_2_qformer"},
        ),
        sized_image(2, 3, 56, 56),
        num_image_tokens=10,
    ),
    "idefics2": Family(
        lambda: tf.Idefics2Config(
            vision_config=VISION,
            text_config=text("mistral"),
            perceiver_config={
                "hidden_size": 64,
                "resampler_n_latents": 2,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
            },
            image_token_id=IMAGE,
        ),
        image(1, 3, 28, 28),
        num_image_tokens=2,
        layers="model.text_model.layers",
    ),
}
