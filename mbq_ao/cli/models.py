"""Models and processors as the commands load them: hub ids and local folders, ours and full precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mbq_ao.cli.console import UserError

if TYPE_CHECKING:
    import torch

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id or a local folder.", show_default=False)]
Device = Annotated[
    str | None,
    typer.Option(help="Where to compute, such as cuda:1; default: a GPU if there is one.", rich_help_panel="Where"),
]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option(help="Of the model and its scales; auto is what the checkpoint has.", rich_help_panel="Where"),
]


def load_config(name: str) -> Any:
    """The model's config. Raises UserError if there is no such model."""
    from transformers import AutoConfig

    with loading(shown(name)):
        return AutoConfig.from_pretrained(name)


def local_folder(name: str) -> Path | None:
    """The path of a model that is no hub id. Raises UserError if it looks like one and is not there."""
    if Path(name).exists():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no folder {name}; MODEL is a local folder or a hub id (owner/name)")
    return None


def shown(name: str) -> str:
    """The name for an error: whether it was looked for here or on the hub."""
    return name if local_folder(name) else f"{name} from the hub (there is no such folder here)"


def load_processor(name: str) -> Any:
    """The model's processor, or a language model's tokenizer. Raises UserError if it has none."""
    from transformers import AutoProcessor

    with loading(f"the processor of {name}"):
        return AutoProcessor.from_pretrained(name)


def load_model(name: str, config: Any, *, dtype: str = "auto", device: torch.device | None = None) -> Any:
    """The model in evaluation mode, on the device: a checkpoint of ours, or any that transformers knows."""
    from mbq_ao.pretrained import load_any

    kwargs: dict[str, Any] = {} if device is None or device.type == "cpu" else {"device_map": str(device)}
    if dtype != "auto":
        kwargs["dtype"] = dtype
    with loading(name):
        return load_any(name, config, **kwargs)


def chosen_device(device: str | None) -> torch.device:
    """The device named, or a GPU if there is one, under torchrun each rank's own. Raises UserError for no device."""
    import torch

    if device is None:
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here: {one_line(error)}") from error


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Errors of transformers and the hub as UserErrors of one line."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load {what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
