"""Which tokens should calibration weigh in a mixture of experts? Measured on small VLMs that are trained here.

    python benchmarks/moe.py            trains three models (ten minutes each, kept), writes results/moe.{json,md}
    python benchmarks/moe.py --smoke    all of it in seconds on a model that has learnt nothing; writes nothing

Variants, each on the same draws of calibration pairs:

    RTN           plain rounding
    AWQ-like      all tokens weigh the same (balance=False)
    MBQ           vision and answer tokens by how much they move the loss (balance=True)
    ..., routed   and each token of an expert's own search (its down projection) also by the factor that the expert's
                  output has for it (CalibrationSettings.route_weighted). The scale of gate and up is one for all
                  experts, searched on the output of the whole mixture, where that factor weighs in any case.

What counts is the KL divergence of the replies from those in full precision, and their NLL: accuracy is close to full
precision's. Variants are compared draw by draw, as a draw moves all of them.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))
import moe_vlm
from accuracy_bed.exam import Exam, packed_questions
from small_vlm import device_name
from torchao.quantization import FqnToConfig, quantize_

from mbq_ao import Int3WeightOnlyConfig, Int8DynamicActivationInt4WeightMBQConfig, mbq_config
from mbq_ao.calibration.mbq import calibrate
from mbq_ao.demo.data import calibration_batches, load_easy_vqa

ROOT = Path(__file__).resolve().parents[1]
RESULTS, MODELS = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "moe_models"
PRECISIONS = {"w3a16": Int3WeightOnlyConfig, "w4a8": Int8DynamicActivationInt4WeightMBQConfig}
# balance, route_weighted
VARIANTS = {
    "AWQ-like": (False, False),
    "AWQ-like, routed": (False, True),
    "MBQ": (True, False),
    "MBQ, routed": (True, True),
}
PAIRS = [("MBQ", "AWQ-like"), ("MBQ, routed", "MBQ"), ("AWQ-like, routed", "AWQ-like")]


def measure(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Everything about the model that is trained with this seed."""
    torch.set_num_threads(1)
    path = options.models / f"seed{seed}.safetensors"
    model, processor = moe_vlm.train(seed, path, options.rounds)
    parts = packed_questions(processor, load_easy_vqa("test"), options.images)
    exam = Exam.of(model, parts)
    found: dict[str, Any] = {
        "seed": seed,
        "questions": sum(len(part.image_ids) for part in parts),
        "full precision": exam.take(model).summary(),
        "routing": moe_vlm.routing(parts, model),
        "runs": [],
    }
    rows = load_easy_vqa("train")

    def record(precision: str, variant: str, quantized: torch.nn.Module, **more: Any) -> None:
        run = {"precision": precision, "variant": variant, **more, **exam.take(quantized).summary()}
        found["runs"].append(run)
        print(f"model {seed}: {json.dumps(run)}", flush=True)

    for precision in options.precisions:
        group_size = options.group_size if precision == "w3a16" else None
        rounded = copy.deepcopy(model)
        names = (r"re:model\.language_model\..*\.self_attn\.\w_proj", r"re:.*\.experts\.(gate_up|down)_proj")
        quantize_(rounded, FqnToConfig(dict.fromkeys(names, PRECISIONS[precision](group_size=group_size))), None)
        record(precision, "RTN", rounded)
        for draw in range(options.draws):
            batches = calibration_batches(processor, rows, options.samples, seed=draw)
            for variant, (balance, route_weighted) in VARIANTS.items():
                config = mbq_config(
                    batches,
                    precision=precision,
                    recipe="mbq",
                    group_size=group_size,
                    balance=balance,
                    n_grid=options.n_grid,
                )
                settings = replace(config.settings(), route_weighted=route_weighted)
                quantized = copy.deepcopy(model)
                plan, report = calibrate(quantized, batches, settings, progress=False)
                plan.apply(quantized)
                tokens = [n for experts in report.experts for n in experts.num_tokens]
                record(
                    precision,
                    variant,
                    quantized,
                    draw=draw,
                    seconds=round(report.seconds, 1),
                    loss_over_rtn=statistics.mean(g.loss / g.loss_rtn for g in report.groups if g.loss_rtn),
                    experts_exponents=[g.alpha for g in report.groups if g.num_tokens is not None],
                    experts_without_tokens=tokens.count(0),
                    tokens_of_an_expert=[min(tokens), statistics.median(tokens), max(tokens)],
                )
    return found


def compared(models: list[dict[str, Any]], precision: str) -> list[dict[str, Any]]:
    """Differences of two variants on the same model and draw."""
    found = []
    for first, second in PAIRS:
        row: dict[str, Any] = {"first": first, "second": second}
        for score in ("kl", "nll", "correct"):
            differences = []
            for model in models:
                runs = {(r["variant"], r.get("draw")): r[score] for r in model["runs"] if r["precision"] == precision}
                draws = [draw for variant, draw in runs if variant == first]
                differences.append([runs[first, draw] - runs[second, draw] for draw in draws])
            every = [d for of_model in differences for d in of_model]
            spread = statistics.stdev(every) / len(every) ** 0.5 if len(every) > 1 else float("nan")
            row[score] = {
                "mean": statistics.mean(every),
                "standard_error": spread,
                "of_models": [statistics.mean(d) for d in differences],
                "lower_in": sum(d < 0 for d in every),
                "of": len(every),
            }
        found.append(row)
    return found


