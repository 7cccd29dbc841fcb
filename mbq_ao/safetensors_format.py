"""The checkpoint format: quantized weights as plain safetensors, for any model. Transformers' are in pretrained.py.

A packed weight called `layers.0.q_proj.weight` is written as its data, each a plain tensor of its own:

    layers.0.q_proj._weight_qdata, ._weight_scale, ._weight_zero_point, ._weight_act_pre_scale   (those that it has)

in the layout that the class of the tensor documents. Every other tensor is written as it is. The file's metadata
(safetensors' `__metadata__`, strings) says what cannot be read off the data:

    mbq_format_version   "1"
    mbq_weights          JSON: name of the weight -> {"type": class name, "shape", "block_size", "transposed"}
    mbq_checksums        JSON: name of a tensor in the file -> CRC-32 of its bytes, 8 hexadecimal digits

Nothing is ever unpickled. A reader refuses a newer version; fields that it does not know it ignores.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mbq_ao.int3_tensor import MBQInt3Tensor
from mbq_ao.packed_weight import PackedWeight
from mbq_ao.w4a8_tensor import MBQW4A8Tensor

FORMAT_VERSION = 1
WEIGHT_TYPES: dict[str, type[PackedWeight]] = {kind.__name__: kind for kind in (MBQInt3Tensor, MBQW4A8Tensor)}


def save_safetensors(model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a model's state dict, quantized weights and all, to one safetensors file; `load_safetensors` reads it.

    model: an nn.Module, or a state dict of tensors. Tensors that share memory (tied weights) are written once each.
    The file appears under its name when it is complete: a failure leaves what was there before.
    Raises ValueError for a tensor of another quantization library, OSError if the file cannot be written.
    """
    state_dict = model.state_dict() if isinstance(model, nn.Module) else model
    plain, metadata = flatten_weights(state_dict)
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in plain.items()}
    seen: set[int] = set()
    for name, tensor in plain.items():
        if tensor.numel() and tensor.data_ptr() in seen:  # safetensors refuses tensors that share memory
            plain[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    metadata["mbq_checksums"] = json.dumps(checksums(plain))
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        save_file(plain, unfinished, {**metadata, "format": "pt"})
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def load_safetensors(
    path: str | os.PathLike[str], device: torch.types.Device = "cpu", *, verify: bool = True
) -> dict[str, Tensor]:
    """The state dict that `save_safetensors` wrote, for `model.load_state_dict(state_dict, assign=True)`.

    device: where the tensors go.  verify: compare the checksums.
    Raises FileNotFoundError, and ValueError naming the tensor if the file is damaged, of a newer format or not ours.
    """
    metadata = read_metadata(path)
    check_version(metadata.get("mbq_format_version"), path)
    if verify:
        verify_file(path)
    with opened(path) as file:
        plain = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    state_dict = unflatten_weights(plain, json.loads(metadata["mbq_weights"]), path)
    return {name: tensor.to(device) for name, tensor in state_dict.items()}


# --- names and metadata -----------------------------------------------------------------------------------------


def part_name(name: str, part: str) -> str:
    """`layers.0.weight`, `qdata` -> `layers.0._weight_qdata`, which is how torchao names it, too."""
    module, dot, parameter = name.rpartition(".")
    return f"{module}{dot}_{parameter}_{part}"


def flatten_weights(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(the state dict with packed weights as their parts, the metadata that describes them).

    Raises ValueError for a tensor subclass that is not ours: its own library knows how to save it.
    """
    plain: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for name, value in state_dict.items():
        if isinstance(value, PackedWeight):
            names, _ = value.__tensor_flatten__()
            plain.update((part_name(name, part), getattr(value, part)) for part in names)
            weights[name] = {"type": type(value).__name__, "shape": list(value.shape), "block_size": value.block_size}
            if value.transposed:
                weights[name]["transposed"] = True
        elif is_traceable_wrapper_subclass(value):
            raise ValueError(
                f"{name} is a {type(value).__name__}, which an mbq checkpoint cannot hold; save the model with "
                "torch.save(model.state_dict(), path), or leave such layers unquantized"
            )
        else:
            plain[name] = value
    return plain, {"mbq_format_version": str(FORMAT_VERSION), "mbq_weights": json.dumps(weights)}


def unflatten_weights(
    plain: Mapping[str, Tensor], weights: Mapping[str, Mapping[str, Any]], path: object
) -> dict[str, Tensor]:
    """The state dict that `flatten_weights` took apart. Raises ValueError naming the weight that does not fit."""
    rest = dict(plain)
    result = {}
    for name, fields in weights.items():
        kind = WEIGHT_TYPES.get(fields["type"])
        if kind is None:
            raise ValueError(f"{path}: {name} is a {fields['type']}, which this version of mbq_ao does not know")
        names = (*kind.tensor_data_names, *kind.optional_tensor_data_names)
        parts = {part: rest.pop(key) for part in names if (key := part_name(name, part)) in rest}
        attributes = {key: fields[key] for key in ("block_size", "shape", "transposed") if key in fields}
        result[name] = assemble(kind, name, parts, attributes, path)
    return {**rest, **result}


def assemble(
    kind: type[PackedWeight], name: str, parts: Mapping[str, Tensor], attributes: Mapping[str, Any], path: object
) -> PackedWeight:
    """The weight of these parts. Raises ValueError naming it if one is missing or does not fit."""
    missing = [part_name(name, part) for part in kind.tensor_data_names if part not in parts]
    if missing:
        raise ValueError(f"{path} is incomplete: {', '.join(missing)} of the quantized weight {name} missing")
    try:
        return kind(**parts, **attributes)
    except ValueError as error:
        raise ValueError(f"{path}: {name} does not fit: {error}") from error


def check_version(version: Any, path: object) -> None:
    """Raise ValueError unless this code can read the format version."""
    if version is None:
        raise ValueError(f"{path} is not an mbq checkpoint: its metadata has no mbq_format_version")
    if int(version) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has mbq format version {version}, but this mbq_ao reads versions up to {FORMAT_VERSION}; upgrade "
            "mbq_ao"
        )


# --- damage -----------------------------------------------------------------------------------------------------


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """CRC-32 of each tensor's bytes, as 8 hexadecimal digits. Several threads: zlib lets go of Python's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(_crc32, tensors.values()), strict=True))


def _crc32(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{zlib.crc32(flat.numpy()):08x}"


def verify_file(path: str | os.PathLike[str]) -> bool:
    """Compare a file with its own checksums; False if there are none. Raises ValueError naming what differs."""
    with opened(path) as file:
        expected = json.loads((file.metadata() or {}).get("mbq_checksums", "{}"))
        check_checksums({name: file.get_tensor(name) for name in file.keys()}, expected, path)  # noqa: SIM118
    return bool(expected)


def check_checksums(tensors: Mapping[str, Tensor], expected: Mapping[str, str], path: object) -> None:
    """Raise ValueError naming the tensors whose bytes are not those that were written."""
    found = checksums({name: tensor for name, tensor in tensors.items() if name in expected})
    damaged = sorted(name for name, value in found.items() if value != expected[name])
    if damaged:
        raise ValueError(
            f"{path} is damaged, its checksums are not those of when it was saved: {listed(damaged)}; copy or download "
            "it again (verify=False loads it nevertheless)"
        )


def listed(names: Iterable[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file. Raises FileNotFoundError, and ValueError if the file is damaged."""
    with opened(path) as file:
        return file.metadata() or {}


def opened(path: str | os.PathLike[str]) -> Any:
    """`safetensors.safe_open`, with errors that name the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}; copy or download it again") from error
