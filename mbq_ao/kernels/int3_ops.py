"""The door to the W3A16 kernels: `torch.library` ops, opaque to torch.compile, chosen by device inside.

    torch.ops.mbq_ao.int3_linear(x, qdata, scale, zero_point, bias, group_size)             -> (..., N) in x.dtype
    torch.ops.mbq_ao.int3_linear_group(x, [qdata], [scale], [zero_point], [bias], group_size)  -> several at once
    torch.ops.mbq_ao.int3_dequantize(qdata, scale, zero_point, k, group_size, dtype)        -> (N, k) in dtype

What each computes is reference.py. Which code computes it:

    CUDA, compute capability 8.0 or newer, with triton    the Triton kernels
    CPU                                                   int3_cpu.py: compiled C++ for few rows of x
    every other device                                    unpack, dequantize, torch's own linear

These are custom ops, not `triton_op`s: the choice of a kernel by the number of rows then adds no guard and no
recompilation to a compiled model, and a model compiles on a machine without a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbq_ao.kernels.checks import check_bias_and_devices, check_input, check_one_device, check_scale, has_kernels
from mbq_ao.kernels.grouped import linear_group
from mbq_ao.kernels.int3_cpu import int3_linear_cpu
from mbq_ao.kernels.int3_layout import TILE_K, TILE_N, check_qdata
from mbq_ao.kernels.reference import dequantize_reference

_Tensors = Sequence[Tensor]


@torch.library.custom_op("mbq_ao::int3_linear", mutates_args=())
def int3_linear(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """y[m, n] = sum_k x[m, k] * scale[n, k // g] * (q[n, k] - zero_point[n, k // g]) + bias[n],  g = group_size.

    x: (..., K) fp32 | fp16 | bf16, any strides, any number of rows.  qdata: int16, see int3_layout.py.
    scale: (N, ceil(K / g)) fp32 | fp16 | bf16.  zero_point: the same shape, uint8.  bias: (N,) or None.
    Returns (..., N) in x.dtype. Differentiable in x and bias. Raises ValueError for shapes or dtypes that do
    not fit and for tensors on different devices.
    """
    _check_linear(x, qdata, scale, zero_point, bias, group_size)
    if x.numel() and has_kernels(x.device):
        from mbq_ao.kernels.int3_linear import int3_linear_triton

        return int3_linear_triton(x, qdata, scale, zero_point, bias, group_size)
    if x.device.type == "cpu":
        return int3_linear_cpu(x, qdata, scale, zero_point, bias, group_size)
    weight = dequantize_reference(qdata, scale, zero_point, x.shape[-1], group_size, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype)).contiguous()


@int3_linear.register_fake
def _(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    _check_linear(x, qdata, scale, zero_point, bias, group_size)
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


@torch.library.custom_op("mbq_ao::int3_linear_group", mutates_args=())
def int3_linear_group(
    x: Tensor, qdata: _Tensors, scale: _Tensors, zero_point: _Tensors, bias: _Tensors, group_size: int
) -> Tensor:
    """Several `int3_linear` of one x, (..., sum of N), in one launch where their data lie one after the other.

    One tensor a weight in each list; no bias at all is []. Every weight but the last needs a multiple of 32 rows to
    be laid together; if they are not, or do not lie together, they are computed one by one. Errors as there.
    """
    return linear_group(lambda *weight: int3_linear(x, *weight, group_size), (qdata, scale, zero_point), bias, TILE_N)


@int3_linear_group.register_fake
def _(x: Tensor, qdata: _Tensors, scale: _Tensors, zero_point: _Tensors, bias: _Tensors, group_size: int) -> Tensor:
    for i, weight in enumerate(zip(qdata, scale, zero_point, strict=True)):
        _check_linear(x, *weight, bias[i] if bias else None, group_size)
    return x.new_empty((*x.shape[:-1], sum(s.shape[0] for s in scale)))


@torch.library.custom_op("mbq_ao::int3_dequantize", mutates_args=())
def int3_dequantize(
    qdata: Tensor, scale: Tensor, zero_point: Tensor, k: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The (N, k) weight (q - zero_point) * scale, computed in fp32 and rounded once to `dtype`.

    Shapes and errors as in `int3_linear`.
    """
    _check_weight(qdata, scale, zero_point, k, group_size)
    if has_kernels(qdata.device):
        from mbq_ao.kernels.int3_linear import int3_dequantize_triton

        return int3_dequantize_triton(qdata, scale, zero_point, k, group_size, dtype)
    return dequantize_reference(qdata, scale, zero_point, k, group_size, dtype)


@int3_dequantize.register_fake
def _(qdata: Tensor, scale: Tensor, zero_point: Tensor, k: int, group_size: int, dtype: torch.dtype) -> Tensor:
    _check_weight(qdata, scale, zero_point, k, group_size)
    return scale.new_empty((scale.shape[0], k), dtype=dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qdata, scale, zero_point, bias, group_size = inputs
    ctx.save_for_backward(qdata, scale, zero_point)
    ctx.k, ctx.group_size = x.shape[-1], group_size
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.mbq_ao.int3_dequantize(*ctx.saved_tensors, ctx.k, ctx.group_size, grad.dtype)
        grad_x = grad @ weight
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None


int3_linear.register_autograd(_backward, setup_context=_save_for_backward)


def _check_linear(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, group_size: int
) -> None:
    check_input(x)
    _check_weight(qdata, scale, zero_point, x.shape[-1], group_size)
    check_bias_and_devices(x, qdata, bias, scale.shape[0])


def _check_weight(qdata: Tensor, scale: Tensor, zero_point: Tensor, k: int, group_size: int) -> None:
    check_scale(scale, k, group_size, TILE_K)
    if zero_point.shape != scale.shape or zero_point.dtype != torch.uint8:
        raise ValueError(
            f"zero_point must be uint8 of scale's shape {tuple(scale.shape)}, got {zero_point.dtype} of shape "
            f"{tuple(zero_point.shape)}"
        )
    check_qdata(qdata, scale.shape[0], k)
    check_one_device({"qdata": qdata, "scale": scale, "zero_point": zero_point})
