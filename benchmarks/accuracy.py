"""Accuracy of quantized vision-language models: every method on the same model, calibration data and questions.

    python benchmarks/accuracy.py --bed shapes --precision w3a16 --methods all --seeds 0 1 2
    python benchmarks/accuracy.py --bed shapes --precision w3a16 --split test --table
    python benchmarks/accuracy.py --bed shapes --methods "llm-compressor GPTQ" --peer-python PATH

The second writes what has been measured to results/accuracy_*.{json,md}. A run (bed, precision, method, seed) is kept
in results/accuracy_runs/ question by question and not repeated, so that a long comparison may be made in parts. Of
each: accuracy, negative log-likelihood of the replies and KL divergence to full precision in nats a reply, flips, nats
a token of plain text (which calibration on images must not damage), and the seconds it took. Methods are compared on
the same questions, draw by draw of the calibration data; standard errors are over the draw of images.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from accuracy_bed.beds import BEDS, Bed, ConversationBed, plain_samples, plain_text
from accuracy_bed.exam import Exam, Scores
from accuracy_bed.methods import METHODS, method_of, quantize
from accuracy_bed.peer_runs import is_peer, peer_of, quantize_by_peer
from accuracy_bed.peers import PEERS
from accuracy_bed.table import FULL_PRECISION, comparison, load_runs, markdown, summary
from small_vlm import device_name

from mbq_ao.calibration.report import CalibrationReport
from mbq_ao.demo.run import unpacked_once

_METHODS_HELP = (
    f'"all", or some of {", ".join(METHODS)}, each with changes after commas: "GPTQ, grid", "MBQ paper, floor=off"; '
    f"or a peer, which needs --peer-python: {', '.join(PEERS)}"
)
RESULTS = Path(__file__).resolve().parent / "results"
RUNS = RESULTS / "accuracy_runs"


def bed_of(options: argparse.Namespace) -> Bed:
    if options.bed in BEDS:
        return BEDS[options.bed]
    if options.data is None:
        sys.exit(f"--bed {options.bed} is none of {', '.join(BEDS)}: for a model of your own, give --data as well")
    return ConversationBed(options.bed, options.data, options.image_folder, options.device)


def folder_of(options: argparse.Namespace) -> Path:
    kind = options.precision if options.precision == "w4a8" else f"{options.precision}g{options.group_size}"
    what = f"{options.split}{options.images or ''}_n{options.samples}_texts{options.texts}"
    return options.runs / bed_of(options).name / kind / what


def run_path(options: argparse.Namespace, method: str, seed: int) -> Path:
    name = method.replace(" ", "_").replace(",", "").replace("+", "plus").replace("=", "_")
    return folder_of(options) / f"{name}_seed{seed}.json"


def searches_of(report: CalibrationReport) -> list[dict[str, Any]]:
    """For the pictures: of each scale group its linears, r before the floor, and the loss of each exponent."""
    return [
        {"block": g.block, "linears": g.linears, "sensitivity": g.sensitivity_raw, "losses": [*map(short, g.losses)]}
        for g in report.groups
        if len(g.losses) > 2
    ]


def short(value: float) -> float:
    """Five digits: the standard errors are far above what that loses."""
    return float(f"{value:.5g}")


def keep(path: Path, scores: Scores, **more: Any) -> None:
    run = {k: [*map(short, v.tolist())] if isinstance(v, Tensor) else v for k, v in vars(scores).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**more, **run}) + "\n", encoding="utf-8")
    partial.replace(path)


def measure(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    wanted = [(m, s) for s in options.seeds for m in options.methods if not run_path(options, m, s).exists()]
    if not wanted:
        return
    bed = bed_of(options)
    model, processor = bed.build()
    exam = Exam.of(model, bed.questions(processor, options.split, options.images), plain_text(processor))
    about: dict[str, Any] = {
        "device": device_name(model.device.type),
        "torch": str(torch.__version__),
        "date": datetime.date.today().isoformat(),
    }
    reference = run_path(options, FULL_PRECISION, 0)
    if not reference.exists():
        keep(reference, exam.take(model), method=FULL_PRECISION, seed=0, seconds=0.0, **about)
    for method, seed in wanted:
        quantized = copy.deepcopy(model)
        calib = bed.calibration(processor, options.samples, seed) + plain_samples(processor, options.texts, seed)
        wanted_is = (options.precision, options.group_size, calib)
        began = time.perf_counter()
        if is_peer(method):
            found = quantize_by_peer(options.peer_python, method, quantized, processor, *wanted_is, options.threads)
            seconds = found.pop("seconds")
        else:
            found = {"searches": searches_of(quantize(quantized, method_of(method), *wanted_is))}
            seconds = time.perf_counter() - began
        scores = exam.take(unpacked_once(quantized))
        keep(run_path(options, method, seed), scores, method=method, seed=seed, seconds=seconds, **about, **found)
        shown = {k: round(v, 4) for k, v in scores.summary().items()}
        print(json.dumps({"method": method, "seed": seed, **shown, "text": scores.text_nll, "s": seconds}), flush=True)


def write_table(options: argparse.Namespace) -> None:
    runs = load_runs(folder_of(options))
    if len(runs) < 2:
        sys.exit(f"nothing to compare in {folder_of(options)}: measure first, with the same options but --table")
    name = "_".join(["accuracy", *folder_of(options).relative_to(options.runs).parts])
    number, images = len(runs[0].of("nll")), len(set(runs[0].runs[0]["image_ids"]))
    kept = {
        k: v
        for k, v in vars(options).items()
        if k not in ("methods", "peer_python", "seeds", "table", "compare", "pictures", "threads", "runs")
    }
    about = {k: runs[-1].runs[-1][k] for k in ("device", "torch", "date")}
    text = json.dumps(
        {**kept, "questions": number, "num_images": images, **about, "rows": summary(runs)}, indent=1, default=str
    )
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    note = f"{number} questions about {images} images; {', '.join(map(str, about.values()))}"
    (RESULTS / f"{name}.md").write_text(f"{markdown(runs)}\n\n{note}\n", encoding="utf-8")
    print(f"{markdown(runs)}\n\n{note}")


PRECISIONS = {"3 bits": "w3a16", "4 bits, activations 8": "w4a8", "2 bits": "w2a16"}


def folders_of(options: argparse.Namespace, precision: str) -> dict[str, Path]:
    """Of kept runs, by bed."""
    made = argparse.Namespace(**vars(options) | {"precision": precision})
    found = {bed: folder_of(argparse.Namespace(**vars(made) | {"bed": bed})) for bed in BEDS}
    return {bed: folder for bed, folder in found.items() if folder.is_dir()}


def draw(options: argparse.Namespace) -> None:
    from accuracy_bed.pictures import draw_costs, draw_searches

    shown = {name: folders_of(options, precision) for name, precision in PRECISIONS.items()}
    if not shown["3 bits"]:
        sys.exit(f"nothing to draw in {options.runs}: measure first, with the same options but --pictures")
    draw_costs({name: of for name, of in shown.items() if of}, RESULTS / "accuracy.png")
    # Without plain text, as in the paper: its many answer tokens have gradients of another size, which would enter r.
    pairs = argparse.Namespace(**vars(options) | {"texts": 0})
    draw_searches(folders_of(pairs, "w3a16"), RESULTS / "accuracy_searches.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bed", default="shapes", help=f"one of {', '.join(BEDS)}; or a model, by path or hub id")
    parser.add_argument("--data", type=Path, help="of such a model: a JSONL file of conversations")
    parser.add_argument("--image-folder", type=Path, help="what paths of images in it are relative to")
    parser.add_argument("--device", help='of such a model, such as "cuda"')
    parser.add_argument("--precision", choices=("w3a16", "w2a16", "w4a8"), default="w3a16")
    parser.add_argument("--group-size", type=int, default=64, help="of w3a16 and w2a16; w4a8 has one scale a row")
    parser.add_argument("--methods", nargs="+", default=["all"], help=_METHODS_HELP)
    parser.add_argument("--peer-python", type=Path, help="of an environment that has the peers among the methods")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="draws of calibration pairs")
    parser.add_argument("--samples", type=int, default=16, help="calibration pairs")
    parser.add_argument("--texts", type=int, default=0, help="calibration samples of plain text beside them")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--images", type=int, help="that are asked about; default: all of the split")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder for the runs")
    parser.add_argument("--table", action="store_true", help="measure nothing; write what has been measured")
    parser.add_argument("--compare", action="store_true", help="measure nothing; print all methods on both beds")
    parser.add_argument("--pictures", action="store_true", help="measure nothing; draw all of both beds and the split")
    options = parser.parse_args()
    if options.methods == ["all"]:
        options.methods = [name for name, method in METHODS.items() if method.can(options.precision)]
    for name in options.methods:
        try:
            if is_peer(name):
                peer_of(name)
            if options.precision == "w4a8" if is_peer(name) else not method_of(name).can(options.precision):
                parser.error(f"{name} rounds weights only, and {options.precision} activations as well: leave it out")
        except ValueError as error:
            parser.error(str(error))
    measures = not (options.table or options.pictures or options.compare)
    if measures and any(map(is_peer, options.methods)):
        if options.peer_python is None:
            parser.error(f"{', '.join(PEERS)} run in environments of their own: give --peer-python")
        if not options.peer_python.is_file():
            parser.error(f"--peer-python {options.peer_python} is no file: it must be a Python that has the peer")
    if options.table:
        write_table(options)
    elif options.pictures:
        draw(options)
    elif options.compare:
        print(comparison(folders_of(options, options.precision)))
    else:
        measure(options)


if __name__ == "__main__":
    main()
