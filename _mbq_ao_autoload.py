"""Lets transformers load mbq checkpoints without `import mbq_ao`: an entry point that `import torch` calls.

torch calls the entry points of the group "torch.backends" at the end of its import; there is no such hook in
transformers, which for an unknown quantization method warns and returns random weights. Nothing of mbq_ao is imported
here: it is when transformers' own table of quantization methods has been made, which takes seconds anyway.
TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns it off. Not part of the package mbq_ao, since importing that would import torchao
in the middle of torch's import.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_TABLE = "transformers.quantizers.auto"


def install() -> None:
    """Register with transformers now, or when it is imported."""
    if _TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    try:
        import mbq_ao.hf_quantizer  # noqa: F401
    except Exception as error:  # must not be the end of somebody's `import transformers`
        warnings.warn(
            f"mbq_ao could not register with transformers, mbq checkpoints will not load: {error!r}", stacklevel=2
        )


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the one module as the others would, and registers as soon as it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
