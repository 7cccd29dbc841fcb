"""Further vision-language models with decoder layers of other kinds; and models that mbq_ao refuses."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor

from families.parts import (
    GLM_IDS,
    GLM_VISION,
    IDS,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    MROPE,
    QWEN2_5_VISION,
    QWEN_IDS,
    QWEN_VISION,
    SIGLIP,
    TWO_MASKS,
    VISION,
    Family,
    Pixels,
    image,
    patches,
    text,
)

QFORMER = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "cross_attention_frequency": 1,
}
OPT = text("opt", ffn_dim=128, word_embed_proj_dim=64)
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def _gemma4(**changes: object) -> tf.PretrainedConfig:
    per_layer = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128, "global_head_dim": 32}
    return tf.Gemma4Config(
        text_config=text(**{**TWO_MASKS, **per_layer, **changes}),
        vision_config={
            **VISION,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "position_embedding_size": 16,
            "pooling_kernel_size": 2,
        },
        audio_config=None,
        boi_token_id=IMAGE_START,
        eoi_token_id=IMAGE_END,
        **IDS,
    )


def _gemma4_inputs(ids: Tensor, pixels: Pixels) -> dict[str, Tensor]:
    grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1)
    return {
        "pixel_values": pixels(16, 3 * 14 * 14).sigmoid(),
        "image_position_ids": grid.view(1, 16, 2).expand(len(ids), -1, -1),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def _flat_patches(ids: Tensor, pixels: Pixels) -> dict[str, Tensor]:
    return patches(ids, pixels, patch_size=14 * 14)


UNUSUAL: dict[str, Family] = {
    "qwen3_5": Family(
        lambda: tf.Qwen3_5Config(
            text_config=text(rope_parameters={**MROPE, "mrope_interleaved": True}, **HYBRID),
            vision_config={
                **QWEN_VISION,
                "hidden_size": 32,
                "out_hidden_size": 64,
                "intermediate_size": 64,
                "num_position_embeddings": 16,
            },
            **QWEN_IDS,
        ),
        patches,
    ),
    "minicpmv4_6": Family(
        lambda: tf.MiniCPMV4_6Config(
            text_config=text("qwen3_5_text", **HYBRID),
            vision_config={**VISION, "num_hidden_layers": 2, "image_size": 112},
            insert_layer_id=0,
            **IDS,
        ),
        lambda ids, pixels: {
            "pixel_values": torch.cat(list(pixels(3, 14, 14 * 16)), -1)[None],
            "target_sizes": torch.tensor([[4, 4]] * len(ids)),
        },
        num_image_tokens=1,
    ),
    "exaone4_5": Family(
        lambda: tf.Exaone4_5_Config(
            text_config=text("exaone4", **TWO_MASKS), vision_config={**QWEN2_5_VISION, "num_key_value_heads": 1}, **IDS
        ),
        patches,
    ),
    "glm_ocr": Family(
        lambda: tf.GlmOcrConfig(text_config=text(rope_parameters=MROPE), vision_config=GLM_VISION, **GLM_IDS),
        patches,
    ),
    "cosmos3_edge": Family(
        lambda: tf.Cosmos3EdgeConfig(
            text_config=text(rope_parameters=MROPE),
            vision_config={**VISION, "num_patches": 16, "spatial_merge_size": 2},
            **IDS,
        ),
        _flat_patches,
    ),
    "gemma4": Family(_gemma4, _gemma4_inputs),
    "gemma4_shared_kv": Family(
        lambda: _gemma4(layer_types=["full_attention"] * 2, num_kv_shared_layers=1),
        _gemma4_inputs,
    ),
    "gemma4_k_eq_v": Family(
        lambda: _gemma4(attention_k_eq_v=True, num_global_key_value_heads=1, hidden_size_per_layer_input=0),
        _gemma4_inputs,
    ),
    "aya_vision": Family(
        lambda: tf.AyaVisionConfig(vision_config=SIGLIP, text_config=text("cohere2"), image_token_index=IMAGE),
        image(3, 28, 28),
        num_image_tokens=1,
    ),
    "cohere2_vision": Family(
        lambda: tf.Cohere2VisionConfig(
            vision_config=SIGLIP, text_config=text("cohere2"), image_token_id=IMAGE, alignment_intermediate_size=64
        ),
        image(3, 28, 28),
        num_image_tokens=1,
    ),
    "lfm2_vl": Family(
        lambda: tf.Lfm2VlConfig(
            vision_config={**VISION, "model_type": "siglip2_vision_model", "num_patches": 4},
            text_config=text("lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
            image_token_id=IMAGE,
            projector_hidden_size=64,
        ),
        lambda ids, pixels: {
            "pixel_values": pixels(4, 3 * 14 * 14),
            "spatial_shapes": torch.tensor([[2, 2]] * len(ids)),
            "pixel_attention_mask": torch.ones(len(ids), 4, dtype=torch.long),
        },
        num_image_tokens=1,
    ),
    "blip_2": Family(
        lambda: tf.Blip2Config(
            vision_config=VISION,
            qformer_config=QFORMER,
            text_config=OPT,
            num_query_tokens=4,
            image_token_index=IMAGE,
        ),
        image(3, 28, 28),
        layers="language_model.model.decoder.layers",
    ),
    "instructblip": Family(
        lambda: tf.InstructBlipConfig(
            vision_config=VISION,
            qformer_config=QFORMER,
            text_config=OPT,
            num_query_tokens=4,
            image_token_index=IMAGE,
        ),
        lambda ids, pixels: {
            "pixel_values": pixels(3, 28, 28),
            "qformer_input_ids": ids[:, -3:],
            "qformer_attention_mask": torch.ones_like(ids[:, -3:]),
        },
        layers="language_model.model.decoder.layers",
    ),
    "fuyu": Family(
        lambda: tf.FuyuConfig(image_size=28, patch_size=14, text_config=text("persimmon"), image_token_id=IMAGE),
        lambda ids, pixels: {"image_patches": pixels(4, 14 * 14 * 3)},
    ),
    "kosmos2": Family(
        lambda: tf.Kosmos2Config(
            text_config={
                "vocab_size": 128,
                "max_position_embeddings": 128,
                "embed_dim": 64,
                "layers": 2,
                "ffn_dim": 128,
                "attention_heads": 4,
                "pad_token_id": 0,
            },
            vision_config=VISION,
            latent_query_num=4,
        ),
        lambda ids, pixels: {"pixel_values": pixels(3, 28, 28), "image_embeds_position_mask": ids == IMAGE},
        layers="text_model.model.layers",
        vision_mask=True,
    ),
}

REFUSED: dict[str, Family] = {
    "florence2": Family(
        lambda: tf.Florence2Config(
            text_config={
                "model_type": "bart",
                "d_model": 64,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "encoder_ffn_dim": 128,
                "decoder_ffn_dim": 128,
                "vocab_size": 128,
            },
            vision_config={
                "depths": [1],
                "patch_size": [7],
                "patch_stride": [4],
                "patch_padding": [3],
                "patch_prenorm": [False],
                "embed_dim": [32],
                "num_heads": [2],
                "num_groups": [2],
                "projection_dim": 64,
            },
            image_token_id=IMAGE,
        ),
        image(3, 28, 28),
    ),
    "blip_2_t5": Family(
        lambda: tf.Blip2Config(
            vision_config=VISION,
            qformer_config=QFORMER,
            text_config={
                "model_type": "t5",
                "d_model": 64,
                "d_kv": 16,
                "d_ff": 128,
                "num_layers": 1,
                "vocab_size": 128,
            },
            num_query_tokens=4,
            image_token_index=IMAGE,
        ),
        image(3, 28, 28),
    ),
    "git": Family(
        lambda: tf.GitConfig(
            vision_config=VISION,
            vocab_size=128,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
        ),
        image(3, 28, 28),
        auto=tf.AutoModelForCausalLM,
    ),
    "gpt2": Family(
        lambda: tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=128),
        auto=tf.AutoModelForCausalLM,
    ),
}
