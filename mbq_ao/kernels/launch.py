"""What every launcher of a Triton kernel needs."""

import contextlib
import os
from typing import Any

import torch
from torch import Tensor


def interpreted() -> bool:
    """Whether the kernels are run by Triton's interpreter, which knows no assembly."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def with_inner_contiguous(qdata: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slices are passed on as views; a tile must be one run of memory, and so must a row of scales."""
    if qdata.stride()[2:] != (256, 8, 1):
        qdata = qdata.contiguous()
    return (
        qdata,
        scale if scale.stride(1) == 1 else scale.contiguous(),
        zero_point if zero_point.stride(1) == 1 else zero_point.contiguous(),
    )


def group_constant(scale: Tensor, group_size: int) -> int:
    """GROUP of a kernel, for which 0 is one scale a row, so that K is no constant of it."""
    return 0 if scale.shape[1] == 1 else group_size


def linear_arguments(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """What kernels of `int3_linear` are launched with: x as a matrix, the weight, a pointer for bias, GROUP."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    qdata, scale, zero_point = with_inner_contiguous(qdata, scale, zero_point)
    # Triton wants a tensor there also where the kernel adds no bias.
    some_bias = scale if bias is None else bias.contiguous()
    return rows, qdata, scale, zero_point, some_bias, group_constant(scale, group_size)


def empty_output(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """For what a kernel returns; fp32 under the interpreter, which would truncate to bf16."""
    return torch.empty(shape, device=device, dtype=torch.float32 if interpreted() else dtype)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability; under the interpreter, that of the GPU whose choices are to be interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def num_sms_of(device: torch.device) -> int:
    """Streaming multiprocessors; under the interpreter, those of an H100 or H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
