"""torch.ops.mbq_ao.*: values on CPU, opcheck, gradients, errors, and importing it without torchao or triton."""

import pathlib
import subprocess
import sys
import textwrap

import expecttest
import pytest
import torch
from torch import Tensor

from mbq_ao.kernels import ops
from mbq_ao.kernels.layout import pack_int3
from mbq_ao.kernels.reference import dequantize_reference, int3_linear_reference

int3_linear = torch.ops.mbq_ao.int3_linear
N, K, G = 40, 96, 32


def weight(n: int = N, k: int = K, g: int = G, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(n + k)
    q = torch.randint(0, 8, (n, k), dtype=torch.uint8, generator=gen)
    scale = torch.rand(n, -(-k // g), generator=gen).to(dtype)
    zero_point = torch.randint(0, 8, scale.shape, dtype=torch.uint8, generator=gen)
    return pack_int3(q), scale, zero_point


def random_x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (0, K)], ids=str)
def test_output_is_in_the_dtype_of_x(shape: tuple[int, ...], scale_dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    x, w, bias = random_x(*shape, dtype=x_dtype), weight(dtype=scale_dtype), random_x(N)
    y = int3_linear(x, *w, bias, G)
    expected = int3_linear_reference(x, *w, bias, G)
    assert y.dtype == x_dtype
    assert y.shape == (*shape[:-1], N)
    # Weight and output are each rounded once to x's dtype.
    size = x.float().abs() @ dequantize_reference(*w, K, G, torch.float32).abs().t() + bias.abs()
    assert ((y.float() - expected).abs() <= 2 * torch.finfo(x_dtype).eps * size).all()


def test_x_with_strides() -> None:
    x, w = random_x(K, 5).t(), weight()
    torch.testing.assert_close(int3_linear(x, *w, None, G), int3_linear(x.contiguous(), *w, None, G))


@pytest.mark.parametrize("bias", [None, random_x(N)], ids=["no bias", "bias"])
def test_opcheck_linear(bias: Tensor | None) -> None:
    bias = None if bias is None else bias.clone().requires_grad_()
    torch.library.opcheck(int3_linear.default, (random_x(2, 3, K).requires_grad_(), *weight(), bias, G))


def test_opcheck_dequantize() -> None:
    torch.library.opcheck(torch.ops.mbq_ao.int3_dequantize.default, (*weight(), K, G, torch.bfloat16))


def test_gradients_of_x_and_bias_are_those_of_the_dequantized_weight() -> None:
    w = weight()
    x, bias = random_x(2, 3, K).requires_grad_(), random_x(N).requires_grad_()
    x_ref, bias_ref = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    int3_linear(x, *w, bias, G).square().sum().backward()
    torch.nn.functional.linear(x_ref, dequantize_reference(*w, K, G, torch.float32), bias_ref).square().sum().backward()
    torch.testing.assert_close(x.grad, x_ref.grad)
    torch.testing.assert_close(bias.grad, bias_ref.grad)


def test_gradient_of_a_vector() -> None:
    x, bias = random_x(K).requires_grad_(), random_x(N).requires_grad_()
    int3_linear(x, *weight(), bias, G).sum().backward()
    assert x.grad.shape == (K,)
    assert bias.grad.shape == (N,)


def test_shapes_are_known_without_data() -> None:
    w = [t.to("meta") for t in weight()]
    y = int3_linear(torch.empty(7, 5, K, device="meta", dtype=torch.bfloat16), *w, None, G)
    assert (y.shape, y.dtype) == ((7, 5, N), torch.bfloat16)


class TestErrors(expecttest.TestCase):
    def assert_error(self, expected: str, *args) -> None:
        with self.assertRaises(ValueError) as caught:
            int3_linear(*args)
        self.assertExpectedInline(textwrap.fill(str(caught.exception), 100), expected, skip=1)

    def test_x_of_another_width(self) -> None:
        self.assert_error(
            """\
scale must be (N, ceil(K / group_size)) in float32, float16 or bfloat16, got torch.float32 of shape
(40, 3) for K=192, group_size=32; K is the last dimension of x""",
            random_x(2, 2 * K),
            *weight(),
            None,
            G,
        )

    def test_x_in_double(self) -> None:
        self.assert_error(
            """x must be (..., K) in float32, float16 or bfloat16, got torch.float64 of shape (2, 96); cast it""",
            random_x(2, K).double(),
            *weight(),
            None,
            G,
        )

    def test_bias_of_another_size(self) -> None:
        self.assert_error(
            """bias must be (40,) and floating point, got torch.float32 of shape (41,)""",
            random_x(2, K),
            *weight(),
            torch.zeros(N + 1),
            G,
        )

    def test_zero_point_of_another_dtype(self) -> None:
        qdata, scale, zero_point = weight()
        self.assert_error(
            """zero_point must be uint8 of scale's shape (40, 3), got torch.int32 of shape (40, 3)""",
            random_x(2, K),
            qdata,
            scale,
            zero_point.int(),
            None,
            G,
        )

    def test_qdata_of_another_shape(self) -> None:
        qdata, scale, zero_point = weight()
        self.assert_error(
            """\
qdata of a 40 x 96 weight must be int16 (2, 1, 3, 32, 8), got torch.int16 (1, 1, 3, 32, 8); make it
with pack_int3""",
            random_x(2, K),
            qdata[:1],
            scale,
            zero_point,
            None,
            G,
        )

    def test_group_size(self) -> None:
        self.assert_error(
            """group_size must be 32, 64, a multiple of 128, or at least K for one scale a row, got 48 for K=96""",
            random_x(2, K),
            *weight(),
            None,
            48,
        )

    def test_devices(self) -> None:
        self.assert_error(
            """\
x, weight and bias must be on one device, got x on meta, the weight on cpu; move them with
.to(device)""",
            random_x(2, K).to("meta"),
            *weight(),
            None,
            G,
        )


@pytest.mark.parametrize("missing", ["torchao", "triton"])
def test_kernels_import_without(missing: str) -> None:
    # A server may have neither. The package's own __init__ imports torchao, so it is stood in for.
    program = f"""
        import sys, types
        sys.modules[{missing!r}] = None
        package = types.ModuleType("mbq_ao")
        package.__path__ = [{str(pathlib.Path(ops.__file__).parents[1])!r}]
        sys.modules["mbq_ao"] = package
        import torch
        import mbq_ao.kernels.ops
        assert "torchao" not in sys.modules or sys.modules["torchao"] is None
        w = [torch.zeros(1, 1, 3, 32, 8, dtype=torch.int16), torch.ones(4, 1), torch.ones(4, 1, dtype=torch.uint8)]
        print(torch.ops.mbq_ao.int3_linear(torch.ones(2, 64), *w, None, 64)[0, 0].item())
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "-64.0"
