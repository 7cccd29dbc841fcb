"""The command line, `mbq-ao` or `python -m mbq_ao`: one module a command, and what they share in console.py.

Nothing here imports torch before a command runs, so that --help and shell completion answer at once: what is heavy is
imported inside the commands' functions, and mbq_ao/__init__.py leaves its own imports out in this case.
"""

from __future__ import annotations

from typing import Annotated

import typer

from mbq_ao.cli import bench, demo, eval, generate, inspect, quantize
from mbq_ao.cli.console import as_command

app = typer.Typer(
    name="mbq-ao",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # what is not the user's error shows Python's own traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        import mbq_ao

        print(f"mbq_ao {mbq_ao.__version__}")
        raise typer.Exit


@app.callback()
def mbq_ao_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """3-bit (W3A16) and 4-bit (W4A8) vision-language models by modality-balanced quantization (MBQ).

    `mbq-ao COMMAND --help` explains a command, with an example.
    """


# In the order of --help. A command prints for people and returns what --json prints, see as_command.
for _command in (quantize.quantize, eval.eval, generate.generate, bench.bench, inspect.inspect, demo.demo):
    app.command(no_args_is_help=_command is not demo.demo)(as_command(_command))
