"""The W4A8 kernels against the reference: by the interpreter on CPU, compiled where there is a GPU.

Tolerance. Sums of integers are exact, so with one scale a row the kernel does the reference's four operations (to
fp32, times scale, times the token's, plus bias; on a GPU the last two in one rounding less) and rounds once. With
groups and with splits it adds their fp32 parts in another order.
"""

import dataclasses
import textwrap

import expecttest
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from launches import DEVICE, HALF_ULP, guarded_outputs, in_turn, needs_kernels, w4a8_problem  # noqa: E402

from mbq_ao.kernels.reference import int4_dequantize_reference, quantize_tokens, w4a8_linear_reference  # noqa: E402
from mbq_ao.kernels.w4a8_config import CUTS, FEW, FEW_SMALL, FUSED, MANY, SOME, W4A8Config  # noqa: E402
from mbq_ao.kernels.w4a8_gemm import quantize_tokens_triton, w4a8_linear_triton  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_matches_reference(y: Tensor, args: list) -> None:
    x, qdata, scale, bias, pre_scale, g = args
    expected = w4a8_linear_reference(*args).double()
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    weight = int4_dequantize_reference(qdata, scale, x.shape[-1], g, torch.float32).double()
    xq, d = quantize_tokens(x, pre_scale)
    size = (xq.double() * d).abs() @ weight.abs().t() + (0 if bias is None else bias.double().abs())
    bound = HALF_ULP[x.dtype] * 1.01 * expected.abs() + 2.0**-22 * size
    error = (y.double() - expected).abs()
    assert (error <= bound).all(), f"worst error is {(error / bound).nan_to_num().max():.2f} of the bound"


@needs_kernels
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")  # numpy's
@ALL_DTYPES
@pytest.mark.parametrize("pre_scaled", [False, True], ids=["", "act_pre_scale"])
@pytest.mark.parametrize(("k", "width"), [(1, 64), (100, 128), (1024, 1024), (40000, 40064)])
def test_tokens_are_quantized_bit_for_bit(k: int, width: int, pre_scaled: bool, dtype: torch.dtype) -> None:
    # 40,000 columns are more than a program holds.
    x, _, _, _, pre_scale, _ = w4a8_problem(5, 1, k, None, dtype)
    factors = pre_scale if pre_scaled else None
    if dtype != torch.float16:
        x[0, 0], pre_scale[0] = 3e38, 1.5  # their product is beyond fp32
    expected, d_expected = quantize_tokens(x, factors)
    xq, d = quantize_tokens_triton(x, factors, width)
    assert torch.equal(xq[:, :k], expected)
    assert (xq[:, k:] == 0).all()
    assert torch.equal(d, d_expected[:, 0])


