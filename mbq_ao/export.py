"""The decoder of a quantized model as one program for torch.export and AOTInductor: `export_decoder`.

The program holds a static cache and takes as many tokens as there are: a prompt, then one at a time. What comes before
the decoder (vision tower, merging the image into the embeddings) stays in Python, its sizes differ from image to image.
Every quantized linear is one op of ours in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config
from transformers import AttentionInterface, Cache, GenerationMixin, StaticCache
from transformers.cache_utils import StaticLayer

from mbq_ao.tensor_parallel import is_sharded

_ATTENTION = "mbq_exported"
_NUM_TRIED = 5  # tokens on which the decoder is compared with the model
# Inputs through which images get past inputs_embeds, or past the causal mask.
_BESIDE_EMBEDS = ("deepstack_visual_embeds", "cross_attention_states", "token_type_ids")


def export_decoder(model: GenerationMixin, *, max_cache_len: int, batch_size: int = 1) -> ExportedProgram:
    """The language model of a transformers model, with its cache, as a program. The model is left as it is.

        program = export_decoder(model, max_cache_len=2048)
        logits = program.module()(inputs_embeds, position_ids, start)

    inputs_embeds: (B, T, hidden size) in the model's dtype, T from 1 to max_cache_len: the embeddings of the tokens,
        the image's among them.
    position_ids: (B, T), or (3, B, T) where the model has positions in time, height and width (Qwen-VL).
    start: int64 of shape (), how many tokens are in the cache already. 0 begins anew.
    logits: (B, vocabulary), of the last token.

    max_cache_len: tokens that there is room for.  batch_size: B; its sequences have equal lengths, as there is no
    padding. The program is for the device and dtype that the model has.

    Raises TypeError for a model that does not generate; ValueError for one that is tensor parallel or offloaded, whose
    cache is not a plain one (sliding windows), that shows images to its layers in other ways than by embeddings, or
    whose logits are not those of its head.
    """
    decoder = _Decoder(model, batch_size, max_cache_len).eval()
    example = decoder.example(min(7, max_cache_len))
    tokens = Dim("tokens", min=1, max=max_cache_len)
    shapes = ({1: tokens}, {example[1].dim() - 1: tokens}, None)
    with torch.no_grad():
        _check_logits(model, decoder)
        # Without the setting, one token at a time would be a program of its own.
        with _attending_by_mask(decoder.decoder), _config.patch(backed_size_oblivious=True):
            try:
                return torch.export.export(decoder, example, dynamic_shapes=shapes)
            except UserError as error:
                reason = str(error).partition("\n\n")[0]
                raise ValueError(f"{type(model).__name__} cannot be exported, torch.export says: {reason}") from error


class _Decoder(nn.Module):
    def __init__(self, model: Any, batch_size: int, max_cache_len: int) -> None:
        super().__init__()
        check_exportable(model)
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        self.batch_size, self.max_cache_len = batch_size, max_cache_len
        self.embedding_size, self.dtype = model.get_input_embeddings().weight.shape[-1], model.dtype
        config = model.config.get_text_config(decoder=True)
        self.position_rows = 3 if "mrope_section" in (getattr(config, "rope_parameters", None) or {}) else 0
        layers = StaticCache(config, max_cache_len).layers
        others = sorted({type(layer).__name__ for layer in layers if type(layer) is not StaticLayer})
        if others:
            raise ValueError(
                f"the cache of {type(model).__name__} has layers of the kind {', '.join(others)}, and only plain ones "
                "can be exported; compile it instead, mbq_ao.compile_for_generation(model)"
            )
        self.num_layers = len(layers)
        num_heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for i in range(self.num_layers):
            for name in ("keys", "values"):
                zeros = torch.zeros(
                    batch_size, num_heads, max_cache_len, head_dim, dtype=model.dtype, device=model.device
                )
                self.register_buffer(f"{name}_{i}", zeros)

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, start: Tensor) -> Tensor:
        length = inputs_embeds.shape[1]
        cache = Cache(
            layers=[
                _layer(getattr(self, f"keys_{i}"), getattr(self, f"values_{i}"), start) for i in range(self.num_layers)
            ]
        )
        places = torch.arange(length, device=start.device) + start
        mask = torch.arange(self.max_cache_len, device=start.device) <= places[:, None]
        hidden = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=mask[None, None],
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self.head(hidden[:, -1])

    def example(self, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        device = self.keys_0.device
        embeds = torch.randn(self.batch_size, num_tokens, self.embedding_size, device=device).to(self.dtype)
        positions = torch.arange(num_tokens, device=device).expand(self.batch_size, -1)
        if self.position_rows:
            positions = positions.expand(self.position_rows, -1, -1)
        return embeds, positions.contiguous(), torch.tensor(0, device=device)


def _layer(keys: Tensor, values: Tensor, start: Tensor) -> StaticLayer:
    """A cache layer over memory that is there already, `start` tokens of it filled."""
    layer = StaticLayer(keys.shape[2])
    layer.keys, layer.values, layer.cumulative_length = keys, values, start.clone()
    layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    return layer


def check_exportable(model: Any) -> None:
    """Raise TypeError or ValueError for a model whose decoder cannot be a program of its own."""
    if not isinstance(model, GenerationMixin):
        raise TypeError(f"export_decoder needs a transformers model that can generate, got {type(model).__name__}")
    kind = type(model).__name__
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) or parameter.device.type == "meta":
            where = "sharded over several ranks" if is_sharded(parameter) else "offloaded"
            raise ValueError(f"{name} is {where}: export a {kind} that one device holds")
    taken = {*inspect.signature(model.forward).parameters, *inspect.signature(model.get_decoder().forward).parameters}
    if beside := [name for name in _BESIDE_EMBEDS if name in taken]:
        raise ValueError(
            f"{kind} shows images to its layers by {' and '.join(beside)}, which the program of a decoder does not "
            "take; compile it instead, mbq_ao.compile_for_generation(model)"
        )


def _check_logits(model: Any, decoder: _Decoder) -> None:
    """Raise ValueError unless the decoder and its head compute the model's logits."""
    embeds, positions, start = decoder.example(min(_NUM_TRIED, decoder.max_cache_len))
    expected = model(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits[:, -1]
    with _attending_by_mask(decoder.decoder):
        found = decoder(embeds, positions, start)
    for cache in decoder.buffers(recurse=False):
        cache.zero_()
    error = float((found - expected).norm() / expected.norm())
    if not error < (1e-3 if decoder.dtype == torch.float32 else 5e-2):
        raise ValueError(
            f"{type(model).__name__} computes other logits than its decoder and head do (relative difference "
            f"{error:.1g}): it does more with them, or its attention has more to it, and cannot be exported"
        )


@contextmanager
def _attending_by_mask(decoder: nn.Module) -> Iterator[None]:
    """The decoder's attention by `_attend`, which unlike transformers' own does the same for one token as for many."""
    configs = {id(m.config): m.config for m in decoder.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    AttentionInterface.register(_ATTENTION, _attend)
    try:
        for config in configs:
            config._attn_implementation = _ATTENTION
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """(B, heads, T, d) of query, (B, key-value heads, S, d) of key and value -> (B, T, heads, d)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    y = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return y.transpose(1, 2).contiguous(), None
