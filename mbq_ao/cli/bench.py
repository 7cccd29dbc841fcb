"""`mbq-ao bench`: how fast a quantized model is here, beside its own weights unpacked, or another model."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbq_ao.cli.console import Json, UserError, console
from mbq_ao.cli.models import Device, Dtype, ModelName, chosen_device, load_config, load_model, load_processor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TEXT = "The quick brown fox jumps over the lazy dog, and the dog, who has seen this before, goes on sleeping. "


@dataclass(frozen=True)
class Speed:
    """Medians. prefill: seconds for the prompt and one token.  decode: seconds for each token after it.

    weights: bytes.  peak: bytes allocated on the GPU at most, None elsewhere.
    """

    prefill: float
    decode: float
    weights: int
    peak: int | None


def bench(
    model: ModelName,
    against: Annotated[
        str | None,
        typer.Option(help="Another model to compare with; default: the same model with its weights unpacked."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Length of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode after it.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements, of which the median counts.")] = 5,
    compile: Annotated[bool, typer.Option("--compile", help="Compile decoding, of both models.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> dict[str, Any]:
    """Measure prefill, decoding and memory of a quantized model on this machine, beside full precision.

    Examples:

    `mbq-ao bench llava-w3 --compile`

    `mbq-ao bench llava-w3 --against llava-hf/llava-onevision-qwen2-7b-ov-hf --prompt-tokens 2048`

    Full precision is made by unpacking the weights, which is as fast as the original model, or given with --against.
    Before anything is told the two must agree: the quantized model's logits are compared with those of its unpacked
    weights. Times are of one sequence of text; without a GPU only ratios are shown.
    """
    config = load_config(model)
    computing_on = chosen_device(device)

    import torch
    from tqdm.auto import tqdm

    from mbq_ao.calibration.labels import tokenizer_of
    from mbq_ao.hf_quantizer import packed_weights

    tokenizer = tokenizer_of(load_processor(model))
    ids = tokenizer(_TEXT * prompt_tokens, return_tensors="pt")["input_ids"][:, :prompt_tokens].to(computing_on)
    measured = load_model(model, config, dtype=dtype, device=computing_on)
    packed = packed_weights(measured).values()
    if not packed:
        raise UserError(f"{model} has no quantized weights to measure; make some with mbq-ao quantize")
    rounds_tokens = any(type(weight).__name__ == "MBQW4A8Tensor" for weight in packed)
    used_dtype = str(measured.dtype).removeprefix("torch.")

    def speed(candidate: Any) -> Speed:
        return _measure(candidate, ids, new_tokens, repeats, compile, bar.update)

    with torch.no_grad(), tqdm(total=2 * (2 * repeats + 1), desc="bench", unit=" generations") as bar:
        logits = _logits(measured, ids)
        speeds = {"quantized": speed(measured)}
        _unpack(measured)
        error = max(_difference(a, b) for a, b in zip(logits, _logits(measured, ids), strict=True))
        allowed = _allowed_error(measured.dtype, rounds_tokens)
        if not error <= allowed:
            raise UserError(
                f"{model} computes something else than its unpacked weights: the logits are {error:.1e} apart "
                f"(relative), and rounding makes at most {allowed:g}. No figures are shown; please report this device"
            )
        if against is None:
            speeds["full precision"] = speed(measured)
        else:
            del measured
            speeds[against] = speed(load_model(against, load_config(against), dtype=dtype, device=computing_on))

    result = {
        "model": model,
        "against": against or f"the same model, its weights unpacked to {used_dtype}",
        "device": _device_name(computing_on),
        "dtype": used_dtype,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "compiled": compile,
        "logits_error": error,
        "versions": _versions(),
        "date": date.today().isoformat(),
        **_figures(*speeds.values(), absolute=computing_on.type != "cpu"),
    }
    _show(result, list(speeds))
    return result


def _measure(
    model: Any, ids: Tensor, new_tokens: int, repeats: int, compile: bool, generated: Callable[[], object]
) -> Speed:
    import torch

    from mbq_ao.generation import compile_for_generation
    from mbq_ao.packed_weight import parameter_nbytes

    on_gpu = ids.device.type == "cuda"
    if compile:
        compile_for_generation(model, max_cache_len=ids.shape[1] + new_tokens + 1)

    def generate(count: int) -> None:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
        if on_gpu:
            torch.cuda.synchronize(ids.device)

    def seconds(count: int) -> float:
        began = time.perf_counter()
        generate(count)
        took = time.perf_counter() - began
        generated()
        return took

    seconds(new_tokens + 1)  # warm up: compiling, and the kernels' own choices
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(ids.device)
    prefill = median(seconds(1) for _ in range(repeats))
    decode = (median(seconds(new_tokens + 1) for _ in range(repeats)) - prefill) / new_tokens
    if decode <= 0:
        raise UserError(f"{new_tokens} tokens are too few to measure decoding: they took no time beside the prompt")
    return Speed(
        prefill, decode, parameter_nbytes(model), torch.cuda.max_memory_allocated(ids.device) if on_gpu else None
    )


def _logits(model: Any, ids: Tensor) -> list[Tensor]:
    """Of the prompt, and of one token alone: kernels for many rows and for one."""
    return [model(input_ids=tokens).logits.float().cpu() for tokens in (ids, ids[:, :1])]


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def _allowed_error(dtype: torch.dtype, rounds_tokens: bool) -> float:
    """Relative, of the logits: two orders of rounding; with 8-bit activations also what those lose."""
    import torch

    if rounds_tokens:
        return 0.2
    return 1e-3 if dtype == torch.float32 else 0.05


def _unpack(model: Any) -> None:
    """Plain weights, with the factors of the activations in them, in place of the packed ones."""
    from torch import nn
    from transformers.quantizers.quantizers_utils import get_module_from_name

    from mbq_ao.hf_quantizer import packed_weights

    for name, weight in packed_weights(model).items():
        plain = weight.dequantize()
        if weight.act_pre_scale is not None:
            factor = weight.act_pre_scale.unsqueeze(-1 if weight.transposed else -2)
            plain = (plain.float() * factor.float()).to(plain.dtype)
        module, parameter = get_module_from_name(model, name)
        module._parameters[parameter] = nn.Parameter(plain, requires_grad=False)


def _figures(quantized: Speed, other: Speed, *, absolute: bool) -> dict[str, Any]:
    """Ratios, above 1 where the quantized model is faster or smaller; absolute figures only from a GPU."""
    figures: dict[str, Any] = {
        "ratios": {
            "prefill": other.prefill / quantized.prefill,
            "decode": other.decode / quantized.decode,
            "weights": other.weights / quantized.weights,
        },
        "weights_nbytes": [quantized.weights, other.weights],
    }
    if absolute:
        figures |= {
            "prefill_seconds": [quantized.prefill, other.prefill],
            "decode_tokens_per_second": [1 / quantized.decode, 1 / other.decode],
            "peak_nbytes": [quantized.peak, other.peak],
        }
    return figures


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def _versions() -> dict[str, str]:
    import torch
    import transformers

    import mbq_ao

    return {"mbq_ao": mbq_ao.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _show(result: dict[str, Any], names: list[str]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", *names, "ratio"):
        table.add_column(column, justify="right" if column else "left")
    rows = {
        "prefill (ms)": ("prefill_seconds", "prefill", 1e3, ".1f"),
        "decode (tokens/s)": ("decode_tokens_per_second", "decode", 1.0, ".1f"),
        "weights (MB)": ("weights_nbytes", "weights", 1e-6, ".1f"),
        "peak memory (MB)": ("peak_nbytes", None, 1e-6, ".1f"),
    }
    for label, (field, ratio, unit, form) in rows.items():
        values = result.get(field)
        if values is None and ratio is None:
            continue
        shown = ["-", "-"] if values is None else [format(unit * value, form) for value in values]
        table.add_row(label, *shown, f"{result['ratios'][ratio]:.2f}x" if ratio else "")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    print(f"{result['model']} against {result['against']}")
    print(f"{result['device']}, {result['dtype']}, {result['prompt_tokens']} + {result['new_tokens']} tokens, ", end="")
    print(f"medians of {result['repeats']}{', compiled' if result['compiled'] else ''}; {versions}; {result['date']}")
    print(f"logits agree to {result['logits_error']:.1e} (relative)\n")
    console().print(table)
    if "prefill_seconds" not in result:
        print("\nOnly ratios: times of a CPU say nothing of the GPU that the kernels are made for.")
