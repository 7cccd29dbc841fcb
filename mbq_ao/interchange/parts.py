"""Checks on what a checkpoint of another library says and holds, and on what ours would say there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mbq_ao.interchange.bits import fields_per_block
from mbq_ao.packed_weight import PackedWeight
from mbq_ao.quant_primitives import num_groups


def check_bits(bits: Any, allowed: Sequence[int], of: str = "the checkpoint") -> int:
    """bits, if it is one of `allowed`; ValueError otherwise."""
    if bits not in allowed or isinstance(bits, bool):
        raise ValueError(
            f"{of} has {bits} bits a weight; {' or '.join(map(str, allowed))} can be imported. Quantize the original "
            "model with mbq_ao.quantize_ instead"
        )
    return int(bits)


def check_group_size(group_size: Any) -> int | None:
    """The group size, None for -1, one group a row; ValueError if it is neither a positive number nor -1."""
    if group_size == -1:
        return None
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
        raise ValueError(f"group_size must be a positive number, or -1 for one group a row, got {group_size!r}")
    return group_size


def check_parts(name: str, parts: Mapping[str, Tensor], needed: Sequence[str]) -> None:
    """Raise ValueError unless all `needed` parts of the weight are there."""
    missing = [part for part in needed if part not in parts]
    if missing:
        raise ValueError(
            f"the checkpoint is incomplete: of {name} it has {', '.join(sorted(parts))} but no {', '.join(missing)}"
        )


def check_whole_words(name: str, bits: int, **sizes: int) -> None:
    """Raise ValueError unless each of the sizes fills a whole number of words."""
    for size_name, size in sizes.items():
        if size % fields_per_block(bits):
            raise ValueError(
                f"{name} has {size_name} = {size}, and codes of {bits} bits are packed {fields_per_block(bits)} at a "
                "time; the checkpoint is of another architecture, or padded, which is not imported"
            )


def check_part(name: str, part: str, tensor: Tensor, kind: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor has this shape and is "int32", or "float": 16 or 32 bits, and finite."""
    is_kind = tensor.dtype == torch.int32
    if kind == "float":
        is_kind = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if tuple(tensor.shape) != shape or not is_kind:
        raise ValueError(
            f"{part} of {name} must be {kind} {shape}, got {tensor.dtype} {tuple(tensor.shape)}; the checkpoint is "
            "damaged, or of another architecture"
        )
    if kind == "float" and not tensor.isfinite().all():
        raise ValueError(f"{part} of {name} holds NaN or infinite values; the checkpoint is damaged")


def common_group_size(weights: Iterable[Tensor]) -> int | None:
    """That of the weight with the most groups; None if all have one scale a row.

    Where all of a short row is one group, its group size could be any that is as long.
    weights: with `scale` (.., N, groups) and `block_size`, as torchao's and ours have them.
    """
    finest = max(weights, key=lambda w: w.scale.shape[-1])
    return None if finest.scale.shape[-1] == 1 else finest.block_size[-1]


def has_groups_of(w: Tensor, group_size: int | None) -> bool:
    """Whether w has as many scales a row as groups of that size make."""
    k = w.in_features if isinstance(w, PackedWeight) else w.shape[-1]
    return w.scale.shape[-1] == num_groups(k, group_size or k)


def left_out(module: nn.Module, weights: set[str], prefix: str = "") -> list[str]:
    """The largest modules with linears but without quantized ones: by their last name where that is unambiguous.

    Serving engines call modules by other paths than transformers does, and look for these names anywhere in them.
    """
    if not any(isinstance(m, nn.Linear) for m in module.modules()):
        return []
    if prefix and not any(name.startswith(prefix) for name in weights):
        last = prefix.split(".")[-2]
        return [prefix[:-1] if any(last in name.split(".") for name in weights) else last]
    return [name for child, m in module.named_children() for name in left_out(m, weights, f"{prefix}{child}.")]
