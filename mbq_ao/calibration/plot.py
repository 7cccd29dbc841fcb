"""The picture of a calibration: what it gained, and how sensitive layers are to modalities, if those were weighed."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mbq_ao.calibration.report import CalibrationReport, Record

_COLORS = ("#2a6fbb", "#e07b39", "#3a9d6e", "#8a5fb0", "#c24d63", "#7d7d7d")


def plot_report(report: CalibrationReport) -> Figure:
    """Left, where modalities were weighed: r by layer and group. Right: what was minimised, over that of plain rounding
    (1 = no gain).

    Of several stacks (`targets`) the last one is shown, the decoder.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('report.plot() needs matplotlib: pip install "mbq_ao[demo]"') from error
    del plt  # only to fail early where no backend can be had
    series = _by_group(report)
    weighed = any(record.sensitivity is not None for points in series.values() for _, record in points)
    figure = Figure(figsize=(11 if weighed else 6, 4), layout="constrained")
    *left, right = figure.subplots(1, 1 + weighed, squeeze=False)[0]
    for axes in left:
        _plot_sensitivity(axes, series)
    _plot_gain(right, series)
    settings = report.settings
    if settings:
        loss = f", loss {settings['loss']}" if report.groups else ""
        figure.suptitle(
            f"Calibration: {settings['precision']}, group size {settings['group_size'] or 'row'}, "
            f"recipe {settings['recipe']}{loss}",
            fontsize=11,
            x=0.01,
            ha="left",
        )
    return figure


def _by_group(report: CalibrationReport) -> dict[str, list[tuple[int, Record]]]:
    """Groups and fits with the same linears, with the number of their block."""
    records = report.shown_records()
    if report.stacks:
        last = report.last_stack()
        records = [record for record in records if record.block in last]
    order = {block: i for i, block in enumerate(dict.fromkeys(record.block for record in records))}
    series: dict[str, list[tuple[int, Record]]] = {}
    for record in records:
        label = ", ".join(name.rpartition(".")[2] for name in record.linears)
        series.setdefault(label, []).append((order[record.block], record))
    return series


def _plot_sensitivity(axes: Axes, series: dict[str, list[tuple[int, Record]]]) -> None:
    drawn = set()
    for color, (label, points) in zip(itertools.cycle(_COLORS), series.items(), strict=False):
        balanced = [(i, g.sensitivity, g.sensitivity_raw) for i, g in points]
        xs = [i for i, r, raw in balanced if r is not None and raw is not None]
        ys = [r for _, r, raw in balanced if r is not None and raw is not None]
        raws = [raw for _, r, raw in balanced if r is not None and raw is not None]
        if not ys or (key := tuple(ys)) in drawn:
            continue  # q, k, v and o share one r; gate, up and down another
        drawn.add(key)
        axes.plot(xs, raws, color=color, lw=1.8, marker="o", ms=3.5, label=f"at the output of {label}")
        axes.plot(xs, ys, color=color, lw=1, ls=":", alpha=0.9)
    axes.set(xlabel="decoder layer", ylabel="vision / answer sensitivity r", ylim=(0, None))
    axes.set_title("How much a vision token's error matters (answer token = 1)", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8, title="dotted: with the median floor", title_fontsize=8)
    _tidy(axes)


def _plot_gain(axes: Axes, series: dict[str, list[tuple[int, Record]]]) -> None:
    highest = 1.0  # above 1 where a scale was taken without a search
    for color, (label, points) in zip(itertools.cycle(_COLORS), series.items(), strict=False):
        kept = [(i, g.loss / g.loss_rtn) for i, g in points if g.loss_rtn]
        if kept:
            axes.plot(*zip(*kept, strict=True), color=color, lw=1.8, marker="o", ms=3.5, label=label)
            highest = max(highest, *(ratio for _, ratio in kept))
    axes.axhline(1.0, color="black", lw=0.8, alpha=0.4)
    axes.set(xlabel="decoder layer", ylabel="loss / loss of plain rounding", ylim=(0, 1.05 * highest))
    axes.set_title("What calibration leaves of the rounding error", fontsize=10, loc="left")
    if series:  # a recipe may scale nothing
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
