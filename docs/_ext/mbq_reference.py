"""Sphinx extension: docstrings of this library in autodoc, and its `torch.library` ops.

`.. mbq-op:: mbq_ao.kernels.int3_ops.int3_linear` documents an op under the name by which it is called,
`torch.ops.mbq_ao.int3_linear`: autodoc finds no signature on what `torch.library.custom_op` returns.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from docstrings import names_of, to_rst
from docutils.nodes import Node, literal_block, make_id
from docutils.nodes import section as section_node
from docutils.nodes import title as title_node
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import mbq_ao

LINKS = {name: f"mbq_ao.{name}" for name in mbq_ao.__all__}


class OpDirective(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[Node]:
        module, _, name = self.arguments[0].rpartition(".")
        function = getattr(importlib.import_module(module), name)._init_fn
        signature = inspect.signature(function)
        # As torch prints a schema, without the classes' modules.
        arguments = ", ".join(f"{p.name}: {_short(p.annotation)}" for p in signature.parameters.values())
        lines = [".. py:currentmodule:: torch.ops.mbq_ao", "", f".. py:function:: {name}({arguments}) -> Tensor", ""]
        body = to_rst((inspect.getdoc(function) or "").splitlines(), names_of(function), LINKS)
        return self.parse_text_to_nodes("\n".join([*lines, *(f"    {line}".rstrip() for line in body)]))


class CommandsDirective(SphinxDirective):
    """The help of every command of `mbq-ao`, as it prints it."""

    def run(self) -> list[Node]:
        from typer.main import get_command
        from typer.testing import CliRunner

        from mbq_ao.cli import app

        runner = CliRunner(env={"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "100", "TERMINAL_WIDTH": "100"})
        nodes: list[Node] = []
        for command in ("", *get_command(app).commands):  # type: ignore[attr-defined]
            result = runner.invoke(app, [*filter(None, [command]), "--help"], prog_name="mbq-ao")
            text = "\n".join(line.rstrip() for line in result.output.strip("\n").splitlines())
            title = f"mbq-ao {command}".strip()
            section = section_node("", title_node("", title), ids=[make_id(title)])
            section += literal_block(text, text, language="text")
            nodes.append(section)
        return nodes


def _short(annotation: Any) -> str:
    text = annotation.__name__ if inspect.isclass(annotation) else str(annotation)
    return text.replace("collections.abc.", "").replace("torch.Tensor", "Tensor").replace("torch.dtype", "dtype")


def process_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rst(lines, names_of(obj), LINKS)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process_docstring)
    app.add_directive("mbq-op", OpDirective)
    app.add_directive("mbq-cli", CommandsDirective)
    return {"version": mbq_ao.__version__, "parallel_read_safe": True}
