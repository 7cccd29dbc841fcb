"""`mbq-ao eval`."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbq_ao.cli.console import Json
from mbq_ao.cli.models import Device, Dtype, chosen_device, local_folder

if TYPE_CHECKING:
    from mbq_ao.evaluation.comparison import Comparison


def eval(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Checkpoints by path or hub name, quantized or not; `demo` is the small model that comes with this "
            "package. The first is what the others are compared with.",
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks, groups, tags and patterns of lm-eval, separated by commas.")
    ] = "easy_vqa,easy_vqa_nll,text_perplexity",
    limit: Annotated[float | None, typer.Option(help="Questions a task, the first ones; below 1 a share.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="As in lm-eval.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and answer; default: what the model's config says.")
    ] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help="For all tasks or none; default: for tasks of images, where the model has one.",
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    include_path: Annotated[list[Path] | None, typer.Option(help="A folder with tasks of your own.")] = None,
    list_tasks: Annotated[bool, typer.Option("--list-tasks", help="Print the names of all tasks and leave.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for lm-eval's JSON files; with several models also the table and the bad cases.",
            rich_help_panel="Output",
        ),
    ] = None,
    log_samples: Annotated[
        bool,
        typer.Option(
            "--log-samples",
            help="Write every question with its answer and score, too (done anyway with several models).",
            rich_help_panel="Output",
        ),
    ] = False,
    as_json: Json = False,
) -> Any:
    """Evaluate models on lm-eval's tasks, and compare them.

    Example: `mbq-ao eval llava llava-w3 --tasks easy_vqa,text_perplexity --output results`

    Without any network work easy_vqa, easy_vqa_one_word (questions about images), easy_vqa_nll (likelihood of their
    answers) and text_perplexity. With several models and --output, `table.md` has the differences with paired standard
    errors, and `bad_cases/` what the first model has right and another wrong, with the images.
    """
    from mbq_ao import evaluation

    if list_tasks:
        names = evaluation.list_tasks(include_path)
        print("\n".join(names))
        return names
    if not models:
        raise typer.BadParameter("name at least one model, or pass --list-tasks", param_hint="MODEL")

    for model in models:  # all of them, before hours of work on the first
        local_folder(model)
    computing_on = chosen_device(device)
    results = []
    for model in models:
        result = evaluation.evaluate(
            model,
            tasks,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            max_length=max_length,
            apply_chat_template=chat_template,
            include_path=include_path,
            log_samples=log_samples or len(models) > 1,
            output=output,
            device=computing_on,
            dtype=None if dtype == "auto" else dtype,
        )
        gc.collect()  # the next model needs this one's memory
        results.append(result)
    comparison = evaluation.compare(*results)
    counts = {}
    if output is not None:
        (output / "table.md").write_text(comparison.markdown(), encoding="utf-8")
        for model, result in zip(models[1:], results[1:], strict=True):
            folder = output / "bad_cases" / model.strip("/").replace("/", "__")
            counts[model] = evaluation.bad_cases(results[0], result, folder, include_path=include_path)["tasks"]
    _print(comparison, output, counts)
    return {"comparison": _without_nan(comparison.to_dict()), "bad_cases": counts}


def _print(comparison: Comparison, output: Path | None, counts: dict[str, Any]) -> None:
    from rich.console import Console

    Console().print(comparison.table())
    for model, tasks in counts.items():
        for task, count in tasks.items():
            print(
                f"{model}, {task}: {count['num_broken']} of {count['num_samples']} questions right before and wrong "
                f"after, {count['num_mended']} the other way round"
            )
    if output is not None:
        print(f"written to {output}/")


def _without_nan(value: Any) -> Any:
    """The same for JSON, which has no NaN: None in its place."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
