"""Pictures of kept runs: what each method costs, and what the scale searches of MBQ and its like saw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from accuracy_bed.table import FULL_PRECISION, ORDER, Runs, load_runs

BEST, OTHERS = "#d1495b", "#5b6c8f"
COLORS = {"shapes": "#2a6fbb", "digits": "#e07b39"}


def draw_costs(folders: dict[str, dict[str, Path]], path: Path) -> None:
    """KL to full precision of every method, a dot a draw of calibration data, a tick for the mean.

    folders: of runs, by precision and bed.
    """
    beds = list(dict.fromkeys(bed for of in folders.values() for bed in of))
    figure, panels = plt.subplots(len(beds), len(folders), figsize=(11, 4.6), squeeze=False, layout="constrained")
    for column, (precision, of) in zip(panels.T, folders.items(), strict=True):
        for axes, bed in zip(column, beds, strict=True):
            if bed not in of:
                axes.set_visible(False)
                continue
            runs = {r.method: r for r in load_runs(of[bed])}
            _draw_methods(axes, [runs[m] for m in ORDER[1:] if m in runs])
            axes.set_title(f"{precision}, {bed}", fontsize=10, loc="left")
    for axes in panels[-1]:
        axes.set_xlabel("KL to full precision (nats a reply)", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_methods(axes: Axes, runs: Sequence[Runs]) -> None:
    for y, r in enumerate(runs):
        color = BEST if r.method == "best" else OTHERS
        draws = [float(run["kl"].mean()) for run in r.runs]
        axes.plot(draws, [y] * len(draws), "o", ms=5, color=color, alpha=0.6)
        axes.plot([r.mean("kl")], [y], "|", ms=14, mew=2, color=color)
    axes.set(xscale="log", xlim=(1e-3, 100), yticks=range(len(runs)), ylim=(len(runs) - 0.4, -0.6))
    axes.set_yticklabels([r.method for r in runs], fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)


def draw_searches(folders: dict[str, Path], path: Path) -> None:
    """Left: how much an error on a vision token matters, layer by layer. Right: the loss of each exponent, as a share
    of plain rounding's, the mean over all groups and draws.

    folders: of runs, by bed.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for bed, folder in folders.items():
        runs = {r.method: r for r in load_runs(folder) if r.method != FULL_PRECISION}
        for method, style in (("MBQ paper", "-"), ("AWQ-like", "--")):
            searches = [s for run in runs[method].runs for s in run["searches"]] if method in runs else []
            if not searches:
                continue
            ratios = [[loss / s["losses"][0] for loss in s["losses"]] for s in searches if s["losses"][0]]
            means = [fmean(column) for column in zip(*ratios, strict=True)]
            alphas = [i / len(means) for i in range(len(means))]
            right.plot(alphas, means, style, color=COLORS.get(bed), label=f"{bed}, {method}")
        if "MBQ paper" in runs:
            for kind, style in (("attn", "-"), ("mlp", ":")):
                xs, ys = _sensitivities(runs["MBQ paper"].runs, kind)
                left.plot(xs, ys, style, marker="o", ms=3, color=COLORS.get(bed), label=f"{bed}, {kind}")
    left.set(xlabel="decoder layer", ylabel="vision / answer sensitivity r", yscale="log")
    left.set_title("How much a vision token's error matters (answer token = 1)", fontsize=10, loc="left")
    right.set(xlabel="exponent alpha of the scales", ylabel="loss / loss of plain rounding", ylim=(0.5, 2))
    right.set_title("What the searches see", fontsize=10, loc="left")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _sensitivities(runs: Sequence[dict[str, Any]], kind: str) -> tuple[list[int], list[float]]:
    """(layers, r), the mean over draws, at the outputs of attention or of the MLPs."""
    by_layer: dict[str, list[float]] = {}
    for run in runs:
        for search in run["searches"]:
            if kind in search["linears"][0] and search["sensitivity"]:  # 0 behind the last layer that reads the image
                by_layer.setdefault(search["block"], []).append(search["sensitivity"])
    return list(range(len(by_layer))), [fmean(values) for values in by_layer.values()]
