"""lm-eval's tasks on the demo VLM: full precision, 3 bits by plain rounding (RTN), 3 bits by MBQ.

    python benchmarks/evaluation.py --limit 100

Writes lm-eval's JSON of each, without samples, to results/lm_eval_demo_{fp,rtn,mbq}.json, and the comparison, with
paired standard errors, to results/lm_eval_demo.md. The quantized models are saved and evaluated as checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("MBQ_AO_CPU_COMPILE", "0")  # compiling the kernel takes longer than unpacking for short answers

import torch
from torch import nn

from mbq_ao import Int3WeightOnlyConfig, mbq_config, quantize_, save_pretrained
from mbq_ao.demo.data import calibration_batches, load_easy_vqa
from mbq_ao.demo.model import build_demo_vlm
from mbq_ao.evaluation import compare, evaluate

RESULTS = Path(__file__).with_name("results")
TASKS = ("easy_vqa", "easy_vqa_nll", "text_perplexity")
GROUP_SIZE = 64  # the model is 576 wide
MODELS = ("fp", "rtn", "mbq")


def save_quantized(kind: str, folder: Path, num_samples: int, seed: int) -> Path:
    model, processor = build_demo_vlm()
    if kind == "rtn":
        quantize_(model, Int3WeightOnlyConfig(group_size=GROUP_SIZE), _in_decoder)
    else:
        calibration = calibration_batches(processor, load_easy_vqa("train"), num_samples=num_samples, seed=seed)
        quantize_(model, mbq_config(calibration, recipe="mbq", group_size=GROUP_SIZE))
    save_pretrained(model, folder / kind)
    processor.save_pretrained(folder / kind)
    return folder / kind


def _in_decoder(module: nn.Module, fqn: str) -> bool:
    return isinstance(module, nn.Linear) and "language_model.layers" in fqn


def shareable(results: dict[str, Any]) -> dict[str, Any]:
    """Without samples, and without what tells of this machine's folders and packages."""
    kept = {k: v for k, v in results.items() if k not in ("samples", "pretty_env_info", "upper_git_hash", "git_hash")}
    for config in kept["configs"].values():
        config["metadata"].pop("config_source", None)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=100, help="questions and passages a task (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=16, help="calibration pairs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration pairs (default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="(default: all)")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.models:
            model = "demo" if kind == "fp" else save_quantized(kind, Path(folder), options.samples, options.seed)
            results[kind] = evaluate(model, TASKS, name=f"demo-{kind}", limit=options.limit, log_samples=True)
            text = json.dumps(shareable(results[kind]), indent=1, default=str)
            (RESULTS / f"lm_eval_demo_{kind}.json").write_text(text + "\n", encoding="utf-8")
    table = compare(*results.values()).markdown()
    print(table)
    note = (
        f"The first {options.limit} questions and passages of each task, {date.today()}, torch {torch.__version__}; "
        f"`python benchmarks/evaluation.py --limit {options.limit} --models {' '.join(options.models)}`.\n"
    )
    (RESULTS / "lm_eval_demo.md").write_text(f"{table}\n{note}", encoding="utf-8")


if __name__ == "__main__":
    main()
