"""Part 5: whole models. One image and a question in, 128 tokens out, one sequence, bf16 and quantized.

The architectures are built from configs written here, with random weights: speed does not depend on them. Quantized
are the linears of the decoder layers, the same ones for all; vision tower, embedding and head stay bf16. Our weights
are made packed, at random, so no 7B model is quantized on the clock. The image of Qwen2.5-VL has 1,500 tokens.

Every (model, precision) is a process. All build and compile at once, and then each is measured alone.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpu_benchmark.adapters import GROUP_SIZE, TorchaoInt4
from gpu_benchmark.generation import Generation
from gpu_benchmark.measure import Clock
from gpu_benchmark.precisions import PRECISIONS as OURS
from gpu_benchmark.tasks import Context, Task

NEW_TOKENS = 128
TEXT_TOKENS = 64
PRECISIONS = ("bf16", "torchao int4", *(f"mbq_ao {name}" for name in OURS))
GIGABYTES = 20  # that one takes while it is built


def qwen2_5_vl(smoke: bool) -> Any:
    """Qwen/Qwen2.5-VL-7B-Instruct, config.json."""
    from transformers import Qwen2_5_VLConfig

    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    if smoke:
        text |= SMALL_TEXT | {"rope_parameters": {**text["rope_parameters"], "mrope_section": [4, 6, 6]}}
        vision |= {"depth": 2, "hidden_size": 32, "intermediate_size": 52, "num_heads": 2, "fullatt_block_indexes": [1]}
        vision |= {"out_hidden_size": text["hidden_size"]}
    ids = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


def llava_onevision(smoke: bool) -> Any:
    """llava-hf/llava-onevision-qwen2-7b-ov-hf, config.json: Qwen2-7B and SigLIP so400m at 384 pixels."""
    from transformers import LlavaOnevisionConfig

    text = {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152000,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
        "num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    if smoke:
        text |= SMALL_TEXT
        vision |= {"hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision |= {"image_size": 28}
    return LlavaOnevisionConfig(
        text_config=text, vision_config=vision, image_token_id=5, video_token_id=6, tie_word_embeddings=False,
        image_grid_pinpoints=[[2 * vision["image_size"]] * 2],
    )  # fmt: skip


SMALL_TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512,
}  # fmt: skip
MODELS: dict[str, Callable[[bool], Any]] = {"Qwen2.5-VL-7B": qwen2_5_vl, "LLaVA-OneVision-7B": llava_onevision}


def tasks(seconds: float, context: Context) -> list[Task]:
    """The models in every precision that passed the gate, `seconds` for the turn of each.

    torchao int4 in one model only: with eight at once, 150 GB would not be enough. A smoke run leaves out what repeats
    itself.
    """
    failed = {f"mbq_ao {name}" for name in OURS if name not in context.precisions}
    pairs = [(model, precision) for model in MODELS for precision in PRECISIONS if precision not in failed]
    first = next(iter(MODELS))
    pairs = [(model, precision) for model, precision in pairs if model == first or precision != "torchao int4"]
    if context.smoke:
        pairs = [*(pair for pair in pairs if pair[0] == first), pairs[-1]]
    return [
        Task(f"{model}, {precision}", functools.partial(measure, model=model, precision=precision), seconds)
        for model, precision in pairs
    ]


def groups(tasks: list[Task], gigabytes: float) -> list[list[Task]]:
    """Those that are built at once: all, or where memory is short those of one model at a time."""
    if gigabytes >= GIGABYTES * len(tasks):
        return [tasks]
    found = [[task for task in tasks if task.name.startswith(model)] for model in MODELS]
    return [group for group in found if group]


def measure(context: Context, *, model: str, precision: str) -> None:
    """Build, quantize, compile; when it is its turn, time it. Emits a row when ready, and rows of results."""
    if precision != "bf16":
        import_mbq_ao(precision)
    torch.manual_seed(0)
    vlm = build(model, context)
    linears = quantize(vlm, precision, context)
    clock = Clock(context.device)
    if clock.on_gpu:
        torch.cuda.empty_cache()  # the bf16 weights that were replaced: other processes are building as well
    inputs = make_inputs(vlm, model, context)
    prompt = inputs["input_ids"].shape[1]
    new_tokens = 8 if context.smoke else NEW_TOKENS
    generation = Generation(vlm, clock, inputs, prompt + new_tokens, context)
    generation.prepare_decode()
    context.emit({
        "model": model, "precision": precision, "quantized_linears": linears, "prompt_tokens": prompt,
        "image_tokens": int((inputs["input_ids"] == vlm.config.image_token_id).sum()), "new_tokens": new_tokens,
        "weight_bytes": weight_bytes(vlm), **generation.how,
    })  # fmt: skip
    context.wait_for_turn()
    context.emit(generation.timings(new_tokens))
    context.emit(generation.prompt_in_a_graph())  # last: what fails here fails alone


def import_mbq_ao(precision: str) -> None:
    """The whole package, where benchmarks/gpu.py has put a root that knows the kernels only; it needs torchao."""
    sys.modules.pop("mbq_ao", None)
    try:
        importlib.import_module("mbq_ao")
    except ImportError as error:
        raise RuntimeError(
            f"{precision} needs torchao, which cannot be imported here ({error}): mbq_ao's tensor is a torchao tensor. "
            "pip install torchao, or carry its wheel; the gate and the kernels need only torch and triton"
        ) from error


def build(model: str, context: Context) -> nn.Module:
    """The model with random weights, made where they stay."""
    from transformers import AutoModelForImageTextToText

    with torch.device(context.device):
        vlm = AutoModelForImageTextToText.from_config(
            MODELS[model](context.smoke), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return vlm.eval().requires_grad_(False)


def decoder_linears(vlm: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the language model's layers by their names in the model."""
    layers = {id(m) for layer in vlm.model.language_model.layers for m in layer.modules()}
    return {name: m for name, m in vlm.named_modules() if isinstance(m, nn.Linear) and id(m) in layers}


