"""The products of a mixture of experts, whose weights are stacked: `torch.library` ops, as int3_ops.py and w4a8_ops.py.

    torch.ops.mbq_ao.int3_grouped_mm(x, qdata, scale, zero_point, act_pre_scale, group_size, offs)    -> (S, N)
    torch.ops.mbq_ao.w4a8_grouped_mm(x, qdata, scale, act_pre_scale, group_size, offs)                -> (S, N)

As torch's grouped_mm: the rows of x (S, K) are sorted by expert, and those of expert e end at offs[e], so the row

    y[s] = linear(x[s], weight e)        offs[e - 1] <= s < offs[e]

is what int3_linear or w4a8_linear gives. How many rows an expert has is known to the data only; inside of one op it
breaks no graph. On a GPU reading offs waits for the device; offs=None, where each expert has S / E rows, does not.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mbq_ao.kernels.checks import DTYPES
from mbq_ao.kernels.int3_ops import int3_dequantize, int3_linear
from mbq_ao.kernels.w4a8_ops import int4_dequantize, w4a8_linear


@torch.library.custom_op("mbq_ao::int3_grouped_mm", mutates_args=())
def int3_grouped_mm(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    act_pre_scale: Tensor | None,
    group_size: int,
    offs: Tensor | None,
) -> Tensor:
    """Each row of x times its expert's 3-bit weight.

    x: (S, K) fp32 | fp16 | bf16.  qdata, scale, zero_point: of E experts, stacked, each as in `int3_linear`.
    act_pre_scale: (E, K), multiplies the expert's rows, or None.  offs: int32 | int64 (E,), not decreasing, at most S;
    None: S / E rows an expert. Returns (S, N) in x.dtype, zeros beyond offs[-1]. Differentiable in x. Raises ValueError
    for shapes, dtypes and offs that do not fit and for tensors on different devices.
    """
    _check(x, scale, act_pre_scale, offs)

    def linear(e: int, rows: Tensor) -> Tensor:
        return int3_linear(_scaled(rows, act_pre_scale, e), qdata[e], scale[e], zero_point[e], None, group_size)

    return _each_expert(linear, x, scale.shape[1], scale.shape[0], offs)


@torch.library.custom_op("mbq_ao::w4a8_grouped_mm", mutates_args=())
def w4a8_grouped_mm(
    x: Tensor, qdata: Tensor, scale: Tensor, act_pre_scale: Tensor | None, group_size: int, offs: Tensor | None
) -> Tensor:
    """Each row of x, rounded to 8 bits, times its expert's 4-bit weight. Arguments and errors as `int3_grouped_mm`."""
    _check(x, scale, act_pre_scale, offs)

    def linear(e: int, rows: Tensor) -> Tensor:
        return w4a8_linear(rows, qdata[e], scale[e], None, _of(act_pre_scale, e), group_size)

    return _each_expert(linear, x, scale.shape[1], scale.shape[0], offs)


@int3_grouped_mm.register_fake
def _(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    act_pre_scale: Tensor | None,
    group_size: int,
    offs: Tensor | None,
) -> Tensor:
    _check(x, scale, act_pre_scale, offs)
    return x.new_empty((x.shape[0], scale.shape[1]))


@w4a8_grouped_mm.register_fake
def _(
    x: Tensor, qdata: Tensor, scale: Tensor, act_pre_scale: Tensor | None, group_size: int, offs: Tensor | None
) -> Tensor:
    _check(x, scale, act_pre_scale, offs)
    return x.new_empty((x.shape[0], scale.shape[1]))


# --- backward ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("mbq_ao::int3_grouped_mm_backward", mutates_args=())
def int3_grouped_mm_backward(
    grad: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    act_pre_scale: Tensor | None,
    k: int,
    group_size: int,
    offs: Tensor | None,
) -> Tensor:
    """What x of `int3_grouped_mm` gets, (S, K), from grad (S, N): one expert's weight is dequantized at a time."""

    def linear(e: int, rows: Tensor) -> Tensor:
        weight = int3_dequantize(qdata[e], scale[e], zero_point[e], k, group_size, grad.dtype)
        return _scaled(rows @ weight, act_pre_scale, e)

    return _each_expert(linear, grad, k, scale.shape[0], offs)


