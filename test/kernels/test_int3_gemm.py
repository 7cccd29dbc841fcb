"""The kernel for many rows of x against the fp32 reference: by the interpreter on CPU, compiled where there is a GPU.

Tolerance, derived. The weight is rounded to x's dtype before it is multiplied; one test shows it to be bit for bit what
`int3_dequantize` gives, so the reference multiplies that weight. Products of 16-bit numbers are exact in fp32, an fp32
sum of K of them is off by at most K * 2^-24 * sum |x w| (and about sqrt(K) of that), and the result is rounded once.
"""

import dataclasses
import textwrap

import expecttest
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from launches import DEVICE, HALF_ULP, guarded_outputs, in_turn, needs_kernels, problem  # noqa: E402

from mbq_ao.kernels.gemm_config import FEW, MANY, MOST, SOME, GemmConfig  # noqa: E402
from mbq_ao.kernels.int3_gemm import int3_gemm_triton  # noqa: E402
from mbq_ao.kernels.reference import dequantize_reference, int3_linear_reference  # noqa: E402

DTYPES = [torch.float16, torch.bfloat16]


def assert_matches_reference(y: Tensor, args: list) -> None:
    x, qdata, scale, zero_point, bias, g = args
    k = x.shape[-1]
    weight = dequantize_reference(qdata, scale, zero_point, k, g, x.dtype).double()
    expected = x.double() @ weight.t() + (0 if bias is None else bias.double())
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    sums = 2.0**-24 * (k**0.5 + 2) * (x.double().abs() @ weight.abs().t() + expected.abs())
    bound = HALF_ULP[x.dtype] * 1.01 * expected.abs() + sums
    error = (y.double() - expected).abs()
    assert (error <= bound).all(), f"worst error is {(error / bound).max():.2f} of the bound"
    # The oracle that knows nothing of a rounded weight is no further away than that rounding.
    exact = int3_linear_reference(*args).double()
    assert (
        (y.double() - exact).abs() <= bound + HALF_ULP[x.dtype] * 1.01 * (x.double().abs() @ weight.abs().t())
    ).all()


