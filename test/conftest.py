"""Test session set-up that must come before any import of triton (torchao imports it)."""

import os

import torch

# Without a GPU the Triton kernels are run by Triton's interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="NEEDS AN NVIDIA GPU: not run on this machine"))