@torch.library.custom_op("mbq_ao::w4a8_grouped_mm_backward", mutates_args=())
def w4a8_grouped_mm_backward(
    grad: Tensor,
    qdata: Tensor,
    scale: Tensor,
    act_pre_scale: Tensor | None,
    k: int,
    group_size: int,
    offs: Tensor | None,
) -> Tensor:
    """What x of `w4a8_grouped_mm` gets, as if it were not rounded."""

    def linear(e: int, rows: Tensor) -> Tensor:
        return _scaled(rows @ int4_dequantize(qdata[e], scale[e], k, group_size, grad.dtype), act_pre_scale, e)

    return _each_expert(linear, grad, k, scale.shape[0], offs)


@int3_grouped_mm_backward.register_fake
def _(
    grad: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    act_pre_scale: Tensor | None,
    k: int,
    group_size: int,
    offs: Tensor | None,
) -> Tensor:
    return grad.new_empty((grad.shape[0], k))


@w4a8_grouped_mm_backward.register_fake
def _(
    grad: Tensor,
    qdata: Tensor,
    scale: Tensor,
    act_pre_scale: Tensor | None,
    k: int,
    group_size: int,
    offs: Tensor | None,
) -> Tensor:
    return grad.new_empty((grad.shape[0], k))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight, group_size, offs = inputs
    ctx.save_for_backward(*weight, offs)
    ctx.k, ctx.group_size = x.shape[-1], group_size


def _backward_by(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *weight, offs = ctx.saved_tensors
        grad_x = op(grad, *weight, ctx.k, ctx.group_size, offs) if ctx.needs_input_grad[0] else None
        return (grad_x, *[None] * (len(weight) + 2))

    return backward


int3_grouped_mm.register_autograd(_backward_by(int3_grouped_mm_backward), setup_context=_save_for_backward)
w4a8_grouped_mm.register_autograd(_backward_by(w4a8_grouped_mm_backward), setup_context=_save_for_backward)


# --- the rows of each expert ------------------------------------------------------------------------------------


def _each_expert(
    linear: Callable[[int, Tensor], Tensor], x: Tensor, n: int, num_experts: int, offs: Tensor | None
) -> Tensor:
    """linear(e, the rows of expert e) for every expert that has rows: (S, n) in x.dtype."""
    y = x.new_zeros((x.shape[0], n))
    for e, rows in _rows_of_experts(x.shape[0], num_experts, offs):
        y[rows] = linear(e, x[rows])
    return y


def _rows_of_experts(num_rows: int, num_experts: int, offs: Tensor | None) -> Iterator[tuple[int, slice]]:
    ends = [num_rows // num_experts * (e + 1) for e in range(num_experts)] if offs is None else offs.tolist()
    bounds = [0, *ends]
    if bounds != sorted(bounds) or bounds[-1] > num_rows:
        raise ValueError(
            f"offs must not decrease and must end at the {num_rows} rows of x at most, as it says where the rows of "
            f"each expert end; got {ends}"
        )
    return ((e, slice(start, end)) for e, (start, end) in enumerate(pairwise(bounds)) if start < end)


def _of(act_pre_scale: Tensor | None, e: int) -> Tensor | None:
    return None if act_pre_scale is None else act_pre_scale[e]


def _scaled(rows: Tensor, act_pre_scale: Tensor | None, e: int) -> Tensor:
    return rows if act_pre_scale is None else rows * act_pre_scale[e].to(rows.dtype)


def _check(x: Tensor, scale: Tensor, act_pre_scale: Tensor | None, offs: Tensor | None) -> None:
    """What the op of one expert does not see."""
    if x.dim() != 2 or x.dtype not in DTYPES:
        raise ValueError(f"x must be (S, K) in float32, float16 or bfloat16, got {x.dtype} of shape {tuple(x.shape)}")
    if scale.dim() != 3:
        raise ValueError(f"scale must be (E, N, groups), of stacked experts, got {tuple(scale.shape)}")
    num_experts = scale.shape[0]
    if offs is None:
        if x.shape[0] % max(num_experts, 1) or (num_experts == 0 and x.shape[0]):
            raise ValueError(
                f"without offs x needs the same number of rows for each of {num_experts} experts, got {x.shape[0]} rows"
            )
    elif tuple(offs.shape) != (num_experts,) or offs.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"offs must be int32 or int64 ({num_experts},), one for each expert, got {offs.dtype} of shape "
            f"{tuple(offs.shape)}"
        )
    if act_pre_scale is not None and tuple(act_pre_scale.shape) != (num_experts, x.shape[1]):
        raise ValueError(
            f"act_pre_scale must be ({num_experts}, {x.shape[1]}), one factor for each expert and column of x, got "
            f"{tuple(act_pre_scale.shape)}"
        )
