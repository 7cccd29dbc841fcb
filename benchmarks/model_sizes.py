"""Sizes of real models in each precision, by arithmetic on their published configs: nothing is loaded.

    python benchmarks/model_sizes.py          # prints the table of docs/precision.md

A quantized weight of N rows and K columns, in groups of g columns (a whole row is one group of K), takes

    w3a16    3/8 N' K' + N ceil(K / g) (2 + 1)     N', K': up to whole tiles of 32 x 128; scale bf16, zero point uint8
    w4a8     4/8 N' K' + N ceil(K / g) 2           N', K': up to whole tiles of 16 x 64

bytes. Quantized are the linears of the decoder's layers; all else is counted in bfloat16.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # where there is no GPU; before torchao is imported

import torch
import transformers
from calibration_memory import SIZES, published
from torch import nn

from mbq_ao.calibration.capture import find_blocks
from mbq_ao.kernels import int3_layout, int4_layout

TITLES = ("bfloat16", "w3a16, groups of 128", "w4a8, a scale a row")


def w3a16_nbytes(n: int, k: int, group_size: int = 128) -> int:
    return 2 * _numel(int3_layout.packed_shape(n, k)) + n * -(-k // group_size) * 3


def w4a8_nbytes(n: int, k: int, group_size: int | None = None) -> int:
    return _numel(int4_layout.packed_shape(n, k)) + n * -(-k // (group_size or k)) * 2


def nbytes(config: transformers.PreTrainedConfig) -> tuple[int, int, int]:
    """Of the whole model, in the order of TITLES."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    shapes = [
        tuple(linear.weight.shape)
        for block in find_blocks(model, None).values()
        for linear in block.modules()
        if isinstance(linear, nn.Linear)
    ]
    rest = total - sum(2 * n * k for n, k in shapes)
    return total, rest + sum(w3a16_nbytes(n, k) for n, k in shapes), rest + sum(w4a8_nbytes(n, k) for n, k in shapes)


def table() -> str:
    lines = [f"| model | {' | '.join(f'{title} (GB)' for title in TITLES)} |", "|---|---:|---:|---:|"]
    for size in SIZES:
        lines.append(f"| Qwen2.5-VL-{size} | {' | '.join(f'{n / 1e9:.1f}' for n in nbytes(published(size)))} |")
    return "\n".join(lines)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


if __name__ == "__main__":
    print(table())
