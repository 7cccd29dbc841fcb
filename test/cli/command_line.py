"""Runs the command line in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from mbq_ao.cli import app


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def document(*arguments: object) -> Any:
    """What a command prints with --json, which has to be all there is on stdout."""
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def refusal(*arguments: object) -> str:
    """What a command that is to fail with exit code 1 says."""
    done = invoke(*arguments)
    assert (done.exit_code, done.stdout) == (1, ""), (done.output, done.exception)
    assert isinstance(done.exception, SystemExit)
    _, found, told = f"\n{done.stderr}".rpartition("\nerror: ")
    assert found, done.stderr
    return told
