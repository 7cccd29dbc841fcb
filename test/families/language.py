"""Language models, and one for each kind of decoder layer that vision-language models may have."""

from __future__ import annotations

import transformers as tf

from families.parts import TEXT, TWO_MASKS, Family, language, text

LANGUAGE: dict[str, Family] = {
    "llama": language(lambda: tf.LlamaConfig(**TEXT)),
    "llama_mha": language(lambda: tf.LlamaConfig(**text(num_key_value_heads=4))),
    "qwen2": language(lambda: tf.Qwen2Config(**TEXT)),
    "qwen3": language(lambda: tf.Qwen3Config(**TEXT)),
    "mistral": language(lambda: tf.MistralConfig(**TEXT)),
    "phi": language(lambda: tf.PhiConfig(**TEXT)),
    "phi3": language(lambda: tf.Phi3Config(**TEXT)),
    "opt": language(lambda: tf.OPTConfig(**text(ffn_dim=128, word_embed_proj_dim=64)), "model.decoder.layers"),
    "gemma2": language(lambda: tf.Gemma2Config(**TEXT)),
    "gemma3_text": language(lambda: tf.Gemma3TextConfig(**text(**TWO_MASKS))),
    "gemma3n_text": language(
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
    "cohere": language(lambda: tf.CohereConfig(**TEXT)),
    "olmo2": language(lambda: tf.Olmo2Config(**TEXT)),
    "starcoder2": language(lambda: tf.Starcoder2Config(**TEXT)),
    "nemotron": language(lambda: tf.NemotronConfig(**TEXT)),
    "gpt_neox": language(lambda: tf.GPTNeoXConfig(**TEXT), "gpt_neox.layers"),
    "falcon": language(lambda: tf.FalconConfig(**{k: v for k, v in TEXT.items() if k != "head_dim"}), "transformer.h"),
    "mamba": language(
        lambda: tf.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=128, state_size=16), "backbone.layers"
    ),
}
