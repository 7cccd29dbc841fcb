"""Several results side by side, and how sure their differences are.

Two models that were asked the same questions mostly fail on the same ones, so the error of their difference is far
smaller than that of either score. It is estimated from the questions by leaving out one at a time (jackknife):

    d_i = score of B without question i - score of A without question i
    standard error = sqrt((n - 1) / n * sum_i (d_i - mean d)^2)

For a mean this is the paired standard error; it holds for perplexities, which are no means, just as well.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.utils import handle_non_serializable

from mbq_ao.evaluation.records import Results, load_results

if TYPE_CHECKING:
    from rich.table import Table

Array = np.ndarray[Any, Any]

# How lm-eval makes one score of all questions: functions of two sums, over the values and over their weights.
_AGGREGATES: tuple[Callable[[Array, Array], Array], ...] = (
    lambda x, w: x / w,  # mean
    lambda x, w: np.exp(-x / w),  # perplexity, weighted_perplexity
    lambda x, w: -x / w / math.log(2),  # bits_per_byte
)


@dataclass(frozen=True)
class Score:
    """One model's score. standard_error: lm-eval's, else the jackknife's, else None.

    difference: to the first model, None for that itself; difference_error: its standard error, None without samples.
    """

    value: float
    standard_error: float | None
    difference: float | None = None
    difference_error: float | None = None

    def __str__(self) -> str:
        return _with_error(self.value, self.standard_error)


@dataclass(frozen=True)
class Row:
    """A metric of a task for all models. higher_is_better: None where lm-eval does not know."""

    task: str
    metric: str
    num_samples: int
    higher_is_better: bool | None
    scores: list[Score]


@dataclass(frozen=True)
class Comparison:
    """models: their names, the first is what the others are compared with; nbytes: of their parameters, if known."""

    models: list[str]
    nbytes: list[int | None]
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def header(self) -> list[str]:
        first, *others = self.models
        return ["task", "metric", "n", first, *(cell for name in others for cell in (name, "difference"))]

    def cells(self) -> list[list[str]]:
        """The table's text, row by row: scores, and differences to the first model, each with its standard error."""
        table = []
        for row in self.rows:
            arrow = {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]
            cells = [row.task, row.metric.removesuffix(",none") + arrow, str(row.num_samples)]
            for score in row.scores:
                cells.append(str(score))
                if score.difference is not None:
                    cells.append(_with_error(score.difference, score.difference_error, sign="+"))
            table.append(cells)
        if any(self.nbytes):
            size = ["" if n is None else f"{n / 1e6:.1f}" for n in self.nbytes]
            table.append(["size", "MB ↓", "", size[0], *(cell for mb in size[1:] for cell in (mb, ""))])
        return table

    def markdown(self) -> str:
        head = self.header()
        lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *self.cells()]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"

    def table(self) -> Table:
        """For a rich console."""
        from rich.table import Table

        table = Table()
        for index, title in enumerate(self.header()):
            table.add_column(title, justify="left" if index < 2 else "right")
        for cells in self.cells():
            table.add_row(*cells)
        return table


def compare(*results: Results | str | os.PathLike[str], names: Sequence[str] | None = None) -> Comparison:
    """Compare results of the same tasks; the first is what the others are compared with.

    results: what `evaluate` returned or wrote, or lm-eval's own JSON files. Differences have a standard error where
        both were made with log_samples=True.
    names: of the models; None: as the results have them.

    Raises ValueError if a task's questions are not the same in all results, if no task is in all of them, or if a file
    holds no results.
    """
    if not results:
        raise ValueError("compare needs at least one result, got none")
    loaded = [r if isinstance(r, dict) else load_results(r) for r in results]
    if names is None:
        names = [str(r.get("model_name") or r.get("config", {}).get("model") or "") for r in loaded]
    if len(names) != len(loaded):
        raise ValueError(f"names must be as many as the results, {len(loaded)}, got {len(names)}")
    tasks = [task for task in loaded[0]["results"] if all(task in r["results"] for r in loaded)]
    if not tasks:
        raise ValueError("the results have no task in common: " + "; ".join(", ".join(r["results"]) for r in loaded))
    for task in tasks:
        _check_same_questions(task, loaded)
    sizes = [r.get("mbq_ao", {}).get("nbytes") for r in loaded]
    return Comparison(list(names), sizes, [row for task in tasks for row in _rows(task, loaded)])


