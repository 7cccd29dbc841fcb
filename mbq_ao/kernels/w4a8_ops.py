"""The door to the W4A8 kernels: as int3_ops.py, for 4-bit weights and activations quantized on the way.

    torch.ops.mbq_ao.w4a8_linear(x, qdata, scale, bias, act_pre_scale, group_size)    -> (..., N) in x.dtype
    torch.ops.mbq_ao.w4a8_linear_group(x, [qdata], [scale], [bias], act_pre_scale, group_size)    several at once
    torch.ops.mbq_ao.int4_dequantize(qdata, scale, k, group_size, dtype)              -> (N, k) in dtype

What each computes is reference.py. Which code computes it:

    CUDA, compute capability 8.0 or newer, with triton    w4a8_gemm.py, on integer tensor cores
    everything else                                       w4a8_cpu.py: unpack, and a matmul of integers, or in fp32
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbq_ao.kernels.checks import (
    DTYPES,
    check_bias_and_devices,
    check_input,
    check_one_device,
    check_scale,
    has_kernels,
)
from mbq_ao.kernels.grouped import linear_group
from mbq_ao.kernels.int4_layout import TILE_K, TILE_N, check_int4_qdata
from mbq_ao.kernels.reference import int4_dequantize_reference
from mbq_ao.kernels.w4a8_cpu import w4a8_linear_cpu

_Tensors = Sequence[Tensor]


@torch.library.custom_op("mbq_ao::w4a8_linear", mutates_args=())
def w4a8_linear(
    x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, act_pre_scale: Tensor | None, group_size: int
) -> Tensor:
    """y = (xq @ q.T) * scale * d + bias: per-token symmetric int8 activations, int4 weights, sums of integers.

    x: (..., K) fp32 | fp16 | bf16, any strides, any number of rows, quantized here: d and xq as in reference.py.
    qdata: int8, see int4_layout.py.  scale: (N, ceil(K / g)) fp32 | fp16 | bf16, a group is g = group_size columns.
    bias: (N,) or None.  act_pre_scale: (K,), multiplies x before it is quantized, or None.

    Returns (..., N) in x.dtype. A token of zeros gives bias; one that holds a NaN or an infinity gives NaN, in its
    own row. Differentiable in x (as if it were not rounded) and bias. Raises ValueError for shapes or dtypes that do
    not fit and for tensors on different devices.
    """
    _check_linear(x, qdata, scale, bias, act_pre_scale, group_size)
    if x.numel() and has_kernels(x.device):
        from mbq_ao.kernels.w4a8_gemm import w4a8_linear_triton

        return w4a8_linear_triton(x, qdata, scale, bias, act_pre_scale, group_size)
    with torch.autocast(x.device.type, enabled=False):  # in whose 16 bits the sums would not fit
        return w4a8_linear_cpu(x, qdata, scale, bias, act_pre_scale, group_size)


@w4a8_linear.register_fake
def _(
    x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, act_pre_scale: Tensor | None, group_size: int
) -> Tensor:
    _check_linear(x, qdata, scale, bias, act_pre_scale, group_size)
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


@torch.library.custom_op("mbq_ao::w4a8_linear_group", mutates_args=())
def w4a8_linear_group(
    x: Tensor, qdata: _Tensors, scale: _Tensors, bias: _Tensors, act_pre_scale: Tensor | None, group_size: int
) -> Tensor:
    """Several `w4a8_linear` of one x, (..., sum of N): where they lie together, x is quantized once, for one matmul.

    One tensor a weight in each list; no bias at all is []. As int3_linear_group, with 16 rows instead of 32.
    """
    return linear_group(
        lambda *weight: w4a8_linear(x, *weight, act_pre_scale, group_size), (qdata, scale), bias, TILE_N
    )


@w4a8_linear_group.register_fake
def _(
    x: Tensor, qdata: _Tensors, scale: _Tensors, bias: _Tensors, act_pre_scale: Tensor | None, group_size: int
) -> Tensor:
    for i, weight in enumerate(zip(qdata, scale, strict=True)):
        _check_linear(x, *weight, bias[i] if bias else None, act_pre_scale, group_size)
    return x.new_empty((*x.shape[:-1], sum(s.shape[0] for s in scale)))


@torch.library.custom_op("mbq_ao::int4_dequantize", mutates_args=())
def int4_dequantize(qdata: Tensor, scale: Tensor, k: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """The (N, k) weight q * scale, computed in fp32 and rounded once to `dtype`.

    Shapes and errors as in `w4a8_linear`.
    """
    _check_weight(qdata, scale, k, group_size)
    return int4_dequantize_reference(qdata, scale, k, group_size, dtype)


@int4_dequantize.register_fake
def _(qdata: Tensor, scale: Tensor, k: int, group_size: int, dtype: torch.dtype) -> Tensor:
    _check_weight(qdata, scale, k, group_size)
    return scale.new_empty((scale.shape[0], k), dtype=dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qdata, scale, bias, act_pre_scale, group_size = inputs
    ctx.save_for_backward(qdata, scale, act_pre_scale)
    ctx.k, ctx.group_size = x.shape[-1], group_size
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    qdata, scale, act_pre_scale = ctx.saved_tensors
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.ops.mbq_ao.int4_dequantize(qdata, scale, ctx.k, ctx.group_size, grad.dtype)
        if act_pre_scale is not None:
            grad_x = grad_x * act_pre_scale.to(grad.dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None


w4a8_linear.register_autograd(_backward, setup_context=_save_for_backward)


def _check_linear(
    x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, act_pre_scale: Tensor | None, group_size: int
) -> None:
    check_input(x)
    k = x.shape[-1]
    _check_weight(qdata, scale, k, group_size)
    if act_pre_scale is not None:
        if tuple(act_pre_scale.shape) != (k,) or act_pre_scale.dtype not in DTYPES:
            raise ValueError(
                f"act_pre_scale must be ({k},) in float32, float16 or bfloat16, got {act_pre_scale.dtype} of shape "
                f"{tuple(act_pre_scale.shape)}"
            )
        check_one_device({"qdata": qdata, "act_pre_scale": act_pre_scale})
    check_bias_and_devices(x, qdata, bias, scale.shape[0])


def _check_weight(qdata: Tensor, scale: Tensor, k: int, group_size: int) -> None:
    check_scale(scale, k, group_size, TILE_K)
    check_int4_qdata(qdata, scale.shape[0], k)
    check_one_device({"qdata": qdata, "scale": scale})
