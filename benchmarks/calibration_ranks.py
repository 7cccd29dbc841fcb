"""Calibration by one process and by several that share the samples: the same model first, then the ratio of the times.

    python benchmarks/calibration_ranks.py               on 1 and 2 processes; writes results/calibration_ranks.json
    python benchmarks/calibration_ranks.py --ranks 4     on 1 and 4
    python benchmarks/calibration_ranks.py --device cuda each rank on its own GPU

The model is a LLaVA with random weights, the samples are random as well: the work does not depend on them. Every
process has one thread, so that two processes on two cores are compared with one process on one of them. Runs take
turns, and the median of the rounds' ratios is what counts; `torchrun` starts them. Nothing is said of the times if the
quantized parameters or the losses differ in a single bit.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEXT = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "pad_token_id": 0,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
    "projection_dim": 64,
}
IMAGE, NUM_IMAGE_TOKENS, NUM_TEXT_TOKENS, NUM_ANSWER_TOKENS = 2000, 64, 48, 16


def run_rank(samples: int, device: str, output: pathlib.Path) -> None:
    """One process of a run; torchrun has set the environment. Rank 0 writes what was found."""
    sys.path.insert(0, str(ROOT))
    import torch
    import torch.distributed as dist
    import transformers as tf

    from mbq_ao import mbq_config, quantize_
    from mbq_ao.calibration.work_dir import tensor_text

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    config = tf.LlavaConfig(vision_config=VISION, text_config=TEXT, image_token_index=IMAGE)
    model = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    data = []
    for _ in range(samples):
        ids = torch.randint(3, 1900, (1, NUM_IMAGE_TOKENS + NUM_TEXT_TOKENS))
        ids[:, 2 : 2 + NUM_IMAGE_TOKENS] = IMAGE
        labels = ids.clone()
        labels[:, :-NUM_ANSWER_TOKENS] = -100
        pixels = torch.randn(1, 3, VISION["image_size"], VISION["image_size"])
        data.append({"input_ids": ids, "attention_mask": ids > 0, "labels": labels, "pixel_values": pixels})
    dist.barrier()
    report = quantize_(
        model,
        mbq_config(data, recipe="mbq", group_size=64),
        device=f"cuda:{rank}" if device == "cuda" else None,
        progress=False,
    )
    assert report is not None
    state = "\n".join(f"{name} {tensor_text(tensor)}" for name, tensor in model.state_dict().items())
    found = {
        "seconds": report.seconds,
        "model": hashlib.sha256(state.encode()).hexdigest(),
        "report": [[group.alpha, group.losses, group.sensitivity_raw] for group in report.groups],
    }
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, found)
    if rank == 0:
        output.write_text(json.dumps(of_all))
    dist.destroy_process_group()


def run(ranks: int, samples: int, device: str) -> list[dict[str, Any]]:
    """What each rank found."""
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [__file__, "--samples", str(samples), "--device", device, "--as-rank", str(output)]
        environment = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
        subprocess.run(command, check=True, env=os.environ | environment | {"OMP_NUM_THREADS": "1"})
        return json.loads(output.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--as-rank", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank is not None:
        run_rank(options.samples, options.device, options.as_rank)
        return

    rounds = []
    for _ in range(options.rounds):
        (one,), several = (run(n, options.samples, options.device) for n in (1, options.ranks))
        for rank, found in enumerate(several):
            for what in ("model", "report"):
                if found[what] != one[what]:
                    sys.exit(f"the {what} of rank {rank} of {options.ranks} is not that of one process")
        rounds.append((one["seconds"], max(found["seconds"] for found in several)))
        print(f"1 process: {rounds[-1][0]:.1f} s, {options.ranks} processes: {rounds[-1][1]:.1f} s", flush=True)

    import torch
    import transformers

    ratios = [one / several for one, several in rounds]
    result = {
        "ranks": options.ranks,
        "samples": options.samples,
        "same model and report, bit for bit": True,
        "time of one process / time of several": {"median": statistics.median(ratios), "rounds": ratios},
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU",
        "cores": os.cpu_count(),
        "load average": os.getloadavg()[0],
        "threads a process": 1,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(result, indent=1))
    (RESULTS / "calibration_ranks.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
