"""What a calibration found: one record a scale group, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class GroupReport:
    """One scale group of one block.

    linears, producer, fold: names relative to `block`; fold "act_pre_scale" if the scale stays on the
    quantized tensors. "mlp.experts.gate_up_proj" stands for all its experts, "mlp.experts.down_proj.3" for one.
    alpha: the exponent taken (0 is plain rounding). losses: one per scale tried; loss_rtn is that of
    alpha = 0, loss that of `alpha`. sensitivity: the factor r on vision tokens, None if the balance is off.
    sensitivity_raw: r before the median floor. num_tokens: for one expert, the tokens that its loss is made of.
    """

    block: str
    producer: str | None
    linears: list[str]
    fold: str
    alpha: float
    losses: list[float]
    loss_rtn: float
    loss: float
    sensitivity: float | None
    sensitivity_raw: float | None = None
    num_tokens: int | None = None


@dataclass
class FitReport:
    """Weights of one block that were fitted together, as they read the same input; all experts of a parameter are one.

    linears: names relative to `block`.  loss_rtn, loss: what plain rounding and what the fitted weights leave of
    sum_t w_t |(W - Q) x_t|^2 (fitting.py), W after its correction for drift; comparable within a record, as w_t is one
    over the size of the residual stream where that is what is fitted.  sensitivity: the factor w_t of vision tokens,
    sensitivity_raw: r before the median floor and the recipe's power; None if the balance is off.
    """

    block: str
    linears: list[str]
    loss_rtn: float
    loss: float
    sensitivity: float | None
    sensitivity_raw: float | None = None


Record: TypeAlias = GroupReport | FitReport


@dataclass
class ExpertsReport:
    """The experts of one module.

    module: its name, relative to `block`.  num_tokens: of each expert, the calibration tokens that it is calibrated on
    (in a balanced search: vision and answer tokens); empty if it cannot be told which tokens they get.
    """

    block: str
    module: str
    num_tokens: list[int]

    @property
    def uncalibrated(self) -> list[int]:
        """The experts that got no such token: what is theirs alone is rounded plainly."""
        return [e for e, n in enumerate(self.num_tokens) if n == 0]

    def warning(self) -> str | None:
        """What a user should know of these experts; None if each was calibrated."""
        name = f"{self.block}.{self.module}"
        if not self.num_tokens:
            return f"{name}: it cannot be told which tokens the experts get; what is theirs alone is rounded plainly"
        if not (missed := self.uncalibrated):
            return None
        return (
            f"{name}: no calibration token for {len(missed)} of {len(self.num_tokens)} experts; what is theirs alone "
            f"is rounded plainly: {some([str(e) for e in missed])}"
        )


@dataclass
class CalibrationReport:
    """Result of `quantize_`. `print(report)` shows a table; see also records(), to_json() and plot().

    groups: one record a scale group, in the order in which the model runs them.
    not_scaled: linears that are quantized by plain rounding because nothing takes their scale, or the recipe has none.
    fits: one record for weights that were fitted to their inputs together (recipes "best" and "gptq").
    not_quantized: linears inside the blocks that filter_fn left out, and other weights found there; of the vision
        tower, those that its config left alone.
    routers: what chooses or weighs experts, always left as it is, as it is small and every token's way depends on it.
    experts: one record a module of experts: how many tokens each got; those that got none are not calibrated.
    vision: linears of the vision tower that were rounded without calibration.
    stacks: with `targets`, the blocks of each stack that was calibrated, the decoder's layers last; else empty.
    rounded, left_alone: with `targets`, linears that were rounded without calibration, and those that stay as they
        are, and why.
    logits_error: relative change of the logits by folding alone, on one calibration batch.
    num_linears, nbytes_before, nbytes_after: the calibrated linears (each expert is one), and bytes of their weights.
    calibration: number of calibration batches and their sha256.
    seconds: of this call.
    stage_seconds: of its stages before and after the decoder layers.
    block_seconds: of every decoder layer, its search, quantization, and the step to the next one.
    num_resumed: blocks whose scales an earlier call had left in work_dir.
    """

    settings: dict[str, Any]
    groups: list[GroupReport] = field(default_factory=list)
    fits: list[FitReport] = field(default_factory=list)
    not_scaled: list[str] = field(default_factory=list)
    not_quantized: list[str] = field(default_factory=list)
    routers: list[str] = field(default_factory=list)
    experts: list[ExpertsReport] = field(default_factory=list)
    vision: list[str] = field(default_factory=list)
    logits_error: float = 0.0
    num_linears: int = 0
    nbytes_before: int = 0
    nbytes_after: int = 0
    calibration: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    block_seconds: dict[str, float] = field(default_factory=dict)
    num_resumed: int = 0
    stacks: dict[str, list[str]] = field(default_factory=dict)
    rounded: dict[str, str] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)

    @property
    def fitted(self) -> list[str]:
        """The linears of all fits."""
        return [f"{fit.block}.{name}" for fit in self.fits for name in fit.linears]

    def records(self) -> list[dict[str, Any]]:
        """The groups, and after them the fits, as plain dicts, such as pandas.DataFrame takes."""
        records: list[Record] = [*self.groups, *self.fits]
        return [asdict(record) for record in records]

    def seconds_per_block(self) -> float:
        """The median over the decoder layers."""
        return median(self.block_seconds[block] for block in self.last_stack()) if self.block_seconds else 0.0

    def last_stack(self) -> list[str]:
        """The blocks that were calibrated last: the decoder's layers, if any of their linears was to be."""
        return [*self.stacks.values()][-1] if self.stacks else list(self.block_seconds)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time inside to `stage_seconds`."""
        began = time.perf_counter()
        yield
        self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + time.perf_counter() - began

    def to_json(self, path: str | Path | None = None) -> str:
        """The whole report as JSON; written to `path` as well if one is given."""
        text = json.dumps(asdict(self), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, path: str | Path) -> CalibrationReport:
        """The report that `to_json` or `save_pretrained` (mbq_report.json) wrote. Unknown fields are ignored.

        Raises FileNotFoundError, and ValueError if the file is no such report.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            records = {
                name: [kind(**_known(kind, one)) for one in found]
                for name, kind, found in (
                    ("groups", GroupReport, values["groups"]),
                    ("fits", FitReport, values.get("fits", [])),  # reports written before fits had none
                    ("experts", ExpertsReport, values["experts"]),
                )
            }
            return cls(**_known(cls, values) | records)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is no calibration report of mbq_ao: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        header = ("block", "linears", "folded into", "alpha", "r", "loss RTN", "loss", "gain")
        records = self.shown_records()
        if not records:
            return self.summary()
        rows = [
            (
                record.block if i == 0 or records[i - 1].block != record.block else "",
                " ".join(name.rpartition(".")[2] for name in record.linears),
                (record.producer or record.fold).rpartition(".")[2] if isinstance(record, GroupReport) else "-",
                f"{record.alpha:.2f}" if isinstance(record, GroupReport) else "-",
                "-" if record.sensitivity is None else f"{record.sensitivity:.3f}",
                f"{record.loss_rtn:.4g}",
                f"{record.loss:.4g}",
                f"{100 * (1 - record.loss / record.loss_rtn):.0f}%" if record.loss_rtn else "-",
            )
            for i, record in enumerate(records)
        ]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(
                f"{cell:<{w}}" if i < 3 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in [header, tuple("-" * w for w in widths), *rows]
        ]
        first_row = {record.block: i for i, record in reversed(list(enumerate(records, start=2)))}
        for stack, blocks in reversed(self.stacks.items()):
            starts = [first_row[block] for block in blocks if block in first_row]
            lines[min(starts, default=0) : 0] = [f"[{stack}]"] if starts else []
        lines.append(self.summary())
        return "\n".join(line.rstrip() for line in lines)

    def shown_records(self) -> list[Record]:
        """What the table and the picture show: block by block its groups, those of experts as one, and its fits."""
        records: list[Record] = [*experts_together(self.groups), *self.fits]
        blocks = {name: i for i, name in enumerate(dict.fromkeys(record.block for record in records))}
        return sorted(records, key=lambda record: blocks[record.block])

    def summary(self) -> str:
        """A few lines: sizes, mean gain, what was left out."""
        megabyte = 1e6
        ratio = self.nbytes_before / self.nbytes_after if self.nbytes_after else float("nan")
        gains = [1 - g.loss / g.loss_rtn for g in experts_together(self.groups) if g.loss_rtn]
        stages = [f"{stage} {seconds:.1f} s" for stage, seconds in self.stage_seconds.items()]
        if self.block_seconds:
            stages.append(f"{self.seconds_per_block():.1f} s a layer")
        timing = f" ({', '.join(stages)})" if stages else ""
        resumed = f", layers taken from work_dir: {self.num_resumed}" if self.num_resumed else ""
        lines = [
            f"{self.num_linears} linears: {self.nbytes_before / megabyte:.1f} MB -> "
            f"{self.nbytes_after / megabyte:.1f} MB ({ratio:.1f}x smaller), "
            f"calibrated in {self.seconds:.0f} s{timing}{resumed}"
        ]
        if gains:
            gain = sum(gains) / len(gains)
            lines.append(
                f"search loss {100 * abs(gain):.0f}% {'below' if gain >= 0 else 'above'} plain rounding on average; "
                f"logits moved by {self.logits_error:.1e} (relative) through folding alone"
            )
        if gains := [1 - fit.loss / fit.loss_rtn for fit in self.fits if fit.loss_rtn]:
            lines.append(
                f"{len(self.fitted)} weights fitted to their inputs: on these their error is "
                f"{100 * sum(gains) / len(gains):.0f}% below plain rounding's on average"
            )
        if counts := [n for experts in self.experts for n in experts.num_tokens]:
            lines.append(
                f"experts: {len(counts)}; calibration tokens of each: {min(counts)} to {max(counts)}, "
                f"median {median(counts):g}"
            )
        lines += [line for experts in self.experts if (line := experts.warning())]
        if self.routers:
            lines.append(f"routers, never quantized: {some(self.routers)}")
        if self.vision:
            lines.append(
                f"vision tower: {len(self.vision)} linears rounded without calibration, {self.settings.get('vision')}"
            )
        for found, what in ((self.rounded, "rounded without calibration"), (self.left_alone, "left as they are")):
            for reason in dict.fromkeys(found.values()):
                lines.append(f"{what} ({reason}): {some([name for name, why in found.items() if why == reason])}")
        if self.not_scaled:
            lines.append(f"rounded without a scale: {some(self.not_scaled)}")
        if self.not_quantized:
            lines.append(f"not quantized: {some(self.not_quantized)}")
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Figure:
        """What calibration leaves of plain rounding's error by layer, and where modalities were weighed their
        sensitivity, as a matplotlib figure.

        path: also saved there (the suffix chooses the format). Raises ImportError without matplotlib.
        """
        from mbq_ao.calibration.plot import plot_report

        figure = plot_report(self)
        if path is not None:
            figure.savefig(path, dpi=150, bbox_inches="tight")
        return figure


def _known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that are fields of the dataclass."""
    return {field.name: values[field.name] for field in fields(cls) if field.name in values}


def experts_together(groups: list[GroupReport]) -> list[GroupReport]:
    """The groups, those of the single experts of a parameter as one: mean alpha, losses added up."""
    result = []
    for key, group in groupby(groups, key=lambda g: (g.block, _parameter_of(g) or id(g))):
        first, *others = members = list(group)
        if not others:
            result.append(first)
            continue
        losses = {name: sum(getattr(g, name) for g in members) for name in ("loss_rtn", "loss")}
        result.append(
            replace(
                first,
                linears=[str(key[1])],
                producer=None if first.producer is None else first.producer.rpartition(".")[0],
                alpha=sum(g.alpha for g in members) / len(members),
                num_tokens=sum(g.num_tokens or 0 for g in members),
                **losses,
            )
        )
    return result


def _parameter_of(group: GroupReport) -> str | None:
    return None if group.num_tokens is None else group.linears[0].rpartition(".")[0]


def some(names: list[str], most: int = 8) -> str:
    """A list for a summary: the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