@needs_kernels
@pytest.mark.parametrize(
    ("group_size", "dtype_of_few", "dtype_of_many"),
    [
        (32, torch.float16, torch.bfloat16),
        (64, torch.bfloat16, torch.float16),
        (128, torch.float16, torch.bfloat16),
        (256, torch.bfloat16, torch.float16),
        (None, torch.float16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [FEW, MANY], ids=["few", "many"])
def test_over_groups(
    config: GemmConfig, group_size: int | None, dtype_of_few: torch.dtype, dtype_of_many: torch.dtype
) -> None:
    dtype = dtype_of_few if config is FEW else dtype_of_many
    args = problem(33, 40, 576, group_size, dtype)
    assert_matches_reference(int3_gemm_triton(*args, config), args)


SHAPES = [
    (17, 40, 896, 128),
    (33, 33, 100, 32),
    (64, 130, 300, 64),
    (70, 64, 200, None),
    (140, 70, 384, 128),
    (1, 1, 1, 32),
]


@needs_kernels
@pytest.mark.parametrize(("m", "n", "k", "group_size", "dtype"), in_turn(SHAPES, DTYPES), ids=str)
def test_over_shapes_with_the_default_cut(m: int, n: int, k: int, group_size: int | None, dtype: torch.dtype) -> None:
    args = problem(m, n, k, group_size, dtype)
    assert_matches_reference(int3_gemm_triton(*args), args)


CUTS = [FEW, SOME, MANY, MOST]
CUTS += [dataclasses.replace(cut, splits=3) for cut in (FEW, MANY)]
CUTS += [GemmConfig(block_m=16, block_k=128), GemmConfig(block_n=256, block_m=32, block_k=64)]
CUTS += [GemmConfig(block_n=32, block_m=16, slices=slices, num_warps=slices, splits=2) for slices in (2, 8)]


@needs_kernels
@pytest.mark.parametrize(("config", "dtype"), in_turn([(cut,) for cut in CUTS], DTYPES), ids=str)
def test_every_cut(config: GemmConfig, dtype: torch.dtype) -> None:
    # Two programs in each direction, the second for a few rows, as far as the interpreter's time allows.
    m, n = min(config.block_m + 3, 35), min(config.block_n + 8, 104)
    args = problem(m, n, 712 if dtype == torch.float16 else 1024, 64, dtype)  # of 1,024 columns none is masked
    if dtype == torch.bfloat16:
        args[4] = None
    assert_matches_reference(int3_gemm_triton(*args, config), args)


@needs_kernels
@pytest.mark.parametrize(
    ("dtype", "scale_dtype", "group_size"),
    [  # every two of them together
        (torch.float16, torch.float16, 32),
        (torch.float16, torch.bfloat16, 128),
        (torch.float16, torch.float32, 32),
        (torch.bfloat16, torch.float16, 128),
        (torch.bfloat16, torch.bfloat16, 32),
        (torch.bfloat16, torch.float32, 128),
    ],
    ids=str,
)
def test_weights_are_those_of_dequantize_bit_for_bit(
    dtype: torch.dtype, scale_dtype: torch.dtype, group_size: int
) -> None:
    _, qdata, scale, zero_point, _, g = problem(1, 64, 256, group_size, torch.float32)
    scale = scale * torch.logspace(-7, 4, 64, device=DEVICE)[:, None]  # subnormal ones and some above 128
    args = [torch.eye(256, dtype=dtype, device=DEVICE), qdata, scale.to(scale_dtype), zero_point, None, g]
    expected = dequantize_reference(*args[1:4], 256, g, dtype)
    assert (expected.isfinite() & (expected != 0)).float().mean() > 0.5
    finite = expected.isfinite().all(1)  # infinity times the zeros of eye() is NaN
    y = int3_gemm_triton(*args, MANY).t()
    torch.testing.assert_close(y[finite], expected[finite], rtol=0, atol=0)


@needs_kernels
@pytest.mark.parametrize("splits", [1, 3])
def test_every_output_is_written_and_nothing_else_is(splits: int) -> None:
    args = problem(19, 45, 400, 64, torch.float16)
    with guarded_outputs(count=1 if splits == 1 else 2):
        y = int3_gemm_triton(*args, dataclasses.replace(MANY, splits=splits))
    assert_matches_reference(y, args)


@needs_kernels
@pytest.mark.parametrize("k", [200, 512])
@pytest.mark.parametrize("config", [FEW, MANY], ids=["few", "many"])
def test_memory_beyond_k_and_m_does_not_matter(config: GemmConfig, k: int) -> None:
    args = problem(19, 40, k, 64, torch.bfloat16)
    x = torch.full((24, k + 8), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    x[:19, :k] = args[0]
    args[0] = x[:19, :k]
    assert_matches_reference(int3_gemm_triton(*args, config), args)


@needs_kernels
@pytest.mark.parametrize("config", [FEW, MANY], ids=["few", "many"])
def test_slices_are_read_in_place(config: GemmConfig) -> None:
    x, qdata, scale, zero_point, bias, g = problem(18, 96, 512, 64, torch.float16)
    args = [x[:, 128:384], qdata[1:3, 1:3], scale[32:, 2:6], zero_point[32:, 2:6], bias[32:], g]
    assert_matches_reference(int3_gemm_triton(*args, config), args)


@needs_kernels
def test_leading_dimensions_and_strides_of_x() -> None:
    args = problem(20, 40, 256, 128, torch.float16)
    flat = int3_gemm_triton(*args)
    args[0] = args[0].t().contiguous().t()
    torch.testing.assert_close(int3_gemm_triton(*args), flat, rtol=0, atol=0)
    args[0] = args[0].contiguous().view(2, 10, 256)
    torch.testing.assert_close(int3_gemm_triton(*args), flat.view(2, 10, 40), rtol=0, atol=0)


class TestErrors(expecttest.TestCase):
    def assert_error(self, expected: str, **arguments: int) -> None:
        with self.assertRaises(ValueError) as caught:
            GemmConfig(**arguments)
        self.assertExpectedInline(textwrap.fill(str(caught.exception), 100), expected, skip=1)

    def test_block_k(self) -> None:
        self.assert_error(
            """\
block_n must be a multiple of 32, block_k 32, 64 or 128 and slices 1, 2, 4 or 8, got block_n=128,
block_k=48, slices=1""",
            block_m=64,
            block_k=48,
        )

    def test_block_m(self) -> None:
        self.assert_error(
            """block_n, block_m and num_warps must be powers of two and block_m at least 16, got (128, 96, 4)""",
            block_m=96,
        )

    def test_slices(self) -> None:
        self.assert_error(
            """slices=4 of K need block_n=32, a row tile a warp, got 128""",
            block_m=32,
            slices=4,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [17, 64, 200, 1024])
def test_compiled_kernel_on_a_real_layer(m: int, dtype: torch.dtype) -> None:
    args = problem(m, 3584, 18944, 128, dtype)
    y = int3_gemm_triton(*args)
    assert_matches_reference(y, args)
    torch.testing.assert_close(int3_gemm_triton(*args), y, rtol=0, atol=0)
