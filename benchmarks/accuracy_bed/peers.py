"""Peers' own programs, each as its authors recommend it, on a decoder that accuracy.py left in a folder.

    PEER_PYTHON benchmarks/accuracy_bed/peers.py "llm-compressor GPTQ" FOLDER

It runs in the peer's environment, so it imports torch, transformers, safetensors and the peer, and nothing of ours.
peer_runs.py writes the folder and reads what is left in it: WEIGHTS and REPORT.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TASK, EXPECTED, WEIGHTS, REPORT = "task.json", "expected.safetensors", "weights.safetensors", "report.json"


@dataclass(frozen=True)
class Task:
    """bits: of weights, asymmetric in groups of `group_size`, all linears but the head.  samples: token ids of each.
    changes: keywords of the peer's own call, where it is not to run as it comes."""

    folder: str
    bits: int
    group_size: int
    samples: list[list[int]]
    changes: dict[str, Any]

    def batches(self) -> list[dict[str, Tensor]]:
        """One sample each, without padding: not every peer leaves masked tokens out of its statistics."""
        ids = [torch.tensor([sample]) for sample in self.samples]
        return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


def decoder_linears(decoder: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}


def weight_groups(bits: int, group_size: int) -> dict[str, Any]:
    """llm-compressor's `config_groups`: weights of all linears, asymmetric."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=group_size)
    return {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}


def llm_compressor(model: nn.Module, samples: list[dict[str, Tensor]], recipe: list[Any]) -> None:
    """In place: the weights stay as they are, or compensated, beside scales and zero points."""
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    if not torch.accelerator.is_available():  # 0.14.0.1 fails where there is nothing to pin memory for
        IntermediatesCache.pin_memory = lambda *_, **__: None
    # Asked for, and not used, as the samples are tokens already.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    oneshot(
        model=model,
        recipe=recipe,
        dataset=torch.utils.data.DataLoader(samples, batch_size=1, collate_fn=lambda rows: rows[0]),
        processor=tokenizer,
        num_calibration_samples=len(samples),
        shuffle_calibration_samples=False,
    )


def _round_as_stored(model: nn.Module) -> None:
    """What llm-compressor would save and load again."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            module.weight.data = fake_quantize(
                module.weight.data, module.weight_scale, module.weight_zero_point, scheme.weights
            )


def by_llm_compressor_awq(model: nn.Module, task: Task) -> None:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    rounding = QuantizationModifier(config_groups=weight_groups(task.bits, task.group_size), ignore=["lm_head"])
    llm_compressor(model, task.batches(), [AWQModifier(**task.changes), rounding])
    _round_as_stored(model)


def by_llm_compressor_gptq(model: nn.Module, task: Task) -> None:
    from llmcompressor.modifiers.gptq import GPTQModifier

    groups = weight_groups(task.bits, task.group_size)
    llm_compressor(model, task.batches(), [GPTQModifier(config_groups=groups, ignore=["lm_head"], **task.changes)])
    _round_as_stored(model)


def by_hqq(model: nn.Module, task: Task) -> None:
    """Of the weights alone."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=task.bits, group_size=task.group_size, axis=1, **task.changes)
    for linear in decoder_linears(model.get_decoder()).values():
        made = HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu", del_orig=False)
        linear.weight.data = made.dequantize()


def by_auto_round(model: nn.Module, task: Task) -> None:
    """It casts the model to bf16. All samples of its batches of eight must have the same length; padding, for which it
    takes repeated last tokens where there is no token for it, counts nowhere."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    longest, size = max(map(len, task.samples)), 8
    ids = torch.tensor([sample + [0] * (longest - len(sample)) for sample in task.samples])
    mask = torch.tensor([[1] * len(sample) + [0] * (longest - len(sample)) for sample in task.samples])
    parts = zip(ids.split(size), mask.split(size), strict=True)
    data = [{"input_ids": i, "attention_mask": m} for i, m in parts]
    tokenizer = AutoTokenizer.from_pretrained(task.folder)
    tokenizer.pad_token = None  # often the one that ends a turn, which is to count
    chosen = {"bits": task.bits, "group_size": task.group_size, "sym": False, "batch_size": size, "device_map": "cpu"}
    given = {"dataset": data, "nsamples": len(ids), "seqlen": longest}
    AutoRound(model, tokenizer, **chosen | given | task.changes).quantize()


def by_gptqmodel(model: nn.Module, task: Task) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.7.0 fails on two cores, of which it takes one by itself
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.config import GPTQConfig

    chosen = {"bits": task.bits, "group_size": task.group_size, "sym": False, "device": "cpu", "offload_to_disk": False}
    # gptq_v2 keeps zero points as they are; of its other format, `dequantize_weight` is off by one before it is saved.
    config = GPTQConfig(**chosen | {"format": "gptq_v2"} | task.changes)
    made = GPTQModel.load(task.folder, config, dtype=model.dtype)
    data = [{"input_ids": sample, "attention_mask": [1] * len(sample)} for sample in task.samples]
    made.quantize(data, batch_size=1, backend=BACKEND.TORCH)
    for name, linear in decoder_linears(model.get_decoder()).items():
        packed = made.model.get_decoder().get_submodule(name)
        linear.weight.data = packed.dequantize_weight().T.to(linear.weight.dtype)


@dataclass(frozen=True)
class Peer:
    """packages: whose versions are kept.  quantize: leaves rounded, plain weights in the model."""

    packages: tuple[str, ...]
    quantize: Callable[[Any, Task], None]


PEERS = {
    "llm-compressor AWQ": Peer(("llmcompressor", "compressed-tensors"), by_llm_compressor_awq),
    "llm-compressor GPTQ": Peer(("llmcompressor", "compressed-tensors"), by_llm_compressor_gptq),
    "gptqmodel GPTQ": Peer(("gptqmodel",), by_gptqmodel),
    "AutoRound": Peer(("auto-round",), by_auto_round),
    "hqq package": Peer(("hqq",), by_hqq),
}


def check_logits(model: Any, task: Task, expected: Tensor) -> None:
    """expected: (samples, V), of the last tokens.  Raises ValueError where this environment's model has others."""
    with torch.no_grad():
        found = torch.stack([model(**batch).logits[0, -1, : expected.shape[1]] for batch in task.batches()])
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= torch.finfo(model.dtype).eps ** 0.5:
        raise ValueError(f"the model loaded here has other logits than the one that was handed over, by {error:.1e}")


def main() -> None:
    from transformers import AutoModelForCausalLM

    name, folder = sys.argv[1], Path(sys.argv[2])
    task = Task(**json.loads((folder / TASK).read_text(encoding="utf-8")))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().requires_grad_(False)
    check_logits(model, task, load_file(folder / EXPECTED)["logits"])
    asked = [key for key, _ in model.get_decoder().named_parameters() if "layers." in key]  # and no scales beside
    before = time.perf_counter()
    PEERS[name].quantize(model, task)
    seconds = time.perf_counter() - before
    save_file({key: model.get_decoder().get_parameter(key).detach().contiguous() for key in asked}, folder / WEIGHTS)
    packages = ("torch", "transformers", *PEERS[name].packages)
    report = {"seconds": seconds, "versions": {package: importlib.metadata.version(package) for package in packages}}
    (folder / REPORT).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
