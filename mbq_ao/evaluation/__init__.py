"""How good a model is, and what quantization did to it: lm-eval's tasks and a few of our own.

    harness.py      evaluate: lm-eval's tasks, of text and of images, on a model or a checkpoint; lm-eval's JSON
    load.py         checkpoints, ours and others', with their processors
    image_lm.py     lm-eval's view of a model that sees images
    task_set.py     tasks by name; tasks/: those that come with this package and need no network
    records.py      results on disk, in lm-eval's own files
    comparison.py   several results side by side, with standard errors of the differences
    regressions.py  what was right before and is wrong after, with the images
    answers.py      likelihood of given answers, and how far two models differ on them

Needs `pip install "mbq_ao[eval]"`, all but answers.py.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["bad_cases", "compare", "divergence", "evaluate", "list_tasks", "load_results"]

_LAZY = {
    "bad_cases": "mbq_ao.evaluation.regressions",
    "compare": "mbq_ao.evaluation.comparison",
    "divergence": "mbq_ao.evaluation.answers",
    "evaluate": "mbq_ao.evaluation.harness",
    "list_tasks": "mbq_ao.evaluation.task_set",
    "load_results": "mbq_ao.evaluation.records",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_LAZY[name])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("lm_eval", "datasets"):
            raise
        raise ImportError(
            f'mbq_ao.{name} needs the package {error.name}, which is not installed: pip install "mbq_ao[eval]"'
        ) from error
    return getattr(module, name)
