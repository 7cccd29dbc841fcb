"""lm-eval's tasks by name: its own, the user's, and those in tasks/ beside this file."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).with_name("tasks")
# What lm-eval warns of whenever a task has its data beside it, or a model is passed as an object.
_NOISE = ("Custom kwargs can be passed", "`pretrained` model kwarg is not", "Passed an already-initialized model")
_LOGGERS = ("lm_eval.api.task", "lm_eval.models.huggingface")
IncludePath = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None


def task_manager(include_path: IncludePath = None, *, include_defaults: bool = True) -> TaskManager:
    """lm-eval's index of our tasks and those of the user's folders, which come first where names are the same.

    include_defaults: lm-eval's own, too; reading their thousands of files takes seconds.
    """
    given = [include_path] if isinstance(include_path, str | os.PathLike) else list(include_path or [])
    for path in given:
        if not Path(path).is_dir():
            raise ValueError(f"include_path must be a folder with lm-eval's YAML files, there is no folder {path}")
    return TaskManager(include_path=[TASKS, *map(Path, given)], include_defaults=include_defaults)


def list_tasks(include_path: IncludePath = None, *, include_defaults: bool = True) -> list[str]:
    """Names of all tasks, groups and tags that `evaluate` takes.

    include_path: folders with tasks of your own.  include_defaults: lm-eval's, too, beside those of this package.
    """
    return list(task_manager(include_path, include_defaults=include_defaults).all_tasks)


def find_tasks(tasks: str | Sequence[str], include_path: IncludePath = None) -> tuple[list[str], TaskManager]:
    """The names, patterns (mmlu_*) replaced by what they stand for, and an index that has them.

    tasks: names of tasks, groups and tags, patterns, and paths of YAML files; a string is taken apart at commas.

    Raises ValueError if a name is unknown, with the nearest ones.
    """
    asked = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else list(tasks)
    asked = [name for name in asked if name]
    if not asked:
        raise ValueError("tasks must name at least one task, got none; list_tasks() has the names")
    for include_defaults in (False, True):
        manager = task_manager(include_path, include_defaults=include_defaults)
        known = {name: [name] if _exists(name, manager) else manager.match_tasks([name]) for name in asked}
        unknown = [name for name, found in known.items() if not found]
        if not unknown:
            return list(dict.fromkeys(name for found in known.values() for name in found)), manager
    near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=5)
    raise ValueError(
        f"there is no task {unknown[0]!r}"
        + (f"; near it are {', '.join(near)}" if near else "")
        + "; list_tasks() has all names, include_path= adds folders of your own"
    )


def _exists(name: str, manager: TaskManager) -> bool:
    return name in manager.task_index or (name.endswith((".yaml", ".yml")) and Path(name).is_file())


def load_tasks(names: Sequence[str], manager: TaskManager) -> dict[str, tuple[list[Task | Group], dict[str, Task]]]:
    """For each name what lm-eval is to run, and the tasks in that by their names. Reads or downloads their data."""
    found = {}
    for name in names:
        with quiet():
            loaded = manager.load([name])
        children = {child for group in loaded.get("group_map", {}).values() for child in group}
        roots: list[Any] = [group for key, group in loaded.get("groups", {}).items() if key not in children]
        found[name] = roots or list(loaded["tasks"].values()), loaded["tasks"]
    return found


def sees_images(task: Task) -> bool:
    """Raises ValueError for a task of sounds, which is not supported."""
    if task.get_config("doc_to_audio"):
        raise ValueError(f"the task {task.task_name} has sounds, evaluate takes tasks of text and images: leave it out")
    return bool(task.get_config("doc_to_image"))


@contextmanager
def quiet() -> Iterator[None]:
    """Without those of lm-eval's warnings that do not concern the user of this package."""

    def is_news(record: logging.LogRecord) -> bool:
        return not any(noise in record.getMessage() for noise in _NOISE)

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_news)
