"""The main job on real input: load a VLM, calibrate, quantize, compare, save, reload.

The comparison is the same questions for full precision, plain rounding (RTN), for W4A8 SmoothQuant, and the recipe,
asked one by one in the model's chat template. Small differences need more images than the default: look at the error
column before you conclude anything (`--images 1000` asks all 9,673 test questions).
"""

from __future__ import annotations

import copy
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig

import mbq_ao
from mbq_ao.demo.data import calibration_batches, group_by_image, load_easy_vqa
from mbq_ao.demo.evaluate import Evaluation, answer, evaluate
from mbq_ao.demo.model import build_demo_vlm
from mbq_ao.kernels.reference import quantize_tokens
from mbq_ao.packed_weight import parameter_nbytes

_WEIGHTS = "model.pt"
_LABELS = {"w3a16": "W3", "w4a8": "W4A8"}
_NAMES = {"best": "best", "mbq": "MBQ", "paper": "MBQ (paper)", "gptq": "GPTQ"}


@dataclass
class Row:
    """One line of the demo's table."""

    name: str
    nbytes: int
    result: Evaluation


def run_demo(
    *,
    model_name: str | None = None,
    num_samples: int = 16,
    num_images: int = 80,
    precision: Literal["w3a16", "w4a8"] = "w3a16",
    group_size: int | Literal["auto"] | None = "auto",
    recipe: Literal["best", "mbq", "paper", "gptq"] = "best",
    seed: int = 0,
    output: Path = Path("demo_output"),
) -> list[Row]:
    """Run the demo and write report.json, report.png, results.json and the quantized model to `output`.

    model_name: hub name or local path of any transformers VLM; None: the small one that comes with the package.
    precision, group_size, recipe: as in mbq_config.
    Raises ImportError naming what to install if the demo's packages are missing.
    """
    began = time.perf_counter()
    # Compiling the CPU kernel takes longer than unpacking for the three short answers below.
    os.environ.setdefault("MBQ_AO_CPU_COMPILE", "0")
    with step("loading the model and easy-VQA"):
        model, processor = load_vlm(model_name)
        calibration = calibration_batches(processor, load_easy_vqa("train"), num_samples=num_samples, seed=seed)
        by_image = group_by_image(load_easy_vqa("test"))[:num_images]
        questions = [row for rows in by_image for row in rows]
        shared = model_name is None  # prompts of the demo model are known to begin with the image
    print(f"{type(model).__name__}, {count_parameters(model) / 1e6:.0f}M parameters, {model.dtype}")

    def measure(name: str, candidate: nn.Module) -> Row:
        with step(f"asking {len(questions)} questions about {len(by_image)} test images: {name}"):
            result = evaluate(unpacked_once(candidate), processor, questions, share_prefix=shared)
        return Row(name, parameter_nbytes(candidate), result)

    example = questions[0]
    rows = [measure("full precision", model)]
    answers = {"full precision": answer(model, processor, example.image, example.question)}

    label, names = _LABELS[precision], decoder_linears(model)
    config = mbq_ao.mbq_config(calibration, precision=precision, group_size=group_size, recipe=recipe)
    quantizer = config.quantizer()
    baselines: dict[str, AOBaseConfig] = {f"{label} RTN": quantizer.rounding(group_size=quantizer.group_size)}
    if precision == "w4a8":
        baselines[f"{label} SmoothQuant"] = replace(config, recipe="smoothquant", balance=None)
    for name, baseline in baselines.items():
        candidate = copy.deepcopy(model)
        with step(f"quantizing: {name}"):
            mbq_ao.quantize_(candidate, baseline, lambda module, fqn: fqn in names, progress=False)
        rows.append(measure(name, candidate))
        answers[name] = answer(candidate, processor, example.image, example.question)
        del candidate

    print(f"quantize_(model, mbq_config(calib_data)) with {num_samples} image-question pairs:")
    report = mbq_ao.quantize_(model, config)
    assert report is not None
    print(report)
    name = f"{label} {_NAMES[recipe]}"
    rows.append(measure(name, model))
    answers[name] = answer(model, processor, example.image, example.question)

    output.mkdir(parents=True, exist_ok=True)
    with step(f"saving to {output}/, loading again, comparing logits"):
        check_reload(model, processor, calibration[0], output)
    report.to_json(output / "report.json")
    report.plot(output / "report.png")
    write_results(output / "results.json", rows, report.settings, num_samples, seed)

    print(f"\n{format_table(rows)}\n")
    print(f"Q: {example.question}   (expected: {example.answer})")
    for name, text in answers.items():
        print(f"   {name:<17} {text}")
    print(f"\nPicture of the calibration: {output / 'report.png'}. Whole demo: {time.perf_counter() - began:.0f} s.")
    return rows


