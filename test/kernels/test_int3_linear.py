"""The Triton kernels against the fp32 reference: by the interpreter on CPU, compiled where there is a GPU.

Tolerance, derived. The reference is fp32. The kernel sums exact products in fp32 and rounds its result once, so it is
off by half a unit in the last place of the output, plus fp32 sums. Both sum(q x) and zero * sum(x) may be large where
their difference is not, and bf16 adds 128 to every q: an fp32 sum of K terms of size a is off by at most K * 2^-24 * a,
and about sqrt(K) of that, so the bound is in terms of sum |x| * scale * (7 or 135). Beyond MAX_ROWS the weight itself
is rounded to x's dtype first.
"""

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from launches import DEVICE, HALF_ULP, guarded_outputs, needs_kernels, problem  # noqa: E402

from mbq_ao.kernels import choice, int3_linear  # noqa: E402
from mbq_ao.kernels.gemv_config import MAX_ROWS  # noqa: E402
from mbq_ao.kernels.int3_gemm import int3_gemm_triton  # noqa: E402
from mbq_ao.kernels.int3_linear import (  # noqa: E402
    int3_dequantize_triton,
    int3_linear_triton,
)
from mbq_ao.kernels.reference import dequantize_reference, int3_linear_reference  # noqa: E402

pytestmark = needs_kernels


def assert_matches_reference(y: Tensor, args: list) -> None:
    x, _, scale, _, _, g = args
    expected = int3_linear_reference(*args)
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    k = x.shape[-1]
    biggest_scale = scale.float().amax()
    level = 135 if x.dtype == torch.bfloat16 else 14
    sums = 2.0**-24 * k**0.5 * level * biggest_scale * x.float().abs().sum(-1, keepdim=True)
    bound = HALF_ULP[x.dtype] * 1.01 * expected.abs() + sums
    if x.shape[0] > MAX_ROWS:
        weight = dequantize_reference(*args[1:4], k, g, torch.float32)
        bound += HALF_ULP[x.dtype] * (x.float().abs() @ weight.abs().t())
    error = (y.float() - expected).abs()
    assert (error <= bound).all(), f"worst error is {(error / bound).max():.2f} of the bound"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("m", [1, MAX_ROWS, MAX_ROWS + 1])  # those in between: test_int3_gemv.py
def test_linear_over_rows_and_groups(m: int, group_size: int | None, dtype: torch.dtype) -> None:
    args = problem(m, 40, 576, group_size, dtype)
    assert_matches_reference(int3_linear_triton(*args), args)


