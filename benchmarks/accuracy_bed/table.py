"""What the runs of benchmarks/accuracy.py say: means over the draws of calibration data, and paired differences."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accuracy_bed.exam import MEASURES
from accuracy_bed.peers import PEERS
from mbq_ao.evaluation.answers import clustered_standard_error

FULL_PRECISION = "full precision"
# Ours, then peers' own programs, then what we ship.
_OURS = ("RTN", "HQQ", "SmoothQuant", "AWQ-like", "MBQ paper", "MBQ", "GPTQ", "GPTQ, act order")
ORDER = (FULL_PRECISION, *_OURS, *PEERS, "AutoRound, iters=50", "best")


@dataclass(frozen=True)
class Runs:
    """Of one method on one bed: a run for each draw of the calibration data. Values are per question, (Q,)."""

    method: str
    seeds: list[int]
    runs: list[dict[str, Any]]

    def of(self, name: str) -> Tensor:
        """(Q,) mean over the draws of one of MEASURES."""
        return torch.stack([run[name] for run in self.runs]).mean(0)

    def mean(self, name: str) -> float:
        return float(self.of(name).mean())

    def spread(self, name: str) -> float | None:
        """Standard deviation of the mean over the draws; None for one draw."""
        means = [float(run[name].mean()) for run in self.runs]
        return statistics.stdev(means) if len(means) > 1 else None

    def standard_error(self, name: str) -> float:
        """Over the draw of images."""
        return clustered_standard_error(self.of(name).tolist(), self.runs[0]["image_ids"])

    def difference(self, other: Runs, name: str) -> tuple[float, float]:
        """Mean of self - other on the same questions, and its standard error over the draw of images."""
        values = self.of(name) - other.of(name)
        return float(values.mean()), clustered_standard_error(values.tolist(), self.runs[0]["image_ids"])

    def flips(self, reference: Runs) -> float:
        """Questions a draw that the reference answers rightly and this method wrongly."""
        right = reference.of("correct") == 1
        return statistics.fmean(float((right & (run["correct"] == 0)).sum()) for run in self.runs)

    def text_nll(self) -> float:
        return statistics.fmean(run["text_nll"] for run in self.runs)


def load_runs(folder: Path) -> list[Runs]:
    """All methods in a folder of runs, full precision first."""
    found: dict[str, dict[int, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        run |= {name: torch.tensor(run[name]) for name in MEASURES}
        found.setdefault(run["method"], {})[run["seed"]] = run
    runs = [Runs(method, list(by_seed), list(by_seed.values())) for method, by_seed in found.items()]
    return sorted(runs, key=lambda r: (r.method != FULL_PRECISION, -r.mean("nll")))


def summary(runs: Sequence[Runs]) -> list[dict[str, Any]]:
    """A row a method, for JSON: nats a reply, shares, and nats a token of plain text."""
    reference = next(r for r in runs if r.method == FULL_PRECISION)
    rows = []
    for r in runs:
        row: dict[str, Any] = {"method": r.method, "seeds": r.seeds}
        for name in MEASURES:
            row[name] = r.mean(name)
            row[f"{name}_spread"] = r.spread(name)
            row[f"{name}_standard_error"] = r.standard_error(name)
        row |= {"flips": r.flips(reference), "text_nll": r.text_nll()}
        row["seconds"] = statistics.median(run["seconds"] for run in r.runs)
        rows.append(row)
    return rows


def markdown(runs: Sequence[Runs]) -> str:
    """± is over draws of the calibration data, in brackets the standard error over images."""
    lines = [
        "| method | answer NLL | KL to full precision | accuracy % | right -> wrong | logit cosine | text NLL | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summary(runs):
        spread = "" if row["nll_spread"] is None else f" ± {row['nll_spread']:.4f}"
        lines.append(
            f"| {row['method']} | {row['nll']:.4f}{spread} ({row['nll_standard_error']:.4f}) "
            f"| {row['kl']:.4f} ({row['kl_standard_error']:.4f}) "
            f"| {100 * row['correct']:.2f} ({100 * row['correct_standard_error']:.2f}) "
            f"| {row['flips']:.1f} | {row['cosine']:.4f} | {row['text_nll']:.3f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def comparison(folders: Mapping[str, Path]) -> str:
    """Markdown: all methods on all beds, by one precision; ± is over draws of the calibration data.

    folders: of runs, by bed.
    """
    by_bed = {bed: {r.method: r for r in load_runs(folder)} for bed, folder in folders.items()}
    methods = [m for m in ORDER if any(m in found for found in by_bed.values())]
    head = [f"{bed}: answer NLL | KL | right (%)" for bed in by_bed]
    lines = [f"| | {' | '.join(head)} | draws |", f"|---|{'---:|---:|---:|' * len(head)}---|"]
    for method in methods:
        cells, draws = [], []
        for found in by_bed.values():
            r = found.get(method)
            draws.append("0" if r is None else str(len(r.runs)))
            cells += (
                ["-"] * 3 if r is None else [_spread(r, "nll", 2), _spread(r, "kl", 3), _spread(r, "correct", 1, 100)]
            )
        shown = "" if method == FULL_PRECISION else ", ".join(dict.fromkeys(draws))
        lines.append(f"| {method} | {' | '.join(cells)} | {shown} |")
    return "\n".join(lines)


def _spread(r: Runs, name: str, digits: int, factor: float = 1) -> str:
    spread = r.spread(name)
    more = "" if spread is None else f" ± {factor * spread:.{digits}f}"
    return f"{factor * r.mean(name):.{digits}f}{more}"
