"""docs/: the site builds without a warning, every public name is in it, and what the pages quote is so."""

import ast
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import mbq_ao

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "reference").glob("*.md"))]
sys.path[:0] = [str(DOCS / "_ext"), str(ROOT / "benchmarks")]


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the built site documents: full name -> kind. Building fails at any warning, such as a link to nothing."""
    InventoryFile = pytest.importorskip("sphinx.util.inventory", reason="NO SPHINX: docs/ is not built").InventoryFile
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", str(DOCS), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    data = InventoryFile.loads((out / "objects.inv").read_bytes(), uri="").data
    return {name: kind for kind, items in data.items() if kind.startswith("py:") for name in items}


def test_public_names_are_in_the_reference(inventory: dict[str, str]) -> None:
    assert {f"mbq_ao.{name}" for name in mbq_ao.__all__} - {*inventory} == set()


def test_ops_are_in_the_reference(inventory: dict[str, str]) -> None:
    import torch

    schemas = torch._C._jit_get_all_schemas()
    ops = {s.name.replace("mbq_ao::", "torch.ops.mbq_ao.") for s in schemas if s.name.startswith("mbq_ao::")}
    assert {op for op in ops if not op.endswith("_backward")} == {n for n in inventory if n.startswith("torch.ops.")}


def test_docstrings_name_the_arguments(inventory: dict[str, str]) -> None:
    from docstrings import names_of

    names = [n for n, kind in inventory.items() if n.startswith("mbq_ao.") and kind != "py:module"]
    assert len(names) > 50
    for name in names:
        thing = pkgutil.resolve_name(name)
        doc = inspect.getdoc(thing)
        assert doc, f"{name} has no docstring"
        parameters = inspect.signature(thing).parameters.values() if inspect.isroutine(thing) else ()
        # What has no default is what the function is about, and may be called by another name.
        optional = [p.name for p in parameters if p.default is not p.empty]
        assert [o for o in optional if not re.search(rf"\b{o}\b", doc)] == [], name
        # Of a list, all are arguments or none is: a renamed argument would leave its text behind.
        known = names_of(thing)
        for block in doc.split("\n\n"):
            heads = re.findall(r"^([a-z]\w*(?:, [a-z]\w*)*): ", block, re.MULTILINE)
            listed = {n for head in heads for n in head.split(", ")}
            assert listed <= known or not listed & known, name


# --- what pages quote ---------------------------------------------------------------------------------------------


def messages() -> list[str]:
    """Every string of the package, with a 0 byte for what is filled in; joined ones as one."""
    found = []
    for path in [ROOT / "_mbq_ao_autoload.py", *(ROOT / "mbq_ao").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                found.append(_text(node))
    return found


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(_text, values))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
    return "\0"


def test_quoted_errors_are_in_the_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quotes = re.findall(r"^```text\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL)
    assert len(quotes) > 30
    patterns = [
        (len(text.replace("\0", "")), re.compile(".*?".join(map(re.escape, text.split("\0"))), re.DOTALL))
        for text in messages()
    ]
    for quote in quotes:  # what is filled in is "..." there, or an example of it
        matching = [pattern for length, pattern in patterns if length > len(quote) / 3 and pattern.fullmatch(quote)]
        assert matching, f"no such message: {quote}"


def _calls(text: str) -> Iterator[ast.Call]:
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield from (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call))
    for code in re.findall(r"`([^`\n]+\))`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)):
        try:
            tree = ast.parse(code)
        except SyntaxError:
            continue  # not Python, such as a formula
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_arguments_of_examples_exist(page: Path) -> None:
    for call in _calls(page.read_text(encoding="utf-8")):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name not in mbq_ao.__all__ or (
            isinstance(call.func, ast.Attribute) and not ast.unparse(call.func).startswith("mbq_ao.")
        ):
            continue
        parameters = inspect.signature(getattr(mbq_ao, name)).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue
        assert {k.arg for k in call.keywords} <= {*parameters}, ast.unparse(call)


# --- the numbers of docs/precision.md -----------------------------------------------------------------------------


def _table(name: str) -> list[str]:
    page = (DOCS / "precision.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- {name} -->\n(.*)\n<!-- /{name} -->", page, re.DOTALL)[1].splitlines()


@pytest.fixture(scope="module")
def model_sizes() -> ModuleType:
    import model_sizes

    return model_sizes


def test_model_sizes(model_sizes: ModuleType) -> None:
    assert _table("model-sizes") == model_sizes.table().splitlines()


def test_sizes_are_those_of_real_tensors(model_sizes: ModuleType) -> None:
    import torch

    for n, k in [(64, 256), (70, 300)]:
        w = torch.randn(n, k, dtype=torch.bfloat16)
        for group_size in (32, 128):
            found = mbq_ao.MBQInt3Tensor.from_hp(w, group_size).quantized_nbytes()
            assert found == model_sizes.w3a16_nbytes(n, k, group_size)
        for group_size in (None, 64):
            found = mbq_ao.MBQW4A8Tensor.from_hp(w, group_size).quantized_nbytes()
            assert found == model_sizes.w4a8_nbytes(n, k, group_size)


def test_demo_accuracy() -> None:
    results = ROOT / "benchmarks" / "results"
    rows = {
        row["name"]: row
        for run in ("demo", "demo_w4a8")
        for row in json.loads((results / f"{run}.json").read_text())["rows"]
    }
    shown = {
        "full precision": "full precision",
        "W3A16 (groups of 64), rounded": "W3 RTN",
        "W3A16 (groups of 64), calibrated": "W3 best",
        "W4A8, rounded": "W4A8 RTN",
        "W4A8, calibrated": "W4A8 best",
    }
    expected = [
        f"| {name} | {row['nbytes'] / 1e6:.0f} | {100 * row['accuracy']:.1f} | {row['answer_nll']:.3f} |"
        for name, row in ((name, rows[run]) for name, run in shown.items())
    ]
    assert _table("demo-accuracy")[2:] == expected


def test_instructions_a_weight() -> None:
    table = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    found = re.findall(
        r"^\| gemv \| (\d+) \| 1 \| bf16 \| 128 \| 4096 x 4096 \| ([\d.]+) \|[^|]*\|[^|]*\| ([\d.]+) ",
        table,
        re.MULTILINE,
    )
    assert _table("instructions")[2:] == [f"| sm_{arch} | {count} | {budget} |" for arch, count, budget in found]


# --- docstrings as pages ------------------------------------------------------------------------------------------


DOCSTRING = """Round x * scale to group_size, see `quantize_` and config.py; a_* stays.

    y = x    # code

x: (N, K) bf16.  scale, mode: of both,
    "auto" for `mode`.
group_size: columns that share a scale.
    32: fewer of them.
    None: a row.
    "auto": some.
Returns (N,) in x.dtype.

Attributes:
    x: what
"""
RST = r"""Round x \* scale to ``group_size``, see :py:obj:`quantize_ <mbq_ao.quantize_>` and ``config.py``; a\_\* stays.

::

        y = x    # code

``x``
    ``(N, K)`` bf16.
``scale``, ``mode``
    of both, ``"auto"`` for ``mode``.
``group_size``
    columns that share a scale. 32: fewer of them.

    * None: a row.
    * ``"auto"``: some.

Returns ``(N,)`` in x.dtype.

**Attributes**

``x``
    what
"""


def test_docstring_becomes_rst() -> None:
    from docstrings import to_rst

    lines = to_rst(DOCSTRING.splitlines(), {"x", "scale", "mode", "group_size"}, {"quantize_": "mbq_ao.quantize_"})
    assert "\n".join(lines) == RST