SHAPES = [(1, 3, 3420), (2, 70, 896), (5, 33, 100), (65, 40, 300), (1, 1, 1)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "dtype"),
    [  # every two of shape, group size and dtype together
        (*shape, [32, 128, None][(i + j) % 3], dtype)
        for i, shape in enumerate(SHAPES)
        for j, dtype in enumerate(DTYPES)
    ],
    ids=str,
)
def test_linear_over_shapes(m: int, n: int, k: int, group_size: int | None, dtype: torch.dtype) -> None:
    args = problem(m, n, k, group_size, dtype)
    assert_matches_reference(int3_linear_triton(*args), args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_with_outliers(dtype: torch.dtype) -> None:
    args = problem(4, 64, 1024, 128, dtype, outliers=True)
    assert_matches_reference(int3_linear_triton(*args), args)


@pytest.mark.parametrize("m", [1, MAX_ROWS, MAX_ROWS + 1])
def test_no_step_between_few_and_many_rows(m: int) -> None:
    args = problem(m, 32, 256, 128, torch.float16)
    assert_matches_reference(int3_linear_triton(*args), args)


def test_every_output_is_written_and_nothing_else_is() -> None:
    args = problem(3, 45, 200, 64, torch.float16)
    with guarded_outputs(count=1):
        y = int3_linear_triton(*args)
    assert_matches_reference(y, args)


def test_memory_beyond_k_and_m_is_not_read() -> None:
    args = problem(3, 40, 200, 64, torch.float16)
    x = torch.full((6, 208), float("nan"), dtype=torch.float16, device=DEVICE)
    x[:3, :200] = args[0]
    args[0] = x[:3, :200]
    assert_matches_reference(int3_linear_triton(*args), args)


def test_slices_of_packed_data_are_read_in_place() -> None:
    x, qdata, scale, zero_point, bias, g = problem(2, 96, 512, 64, torch.float16)
    args = [x[:, 128:384], qdata[1:3, 1:3], scale[32:, 2:6], zero_point[32:, 2:6], bias[32:], g]
    assert_matches_reference(int3_linear_triton(*args), args)


def test_without_bias_and_without_rows() -> None:
    args = problem(2, 32, 128, 128, torch.float16)
    args[4] = None
    assert_matches_reference(int3_linear_triton(*args), args)
    args[0] = args[0][:0]
    assert int3_linear_triton(*args).shape == (0, 32)


def test_leading_dimensions_and_strides_of_x() -> None:
    args = problem(6, 32, 256, 128, torch.float16)
    flat = int3_linear_triton(*args)
    args[0] = args[0].t().contiguous().t()
    torch.testing.assert_close(int3_linear_triton(*args), flat, rtol=0, atol=0)
    args[0] = args[0].contiguous().view(2, 3, 256).expand(2, 3, 256)
    torch.testing.assert_close(int3_linear_triton(*args), flat.view(2, 3, 32), rtol=0, atol=0)


def test_scale_and_bias_of_another_dtype() -> None:
    args = problem(2, 32, 256, 128, torch.float16)
    args[2], args[4] = args[2].float(), args[4].float()
    assert_matches_reference(int3_linear_triton(*args), args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 128, None])
def test_dequantize_is_the_reference_bit_for_bit(group_size: int | None, dtype: torch.dtype) -> None:
    _, qdata, scale, zero_point, _, g = problem(1, 40, 300, group_size, dtype)
    w = int3_dequantize_triton(qdata, scale, zero_point, 300, g, dtype)
    torch.testing.assert_close(w, dequantize_reference(qdata, scale, zero_point, 300, g, dtype), rtol=0, atol=0)


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_dequantized_weight_is_held_in_parts(with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    args = problem(65, 140, 256, 128, torch.float16)
    args[4] = args[4] if with_bias else None
    limit, sizes = 2 * 32 * 256 * 2, []

    def dequantize(*arguments) -> Tensor:
        weight = int3_dequantize_triton(*arguments)
        sizes.append(weight.nbytes)
        return weight

    monkeypatch.setattr(choice, "fused_serves", lambda *_: False)
    monkeypatch.setattr(int3_linear, "int3_dequantize_triton", dequantize)
    monkeypatch.setattr(int3_linear, "TRANSIENT_BYTES", limit)
    assert_matches_reference(int3_linear_triton(*args), args)
    assert len(sizes) == 3
    assert max(sizes) == limit


@pytest.mark.parametrize("serves", [True, False])
def test_many_rows_go_where_the_model_says(serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    args = problem(MAX_ROWS + 1, 32, 128, 128, torch.float16)
    fused = []

    def gemm(*arguments) -> Tensor:
        fused.append(arguments)
        return int3_gemm_triton(*arguments)

    monkeypatch.setattr(choice, "fused_serves", lambda *_: serves)
    monkeypatch.setattr(int3_linear, "int3_gemm_triton", gemm)
    assert_matches_reference(int3_linear_triton(*args), args)
    assert len(fused) == serves


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 8, 16, 64, 512])
def test_compiled_kernel_on_a_real_layer(m: int, dtype: torch.dtype) -> None:
    # Not the least: that tensor cores take fp16 subnormal operands as they are.
    args = problem(m, 3584, 18944, 128, dtype)
    if m <= MAX_ROWS:
        assert_matches_reference(int3_linear_triton(*args), args)
    torch.testing.assert_close(int3_linear_triton(*args), int3_linear_triton(*args), rtol=0, atol=0)
