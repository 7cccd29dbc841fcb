"""Calibration time against llm-compressor's AWQ: the same model, the same samples, the ratio of times in one run.

    python benchmarks/calibration_time.py --peer-python PATH    both; writes results/calibration_time.{json,md}
    python benchmarks/calibration_time.py                       ours alone, and how to make an environment for the peer
    python benchmarks/calibration_time.py --smoke               a model of a moment; writes nothing

The model is a Qwen2.5-VL with random weights, small beside the real ones, in fp32; every sample is an image, a question
and an answer. Weights become 3-bit, asymmetric, in groups of 128, in both. The contenders:

    mbq_ao              recipe="mbq": the sensitivity pass, then the search by the balanced absolute error
    mbq_ao, AWQ-like    the same with balance=False, loss="mse": the mean squared error over all tokens, as AWQ
    llm-compressor      oneshot with [AWQModifier(), QuantizationModifier(...)], both as they come

Ours and the peer's are a process each, which loads the model from disk for every run, calibrates a tiny one of the same
kind first, so that first times are not measured, and then measures the one call. Contenders take turns, so that what
else the machine does hits all of them; CPU time, on one thread, hardly depends on that. Every run checks its result:
finite logits on held-out samples, and their mean squared error against full precision, beside what plain rounding (RTN)
on the same grid leaves.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from accuracy_bed.peers import llm_compressor, weight_groups
from small_vlm import TINY, Size, build_model, build_samples, device_name, inputs, logits

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GROUP, BITS, N_GRID = 128, 3, 20
PEER = "llm-compressor"
OURS = ("mbq_ao", "mbq_ao, AWQ-like")
RTN = {True: "llm-compressor RTN", False: "mbq_ao RTN"}
MARK = "RESULT "
HELD_OUT = 4
SMOKE = Size(hidden=256, intermediate=256, layers=1, samples=2, image_side=2, words=20)
HOW_TO_MAKE_AN_ENVIRONMENT = """\
--peer-python PATH is the Python of an environment that has llm-compressor (tried with 0.14.0.1):
    python3.11 -m venv llmcompressor_env
    llmcompressor_env/bin/pip install llmcompressor==0.14.0.1 torch=={torch}
It has its own transformers: llm-compressor 0.14 asks for one that is older than ours."""

# What each does, for who reads the table.
NOTES = [
    f"All: {N_GRID} scales tried for each of four groups a layer (q k v, o, gate up, down), {BITS} bits, asymmetric, "
    f"groups of {GROUP}, the decoder's linears only; inputs and targets of a layer are those of the unquantized model.",
    "mbq_ao: exponents 0, 1/20 .. 19/20 of mean |x|. The time includes finding the groups, the check of the folded "
    "model's logits and packing to 3 bits; that of the balanced one the sensitivity pass, with backward.",
    "llm-compressor: no scaling, or exponents 0, 1/18 .. 1 of mean |x| and 1 - exponent of mean |W| (duo scaling); "
    "mean squared error over all tokens. The time includes tracing the model, two forwards a layer and the final "
    "scales and zero points; weights stay as they are beside those and are packed when the model is saved, which is "
    "not timed.",
]


# --- one run, in a process of its own


def quantize_ours(model: nn.Module, samples: list[dict[str, Tensor]], contender: str) -> None:
    sys.path.insert(0, str(ROOT))
    from mbq_ao import Int3WeightOnlyConfig, mbq_config, quantize_

    if contender in RTN.values():
        quantize_(model, Int3WeightOnlyConfig(group_size=GROUP), lambda m, name: is_quantized(m, name))
        return
    choices: dict[str, Any] = {"balance": False, "loss": "mse"} if "AWQ" in contender else {}
    config = mbq_config(samples, group_size=GROUP, n_grid=N_GRID, recipe="mbq", **choices)
    quantize_(model, config, progress=False)


def is_quantized(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "language_model.layers" in name


def quantize_peer(model: nn.Module, samples: list[dict[str, Tensor]], contender: str) -> None:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    rounding = QuantizationModifier(config_groups=weight_groups(BITS, GROUP), ignore=["re:.*visual.*", "lm_head"])
    awq = [] if contender in RTN.values() else [AWQModifier(n_grid=N_GRID)]
    llm_compressor(model, [inputs(s) for s in samples], [*awq, rounding])


def run(contender: str, folder: pathlib.Path, size: Size, device: str) -> dict[str, Any]:
    from transformers import Qwen2_5_VLForConditionalGeneration

    quantize = quantize_peer if PEER in contender else quantize_ours

    def load(name: str) -> nn.Module:
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / name, dtype=torch.float32).eval().to(device)

    quantize(load("tiny"), build_samples(TINY, TINY.samples, seed=0), contender)
    model, held_out = load("model"), build_samples(size, HELD_OUT, seed=1)
    expected = logits(model, held_out)
    samples = build_samples(size, size.samples, seed=0)
    before, cpu_before = time.perf_counter(), time.process_time()
    quantize(model, samples, contender)
    if device != "cpu":
        torch.accelerator.synchronize()
    seconds, cpu_seconds = time.perf_counter() - before, time.process_time() - cpu_before
    found = logits(model, held_out)
    packages = ("llmcompressor", "compressed-tensors") if PEER in contender else ("torchao",)
    return {
        "contender": contender,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "finite": bool(found.isfinite().all()),
        "error": ((found - expected).square().mean() / expected.square().mean()).item(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)},
    }


# --- all runs


class Worker:
    """`run` in a process of its own, as often as it is asked."""

    def __init__(self, python: str, folder: pathlib.Path, args: argparse.Namespace) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
        self.command = [python, __file__, "--worker"]
        self.asked = {"folder": str(folder), "device": args.device}
        self.log = (folder / f"worker_{id(self)}.log").open("w+")
        self.process = subprocess.Popen(
            self.command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def run(self, contender: str, size: Size) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        request = json.dumps(self.asked | {"contender": contender, "size": asdict(size)})
        with contextlib.suppress(BrokenPipeError):  # its log says why
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self.log.seek(0)
        raise SystemExit(f"{contender} failed under {self.command[0]}:\n{self.log.read()[-4000:]}")

    def close(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.log.close()


def serve() -> None:
    """A worker's side: one request a line."""
    for line in sys.stdin:
        asked = json.loads(line)
        found = run(asked["contender"], pathlib.Path(asked["folder"]), Size(**asked["size"]), asked["device"])
        print(MARK + json.dumps(found), flush=True)


