"""What a checkpoint's files say of its weights, read weight by weight: no model is built, and little memory needed.

A weight is unpacked in slabs of rows, so that the largest thing in memory is one weight's scales.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbq_ao.hf_quantizer import METHOD
from mbq_ao.kernels import int3_layout, int4_layout
from mbq_ao.packed_weight import PackedWeight, plain_shape
from mbq_ao.quant_primitives import num_groups
from mbq_ao.safetensors_format import WEIGHT_TYPES, check_version, opened, part_name

_SLAB = 1 << 22  # weights that are unpacked at a time
_PRECISIONS = {"MBQInt3Tensor": "w3a16", "MBQW4A8Tensor": "w4a8"}
_UNPACK = {"MBQInt3Tensor": (int3_layout.unpack_int3, 0, 8), "MBQW4A8Tensor": (int4_layout.unpack_int4, -8, 16)}
"""How to unpack, the smallest code, and how many there are."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, as its header has it. dtype: safetensors' name, such as "BF16"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight in a checkpoint.

    shape: of the plain weight, (N, K) or (E, N, K).  nbytes: of all its parts.
    parts: "qdata", "scale", ... -> its tensor's name in the file and what it is.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    group_size: int
    parts: Mapping[str, tuple[str, StoredTensor]]

    @property
    def precision(self) -> str:
        return _PRECISIONS[self.kind]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.parts.values())

    @property
    def num_weights(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class WeightStatistics:
    """codes: how often each code occurs, the smallest first.  saturated: share of the smallest and the largest code.

    scale_min, scale_median, scale_max: of the finite ones, None if there is none.  zero_scales: share of scales that
    are 0.  bad_scales: number of those that are NaN or infinite, which no sound checkpoint has.
    """

    codes: list[int]
    saturated: float
    scale_min: float | None
    scale_median: float | None
    scale_max: float | None
    zero_scales: float
    bad_scales: int


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, or the file itself.

    Raises ValueError if it is not ours or of a newer format, FileNotFoundError if a shard is missing.
    """
    if path.is_file():
        with opened(path) as file:
            check_version((file.metadata() or {}).get("mbq_format_version"), path)
        return [path]
    config = path / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") if config.is_file() else None
    if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        method = f"quant_method {settings['quant_method']!r}" if settings else "no quantization_config"
        raise ValueError(
            f"{path} is not an mbq checkpoint: "
            + (f"its config.json has {method}" if config.is_file() else "it has no config.json")
        )
    check_version(settings.get("format_version"), path)
    index = path / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if missing := sorted(name for name in names if not (path / name).is_file()):
        raise FileNotFoundError(f"{path} is incomplete: {', '.join(missing)} missing; copy or download it again")
    return [path / name for name in sorted(names)]


def read_headers(files: Sequence[Path]) -> tuple[list[StoredWeight], dict[str, StoredTensor]]:
    """(the quantized weights, the other tensors) of a checkpoint, from the headers of its files alone.

    Raises ValueError naming the file or the weight if something does not fit.
    """
    tensors: dict[str, StoredTensor] = {}
    described: dict[str, Any] = {}
    for path in files:
        with opened(path) as file:  # which checks the header
            described |= json.loads((file.metadata() or {}).get("mbq_weights", "{}"))
        tensors |= _header(path)
    weights = []
    for key in [key for key in tensors if key.endswith("_qdata")]:
        module, _, last = key.rpartition(".")
        parameter = last.removeprefix("_").removesuffix("_qdata")
        weights.append(_weight(f"{module}.{parameter}".removeprefix("."), tensors, described))
    return sorted(weights, key=lambda weight: _natural(weight.name)), tensors


def statistics(weight: StoredWeight) -> WeightStatistics:
    """Reads the weight's codes and scales."""
    unpack, smallest, num_codes = _UNPACK[weight.kind]
    codes = torch.zeros(num_codes, dtype=torch.int64)
    for qdata, rows in _slabs(weight):
        q = unpack(qdata, rows, weight.shape[-1])
        codes += torch.bincount((q - smallest).reshape(-1), minlength=num_codes)
    scale = _read(weight, "scale")[...].float().reshape(-1)
    finite = scale[scale.isfinite()]
    any_finite = finite.numel() > 0
    return WeightStatistics(
        codes=codes.tolist(),
        saturated=((codes[0] + codes[-1]) / codes.sum()).item(),
        scale_min=finite.min().item() if any_finite else None,
        scale_median=finite.median().item() if any_finite else None,
        scale_max=finite.max().item() if any_finite else None,
        zero_scales=(scale == 0).float().mean().item(),
        bad_scales=scale.numel() - finite.numel(),
    )


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """To sort by: layer 2 before layer 10."""
    return [(word.isdigit(), int(word) if word.isdigit() else 0, word) for word in name.split(".")]


def _header(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {
        name: StoredTensor(
            path, entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _weight(name: str, tensors: dict[str, StoredTensor], described: Mapping[str, Any]) -> StoredWeight:
    """The weight of this name, whose parts are taken out of `tensors`.

    The files have the names of transformers' layout, `described` those of the model in memory. So the weight's entry is
    found by what fits, and of several by how much of the name's end is the same.
    """
    has_zero_point = part_name(name, "zero_point") in tensors
    kind = next(k for k, t in WEIGHT_TYPES.items() if ("zero_point" in t.tensor_data_names) == has_zero_point)
    cls = WEIGHT_TYPES[kind]
    names = (*cls.tensor_data_names, *cls.optional_tensor_data_names)
    parts = {part: (key, tensors.pop(key)) for part in names if (key := part_name(name, part)) in tensors}
    if missing := [part_name(name, part) for part in cls.tensor_data_names if part not in parts]:
        raise ValueError(f"the checkpoint is incomplete: {', '.join(missing)} missing; copy or download it again")
    fitting = [
        (
            _common_end(name, other),
            plain_shape(entry["shape"], entry.get("transposed")),
            entry,
        )
        for other, entry in described.items()
        if entry["type"] == kind and _fits(cls, parts, entry)
    ]
    if not fitting:
        raise ValueError(
            f"{name} does not fit: its file describes no {kind} with such parts; copy or download it again"
        )
    _, shape, entry = max(fitting, key=lambda found: found[0])
    return StoredWeight(name, kind, shape, entry["block_size"][-1], parts)


def _common_end(a: str, b: str) -> int:
    """How many of the last words of two names are the same."""
    pairs = zip(reversed(a.split(".")), reversed(b.split(".")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _fits(cls: type[PackedWeight], parts: Mapping[str, tuple[str, StoredTensor]], entry: Mapping[str, Any]) -> bool:
    shape = plain_shape(entry["shape"], entry.get("transposed"))
    layout = int3_layout if cls is WEIGHT_TYPES["MBQInt3Tensor"] else int4_layout
    expected = {
        "qdata": layout.packed_shape(*shape),
        "scale": (*shape[:-1], num_groups(shape[-1], entry["block_size"][-1])),
        "act_pre_scale": (*shape[:-2], shape[-1]),
    }
    return all(tensor.shape == expected.get(part, expected["scale"]) for part, (_, tensor) in parts.items())


def _read(weight: StoredWeight, part: str) -> Any:
    """A part as something to slice, of which only the slices are read."""
    key, tensor = weight.parts[part]
    return opened(tensor.file).get_slice(key)


def _slabs(weight: StoredWeight) -> Iterator[tuple[Tensor, int]]:
    """The packed data in slabs of whole row tiles, each with the number of its rows."""
    *experts, n, k = weight.shape
    qdata, tile_n = _read(weight, "qdata"), WEIGHT_TYPES[weight.kind].TILE_N
    tiles = max(1, _SLAB // (tile_n * k))
    for expert in range(experts[0]) if experts else [None]:
        for start in range(0, -(-n // tile_n), tiles):
            slab = qdata[start : start + tiles] if expert is None else qdata[expert, start : start + tiles]
            yield slab, min(tiles * tile_n, n - start * tile_n)