@contextmanager
def step(name: str) -> Iterator[None]:
    """Say what is going on, and how long it took."""
    print(f"{name} ... ", end="", flush=True)
    began = time.perf_counter()
    yield
    print(f"{time.perf_counter() - began:.0f} s", flush=True)


def load_vlm(name: str | None) -> tuple[Any, Any]:
    """(model, processor): the demo's own, or any that the Auto classes load."""
    if name is None:
        return build_demo_vlm()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto").eval()
    return model, AutoProcessor.from_pretrained(name)


def decoder_linears(model: nn.Module) -> set[str]:
    """Names of the linears that MBQ quantizes, so that plain rounding gets the same ones."""
    from mbq_ao.calibration.capture import find_blocks

    return {
        f"{block}.{name}"
        for block, module in find_blocks(model).items()
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear)
    }


def unpacked_once(model: nn.Module) -> nn.Module:
    """A copy for evaluation on a CPU that does not unpack its weights over and over.

    There the kernels unpack a weight at every call and hand it to F.linear; here it is unpacked beforehand. Packed stay
    weights with an act_pre_scale of W3A16, as moving the factor would change the rounding, and of W4A8 in 16 bits,
    where integers are multiplied.
    """
    if next(model.parameters()).device.type != "cpu":
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, mbq_ao.MBQW4A8Tensor) and weight.dtype == torch.float32:
            module.register_forward_pre_hook(partial(_round_tokens, weight.act_pre_scale))
        elif not isinstance(weight, mbq_ao.MBQInt3Tensor) or weight.act_pre_scale is not None:
            continue
        module.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    return model


def _round_tokens(act_pre_scale: Tensor | None, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    q, d = quantize_tokens(args[0], act_pre_scale)
    return (q * d,)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def check_reload(model: Any, processor: Any, batch: dict[str, Tensor], folder: Path) -> None:
    """Save config, processor and weights, load them into a new model, and compare logits bit for bit.

    Raises RuntimeError if they differ.
    """
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    torch.save(model.state_dict(), folder / _WEIGHTS)
    reloaded = type(model)(model.config).to(model.dtype).eval()
    reloaded.load_state_dict(torch.load(folder / _WEIGHTS, weights_only=True, mmap=True), assign=True)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if not torch.equal(model(**inputs).logits, reloaded(**inputs).logits):
        raise RuntimeError(f"the model saved in {folder} and loaded again gives other logits")


def format_table(rows: list[Row]) -> str:
    """Markdown: size, accuracy with standard error, negative log-likelihood."""
    lines = [
        "| | size (MB) | accuracy (%) | standard error | answer NLL |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.name} | {row.nbytes / 1e6:.0f} | {100 * row.result.accuracy:.1f} | "
        f"{100 * row.result.standard_error:.1f} | {row.result.answer_nll:.3f} |"
        for row in rows
    ]
    return "\n".join(lines)


def write_results(path: Path, rows: list[Row], settings: dict[str, Any], num_samples: int, seed: int) -> None:
    """The table as JSON, with what it takes to reproduce it."""
    record = {
        "date": date.today().isoformat(),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mbq_ao": mbq_ao.__version__,
        "settings": settings,
        "num_calibration_samples": num_samples,
        "seed": seed,
        "rows": [
            {
                "name": row.name,
                "nbytes": row.nbytes,
                "num_questions": row.result.num_questions,
                "accuracy": row.result.accuracy,
                "standard_error": row.result.standard_error,
                "answer_nll": row.result.answer_nll,
            }
            for row in rows
        ],
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