def summarised(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each contender the median times, the error, and the times over ours; raises where a result is wrong."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for one in runs:
        by_name.setdefault(one["contender"], []).append(one)
    rtn = {name: by_name[name][0]["error"] for name in RTN.values() if name in by_name}
    summary: dict[str, Any] = {}
    for name, found in by_name.items():
        plain = rtn[RTN[PEER in name]]
        if not all(one["finite"] for one in found):
            raise SystemExit(f"{name} left a model whose logits are not finite; its time counts for nothing")
        if name not in rtn and not all(0 < one["error"] < plain for one in found):
            raise SystemExit(f"{name} leaves an error of {found[0]['error']:.4f}, RTN {plain:.4f}: it searched nothing")
        summary[name] = {
            "seconds": statistics.median(one["seconds"] for one in found),
            "cpu_seconds": statistics.median(one["cpu_seconds"] for one in found),
            "error": found[0]["error"],
            "error_over_rtn": round(found[0]["error"] / plain, 3),
            "versions": found[0]["versions"],
        }
    if PEER in summary:
        for name in set(OURS) & summary.keys():
            for unit in ("seconds", "cpu_seconds"):
                # Round by round, as the machine is not the same from one to the next.
                pairs = zip(by_name[PEER], by_name[name], strict=True)
                ratio = statistics.median(peer[unit] / ours[unit] for peer, ours in pairs)
                summary[name][f"peer_{unit}_over_ours"] = round(ratio, 2)
    return summary


def table(summary: dict[str, Any]) -> str:
    lines = [
        "| | llm-compressor's time / ours | of CPU time | error on held-out samples | of RTN's |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in summary.items():
        ratios = " | ".join(str(row.get(f"peer_{unit}_over_ours", "")) for unit in ("seconds", "cpu_seconds"))
        lines.append(f"| {name} | {ratios} | {row['error']:.4f} | {row['error_over_rtn']:.3f} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", help="the Python of an environment with llm-compressor")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=Size.layers)
    parser.add_argument("--samples", type=int, default=Size.samples)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="a model of a moment, one repeat; writes nothing")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.worker:
        serve()
        return
    size, repeats = (SMOKE, 1) if args.smoke else (Size(layers=args.layers, samples=args.samples), args.repeats)
    if not args.peer_python:
        print(HOW_TO_MAKE_AN_ENVIRONMENT.format(torch=torch.__version__.partition("+")[0]), flush=True)
    facts = {
        "device": device_name(args.device),
        "threads": args.threads,
        "date": datetime.date.today().isoformat(),
        "model": asdict(size),
        "load": [round(os.getloadavg()[0], 1)],
        "notes": NOTES,
    }
    runs = all_runs(size, repeats, args)
    facts["load"].append(round(os.getloadavg()[0], 1))
    facts |= {"summary": summarised(runs), "runs": runs}
    text = markdown(facts, size, repeats)
    print(f"\n{text}")
    if args.peer_python and not args.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "calibration_time.json").write_text(json.dumps(facts, indent=1) + "\n")
        (RESULTS / "calibration_time.md").write_text(text)


def all_runs(size: Size, repeats: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Plain rounding once, then the others in turns."""
    runs = []
    peers = [PEER] if args.peer_python else []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        build_model(TINY).save_pretrained(folder / "tiny")
        build_model(size).save_pretrained(folder / "model")
        pythons = {False: sys.executable, True: args.peer_python}
        workers = {is_peer: Worker(pythons[is_peer], folder, args) for is_peer in (False, *(True for _ in peers))}
        try:
            for contender in [RTN[False], *(RTN[True] for _ in peers)] + [*OURS, *peers] * repeats:
                runs.append(workers[PEER in contender].run(contender, size))
                print(json.dumps(runs[-1]), flush=True)
        finally:
            for worker in workers.values():
                worker.close()
    return runs


def markdown(facts: dict[str, Any], size: Size, repeats: int) -> str:
    versions = "; ".join(
        f"{name}: " + ", ".join(" ".join(pair) for pair in row["versions"].items())
        for name, row in facts["summary"].items()
        if name in (OURS[0], PEER)
    )
    loads = " before and ".join(map(str, facts["load"]))
    return (
        f"Qwen2.5-VL of {size.layers} layers, {size.hidden} x {size.intermediate}, random weights, fp32; "
        f"{size.samples} samples of {size.tokens} tokens, {size.image_side**2} of them of an image. "
        f"{facts['device']}, {facts['threads']} threads, {facts['date']}, load average {loads} after; medians of "
        f"{repeats} rounds. {versions}. Error: mean squared, of the logits, over theirs.\n\n"
        f"{table(facts['summary'])}\n\n" + "".join(f"- {note}\n" for note in NOTES)
    )


if __name__ == "__main__":
    main()
