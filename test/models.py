"""Tiny randomly initialised models of many families, and hand-made calibration batches for them.

Every parameter is perturbed, so that no norm weight is 1 and no bias is 0. A batch begins with two text
tokens, then the image, then the question, and ends with the answer, which alone has labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

IMAGE, VIDEO, IMAGE_START, IMAGE_END = 120, 121, 122, 123
NUM_ANSWER_TOKENS = 3

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
QWEN_VISION = {
    "depth": 1,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": IMAGE_START,
    "vision_end_token_id": IMAGE_END,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


def _text(**changes: Any) -> dict[str, Any]:
    return {**TEXT, **changes}


CONFIGS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "llava": lambda: tf.LlavaConfig(
        vision_config=CLIP,
        text_config=_text(model_type="llama"),
        image_token_index=IMAGE,
        image_seq_length=4,
    ),
    "llava_onevision": lambda: tf.LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config=_text(model_type="qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[28, 28], [28, 56]],
    ),
    "qwen2_vl": lambda: tf.Qwen2VLConfig(
        text_config=_text(rope_parameters=MROPE),
        vision_config={**QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        **QWEN_IDS,
    ),
    "qwen2_5_vl": lambda: tf.Qwen2_5_VLConfig(
        text_config=_text(rope_parameters=MROPE),
        vision_config={
            **QWEN_VISION,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 64,
            "fullatt_block_indexes": [0],
            "window_size": 56,
        },
        **QWEN_IDS,
    ),
    "qwen3_vl": lambda: tf.Qwen3VLConfig(
        text_config=_text(rope_parameters={**MROPE, "mrope_interleaved": True}),
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
    "internvl": lambda: tf.InternVLConfig(
        vision_config=VISION,
        text_config=_text(model_type="qwen2"),
        image_token_id=IMAGE,
        image_seq_length=1,
        downsample_ratio=0.5,
    ),
    "gemma3": lambda: tf.Gemma3Config(
        text_config=_text(sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        boi_token_index=IMAGE_START,
        eoi_token_index=IMAGE_END,
    ),
    "smolvlm": lambda: tf.SmolVLMConfig(
        vision_config=VISION,
        text_config=_text(model_type="llama"),
        image_token_id=IMAGE,
        scale_factor=2,
    ),
    "mistral3": lambda: tf.Mistral3Config(
        vision_config=PIXTRAL,
        text_config=_text(model_type="mistral"),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    ),
    "paligemma": lambda: tf.PaliGemmaConfig(
        vision_config={**SIGLIP, "projection_dim": 64},
        text_config=_text(model_type="gemma", num_image_tokens=4),
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
    ),
    "mllama": lambda: tf.MllamaConfig(
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
        text_config=_text(
            num_hidden_layers=3,
            cross_attention_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        image_token_index=IMAGE,
    ),
    "llama": lambda: tf.LlamaConfig(**_text()),
    "llama_mha": lambda: tf.LlamaConfig(**_text(num_key_value_heads=4)),
    "opt": lambda: tf.OPTConfig(**_text(ffn_dim=128, word_embed_proj_dim=64)),
    "phi3": lambda: tf.Phi3Config(**_text()),
    "cohere": lambda: tf.CohereConfig(**_text()),
    "olmo2": lambda: tf.Olmo2Config(**_text()),
    "qwen3": lambda: tf.Qwen3Config(**_text()),
    "starcoder2": lambda: tf.Starcoder2Config(**_text()),
}
_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
MOE_CONFIGS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "qwen3_vl_moe": lambda: tf.Qwen3VLMoeConfig(
        text_config=_text(**_MOE, rope_parameters={**MROPE, "mrope_interleaved": True}),
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
    "llama4": lambda: tf.Llama4Config(
        text_config=_text(
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
    "glm4v_moe": lambda: tf.Glm4vMoeConfig(
        text_config=_text(**_ROUTED, rope_parameters={**MROPE, "partial_rotary_factor": 1.0}),
        vision_config={
            "depth": 1,
            "num_heads": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 64,
            "image_size": 56,
            "patch_size": 14,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=IMAGE_START,
        image_end_token_id=IMAGE_END,
    ),
    "mixtral": lambda: tf.MixtralConfig(**_text(intermediate_size=32, num_local_experts=4)),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_text(**_MOE)),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(**_text(**_MOE, shared_expert_intermediate_size=32)),
    "gpt_oss": lambda: tf.GptOssConfig(
        **_text(intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)
    ),
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **_text(
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
    ),
}
MOE_TEXT_ONLY = ("mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3")
TEXT_ONLY = ("llama", "llama_mha", "opt", "phi3", "cohere", "olmo2", "qwen3", "starcoder2", *MOE_TEXT_ONLY)
NUM_IMAGE_TOKENS = {"llava_onevision": 10, "internvl": 1, "smolvlm": 1, "mllama": 1, "llama4": 1}


def build_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A model of the family in eval mode; `changes` are attributes of its text config."""
    config = (CONFIGS | MOE_CONFIGS)[family]()
    for name, value in changes.items():
        setattr(config.get_text_config(decoder=True), name, value)
    auto = tf.AutoModelForCausalLM if family in TEXT_ONLY else tf.AutoModelForImageTextToText
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model if dtype == torch.float32 else model.to(dtype)  # which makes complex buffers (Llama4) real


def build_batch(family: str, num_text: int = 9, batch_size: int = 1, seed: int = 1) -> dict[str, Any]:
    """What a processor would return, plus labels: `num_text` text tokens, the last three the answer."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 100, (batch_size, num_text), generator=generator)
    if family in TEXT_ONLY:
        ids = text
    else:
        n = NUM_IMAGE_TOKENS.get(family, 4)
        image = torch.tensor([IMAGE_START, *[IMAGE] * n, IMAGE_END]).expand(batch_size, -1)
        ids = torch.cat([text[:, :2], image, text[:, 2:]], 1)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["labels"] = ids.clone()
    batch["labels"][:, :-NUM_ANSWER_TOKENS] = -100
    if family not in TEXT_ONLY:
        batch.update(_image_inputs(family, ids, generator))
    return batch


def _image_inputs(family: str, ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    b, t = ids.shape

    def pixels(*shape: int) -> Tensor:
        return torch.randn(b, *shape, generator=generator)

    if family.startswith(("qwen", "glm4v")):
        return {
            "pixel_values": pixels(16, 3 * 2 * 14 * 14).flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * b),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    if family == "llava_onevision":
        return {"pixel_values": pixels(2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]] * b)}
    if family == "smolvlm":
        return {"pixel_values": pixels(1, 3, 28, 28)}
    if family == "mistral3":
        return {"pixel_values": pixels(3, 56, 56), "image_sizes": torch.tensor([[56, 56]] * b)}
    if family == "mllama":
        seen = torch.zeros(b, t, 1, 2, dtype=torch.long)
        seen[:, 3:, 0, 0] = 1
        return {
            "pixel_values": pixels(1, 2, 3, 28, 28),
            "aspect_ratio_ids": torch.ones(b, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.tensor([[[1, 0]]] * b),
            "cross_attention_mask": seen,
        }
    if family in ("gemma3", "paligemma"):
        return {"pixel_values": pixels(3, 28, 28), "token_type_ids": (ids == IMAGE).long()}
    return {"pixel_values": pixels(3, 28, 28)}


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
