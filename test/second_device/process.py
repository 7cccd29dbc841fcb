"""A process that has the counted device: torch knows it for good once it is registered."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from second_device import counted_device


@contextmanager
def process_with_device() -> Iterator[Callable[..., Any]]:
    """Calls a function of the test's module in that process. Skips the test without a C++ compiler."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), warnings.simplefilter, ("ignore",)) as pool:
        try:
            pool.submit(_register).result()
        except RuntimeError as error:
            if "needs a C++ compiler" in str(error):
                pytest.skip(f"NOT RUN: {error}")
            raise
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


def _register() -> None:
    counted_device()