def quantize(vlm: nn.Module, precision: str, context: Context) -> int:
    """Quantize the decoder's linears in place; how many."""
    linears = decoder_linears(vlm)
    if ours := OURS.get(precision.removeprefix("mbq_ao ")):
        for linear in linears.values():
            weight = ours.tensor(*linear.weight.shape, torch.bfloat16, context.device)
            linear.weight = nn.Parameter(weight, requires_grad=False)
    elif precision == "torchao int4":
        from torchao.quantization import quantize_

        quantize_(vlm, int4_config(context), filter_fn=lambda module, name: name in linears)
    return len(linears) if precision != "bf16" else 0


def int4_config(context: Context) -> Any:
    if not context.smoke:
        return TorchaoInt4.config()
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup  # tinygemm's packing exists on GPUs only

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP_SIZE))


def make_inputs(vlm: nn.Module, model: str, context: Context) -> dict[str, Tensor]:
    """What the processor would return for one image and a question of 64 tokens."""
    device, config = context.device, vlm.config
    if model.startswith("Qwen"):
        grid = (1, 4, 4) if context.smoke else (1, 60, 100)  # patches of 14 pixels: 840 x 1400
        patches = grid[0] * grid[1] * grid[2]
        image = {"image_grid_thw": torch.tensor([grid], device=device)}
        image["pixel_values"] = torch.randn(patches, 3 * 2 * 14 * 14, device=device).to(torch.bfloat16)
        num_image = patches // 4
    else:
        size = config.vision_config.image_size  # 768 x 768 is a base view and four tiles
        image = {"image_sizes": torch.tensor([[2 * size, 2 * size]], device=device)}
        image["pixel_values"] = torch.randn(1, 5, 3, size, size, device=device).to(torch.bfloat16)
        with torch.no_grad():
            features = vlm.model.get_image_features(**image, return_dict=True).pooler_output
        num_image = sum(len(f) for f in features)
    text = torch.randint(10, config.text_config.vocab_size, (1, TEXT_TOKENS), device=device)
    tokens = torch.full((1, num_image), config.image_token_id, device=device)
    ids = torch.cat([text[:, :10], tokens, text[:, 10:]], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image}
    if model.startswith("Qwen"):
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    return inputs


def weight_bytes(vlm: nn.Module) -> int:
    """Bytes of all parameters, of packed ones what they take packed."""
    total = 0
    for parameter in vlm.parameters():
        inner = [parameter]
        while any(hasattr(t, "__tensor_flatten__") for t in inner):
            inner = [
                part
                for t in inner
                for part in (
                    [getattr(t, name) for name in t.__tensor_flatten__()[0]]
                    if hasattr(t, "__tensor_flatten__")
                    else [t]
                )
            ]
        total += sum(t.nbytes for t in inner)
    return total
