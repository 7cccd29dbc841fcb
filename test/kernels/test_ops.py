"""torch.ops.mbq_ao.*: values on CPU, opcheck, gradients, errors, and importing it without torchao or triton."""

import pathlib
import subprocess
import sys
import textwrap

import expecttest
import pytest
import torch
from torch import Tensor

from mbq_ao.kernels import int3_layout, int3_ops, int4_layout, reference, w4a8_ops  # noqa: F401  (registers torch.ops.mbq_ao)

int3_linear, w4a8_linear = torch.ops.mbq_ao.int3_linear, torch.ops.mbq_ao.w4a8_linear
N, K, G = 40, 96, 32
Weight = tuple[Tensor, ...]


class Int3:
    linear, dequantize = int3_linear, torch.ops.mbq_ao.int3_dequantize
    linear_reference = staticmethod(reference.int3_linear_reference)
    dequantize_reference = staticmethod(reference.dequantize_reference)

    @staticmethod
    def weight(n: int = N, k: int = K, g: int = G, dtype: torch.dtype = torch.float32) -> Weight:
        gen = torch.Generator().manual_seed(n + k)
        q = torch.randint(0, 8, (n, k), dtype=torch.uint8, generator=gen)
        scale = torch.rand(n, -(-k // g), generator=gen).to(dtype)
        zero_point = torch.randint(0, 8, scale.shape, dtype=torch.uint8, generator=gen)
        return int3_layout.pack_int3(q), scale, zero_point

    @staticmethod
    def arguments(x: Tensor, w: Weight, bias: Tensor | None, g: int = G) -> tuple:
        return x, *w, bias, g


class W4A8:
    linear, dequantize = w4a8_linear, torch.ops.mbq_ao.int4_dequantize
    linear_reference = staticmethod(reference.w4a8_linear_reference)
    dequantize_reference = staticmethod(reference.int4_dequantize_reference)

    @staticmethod
    def weight(n: int = N, k: int = K, g: int = G, dtype: torch.dtype = torch.float32) -> Weight:
        gen = torch.Generator().manual_seed(n + k)
        q = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=gen)
        return int4_layout.pack_int4(q), torch.rand(n, -(-k // g), generator=gen).to(dtype)

    @staticmethod
    def arguments(x: Tensor, w: Weight, bias: Tensor | None, g: int = G, act_pre_scale: Tensor | None = None) -> tuple:
        return x, *w, bias, act_pre_scale, g


Kind = type[Int3] | type[W4A8]
each_kind = pytest.mark.parametrize("kind", [Int3, W4A8])


def random_x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@each_kind
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (0, K)], ids=str)
def test_output_is_in_the_dtype_of_x(
    shape: tuple[int, ...], scale_dtype: torch.dtype, x_dtype: torch.dtype, kind: Kind
) -> None:
    x, w, bias = random_x(*shape, dtype=x_dtype), kind.weight(dtype=scale_dtype), random_x(N)
    y = kind.linear(*kind.arguments(x, w, bias))
    expected = kind.linear_reference(*kind.arguments(x, w, bias))
    assert y.dtype == x_dtype
    assert y.shape == (*shape[:-1], N)
    # Weight and output are each rounded once to x's dtype.
    plain = kind.dequantize_reference(*w, K, G, torch.float32)
    size = x.float().abs() @ plain.abs().t() + bias.abs()
    assert ((y.float() - expected).abs() <= 2 * torch.finfo(x_dtype).eps * size).all()
    assert torch.equal(kind.dequantize(*w, K, G, torch.float32), plain)


@each_kind
def test_x_with_strides(kind: Kind) -> None:
    x, w = random_x(K, 5).t(), kind.weight()
    y = kind.linear(*kind.arguments(x, w, None))
    torch.testing.assert_close(y, kind.linear(*kind.arguments(x.contiguous(), w, None)))
    spread = x.new_full((5, 2, K), torch.nan)
    spread[:, 0] = x
    torch.testing.assert_close(y, kind.linear(*kind.arguments(spread[:, 0], w, None)))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_act_pre_scale_multiplies_x_in_fp32(x_dtype: torch.dtype) -> None:
    x, w, factors = random_x(3, K, dtype=x_dtype), W4A8.weight(g=K), random_x(K, dtype=torch.bfloat16)
    y = w4a8_linear(*W4A8.arguments(x, w, None, K, factors))
    expected = w4a8_linear(*W4A8.arguments(x.float() * factors.float(), w, None, K))
    assert torch.equal(y, expected.to(x_dtype))


@each_kind
@pytest.mark.parametrize("bias", [None, random_x(N)], ids=["no bias", "bias"])
def test_opcheck_linear(bias: Tensor | None, kind: Kind) -> None:
    bias = None if bias is None else bias.clone().requires_grad_()
    x = random_x(2, 3, K).requires_grad_()
    torch.library.opcheck(kind.linear.default, kind.arguments(x, kind.weight(), bias))
    if kind is W4A8 and bias is not None:
        torch.library.opcheck(kind.linear.default, kind.arguments(x, kind.weight(), bias, G, random_x(K)))


@each_kind
def test_opcheck_dequantize(kind: Kind) -> None:
    torch.library.opcheck(kind.dequantize.default, (*kind.weight(), K, G, torch.bfloat16))


@each_kind
def test_gradients_of_x_and_bias_are_those_of_the_dequantized_weight(kind: Kind) -> None:
    w, grad = kind.weight(), random_x(2, 3, N)
    x, bias = random_x(2, 3, K).requires_grad_(), random_x(N).requires_grad_()
    kind.linear(*kind.arguments(x, w, bias)).backward(grad)
    plain = kind.dequantize_reference(*w, K, G, torch.float32)
    torch.testing.assert_close(x.grad, grad @ plain)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))
    if kind is W4A8:
        x.grad, factors = None, random_x(K)
        kind.linear(*kind.arguments(x, w, bias, G, factors)).backward(grad)
        torch.testing.assert_close(x.grad, grad @ plain * factors)


