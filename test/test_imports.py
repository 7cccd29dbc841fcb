"""Which way imports go, and what `import mbq_ao` costs and prints."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mbq_ao"
# Every part may import from itself and from the parts before it.
ORDER = [
    "kernels",
    "quant_primitives",
    "packed_weight",
    "int3_tensor",
    "fuse_linears",
    "tuning",
    "config",
    "calibration",
    "quantize",
    "evaluation",
    "demo",
    "cli",
]
SAME_LAYER = {"packed_shapes": "packed_weight", "packed_products": "packed_weight", "w4a8_tensor": "int3_tensor"}


def part_of(module: str) -> str | None:
    """mbq_ao.kernels.int3_layout -> kernels; None for the package itself and for its small private files."""
    parts = module.split(".")
    if len(parts) < 2 or parts[1] not in {*ORDER, *SAME_LAYER}:
        return None
    return SAME_LAYER.get(parts[1], parts[1])


def imports(path: Path, *, everywhere: bool) -> set[str]:
    """Modules a file imports: at its top level, or anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    module = ".".join(("mbq_ao", *path.relative_to(PACKAGE).with_suffix("").parts))
    own = part_of(module)
    if own is None:
        return
    for imported in imports(path, everywhere=False):
        other = part_of(imported) if imported.startswith("mbq_ao") else None
        if other is not None:
            assert ORDER.index(other) <= ORDER.index(own), f"{module} imports {imported}"


def test_kernels_know_torch_and_triton_only() -> None:
    for path in (PACKAGE / "kernels").glob("*.py"):
        roots = {name.partition(".")[0] for name in imports(path, everywhere=True)}
        outside = roots - sys.stdlib_module_names - {"torch", "triton", "mbq_ao"}
        assert not outside, f"{path.name} imports {outside}"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_is_silent_and_leaves_calibration_out() -> None:
    done = run_python(
        "import mbq_ao, sys\n"
        "assert not {'mbq_ao.calibration', 'mbq_ao.fuse_linears'} & sys.modules.keys()\n"
        "mbq_ao.ScaleGroup, mbq_ao.fuse_linears_, mbq_ao.calibration_data\n"
        "assert not {'transformers', 'PIL'} & sys.modules.keys()"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_without_triton() -> None:
    # None in sys.modules makes `import triton` raise ImportError.
    done = run_python(
        "import os, sys; sys.modules['triton'] = None; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch, mbq_ao\n"
        "for kind in (mbq_ao.MBQInt3Tensor, mbq_ao.MBQW4A8Tensor):\n"
        "    w = kind.from_hp(torch.randn(8, 64), 64)\n"
        "    print(tuple(torch.nn.functional.linear(torch.randn(2, 64), w).shape))\n"
        "linear = torch.nn.Linear(64, 8)\n"
        "linear.weight = torch.nn.Parameter(mbq_ao.MBQInt3Tensor.from_hp(linear.weight, 64), False)\n"
        "try: mbq_ao.tune(linear)\n"
        "except ValueError as error: print(str(error)[:41])"
    )
    expected = "(2, 8)\n(2, 8)\ntune measures kernels on one NVIDIA GPU, \n"
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


def test_import_takes_under_a_second_beyond_torch_and_torchao() -> None:
    timed = run_python(
        "import logging; logging.disable()\n"
        "import torch, torchao.quantization, torchao.utils, time\n"
        "began = time.process_time(); import mbq_ao; print(time.process_time() - began)"
    )
    assert timed.returncode == 0, timed.stderr
    assert float(timed.stdout) < 1.0
