"""Memory and time of a calibration with compute_device=...: on paper for real sizes, measured on a scaled model.

    python benchmarks/calibration_memory.py           # prints both, writes results/calibration_memory.json

The scaled model is Qwen2.5-VL's, narrower. Each measurement runs in a process of its own, as the host's is its peak
resident set. Without CUDA the device is test/second_device: host memory that torch takes for another device's, and
counts; its bytes are then part of the resident set too. What must hold is asserted: twice the layers, or twice the
samples, move the peak of the device by less than 2%.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # where there is no GPU; before torchao is imported

import torch
import transformers

from mbq_ao import mbq_config, quantize_
from mbq_ao.calibration import scale_search
from mbq_ao.calibration.memory import estimate

_RESULTS = Path(__file__).with_name("results") / "calibration_memory.json"
_BASE = {"layers": 2, "samples": 4, "tokens": 256}
_CHUNK_TOKENS = 256  # scaled down as the model is, to be less than all tokens
# Of Qwen2.5-VL: hidden size, intermediate size, layers, heads, key and value heads.
SIZES = {
    "7B": (3584, 18944, 28, 28, 4),
    "32B": (5120, 27648, 64, 40, 8),
    "72B": (8192, 29568, 80, 64, 8),
}


def published(size: str) -> transformers.Qwen2_5_VLConfig:
    """Qwen2.5-VL's published configs."""
    hidden, intermediate, layers, heads, kv_heads = SIZES[size]
    text = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 152064,
    }
    vision = {"hidden_size": 1280, "intermediate_size": 3456, "out_hidden_size": hidden, "depth": 32}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)


def paper_table(samples: int = 128) -> str:
    lines = [
        "| Qwen2.5-VL | tokens a sample | device (GB) | the same, recipe mbq | 24 GB card | 80 GB card | host (GB) |",
        "|---|---:|---:|---:|---|---|---:|",
    ]
    for size in SIZES:
        for tokens in (1000, 2000):
            e, searched = (estimate(published(size), samples, tokens, recipe=recipe) for recipe in ("best", "mbq"))
            fits = ["fits" if e.device_peak < 0.9e9 * card else "does not fit" for card in (24, 80)]  # 10% for CUDA
            lines.append(
                f"| {size} | {tokens} | {e.device_peak / 1e9:.1f} | {searched.device_peak / 1e9:.1f} | {fits[0]} | "
                f"{fits[1]} | {e.host_peak / 1e9:.0f} |"
            )
    return "\n".join(lines)


def measure(layers: int, samples: int, tokens: int) -> dict[str, Any]:
    """One calibration in this process."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 256,
            "intermediate_size": 896,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": 1000,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        },
        vision_config={"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 256, "depth": 1, "num_heads": 2},
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    data = []
    for _ in range(samples):
        ids = torch.randint(3, 900, (1, tokens))
        labels, vision = ids.clone(), torch.zeros_like(ids, dtype=torch.bool)
        labels[:, :-16], vision[:, 4 : tokens // 2] = -100, True
        data.append({"input_ids": ids, "labels": labels, "vision_mask": vision})
    scale_search.CHUNK_TOKENS = _CHUNK_TOKENS
    stated = estimate(model, samples, tokens, answer_tokens=16, recipe="mbq")
    device, reset, peak = _device()
    before = _max_rss()
    reset()
    began = time.perf_counter()
    report = quantize_(model, mbq_config(data, recipe="mbq", n_grid=5), compute_device=device, progress=False)
    assert report is not None
    return {
        "layers": layers,
        "samples": samples,
        "tokens": tokens,
        "device_peak": peak(),
        "device_estimate": stated.device_peak,
        "host_max_rss": _max_rss(),
        "host_max_rss_before": before,
        "seconds": round(time.perf_counter() - began, 1),
        "seconds_per_block": report.seconds_per_block(),
    }


def _device() -> tuple[torch.device, Any, Any]:
    if torch.cuda.is_available():
        return torch.device("cuda:0"), torch.cuda.reset_peak_memory_stats, torch.cuda.max_memory_allocated
    sys.path.insert(0, str(Path(__file__).parent.parent / "test"))
    from second_device import counted_device

    counted = counted_device()
    return counted.device, counted.reset_peak, counted.peak_bytes


def _max_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=int, nargs=3, metavar=("LAYERS", "SAMPLES", "TOKENS"), help=argparse.SUPPRESS)
    parser.add_argument("--paper", action="store_true", help="only the table on paper")
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(*arguments.worker)))
        return
    print(paper_table(), flush=True)
    if arguments.paper:
        return
    runs = {}
    for name in ("base", *_BASE):
        case = {key: value * (1 + (key == name)) for key, value in _BASE.items()}
        command = [sys.executable, __file__, "--worker", *map(str, case.values())]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        runs["base" if name == "base" else f"twice the {name}"] = json.loads(output.splitlines()[-1])
        print(list(runs)[-1], json.dumps(list(runs.values())[-1]), flush=True)
    for name in ("layers", "samples"):
        ratio = runs[f"twice the {name}"]["device_peak"] / runs["base"]["device_peak"]
        assert ratio < 1.02, f"twice the {name}: {ratio:.3f} times the peak of the device"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "test/second_device"
    about = {"date": str(date.today()), "device": device, "machine": platform.machine(), "torch": torch.__version__}
    _RESULTS.write_text(json.dumps({"about": about, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
