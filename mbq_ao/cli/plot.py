"""The picture of a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mbq_ao.cli.stored_weights import StoredWeight, WeightStatistics

_COLORS = {"w3a16": "#2a6fbb", "w4a8": "#e07b39"}
_SMALLEST = {"w3a16": 0, "w4a8": -8}


def plot_weights(weights: Sequence[StoredWeight], found: Mapping[str, WeightStatistics]) -> Figure:
    """Left: how often each code occurs. Right: the median scale of every weight, layer by layer.

    Raises ImportError without matplotlib, ValueError if there is no weight.
    """
    if not weights:
        raise ValueError("nothing to draw: the checkpoint has no quantized weights")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('--plot needs matplotlib: pip install "mbq_ao[demo]"') from error
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    _plot_codes(left, weights, found)
    _plot_scales(right, weights, found)
    return figure


def layer_and_kind(name: str) -> tuple[int, str]:
    """model.layers.3.mlp.up_proj.weight -> (3, "model.layers.mlp.up_proj"); layer 0 where there is no number."""
    words = name.removesuffix(".weight").split(".")
    place = next((i for i, word in enumerate(words) if word.isdigit()), None)
    if place is None:
        return 0, ".".join(words)
    return int(words[place]), ".".join(words[:place] + words[place + 1 :])


def _plot_codes(axes: Axes, weights: Sequence[StoredWeight], found: Mapping[str, WeightStatistics]) -> None:
    for precision, color in _COLORS.items():
        codes = [found[w.name].codes for w in weights if w.precision == precision]
        if codes:
            counts = [sum(column) for column in zip(*codes, strict=True)]
            places = range(_SMALLEST[precision], _SMALLEST[precision] + len(counts))
            axes.bar(places, [100 * c / sum(counts) for c in counts], color=color, alpha=0.8, label=precision)
    axes.set(xlabel="code", ylabel="share of the weights (%)")
    axes.set_title("Codes", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_scales(axes: Axes, weights: Sequence[StoredWeight], found: Mapping[str, WeightStatistics]) -> None:
    from matplotlib.colors import LogNorm

    places = {w.name: layer_and_kind(w.name) for w in weights}
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    layers = max(layer for layer, _ in places.values()) + 1
    table = [[float("nan")] * layers for _ in kinds]
    for name, (layer, kind) in places.items():
        median = found[name].scale_median
        if median:  # a logarithm has no colour for 0
            table[kinds.index(kind)][layer] = median
    image = axes.imshow(table, aspect="auto", interpolation="nearest", cmap="viridis", norm=LogNorm())
    labels = _without_common_start(kinds)
    axes.set_yticks(range(len(kinds)), labels, fontsize=7)
    axes.set(xlabel="layer")
    axes.set_title("Median scale", fontsize=10, loc="left")
    axes.figure.colorbar(image, ax=axes)


def _without_common_start(names: Sequence[str]) -> list[str]:
    words = [name.split(".") for name in names]
    shared = 0
    while all(len(w) > shared + 1 for w in words) and len({w[shared] for w in words}) == 1:
        shared += 1
    return [".".join(w[shared:]) for w in words]
