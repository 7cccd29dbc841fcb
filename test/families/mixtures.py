"""Mixtures of experts, whose experts transformers keeps in 3-D parameters."""

from __future__ import annotations

import transformers as tf

from families.parts import (
    GLM_VISION,
    IDS,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    MROPE,
    QWEN_IDS,
    QWEN_VISION,
    VISION,
    Family,
    image,
    language,
    patches,
    text,
)

_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}

MIXTURES: dict[str, Family] = {
    "qwen3_vl_moe": Family(
        lambda: tf.Qwen3VLMoeConfig(
            text_config=text(**_MOE, rope_parameters={**MROPE, "mrope_interleaved": True}),
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
    "llama4": Family(
        lambda: tf.Llama4Config(
            text_config=text(
                intermediate_size=32,
                intermediate_size_mlp=128,
                num_local_experts=4,
                interleave_moe_layer_step=2,
                attention_chunk_size=32,
            ),
            vision_config={
                **VISION,
                "intermediate_size": 128,
                "vision_output_dim": 64,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
                "pixel_shuffle_ratio": 0.5,
            },
            image_token_index=IMAGE,
            boi_token_index=IMAGE_START,
            eoi_token_index=IMAGE_END,
        ),
        image(3, 28, 28),
        num_image_tokens=1,
        layers="language_model.model.layers",
    ),
    "glm4v_moe": Family(
        lambda: tf.Glm4vMoeConfig(
            text_config=text(**_ROUTED, rope_parameters={**MROPE, "partial_rotary_factor": 1.0}),
            vision_config=GLM_VISION,
            image_start_token_id=IMAGE_START,
            image_end_token_id=IMAGE_END,
            **IDS,
        ),
        patches,
    ),
    "mixtral": language(lambda: tf.MixtralConfig(**text(intermediate_size=32, num_local_experts=4))),
    "qwen3_moe": language(lambda: tf.Qwen3MoeConfig(**text(**_MOE))),
    "qwen2_moe": language(lambda: tf.Qwen2MoeConfig(**text(**_MOE, shared_expert_intermediate_size=32))),
    "gpt_oss": language(
        lambda: tf.GptOssConfig(
            **text(intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)
        )
    ),
    "deepseek_v3": language(
        lambda: tf.DeepseekV3Config(
            **text(
                **_ROUTED,
                num_key_value_heads=4,
                head_dim=8,
                kv_lora_rank=32,
                q_lora_rank=32,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=16,
                n_group=2,
                topk_group=1,
            )
        )
    ),
}
