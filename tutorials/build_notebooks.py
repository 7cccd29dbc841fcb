"""Run every tutorial cell by cell and write it as a notebook, outputs and pictures inside: `make notebooks`.

    python tutorials/build_notebooks.py [01 07 ...]       those whose names begin so; all, if none is named
    python tutorials/build_notebooks.py --text [01 ...]   after a change of the prose: the outputs stay, nothing is run

The scripts are what is edited; the notebooks are built. What differs from run to run (cell ids, execution times) is
left out, so that a notebook changes only where its script or an output does.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "name": "python"},
}
# Nothing of the machine or the process that ran it (absolute paths, addresses), no progress bars, no colours.
PATH = r"""(?:^|[\s'"(=:])(?:/|[A-Z]:\\)\w[\w.-]*[/\\]"""
UNWANTED = re.compile(PATH + r"|site-packages|\b0x[0-9a-f]{8,}|\r|\x1b|%\|", re.MULTILINE)


def scripts() -> list[Path]:
    """The tutorials, in order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def as_notebook(script: Path) -> NotebookNode:
    """The script's cells as a notebook without outputs."""
    notebook = jupytext.read(script)
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
    return notebook


def defects(notebook: NotebookNode) -> list[str]:
    """What must not be in the outputs of a notebook that is shown to others."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"{cell.id}: {output.get('ename', 'stderr')}: {output.get('evalue', text)}")
            elif match := UNWANTED.search(text):
                found.append(f"{cell.id}: {match.group()!r} in the output {text!r}")
    return found


def build(script: Path) -> Path:
    """Run the script's cells in a fresh kernel and folder, and write the notebook beside it.

    Raises ValueError naming the cell for outputs with warnings, or with paths of this machine.
    """
    notebook = as_notebook(script)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=1200,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        ).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    return write(notebook, script)


def with_new_text(script: Path) -> Path:
    """Write the notebook anew with the outputs that it has. Raises ValueError if a code cell has changed."""
    notebook, old = as_notebook(script), nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    cells, old_cells = ([cell for cell in n.cells if cell.cell_type == "code"] for n in (notebook, old))
    if [cell.source for cell in cells] != [cell.source for cell in old_cells]:
        raise ValueError(f"{script.name} has other code than its notebook: build it without --text")
    for cell, old_cell in zip(cells, old_cells, strict=True):
        cell.outputs, cell.execution_count = old_cell.outputs, old_cell.execution_count
    return write(notebook, script)


def write(notebook: NotebookNode, script: Path) -> Path:
    path = script.with_suffix(".ipynb")
    nbformat.write(notebook, path)
    if found := defects(notebook):
        raise ValueError(f"{path.name} is not fit to be shown:\n" + "\n".join(found))
    return path


def main(arguments: list[str]) -> None:
    prefixes = [argument for argument in arguments if argument != "--text"]
    make = build if prefixes == arguments else with_new_text
    # The kernel is another process: it finds the package that lies here, installed or not.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's, in a kernel without ipywidgets
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    os.environ["GIT_DIR"] = str(FOLDER.parent / ".git")  # lm-eval asks git for a commit, which complains elsewhere
    for script in scripts():
        if not prefixes or script.name.startswith(tuple(prefixes)):
            print(make(script).name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
