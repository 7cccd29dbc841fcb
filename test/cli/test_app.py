"""The app itself: help, exit codes, what goes to stdout, and that --help does not wait for torch."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import invoke
from typer.testing import CliRunner, Result

import mbq_ao
from mbq_ao.cli import app
from mbq_ao.cli.console import Json, UserError, as_command


def mbq_ao_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_every_command_has_an_example() -> None:
    commands = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert "demo" in commands
    for name in commands:
        shown = invoke(name, "--help")
        assert shown.exit_code == 0 and f"mbq-ao {name}" in shown.stdout, name


def test_help_and_version_do_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['mbq-ao', {!r}]\n"
        "import atexit; atexit.register(lambda: print('torch' in sys.modules))\n"
        "from mbq_ao.cli import app; app()"
    )
    shown = mbq_ao_process("-c", code.format("--help"))
    assert "\x1b" not in shown.stdout and "COMMAND" in shown.stdout
    assert shown.returncode == 0 and shown.stdout.endswith("\nFalse\n"), shown
    shown = mbq_ao_process("-c", code.format("--version"))
    assert shown.stdout == f"mbq_ao {mbq_ao.__version__}\nFalse\n"


def test_python_m() -> None:
    shown = mbq_ao_process("-X", "importtime", "-m", "mbq_ao", "--version")
    assert shown.stdout == f"mbq_ao {mbq_ao.__version__}\n"
    assert " mbq_ao.cli\n" in shown.stderr and " torch\n" not in shown.stderr
    unknown = mbq_ao_process("-m", "mbq_ao", "quantise")
    assert (unknown.returncode, unknown.stdout) == (2, "") and "quantise" in unknown.stderr


def test_every_name_is_there_on_the_command_line() -> None:
    """Where the package imports nothing, its names come from here alone."""
    assert set(mbq_ao.__all__) <= mbq_ao._LAZY.keys()
    for name, module in mbq_ao._LAZY.items():
        assert getattr(importlib.import_module(module), name) is getattr(mbq_ao, name)


def test_a_whole_process() -> None:
    """One JSON document on stdout; nothing of torchao's remarks on stderr."""
    golden = Path(__file__).parents[1] / "goldens" / "checkpoint_v1"
    done = mbq_ao_process("-m", "mbq_ao", "inspect", str(golden), "--json")
    assert done.returncode == 0 and len(json.loads(done.stdout)["weights"]) == 7
    assert "register_constant" not in done.stderr and "Failed to load" not in done.stderr


def raising(error: BaseException) -> Result:
    def command(as_json: Json = False) -> dict[str, Any]:
        """A command."""
        print("told to people")
        if error.args == ("none",):
            return {"value": 1.5}
        raise error

    one = typer.Typer(pretty_exceptions_enable=False)
    one.command()(as_command(command))
    return CliRunner().invoke(one, ["--json"])


def test_json_is_all_there_is_on_stdout() -> None:
    done = raising(Exception("none"))
    assert done.exit_code == 0 and json.loads(done.stdout) == {"value": 1.5}
    assert "told to people" in done.stderr


@pytest.mark.parametrize(
    ("error", "exit_code", "told"),
    [
        (UserError("what"), 1, "error: what\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "error: [Errno 2] No such file: 'x'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_of_the_users_are_one_line(error: BaseException, exit_code: int, told: str) -> None:
    done = raising(error)
    assert (done.exit_code, done.stdout) == (exit_code, "") and done.stderr.endswith(told)


def test_what_our_code_refuses_is_one_line_and_what_others_raise_is_not() -> None:
    def refused() -> None:
        mbq_ao.Int3WeightOnlyConfig(group_size=7)

    def mistake() -> None:
        json.loads("{")  # a ValueError, but not ours

    for command, exit_code, kind in ((refused, 1, SystemExit), (mistake, 1, json.JSONDecodeError)):
        one = typer.Typer(pretty_exceptions_enable=False)
        one.command()(as_command(command))
        done = CliRunner().invoke(one, [])
        assert done.exit_code == exit_code and isinstance(done.exception, kind)
        assert done.stderr.startswith("error: group_size must be") == (kind is SystemExit)
