"""Language models, and one for each kind of decoder layer that vision-language models may have."""

from __future__ import annotations

from collections.abc import Callable

import transformers as tf

from families.parts import TEXT, TWO_MASKS, Family, text


def _language(config: Callable[[], tf.PretrainedConfig], layers: str = "model.layers") -> Family:
    return Family(config, layers=layers, auto=tf.AutoModelForCausalLM)


LANGUAGE: dict[str, Family] = {
    "llama": _language(lambda: tf.LlamaConfig(**TEXT)),
    "llama_mha": _language(lambda: tf.LlamaConfig(**text(num_key_value_heads=4))),
    "qwen2": _language(lambda: tf.Qwen2Config(**TEXT)),
    "qwen3": _language(lambda: tf.Qwen3Config(**TEXT)),
    "mistral": _language(lambda: tf.MistralConfig(**TEXT)),
    "phi": _language(lambda: tf.PhiConfig(**TEXT)),
    "phi3": _language(lambda: tf.Phi3Config(**TEXT)),
    "opt": _language(lambda: tf.OPTConfig(**text(ffn_dim=128, word_embed_proj_dim=64)), "model.decoder.layers"),
    "gemma2": _language(lambda: tf.Gemma2Config(**TEXT)),
    "gemma3_text": _language(lambda: tf.Gemma3TextConfig(**text(**TWO_MASKS))),
    "gemma3n_text": _language(
        lambda: tf.Gemma3nTextConfig(
            **text(
                layer_types=["full_attention"] * 2,
                num_kv_shared_layers=1,
                hidden_size_per_layer_input=16,
                vocab_size_per_layer_input=128,
                laurel_rank=16,
                altup_num_inputs=2,
                activation_sparsity_pattern=[0.5, 0.0],
            )
        )
    ),
    "cohere": _language(lambda: tf.CohereConfig(**TEXT)),
    "olmo2": _language(lambda: tf.Olmo2Config(**TEXT)),
    "starcoder2": _language(lambda: tf.Starcoder2Config(**TEXT)),
    "nemotron": _language(lambda: tf.NemotronConfig(**TEXT)),
    "gpt_neox": _language(lambda: tf.GPTNeoXConfig(**TEXT), "gpt_neox.layers"),
    "falcon": _language(lambda: tf.FalconConfig(**{k: v for k, v in TEXT.items() if k != "head_dim"}), "transformer.h"),
    "mamba": _language(
        lambda: tf.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=128, state_size=16), "backbone.layers"
    ),
}
