"""Test session set-up that must come before any import of triton (torchao imports it)."""

import os

import torch

# Without a GPU the Triton kernels are run by Triton's interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

# Files of a minute or more, begun first, so that no process is left alone with one of them at the end.
LONG = ("test_tutorials", "test_export", "test_gpu_benchmark", "test_int3_cpu", "test_ranks", "test_time_benchmarks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)  # stable
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="NEEDS AN NVIDIA GPU: not run on this machine"))
