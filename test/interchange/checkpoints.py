"""Tiny GPTQ and AWQ checkpoints, packed here bit by bit from the published layouts, independent of mbq_ao."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import build_model
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """(rows, fields) -> int32 (rows, fields * bits / 32): each row one stream of bits, lowest first."""
    stream = np.unpackbits(codes.numpy().astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    words = np.packbits(stream.reshape(len(codes), -1), axis=-1, bitorder="little").view("<i4")
    return torch.from_numpy(words.copy())


def gptq_parts(
    codes: Tensor, zero: Tensor, scale: Tensor, group_of: Tensor, bits: int, minus_one: bool
) -> dict[str, Tensor]:
    """codes (N, K); zero, scale (N, groups)."""
    return {
        "qweight": pack_columns(codes, bits).t().contiguous(),
        "qzeros": pack_columns((zero - int(minus_one)).t() & (2**bits - 1), bits),
        "scales": scale.t().contiguous(),
        "g_idx": group_of.to(torch.int32),
    }


def awq_parts(codes: Tensor, zero: Tensor, scale: Tensor) -> dict[str, Tensor]:
    def interleaved(x: Tensor) -> Tensor:
        return pack_columns(x.t().unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1), 4)

    return {"qweight": interleaved(codes), "qzeros": interleaved(zero), "scales": scale.t().contiguous()}


def random_weight(n: int, k: int, bits: int, group_of: Tensor, sym: bool, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, zero points (never 0, which GPTQ's first format cannot store), fp16 scales."""
    generator = torch.Generator().manual_seed(seed)
    groups = int(group_of.max()) + 1
    codes = torch.randint(0, 2**bits, (n, k), generator=generator)
    zero = torch.full((n, groups), 2 ** (bits - 1))
    if not sym:
        zero = torch.randint(1, 2**bits, (n, groups), generator=generator)
    return codes, zero, (torch.rand(n, groups, generator=generator) * 0.02 + 0.01).half()


def write_checkpoint(
    folder: Path,
    method: str = "gptq",
    bits: int = 3,
    *,
    family: str = "llama",
    group_size: int = 32,
    sym: bool = False,
    group_of: Callable[[int], Tensor] | None = None,
    changes: dict[str, Any] | None = None,
    own_file: bool = False,
    which: str = ".layers.",
) -> dict[str, Tensor]:
    """Write a family's tiny model, in fp16, with its decoder linears quantized.

    changes: of the quantization_config.  own_file: that in a file of its own, as older libraries wrote it.
    Returns name in the file -> the weight that it stands for, fp16.
    """
    build_model(family, torch.float16).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors, weights = load_file(path), {}
    settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "sym": sym, "quant_method": method}
    if method == "awq":
        settings = {
            "bits": bits,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "quant_method": "awq",
        }
    settings |= changes or {}
    for seed, name in enumerate(sorted(tensors)):
        value = tensors[name]
        if value.dim() != 2 or which not in name or not name.endswith("_proj.weight") or "vision" in name:
            continue
        n, k = value.shape
        columns = torch.arange(k) // (k if group_size == -1 else group_size) if group_of is None else group_of(k)
        codes, zero, scale = random_weight(n, k, bits, columns, sym, seed)
        parts = (
            awq_parts(codes, zero, scale)
            if method == "awq"
            else gptq_parts(codes, zero, scale, columns, bits, settings.get("checkpoint_format") != "gptq_v2")
        )
        del tensors[name]
        tensors |= {name.replace("weight", part): tensor for part, tensor in parts.items()}
        weights[name] = (codes - zero[:, columns]).half() * scale[:, columns]
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if own_file:
        if method == "awq":
            settings = {"w_bit": bits, "q_group_size": group_size, "zero_point": True, "version": "GEMM"}
        settings.pop("quant_method", None)
        own = "quant_config.json" if method == "awq" else "quantize_config.json"
        (folder / own).write_text(json.dumps(settings))
    else:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
