"""`mbq-ao demo`: what it hands to run_demo, which test/demo tests."""

from __future__ import annotations

from typing import Any

import pytest
from command_line import invoke


@pytest.mark.parametrize(
    ("arguments", "precision", "group_size"),
    [
        ([], "w3a16", 64),
        (["--model", "name"], "w3a16", "auto"),
        (["--group-size", "row"], "w3a16", None),
        (["--precision", "w4a8"], "w4a8", "auto"),
        (["--precision", "w4a8", "--group-size", "128"], "w4a8", 128),
    ],
)
def test_options(arguments: list[str], precision: str, group_size: object, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("mbq_ao.demo.run.run_demo", lambda **options: given.update(options))
    done = invoke("demo", *arguments)
    assert done.exit_code == 0, done.output
    assert (given["precision"], given["group_size"]) == (precision, group_size)
