"""What quantization broke: questions that were answered right before and wrong after, with their images.

FOLDER/bad_cases.md      to read: image, prompt, the right answer, the answers before and after
FOLDER/bad_cases.json    the same for programs, with the counts of the opposite case beside it
FOLDER/images/           TASK_NUMBER.png, or TASK_NUMBER_2.png and so on where a question has several
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbq_ao.evaluation.comparison import samples_of
from mbq_ao.evaluation.records import Results, load_results
from mbq_ao.evaluation.task_set import IncludePath, find_tasks, load_tasks, sees_images


def bad_cases(
    before: Results | str | os.PathLike[str],
    after: Results | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tasks: Sequence[str] | None = None,
    include_path: IncludePath = None,
) -> dict[str, Any]:
    """List the questions that `before` has right and `after` wrong, and write them to a folder.

    before, after: results with samples (log_samples=True), in memory or on disk. Questions count in tasks that score
        each of them as right or wrong (exact_match, acc, ...).
    tasks: None: all such tasks that both have.
    include_path: as in `evaluate`; images are read from the tasks' data again, results have their hashes only.

    Returns what bad_cases.json holds: {"tasks": {task: {"metric", "num_samples", "num_broken", "num_mended"}},
    "cases": [{"task", "doc_id", "prompt", "target", "before", "after", "images"}]}.

    Raises ValueError if there are no samples.
    """
    before, after = (r if isinstance(r, dict) else load_results(r) for r in (before, after))
    both = [task for task in before.get("samples") or {} if task in (after.get("samples") or {})]
    if not both:
        raise ValueError("bad cases are found in samples, which these results do not share: pass log_samples=True")
    counts: dict[str, Any] = {}
    cases: list[dict[str, Any]] = []
    for task in both if tasks is None else tasks:
        if task not in both:
            raise ValueError(f"there are no samples of {task!r}, only of {', '.join(both)}")
        metric = _right_or_wrong(before, task)
        if metric is None:
            continue
        name = before["samples"][task][0].get("filter", "none")
        old, new = samples_of(before, task, name), samples_of(after, task, name)
        shared = sorted(old.keys() & new.keys())
        broken = [number for number in shared if old[number][metric] == 1 and new[number][metric] == 0]
        mended = [number for number in shared if old[number][metric] == 0 and new[number][metric] == 1]
        counts[task] = {
            "metric": metric,
            "num_samples": len(shared),
            "num_broken": len(broken),
            "num_mended": len(mended),
        }
        for number in broken:
            cases.append(
                {
                    "task": task,
                    "doc_id": number,
                    "prompt": _arguments(old[number])[0][0],
                    "target": str(old[number]["target"]),
                    "before": _answer(old[number]),
                    "after": _answer(new[number]),
                    "images": [],
                }
            )
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    _save_images(cases, folder, include_path)
    record = {"tasks": counts, "cases": cases}
    (folder / "bad_cases.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "bad_cases.md").write_text(_markdown(record), encoding="utf-8")
    return record


def _right_or_wrong(results: Results, task: str) -> str | None:
    """The first metric that is 0 or 1 for every question."""
    rows = results["samples"][task]
    names = rows[0]["metrics"] if rows else []
    return next((name for name in names if all(_is_bit(row.get(name)) for row in rows)), None)


def _is_bit(value: Any) -> bool:
    return not isinstance(value, list | tuple | str) and value in (0, 1)


def _arguments(row: dict[str, Any]) -> list[list[Any]]:
    """What was asked: for each request its arguments, whether from memory or from lm-eval's files."""
    given = row["arguments"]
    return [list(request.values()) for request in given.values()] if isinstance(given, dict) else [*map(list, given)]


def _answer(row: dict[str, Any]) -> str:
    """What was generated, or the likeliest of the given answers, with their log-likelihoods."""
    replies = row["filtered_resps"]
    if not isinstance(replies[0], list | tuple):
        return str(replies[0])
    scores = [float(reply[0]) for reply in replies]
    best = max(range(len(scores)), key=scores.__getitem__)
    choice = str(_arguments(row)[best][1]).strip()
    return f"{choice} (log-likelihood {scores[best]:.3f})" if len(scores) > 1 else f"log-likelihood {scores[0]:.3f}"


def _save_images(cases: Sequence[dict[str, Any]], folder: Path, include_path: IncludePath) -> None:
    names = list(dict.fromkeys(case["task"] for case in cases))
    if not names:
        return
    found, manager = find_tasks(names, include_path)
    loaded = {name: task for _, tasks in load_tasks(found, manager).values() for name, task in tasks.items()}
    for case in cases:
        task = loaded[case["task"]]
        if not sees_images(task):
            continue
        (folder / "images").mkdir(exist_ok=True)
        for index, image in enumerate(task.doc_to_image(task.eval_docs[case["doc_id"]]), start=1):
            file = f"images/{case['task']}_{case['doc_id']}" + (f"_{index}" if index > 1 else "") + ".png"
            image.convert("RGB").save(folder / file)
            case["images"].append(file)


def _markdown(record: dict[str, Any]) -> str:
    lines = ["# Right before, wrong after", ""]
    if not record["tasks"]:
        lines.append("No task scores its questions as right or wrong.")
    for task, count in record["tasks"].items():
        lines += [
            f"* {task}, {count['metric']}: {count['num_broken']} of {count['num_samples']} questions broken, "
            f"{count['num_mended']} the other way round"
        ]
    for case in record["cases"]:
        lines += ["", f"## {case['task']}, question {case['doc_id']}", ""]
        lines += [f"![question {case['doc_id']}]({file})" for file in case["images"]]
        fence = "```"
        while fence in case["prompt"]:
            fence += "`"
        lines += [
            "",
            fence,
            case["prompt"].rstrip("\n"),
            fence,
            "",
            f"* right: {case['target']!r}",
            f"* before: {case['before']!r}",
            f"* after: {case['after']!r}",
        ]
    return "\n".join(lines) + "\n"