def table(results: dict[str, Any]) -> str:
    models = results["models"]
    lines = ["# Weighting tokens in mixtures of experts", ""]
    lines += [
        f"`{results['command']}`, {results['date']}, {results['device']}, torch {results['torch']}, transformers "
        f"{results['transformers']}. {len(models)} models of {moe_vlm.LAYERS} layers with {moe_vlm.EXPERTS} experts, "
        f"{moe_vlm.EXPERTS_A_TOKEN} a token; {models[0]['questions']} test questions; {results['draws']} draws of "
        f"{results['samples']} calibration pairs, {results['n_grid']} exponents for each scale. KL and NLL in nats a "
        "reply, mean (lowest to highest draw); `s.e.`: over the draw of test images, clustered by image.",
        "",
    ]
    for precision in results["precisions"]:
        grouping = f", groups of {results['group_size']}" if precision == "w3a16" else ", one scale a row"
        lines += [f"## {precision.upper()}{grouping}", ""]
        lines += ["| model | variant | KL | NLL | s.e. | accuracy (%) | s.e. |", "|---|---|---|---|---|---|---|"]
        for model in models:
            full = {**model["full precision"], "variant": "full precision"}
            runs = [full, *(r for r in model["runs"] if r["precision"] == precision)]
            for variant in dict.fromkeys(r["variant"] for r in runs):
                of_variant = [r for r in runs if r["variant"] == variant]
                cells = [str(model["seed"]), variant]
                for score, factor in (("kl", 1), ("nll", 1), ("correct", 100)):
                    values = [factor * r[score] for r in of_variant]
                    span = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
                    cells.append(f"{statistics.mean(values):.4g}{span}")
                    if score != "kl":
                        cells.append(f"{factor * statistics.mean(r[f'{score}_se'] for r in of_variant):.2g}")
                lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "Differences on the same model and draw, with their standard error over all of them:", ""]
        lines += ["| difference | of KL | lower in | of each model | of NLL | lower in | of accuracy (%) |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in results["compared"][precision]:
            kl, nll, correct = row["kl"], row["nll"], row["correct"]
            lines.append(
                f"| {row['first']} - {row['second']} | {kl['mean']:+.2g} ({kl['standard_error']:.2g}) | "
                f"{kl['lower_in']} of {kl['of']} | {', '.join(f'{d:+.2g}' for d in kl['of_models'])} | "
                f"{nll['mean']:+.2g} ({nll['standard_error']:.2g}) | {nll['lower_in']} of {nll['of']} | "
                f"{100 * correct['mean']:+.2f} ({100 * correct['standard_error']:.2f}) |"
            )
        lines.append("")
    lines += ["## Routing of test tokens", "", *_routing(models)]
    return "\n".join(lines) + "\n"


def _routing(models: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Share of a modality's choices that fall on its busiest and its least busy expert of a layer, and how many of "
        "the layer's experts get more than 1% of them.",
        "",
        "| model | layer | vision | answer | prompt text |",
        "|---|---|---|---|---|",
    ]
    for model in models:
        for layer in range(moe_vlm.LAYERS):
            cells = []
            for kind in ("vision", "answer", "prompt"):
                counts = model["routing"][kind][layer]
                shares = [n / sum(counts) for n in counts]
                used = sum(share > 0.01 for share in shares)
                cells.append(f"{100 * max(shares):.0f}%, {100 * min(shares):.0f}%, {used}")
            lines.append(f"| {model['seed']} | {layer} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the training, a model each")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time, one thread each")
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--draws", type=int, default=3, help="of calibration pairs")
    parser.add_argument("--samples", type=int, default=16, help="calibration pairs of a draw")
    parser.add_argument("--images", type=int, default=150, help="test images; each has about ten questions")
    parser.add_argument("--group-size", type=int, default=128, help="of w3a16")
    parser.add_argument("--n-grid", type=int, default=20, help="exponents tried for each scale")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the trained models")
    parser.set_defaults(rounds=((120, 150, 350), (250, 0, 200)))
    options = parser.parse_args()
    if options.smoke:
        parser.set_defaults(rounds=((2, 1, 1),), n_grid=4, draws=1, samples=2, images=2, seeds=[0])
        parser.set_defaults(precisions=["w3a16"])
        options = parser.parse_args()
    if options.jobs == 1:
        models = [measure(options, seed) for seed in options.seeds]
    else:
        with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
            models = list(pool.map(partial(measure, options), options.seeds))
    results = {
        "command": " ".join(["python", "benchmarks/moe.py", *sys.argv[1:]]),
        "device": f"{device_name('cpu')}, one thread",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "load": round(os.getloadavg()[0], 1),
        **{name: getattr(options, name) for name in ("rounds", "draws", "samples", "group_size", "n_grid")},
        "precisions": options.precisions,
        "models": models,
        "compared": {precision: compared(models, precision) for precision in options.precisions},
    }
    print(table(results))
    if not options.smoke:
        (RESULTS / "moe.json").write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "moe.md").write_text(table(results))


if __name__ == "__main__":
    main()
