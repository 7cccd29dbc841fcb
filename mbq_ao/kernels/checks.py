"""What every op checks of its arguments, and whether a device has our kernels."""

import functools
import importlib.util
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_input(x: Tensor) -> None:
    if x.dim() == 0 or x.dtype not in DTYPES:
        raise ValueError(
            f"x must be (..., K) in float32, float16 or bfloat16, got {x.dtype} of shape {tuple(x.shape)}; cast it"
        )


def check_scale(scale: Tensor, k: int, group_size: int, tile_k: int) -> None:
    if group_size < 1 or (group_size < k and group_size not in (32, 64) and group_size % tile_k):
        raise ValueError(
            f"group_size must be 32, 64, a multiple of {tile_k}, or at least K for one scale a row, "
            f"got {group_size} for K={k}"
        )
    if scale.dim() != 2 or scale.shape[1] != -(-k // group_size) or scale.dtype not in DTYPES:
        raise ValueError(
            f"scale must be (N, ceil(K / group_size)) in float32, float16 or bfloat16, got {scale.dtype} of shape "
            f"{tuple(scale.shape)} for K={k}, group_size={group_size}; K is the last dimension of x"
        )


def check_one_device(tensors: Mapping[str, Tensor]) -> None:
    if len({t.device for t in tensors.values()}) > 1:
        *names, last = tensors
        raise ValueError(
            f"{', '.join(names)} and {last} must be on one device, got "
            f"{', '.join(str(t.device) for t in tensors.values())}; move them with .to(device)"
        )


def check_bias_and_devices(x: Tensor, qdata: Tensor, bias: Tensor | None, n: int) -> None:
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype not in DTYPES):
        raise ValueError(f"bias must be ({n},) and floating point, got {bias.dtype} of shape {tuple(bias.shape)}")
    devices = {t.device for t in (x, qdata, bias) if t is not None}
    if len(devices) > 1:
        raise ValueError(
            f"x, weight and bias must be on one device, got x on {x.device}, the weight on {qdata.device}"
            + ("" if bias is None else f", bias on {bias.device}")
            + "; move them with .to(device)"
        )


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run on this device; says so once where a GPU has to do without them."""
    if device.type != "cuda":
        return False
    reason = ""
    if torch.version.hip is not None:
        reason = "the kernels are for NVIDIA GPUs"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reason = "compute capability 8.0 is needed"
    elif importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    if reason:
        warnings.warn(
            f"mbq_ao: no kernel for packed weights on {torch.cuda.get_device_name(device)} ({reason}); "
            "each linear unpacks its weight instead, which is right but slow",
            stacklevel=2,
        )
    return not reason
