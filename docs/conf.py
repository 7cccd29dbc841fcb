"""Sphinx: `make docs` builds this folder into docs/_build/html."""

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels are imported for their docstrings, on any machine

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import mbq_ao  # noqa: E402

project = "mbq_ao"
copyright = "the mbq_ao authors"
version = release = mbq_ao.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "myst_nb", "mbq_reference"]
exclude_patterns = ["_build", "_ext"]
html_theme = "furo"
html_title = f"mbq_ao {version}"
html_copy_source = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tutorials' outputs are in the notebooks, made by `make notebooks`

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

# Types of other libraries, which have no page here, and what signatures call them.
_OTHERS = "torch|nn|torchao|transformers|collections|typing|os|pathlib|matplotlib"
nitpick_ignore_regex = [
    ("py:.*", rf"({_OTHERS})\..*"),
    ("py:class", "Tensor|dtype|Path|Figure|AOBaseConfig|PreTrainedModel|FilterFn"),
]


def tutorials() -> None:
    """Bring the notebooks here: they lie beside their scripts, outside of this folder, where Sphinx does not look."""
    notebooks = sorted((HERE.parent / "tutorials").glob("*.ipynb"))
    folder = HERE / "tutorials"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for notebook in notebooks:
        shutil.copy2(notebook, folder)
    listed = "\n".join(notebook.stem for notebook in notebooks)
    page = f"# Tutorials\n\nNotebooks with their outputs, from `tutorials/`.\n\n```{{toctree}}\n{listed}\n```\n"
    (folder / "index.md").write_text(page, encoding="utf-8")


tutorials()
