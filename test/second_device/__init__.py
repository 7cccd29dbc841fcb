"""A second device for machines that have none, "counted": see backend.cpp. Compiled once, in about 40 s.

counted = counted_device()
model.to(counted.device)
counted.peak_bytes()
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import types
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

_SOURCE = Path(__file__).with_name("backend.cpp")


@cache
def counted_device() -> CountedDevice:
    """The device, registered with torch. Raises RuntimeError without a C++ compiler."""
    library = _compiled()
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend("counted")
    module: Any = types.ModuleType("counted")
    module.is_available, module.device_count, module.current_device = lambda: True, lambda: 1, lambda: 0
    module._is_in_bad_fork, module.manual_seed_all = lambda: False, lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch._register_device_module("counted", module)
    return CountedDevice(ctypes.CDLL(str(library)))


class CountedDevice:
    """torch.device("counted") as `device`, and how many bytes are alive on it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.device = torch.device("counted")
        self._library = library
        for function in (library.live_bytes, library.peak_bytes):
            function.restype = ctypes.c_int64

    def live_bytes(self) -> int:
        return self._library.live_bytes()

    def peak_bytes(self) -> int:
        """The most that was alive at once since `reset_peak`."""
        return self._library.peak_bytes()

    def reset_peak(self) -> None:
        self._library.reset_peak()


def _compiled() -> Path:
    """The shared library; one file for this source and this torch, kept in the user's cache."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("the counted device needs a C++ compiler: install g++, or set CXX")
    key = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode() + compiler.encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mbq_ao" / "second_device"
    library = folder / f"{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            target = Path(scratch) / library.name
            flags = ["-std=c++20", "-O1", "-fPIC", "-shared", *(f"-I{p}" for p in cpp_extension.include_paths())]
            paths = [f"-L{p}" for p in cpp_extension.library_paths()]
            command = [compiler, *flags, str(_SOURCE), "-o", str(target), *paths, "-ltorch", "-ltorch_cpu", "-lc10"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"{_SOURCE} does not compile:\n{result.stderr}")
            target.replace(library)  # another process may do the same at the same time
    return library
