"""What the commands share: the option --json, errors and exit codes.

    0    done
    1    an error of the user's (a path, a value, a damaged file), told in one line on stderr; --traceback of Python's
         own kind with MBQ_AO_TRACEBACK=1
    2    unknown options, missing arguments
    130  Ctrl-C

Anything else is a mistake of ours and keeps its traceback (and Python's exit code, 1).
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

PACKAGE = Path(__file__).parents[1]

Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the result as one JSON document on stdout, and everything else on stderr.",
        rich_help_panel="Output",
    ),
]
"""Type of the parameter `as_json` of commands that have --json."""


class UserError(Exception):
    """An error to be told in one line, exit code 1. The message says the thing, the value, the rule and the way out."""


def as_command(function: Callable[..., Any]) -> Callable[..., None]:
    """The function as typer is to call it.

    It prints for people, to stdout, and returns what --json prints (the parameter `as_json`, see Json): with it stdout
    is stderr while the function runs. None: nothing, as of a rank that is not the first.
    """

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        out, as_json = sys.stdout, kwargs.get("as_json", False)
        try:
            _import_quietly()
            with redirect_stdout(sys.stderr if as_json else out), _plain_warnings():
                result = function(*args, **kwargs)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # `mbq-ao inspect MODEL | head`; typer knows what to do
            raise
        except Exception as error:
            if os.environ.get("MBQ_AO_TRACEBACK") or not _is_users(error):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from error
        if as_json and result is not None:
            print(json.dumps(result, indent=1, allow_nan=False), file=out)

    return command


def _is_users(error: Exception) -> bool:
    """Whether the message is meant for the user: files, and what our own code raises deliberately."""
    if isinstance(error, UserError | OSError):
        return True
    if not isinstance(error, ValueError | TypeError | ImportError | RuntimeError):
        return False
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and Path(traceback.tb_frame.f_code.co_filename).is_relative_to(PACKAGE)


def console() -> Console:
    """For tables on stdout: as wide as the terminal, and wide enough for whole lines where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings without the place in the code that they come from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *args, **kwargs: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _import_quietly() -> None:
    from mbq_ao._quiet import import_torchao

    import_torchao()
    # transformers imports more of torchao, whose deprecation remarks would open the output.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
