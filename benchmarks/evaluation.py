"""lm-eval's tasks on the demo VLM before and after quantization.

    python benchmarks/evaluation.py --limit 100        # about 20 CPU minutes

Quantizes the demo VLM (W3A16, 16 calibration pairs), saves it, evaluates the original and the checkpoint, and writes
lm-eval's JSON of both, without samples, to results/lm_eval_demo_fp.json and lm_eval_demo_w3.json, and the comparison,
with paired standard errors, to lm_eval_demo.md.
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

from mbq_ao import mbq_config, quantize_
from mbq_ao.demo.data import calibration_batches, load_easy_vqa
from mbq_ao.demo.model import build_demo_vlm
from mbq_ao.evaluation import compare, evaluate

RESULTS = Path(__file__).with_name("results")
TASKS = ("easy_vqa", "easy_vqa_nll", "text_perplexity")
GROUP_SIZE = 64  # the model is 576 wide


def save_quantized(folder: str, num_samples: int, seed: int) -> None:
    model, processor = build_demo_vlm()
    calibration = calibration_batches(processor, load_easy_vqa("train"), num_samples=num_samples, seed=seed)
    quantize_(model, mbq_config(calibration, group_size=GROUP_SIZE))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = f"{folder}/demo-w3"
        save_quantized(checkpoint, options.samples, options.seed)
        results = {
            "demo": evaluate("demo", TASKS, limit=options.limit, log_samples=True),
            "demo-w3": evaluate(checkpoint, TASKS, name="demo-w3", limit=options.limit, log_samples=True),
        }
    comparison = compare(*results.values())
    print(comparison.markdown())
    for name, result in zip(("fp", "w3"), results.values(), strict=True):
        text = json.dumps(shareable(result), indent=1, default=str)
        (RESULTS / f"lm_eval_demo_{name}.json").write_text(text + "\n", encoding="utf-8")
    note = (
        f"`python benchmarks/evaluation.py --limit {options.limit} --samples {options.samples} --seed {options.seed}`, "
        f"{date.today()}, torch {torch.__version__}: the first {options.limit} questions and passages of each task.\n"
    )
    (RESULTS / "lm_eval_demo.md").write_text(comparison.markdown() + "\n" + note, encoding="utf-8")


if __name__ == "__main__":
    main()
