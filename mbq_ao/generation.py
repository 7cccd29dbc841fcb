"""`compile_for_generation(model)`: what makes `model.generate` of transformers run compiled, in one graph."""

from __future__ import annotations

import torch
from transformers import CompileConfig, GenerationMixin


def compile_for_generation(
    model: GenerationMixin,
    *,
    max_cache_len: int | None = None,
    mode: str | None = "auto",
    backend: str = "inductor",
) -> GenerationMixin:
    """Let `model.generate` compile decoding: a static cache, and one graph without breaks for each new token.

    Sets defaults in `model.generation_config`, which arguments of `generate` override, and returns the model. The
    prompt, images and all, is not compiled: its length differs from call to call. Compiling happens in the first
    `generate`, and again only if a later one needs a longer cache.

    max_cache_len: tokens of prompt and answer together that there shall be room for, so that no later call compiles
        again; it costs the memory of such a cache. None: as long as the longest call so far.
    mode: of torch.compile. "auto" is "reduce-overhead" on a GPU, which is CUDA graphs, and torch's default elsewhere.
    backend: of torch.compile.

    Raises TypeError for a model without `generate`, ValueError for a max_cache_len below 1.
    """
    if not isinstance(model, GenerationMixin):
        raise TypeError(
            f"compile_for_generation needs a transformers model that can generate, got {type(model).__name__}"
        )
    if max_cache_len is not None and max_cache_len < 1:
        raise ValueError(f"max_cache_len must be a number of tokens of at least 1, got {max_cache_len}")
    if mode == "auto":
        mode = "reduce-overhead" if torch.device(model.device).type == "cuda" else None
    config = CompileConfig(fullgraph=True, backend=backend, mode=mode)
    config._compile_all_devices = True  # transformers compiles on accelerators only, unless told otherwise
    model.generation_config.cache_implementation = "static"
    model.generation_config.max_cache_len = max_cache_len
    model.generation_config.compile_config = config
    return model
