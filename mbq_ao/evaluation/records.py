"""Results on disk, in the files that lm-eval's own command writes.

FOLDER/MODEL/results_DATE.json            as `evaluate` returns it
FOLDER/MODEL/samples_TASK_DATE.jsonl      one question a line, with log_samples=True
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lm_eval.loggers import EvaluationTracker

Results = dict[str, Any]


def tracker_of(output: str | os.PathLike[str] | None) -> EvaluationTracker:
    """What writes results to a folder, which is made now, so that hours of work do not end at a folder that cannot be.

    Raises OSError if it cannot be made or written.
    """
    if output is None:
        return EvaluationTracker()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write to the folder {folder}")
    return EvaluationTracker(output_path=os.fspath(folder))


def save_results(tracker: EvaluationTracker, results: Results) -> Path:
    """Write results, and their samples if there are some; returns the path of the JSON file."""
    samples = results.get("samples") or {}
    aggregated = {key: value for key, value in results.items() if key != "samples"}
    tracker.save_results_aggregated(aggregated, samples)  # which swallows its errors
    folder = Path(tracker.output_path) / str(tracker.general_config_tracker.model_name_sanitized)
    date = getattr(tracker, "date_id", None)
    if date is None or not (folder / f"results_{date}.json").is_file():
        raise OSError(f"the results could not be written to {folder}; lm-eval logged why")
    for task, rows in samples.items():
        tracker.save_results_samples(task, [dict(row) for row in rows])  # which changes the rows
        if not (folder / f"samples_{task}_{date}.jsonl").is_file():
            raise OSError(f"the samples of {task} could not be written to {folder}; lm-eval logged why")
    return folder / f"results_{date}.json"


def load_results(path: str | os.PathLike[str]) -> Results:
    """Results and samples as `evaluate` returned them (their arguments in lm-eval's form for files).

    path: a results_DATE.json, whose samples are looked for beside it, or a folder, whose newest one is taken.

    Raises ValueError if there is none, or if it is not lm-eval's.
    """
    file = Path(path)
    if file.is_dir():
        found = sorted(file.rglob("results_*.json"), key=lambda f: f.stem)
        if not found:
            raise ValueError(f"{path} has no results_*.json: pass what evaluate(output=...) or lm_eval wrote")
        file = found[-1]
    if not file.is_file():
        raise ValueError(f"there are no results at {path}")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(results, dict) or "results" not in results:
        raise ValueError(f"{file} has no results of lm-eval: it lacks the key 'results'")
    samples = {}
    for task in results["results"]:
        beside = file.with_name(f"samples_{task}_{file.stem.removeprefix('results_')}.jsonl")
        if beside.is_file():
            with open(beside, encoding="utf-8") as lines:
                samples[task] = [json.loads(line) for line in lines]
    return {**results, "samples": samples} if samples else results
