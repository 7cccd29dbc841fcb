"""`evaluate`: lm-eval's tasks on a model in memory or a checkpoint, tasks of text and of images in one call.

    load the model -> load the tasks -> tasks of text through lm-eval's `hf`, tasks of images through image_lm.py, over
    the same model -> one result, in lm-eval's own schema

Two runs of lm-eval rather than one, since a run has one kind of model and one chat template for all its tasks.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import sanitize_model_name
from transformers import PreTrainedModel

import mbq_ao
from mbq_ao.calibration.labels import chat_template_of, tokenizer_of
from mbq_ao.evaluation.image_lm import ImageTextLM
from mbq_ao.evaluation.load import load
from mbq_ao.evaluation.records import Results, save_results, tracker_of
from mbq_ao.evaluation.task_set import IncludePath, find_tasks, load_tasks, quiet, sees_images
from mbq_ao.packed_weight import PackedWeight, parameter_nbytes

_BY_TASK = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


def evaluate(
    model: PreTrainedModel | str | os.PathLike[str],
    tasks: str | Sequence[str],
    *,
    processor: Any = None,
    name: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
    apply_chat_template: bool | None = None,
    gen_kwargs: dict[str, Any] | None = None,
    include_path: IncludePath = None,
    log_samples: bool = False,
    bootstrap_iters: int = 100_000,
    output: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Results:
    """Evaluate a model, quantized or not, on lm-eval's tasks and on those that come with this package.

    model: of transformers, evaluated where it is and left as it was; or a checkpoint, ours or any that the Auto classes
        load, by path or hub name. "demo" is the small model that comes with this package.
    tasks: names of tasks, groups and tags of lm-eval, as a list or separated by commas. Without any network:
        easy_vqa, easy_vqa_one_word (questions about images), easy_vqa_nll (likelihood of their answers) and
        text_perplexity.
    processor: the model's AutoProcessor, or the tokenizer of a model of text; None: that of the checkpoint.
    name: what the results call the model; None: its path or hub name.
    limit: questions a task, the first ones; below 1 the share of them. None: all.
    num_fewshot, gen_kwargs, bootstrap_iters: as in lm-eval.
    batch_size: prompts at a time, except for likelihoods given images, which go one by one.
    max_length: tokens of prompt and answer together; None: what the model's config says.
    apply_chat_template: None applies the chat template, where there is one, to tasks of images, and to those of text
        not, which is lm-eval's default.
    include_path: folders with tasks of your own.
    log_samples: keep every question with its answer and score; `compare` makes paired errors of them.
    output: a folder for lm-eval's files, see records.py.
    device, dtype: of a checkpoint; None: the GPU if there is one, and the dtype it was saved in.

    Returns what lm_eval.simple_evaluate returns, with a section "mbq_ao": version, size, settings of the quantization,
    chat templates. Under torchrun, where every rank makes the call, those beside the first get an empty dict.

    Raises ValueError for an unknown task, a task of images where the model or processor sees none, a limit of 0, a
    checkpoint without processor; ImportError if lm-eval is not installed; OSError if output cannot be written.
    """
    if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit))):
        raise ValueError(f"limit must be a number of questions from 1, or a share of them below 1, got {limit}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number from 1, got {batch_size!r}")
    names, manager = find_tasks(tasks, include_path)
    tracker = tracker_of(output)
    name, model, processor = _loaded(name, model, processor, device, dtype)
    began = time.perf_counter()
    runs, seeing = _runs(names, manager, processor)
    chat = {ImageTextLM: bool(chat_template_of(processor)), HFLM: False}
    if apply_chat_template is not None:
        chat = dict.fromkeys(chat, apply_chat_template)
    parts = []
    for kind, roots in runs.items():
        with quiet(), _language_model(kind, model, processor, batch_size, max_length) as lm:
            part = lm_eval.simple_evaluate(
                lm,
                tasks=roots,
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=bootstrap_iters,
                log_samples=log_samples,
                apply_chat_template=chat[kind],
                gen_kwargs=gen_kwargs,
                batch_size=batch_size,
                device=str(model.device),
                evaluation_tracker=tracker,
            )
        if part is None:  # another rank has the results
            return {}
        parts.append(part)
    results = _merged(parts)
    results["config"]["model"] = name
    results["mbq_ao"] = {
        "version": mbq_ao.__version__,
        "model": type(model).__name__,
        "nbytes": parameter_nbytes(model),
        "quantization": _quantization(model),
        "chat_template_applied": {task: chat[ImageTextLM if sees else HFLM] for task, sees in seeing.items()},
        "seconds": time.perf_counter() - began,
    }
    record = tracker.general_config_tracker
    record.model_source, record.model_name, record.model_name_sanitized = "mbq_ao", name, sanitize_model_name(name)
    if output is not None:
        save_results(tracker, results)
    return results


def _loaded(name: str | None, model: Any, processor: Any, device: Any, dtype: Any) -> tuple[str, PreTrainedModel, Any]:
    """Name, model and processor, which are loaded if `model` is a path or a hub name."""
    if isinstance(model, PreTrainedModel):
        if processor is None:
            raise ValueError("a model in memory comes without its processor: pass processor=")
        if device is not None or dtype is not None:
            raise ValueError("a model in memory is evaluated as it is: device and dtype are for checkpoints")
        return name or model.config._name_or_path or type(model).__name__, model, processor
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"model must be a transformers model, a path or a hub name, got {type(model).__name__}")
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = {"device_map": device} if dtype is None else {"device_map": device, "dtype": dtype}
    return name or os.fspath(model), *load(model, processor, **options)


def _runs(
    names: Sequence[str], manager: TaskManager, processor: Any
) -> tuple[dict[type[HFLM], list[Any]], dict[str, bool]]:
    """What each kind of model is to run, and of every task whether it has images."""
    runs: dict[type[HFLM], list[Any]] = {}
    seeing: dict[str, bool] = {}
    for asked, (roots, found) in load_tasks(names, manager).items():
        kinds = {task: sees_images(entry) for task, entry in found.items()}
        if len(set(kinds.values())) > 1:
            raise ValueError(f"{asked} has tasks with and without images: name its tasks one by one")
        runs.setdefault(ImageTextLM if any(kinds.values()) else HFLM, []).extend(roots)
        seeing |= kinds
    if any(seeing.values()) and not hasattr(processor, "image_processor"):
        raise ValueError(
            f"{', '.join(task for task in seeing if seeing[task])}: questions about images, but "
            f"{type(processor).__name__} takes text only; pass a vision-language model and its AutoProcessor"
        )
    return runs, seeing


@contextmanager
def _language_model(
    kind: type[HFLM], model: PreTrainedModel, processor: Any, batch_size: int, max_length: int | None
) -> Iterator[HFLM]:
    """lm-eval's view of a model, which is in its former mode again afterwards."""
    # lm-eval sets padding sides and padding tokens.
    processor, training = copy.deepcopy(processor), model.training
    # It also ties the weights again, which would put the embedding in the place of a quantized lm_head.
    model.tie_weights = lambda *args, **kwargs: None
    options = {"backend": "causal", "batch_size": batch_size, "max_length": max_length}
    try:
        if kind is ImageTextLM:
            yield ImageTextLM(model, processor, **options)
        else:
            yield HFLM(model, tokenizer=tokenizer_of(processor), **options)
    finally:
        del model.tie_weights
        model.train(training)


def _merged(parts: Sequence[Results]) -> Results:
    merged = dict(parts[0])
    for part in parts[1:]:
        for key in (*_BY_TASK, "samples"):
            if key in part:
                merged[key] = merged.get(key, {}) | part[key]
    return merged


def _quantization(model: PreTrainedModel) -> dict[str, Any] | None:
    """Kinds and number of the quantized weights, and the settings they were made with, if the model knows them."""
    kinds = [type(p).__name__ for p in model.parameters() if isinstance(p, PackedWeight)]
    if not kinds:
        return None
    config = getattr(model.config, "quantization_config", None)
    settings = config if isinstance(config, dict) else config.to_dict() if config is not None else {}
    weights = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    return {"weights": weights, "settings": {key: value for key, value in settings.items() if key != "parameters"}}