def samples_of(results: Results, task: str, name: str = "none") -> dict[int, dict[str, Any]]:
    """A task's questions by their number, as the filter of that name left their answers; none without log_samples."""
    rows = (results.get("samples") or {}).get(task, [])
    return {row["doc_id"]: row for row in rows if row.get("filter", "none") == name}


def _check_same_questions(task: str, loaded: Sequence[Results]) -> None:
    counts = [r.get("n-samples", {}).get(task, {}).get("effective") for r in loaded]
    if len(set(counts)) > 1:
        raise ValueError(f"{task} was asked with {', '.join(map(str, counts))} questions: evaluate with the same limit")
    versions = [r.get("versions", {}).get(task) for r in loaded]
    if len(set(map(str, versions))) > 1:
        raise ValueError(f"{task} was asked in the versions {', '.join(map(str, versions))}: evaluate all with one")
    asked = [{row["doc_id"]: _fingerprint(row["doc"]) for row in r.get("samples", {}).get(task, [])} for r in loaded]
    asked = [docs for docs in asked if docs]
    if any(docs != asked[0] for docs in asked[1:]):
        raise ValueError(f"{task} was asked with other questions in some of the results: evaluate with the same data")


def _fingerprint(doc: Any) -> str:
    # Not lm-eval's doc_hash, which depends on where in memory an image lies.
    return json.dumps(doc, sort_keys=True, default=handle_non_serializable)


def _rows(task: str, loaded: Sequence[Results]) -> list[Row]:
    rows = []
    for key, value in loaded[0]["results"][task].items():
        metric, _, name = key.partition(",")
        if not name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        values = [r["results"][task].get(key) for r in loaded]
        if any(v is None for v in values):
            continue
        samples = [_values(r, task, metric, name) for r in loaded]
        first = _left_out(samples[0], values[0])
        scores = []
        for index, result in enumerate(loaded):
            without = _left_out(samples[index], values[index])
            error = result["results"][task].get(f"{metric}_stderr,{name}")
            if not isinstance(error, int | float):
                error = None if without is None else _jackknife(without)
            paired = None
            if index and first is not None and without is not None:
                paired = _jackknife(without - first)
            scores.append(Score(values[index], error, values[index] - values[0] if index else None, paired))
        higher = loaded[0].get("higher_is_better", {}).get(task, {}).get(metric)
        count = loaded[0].get("n-samples", {}).get(task, {}).get("effective", 0)
        rows.append(Row(task, key, count, higher, scores))
    return rows


def _values(results: Results, task: str, metric: str, name: str) -> Array | None:
    """Value and weight of each question (n, 2), in the order of their numbers; None if they are not there."""
    rows = samples_of(results, task, name)
    found = [rows[number].get(metric) for number in sorted(rows)]
    if len(found) < 2:
        return None
    pairs = [value if isinstance(value, list | tuple) else (value, 1.0) for value in found]
    if not all(len(pair) == 2 and all(isinstance(x, int | float | np.number) for x in pair) for pair in pairs):
        return None
    return np.array(pairs, dtype=np.float64)


def _left_out(values: Array | None, score: float) -> Array | None:
    """The score without each question in turn (n,).

    Which aggregate lm-eval used is told by the score it arrived at; None if it is none of those known here.
    """
    if values is None:
        return None
    total = values.sum(0)
    for aggregate in _AGGREGATES:
        if math.isclose(aggregate(*total), score, rel_tol=1e-6, abs_tol=1e-9):
            return aggregate(*(total - values).T)
    return None


def _jackknife(without: Array) -> float:
    count = len(without)
    return math.sqrt((count - 1) / count * float(((without - without.mean()) ** 2).sum()))


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    text = f"{value:{sign}.4g}"
    return text if error is None else f"{text} ± {error:.2g}"
