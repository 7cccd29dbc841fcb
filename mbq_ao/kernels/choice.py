"""Which kernel serves a call, and how it is cut: what `mbq_ao.tune` measured on this machine, else arithmetic.

    rows of x     default
    1 .. 16       int3_gemv.py                             gemv_config.py
    17 ..         int3_gemm.py, or dequantize + matmul     gemm_config.py

A tuned table is data: one JSON file a GPU model and Triton version, in $MBQ_AO_CACHE or ~/.cache/mbq_ao, read at the
first call on that GPU. Nothing is ever tuned by a call itself: a first token that takes a minute is a defect.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import tempfile
import warnings
from typing import Any

import torch
import triton

from mbq_ao.kernels.gemm_config import GemmConfig, default_gemm_config, fused_serves
from mbq_ao.kernels.gemv_config import MAX_ROWS, GemvConfig, default_gemv_config
from mbq_ao.kernels.launch import capability_of, num_sms_of

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Dequantize:
    """The weight is unpacked once, in parts, and multiplied by torch."""


Choice = GemvConfig | GemmConfig | Dequantize
_KINDS: dict[str, type] = {"gemv": GemvConfig, "gemm": GemmConfig, "dequantize": Dequantize}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """num_rows: of x, a power of two that stands for all numbers down to the next. (n, k): of the weight."""

    num_rows: int
    n: int
    k: int
    group_size: int
    dtype: str

    @classmethod
    def of(cls, num_rows: int, n: int, k: int, group_size: int, dtype: torch.dtype) -> "Problem":
        name = str(dtype).removeprefix("torch.")
        return cls(num_rows=triton.next_power_of_2(num_rows), n=n, k=k, group_size=min(group_size, k), dtype=name)


def choose(num_rows: int, n: int, k: int, group_size: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """For x (num_rows, k) in fp16 or bf16 and an (n, k) weight, on a CUDA device or under Triton's interpreter."""
    table = _table_of(device)
    tuned = table.get(Problem.of(num_rows, n, k, group_size, dtype)) if table else None
    return tuned or default_choice(num_rows, n, k, group_size, dtype, device)


def default_choice(num_rows: int, n: int, k: int, group_size: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """The choice without a tuned table."""
    if num_rows <= MAX_ROWS:
        return default_gemv_config(num_rows, n, k, group_size, dtype, num_sms=num_sms_of(device))
    capability = capability_of(device)
    if fused_serves(num_rows, n, k, group_size, dtype, capability):
        return default_gemm_config(num_rows, n, k, group_size, dtype, capability)
    return Dequantize()


def table_path(device: torch.device) -> pathlib.Path:
    """The file of this GPU's tuned table, whether or not it exists."""
    folder = os.environ.get("MBQ_AO_CACHE")
    root = pathlib.Path(folder) if folder else pathlib.Path.home() / ".cache" / "mbq_ao"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return root / f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}_triton-{triton.__version__}.json"


def read_table(path: pathlib.Path) -> dict[Problem, Choice]:
    """A tuned table; empty if there is none, and with a warning if the file is not one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']}, expected {_FORMAT}")
        return dict(_from_json(entry) for entry in record["entries"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"{path} is not a table of mbq_ao.tune ({type(error).__name__}: {error}) and is not used; "
            "delete it, or run mbq_ao.tune again",
            stacklevel=2,
        )
        return {}


def write_table(path: pathlib.Path, table: dict[Problem, Choice]) -> None:
    """Write the table whole or not at all, and use it from the next call on."""
    entries = [_to_json(problem, choice) for problem, choice in table.items()]
    text = json.dumps({"format": _FORMAT, "entries": entries}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False, encoding="utf-8") as file:
        file.write(text)
    pathlib.Path(file.name).replace(path)
    _table_of.cache_clear()


@functools.cache
def _table_of(device: torch.device) -> dict[Problem, Choice]:
    return read_table(table_path(device))


def _to_json(problem: Problem, choice: Choice) -> dict[str, Any]:
    kind = next(name for name, cls in _KINDS.items() if type(choice) is cls)
    return {**dataclasses.asdict(problem), "kernel": kind, "config": dataclasses.asdict(choice)}


def _from_json(entry: dict[str, Any]) -> tuple[Problem, Choice]:
    kind, config = entry.pop("kernel"), entry.pop("config")
    return Problem(**entry), _KINDS[kind](**config)