@each_kind
def test_gradient_of_a_vector(kind: Kind) -> None:
    x, bias = random_x(K).requires_grad_(), random_x(N).requires_grad_()
    kind.linear(*kind.arguments(x, kind.weight(), bias)).sum().backward()
    assert x.grad.shape == (K,)
    assert bias.grad.shape == (N,)


@each_kind
def test_shapes_are_known_without_data(kind: Kind) -> None:
    w = tuple(t.to("meta") for t in kind.weight())
    y = kind.linear(*kind.arguments(torch.empty(7, 5, K, device="meta", dtype=torch.bfloat16), w, None))
    assert (y.shape, y.dtype) == ((7, 5, N), torch.bfloat16)
    plain = kind.dequantize(*w, K, G, torch.float16)
    assert (plain.shape, plain.dtype, plain.device.type) == ((N, K), torch.float16, "meta")


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
            *Int3.weight(),
            None,
            G,
        )

    def test_x_in_double(self) -> None:
        self.assert_error(
            """x must be (..., K) in float32, float16 or bfloat16, got torch.float64 of shape (2, 96); cast it""",
            random_x(2, K).double(),
            *Int3.weight(),
            None,
            G,
        )

    def test_bias_of_another_size(self) -> None:
        self.assert_error(
            """bias must be (40,) and floating point, got torch.float32 of shape (41,)""",
            random_x(2, K),
            *Int3.weight(),
            torch.zeros(N + 1),
            G,
        )

    def test_zero_point_of_another_dtype(self) -> None:
        qdata, scale, zero_point = Int3.weight()
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
        qdata, scale, zero_point = Int3.weight()
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
            *Int3.weight(),
            None,
            48,
        )

    def test_devices(self) -> None:
        self.assert_error(
            """\
x, weight and bias must be on one device, got x on meta, the weight on cpu; move them with
.to(device)""",
            random_x(2, K).to("meta"),
            *Int3.weight(),
            None,
            G,
        )

    def assert_w4a8_error(self, expected: str, x: Tensor, w: Weight, *args) -> None:
        with self.assertRaises(ValueError) as caught:
            w4a8_linear(*W4A8.arguments(x, w, *args))
        self.assertExpectedInline(textwrap.fill(str(caught.exception), 100), expected, skip=1)

    def test_w4a8_x(self) -> None:
        w = W4A8.weight()
        self.assert_w4a8_error(
            """x must be (..., K) in float32, float16 or bfloat16, got torch.float64 of shape (2, 96); cast it""",
            random_x(2, K).double(),
            w,
            None,
        )
        self.assert_w4a8_error(
            """\
scale must be (N, ceil(K / group_size)) in float32, float16 or bfloat16, got torch.float32 of shape
(40, 3) for K=192, group_size=32; K is the last dimension of x""",
            random_x(2, 2 * K),
            w,
            None,
        )
        self.assert_w4a8_error(
            """x must be (..., K) in float32, float16 or bfloat16, got torch.float32 of shape (); cast it""",
            torch.tensor(1.0),
            w,
            None,
        )

    def test_w4a8_weight(self) -> None:
        qdata, scale = W4A8.weight()
        self.assert_w4a8_error(
            """\
qdata of a 40 x 96 weight must be int8 (3, 2, 32, 16), got torch.int8 (1, 2, 32, 16); make it with
pack_int4""",
            random_x(2, K),
            (qdata[:1], scale),
            None,
        )
        self.assert_w4a8_error(
            """\
scale must be (N, ceil(K / group_size)) in float32, float16 or bfloat16, got torch.float64 of shape
(40, 3) for K=96, group_size=32; K is the last dimension of x""",
            random_x(2, K),
            (qdata, scale.double()),
            None,
        )
        self.assert_w4a8_error(
            """group_size must be 32, 64, a multiple of 64, or at least K for one scale a row, got 48 for K=96""",
            random_x(2, K),
            (qdata, scale),
            None,
            48,
        )

    def test_w4a8_bias_and_act_pre_scale(self) -> None:
        x, w = random_x(2, K), W4A8.weight()
        self.assert_w4a8_error(
            """bias must be (40,) and floating point, got torch.float32 of shape (41,)""", x, w, torch.zeros(N + 1)
        )
        self.assert_w4a8_error(
            """act_pre_scale must be (96,) in float32, float16 or bfloat16, got torch.float32 of shape (40,)""",
            x,
            w,
            None,
            G,
            torch.ones(N),
        )
        self.assert_w4a8_error(
            """act_pre_scale must be (96,) in float32, float16 or bfloat16, got torch.float64 of shape (96,)""",
            x,
            w,
            None,
            G,
            torch.ones(K, dtype=torch.float64),
        )

    def test_w4a8_devices(self) -> None:
        x, (qdata, scale) = random_x(2, K), W4A8.weight()
        self.assert_w4a8_error(
            """\
x, weight and bias must be on one device, got x on meta, the weight on cpu; move them with
.to(device)""",
            x.to("meta"),
            (qdata, scale),
            None,
        )
        self.assert_w4a8_error(
            """qdata and scale must be on one device, got cpu, meta; move them with .to(device)""",
            x,
            (qdata, scale.to("meta")),
            None,
        )
        self.assert_w4a8_error(
            """qdata and act_pre_scale must be on one device, got cpu, meta; move them with .to(device)""",
            x,
            (qdata, scale),
            None,
            G,
            torch.ones(K, device="meta"),
        )


@pytest.mark.parametrize("missing", ["torchao", "triton"])
def test_kernels_import_without(missing: str) -> None:
    # A server may have neither. The package's own __init__ imports torchao, so it is stood in for.
    program = f"""
        import sys, types
        sys.modules[{missing!r}] = None
        package = types.ModuleType("mbq_ao")
        package.__path__ = [{str(pathlib.Path(int3_ops.__file__).parents[1])!r}]
        sys.modules["mbq_ao"] = package
        import torch
        import mbq_ao.kernels.int3_ops, mbq_ao.kernels.w4a8_ops
        assert "torchao" not in sys.modules or sys.modules["torchao"] is None
        w = [torch.zeros(1, 1, 3, 32, 8, dtype=torch.int16), torch.ones(4, 1), torch.ones(4, 1, dtype=torch.uint8)]
        print(torch.ops.mbq_ao.int3_linear(torch.ones(2, 64), *w, None, 64)[0, 0].item())
        w = [torch.full((1, 1, 32, 16), -1, dtype=torch.int8), torch.ones(4, 1)]
        print(torch.ops.mbq_ao.w4a8_linear(torch.ones(2, 64), *w, None, None, 64)[0, 0].item())
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["-64.0", "-64.0"]