@needs_kernels
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # numpy's, of 0 * inf
@pytest.mark.parametrize("bad", [-float("inf"), float("nan")])
@pytest.mark.parametrize(("k", "config"), [(70, FEW), (33000, FEW), (70, FUSED), (5000, FUSED)], ids=str)
def test_a_token_that_is_not_finite(k: int, config: W4A8Config, bad: float) -> None:
    x, *rest = w4a8_problem(4, 17, k, None, torch.float32)
    good = w4a8_linear_triton(x, *rest, config)
    x[2, k - 1] = bad
    assert (quantize_tokens_triton(x, None, -(-k // 64) * 64)[0][2] == 0).all()
    y = w4a8_linear_triton(x, *rest, config)
    assert y[2].isnan().all()
    torch.testing.assert_close(y[[0, 1, 3]], good[[0, 1, 3]], rtol=0, atol=0)


@needs_kernels
def test_the_corrected_quotient_is_that_of_a_division() -> None:
    """What a GPU does instead of dividing (w4a8_gemm._rounded), in float64, which holds every product exactly."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(512, 1024, generator=gen) * 10 ** (torch.rand(512, 1, generator=gen) * 20 - 10)
    d = x.abs().amax(1, keepdim=True).clamp(min=1e-5) / 127
    inverse = 1 / d
    q = x * inverse
    remainder = (x.double() - q.double() * d.double()).float()
    assert torch.equal((q.double() + remainder.double() * inverse.double()).float(), x / d)
    assert not torch.equal(q, x / d)  # so it is worth correcting


@needs_kernels
@pytest.mark.parametrize(
    ("group_size", "dtype"),
    [(32, torch.float16), (64, torch.bfloat16), (128, torch.float32), (256, torch.bfloat16), (None, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("config", [FEW, FUSED, SOME, MANY], ids=["few", "fused", "some", "many"])
def test_over_groups(config: W4A8Config, group_size: int | None, dtype: torch.dtype) -> None:
    if (group_size or 128) < 128:
        config = dataclasses.replace(config, block_k=64)
    args = w4a8_problem(7 if config.fused else 19, 40, 712, group_size, dtype)
    assert_matches_reference(w4a8_linear_triton(*args, config), args)


SHAPES = [
    (1, 40, 896, None),
    (17, 33, 100, 32),
    (70, 64, 200, None),
    (140, 70, 384, 128),
    (1, 1, 1, 32),
    (9, 4304, 70, None),
]


@needs_kernels
@pytest.mark.parametrize(("m", "n", "k", "group_size", "dtype"), in_turn(SHAPES, DTYPES), ids=str)
def test_over_shapes_with_the_default_cut(m: int, n: int, k: int, group_size: int | None, dtype: torch.dtype) -> None:
    args = w4a8_problem(m, n, k, group_size, dtype)
    assert_matches_reference(w4a8_linear_triton(*args), args)


EVERY_CUT = [*CUTS, *(dataclasses.replace(cut, splits=3) for cut in (FEW_SMALL, FUSED, MANY))]


@needs_kernels
@pytest.mark.parametrize("config", EVERY_CUT, ids=str)
def test_every_cut(config: W4A8Config) -> None:
    # Two programs in each direction, the second for a few rows, as far as the interpreter's time allows.
    m, n = 5 if config.fused else min(config.block_m + 3, 35), min(config.block_n + 8, 104)
    args = w4a8_problem(m, n, 1100, None, torch.bfloat16)
    assert_matches_reference(w4a8_linear_triton(*args, config), args)
    args[3] = args[4] = None
    assert_matches_reference(w4a8_linear_triton(*args, config), args)


@needs_kernels
@ALL_DTYPES
@pytest.mark.parametrize("pre_scaled", [False, True], ids=["", "act_pre_scale"])
@pytest.mark.parametrize("m", [1, 3, 8])
def test_quantizing_tokens_in_every_program_changes_nothing(m: int, pre_scaled: bool, dtype: torch.dtype) -> None:
    args = w4a8_problem(m, 40, 4200, None, dtype)
    if not pre_scaled:
        args[4] = None
    apart = dataclasses.replace(FUSED, fused=False)
    expected = w4a8_linear_triton(*args, apart)
    torch.testing.assert_close(w4a8_linear_triton(*args, FUSED), expected, rtol=0, atol=0)


@needs_kernels
def test_factors_that_are_not_finite() -> None:
    x, _, _, _, pre_scale, _ = w4a8_problem(3, 1, 100, None, torch.float32)
    pre_scale[5], pre_scale[7] = float("inf"), float("nan")
    x[0, 7], x[1] = 1, 0
    expected, d = quantize_tokens(x, pre_scale)
    xq, d_kernel = quantize_tokens_triton(x, pre_scale, 128)
    assert torch.equal(d.isnan(), d_kernel[:, None].isnan()) and d.isnan().all()  # 0 * NaN, too
    assert torch.equal(xq[:, :100], expected)


@needs_kernels
def test_a_cut_that_does_not_go_with_the_groups() -> None:
    args = w4a8_problem(3, 16, 256, 64, torch.bfloat16)
    with pytest.raises(ValueError, match="block_k=128 does not go with groups of 64; take 64"):
        w4a8_linear_triton(*args, SOME)


@needs_kernels
def test_groups_of_whole_tiles() -> None:
    args = w4a8_problem(3, 40, 1152, None, torch.bfloat16)
    args[2], args[5] = args[2].expand(-1, 6).contiguous(), 192
    assert_matches_reference(w4a8_linear_triton(*args), args)


@needs_kernels
def test_no_rows() -> None:
    args = w4a8_problem(3, 40, 64, None, torch.bfloat16)
    args[0] = args[0][:0]
    assert w4a8_linear_triton(*args).shape == (0, 40)


@needs_kernels
def test_no_cut_changes_the_result() -> None:
    args = w4a8_problem(9, 40, 700, None, torch.float32)
    results = [w4a8_linear_triton(*args, config) for config in (FEW, dataclasses.replace(FEW, block_m=16), SOME, MANY)]
    for y in results[1:]:
        torch.testing.assert_close(y, results[0], rtol=0, atol=0)


@needs_kernels
def test_integers_do_not_overflow_at_the_largest_sums() -> None:
    k = 1 << 18  # more than the int32 of one program holds
    args = [
        torch.ones(1, k),
        torch.full((1, k // 64, 32, 16), -0x78, dtype=torch.int8),
        torch.ones(1, 1),
        None,
        None,
        k,
    ]
    args = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in args]
    y = w4a8_linear_triton(*args)  # -0x78 is the nibbles 8, 8: -8 each
    torch.testing.assert_close(y.cpu(), torch.tensor([[-8.0 * k]]), rtol=1e-6, atol=0)


@needs_kernels
@pytest.mark.parametrize("splits", [1, 3])
def test_every_output_is_written_and_nothing_else_is(splits: int) -> None:
    args = w4a8_problem(19, 45, 400, None, torch.float16)
    with guarded_outputs(count=3 if splits == 1 else 4):  # the tokens, their scales, y, and the parts
        y = w4a8_linear_triton(*args, dataclasses.replace(SOME, splits=splits))
    assert_matches_reference(y, args)


@needs_kernels
@pytest.mark.parametrize("config", [FEW, MANY], ids=["few", "many"])
def test_slices_and_strides_are_read_in_place(config: W4A8Config) -> None:
    x, qdata, scale, bias, pre_scale, g = w4a8_problem(18, 96, 512, 64, torch.float16)
    config = dataclasses.replace(config, block_k=64)
    args = [x[:, 128:384], qdata[1:3, 2:6], scale[16:48, 2:6], bias[16:48], pre_scale[128:384], g]
    assert_matches_reference(w4a8_linear_triton(*args, config), args)
    args[0] = args[0].t().contiguous().t()
    flat = w4a8_linear_triton(*args, config)
    assert_matches_reference(flat, args)
    args[0] = args[0].contiguous().view(2, 9, 256)
    torch.testing.assert_close(w4a8_linear_triton(*args, config), flat.view(2, 9, 32), rtol=0, atol=0)


class TestErrors(expecttest.TestCase):
    def assert_error(self, expected: str, **arguments: int) -> None:
        with self.assertRaises(ValueError) as caught:
            W4A8Config(**arguments)
        self.assertExpectedInline(textwrap.fill(str(caught.exception), 100), expected, skip=1)

    def test_powers(self) -> None:
        self.assert_error(
            """\
block_n, block_m, slices and num_warps must be powers of two, got (48, 8, 1, 4), and splits at least
1, got 1""",
            block_n=48,
            block_m=8,
        )

    def test_block_k(self) -> None:
        self.assert_error(
            """\
block_n must be at least 16, block_m 8, block_k 64 or 128 and slices at most 8, got block_n=32,
block_m=8, block_k=32, slices=1""",
            block_n=32,
            block_m=8,
            block_k=32,
        )

    def test_fused(self) -> None:
        self.assert_error(
            """fused=True needs slices of K and block_k=64, got slices=1, block_k=128""",
            block_n=32,
            block_m=8,
            fused=True,
        )
        args = w4a8_problem(9, 16, 64, None, torch.bfloat16)
        with self.assertRaisesRegex(ValueError, "a fused config serves at most block_m=8 tokens, got 9"):
            w4a8_linear_triton(*args, FUSED)


@pytest.mark.gpu
@ALL_DTYPES
@pytest.mark.parametrize("m", [1, 4, 16, 17, 64, 200, 1024])
def test_compiled_kernel_on_a_real_layer(m: int, dtype: torch.dtype) -> None:
    args = w4a8_problem(m, 3584, 18944, None, dtype)
    y = w4a8_linear_triton(*args)
    assert_matches_reference(y, args)
    torch.testing.assert_close(w4a8_linear_triton(*args), y, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("config", EVERY_CUT, ids=str)
def test_every_cut_compiled(config: W4A8Config) -> None:
    args = w4a8_problem(8 if config.fused else 300, 520, 4096, None, torch.bfloat16)
    assert_matches_reference(w4a8_linear_triton(*args, config), args)
