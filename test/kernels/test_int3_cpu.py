"""The CPU path: its values, what it compiles and when, and that it does without a compiler.

Most tests run the compiled kernel's program uncompiled; `compiled` is the one that builds it.
"""

import itertools
import threading
import warnings
from collections.abc import Iterator

import linear_cases
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mbq_ao import MBQInt3Tensor
from mbq_ao.kernels import int3_cpu
from mbq_ao.kernels.int3_layout import pack_int3, unpack_int3

int3_linear = torch.ops.mbq_ao.int3_linear
Weight = tuple[Tensor, Tensor, Tensor]

SHAPES = [(64, 256), (33, 129), (100, 576), (70, 300), (256, 1024)]
GROUPS = [32, 64, 128, 256, 384, 10**6]


def weight(n: int, k: int, group_size: int, dtype: torch.dtype = torch.float32) -> Weight:
    gen = torch.Generator().manual_seed(n + k)
    q = torch.randint(0, 8, (n, k), dtype=torch.uint8, generator=gen)
    scale = (torch.rand(n, -(-k // group_size), generator=gen) + 0.1).to(dtype)
    zero_point = torch.randint(0, 8, scale.shape, dtype=torch.uint8, generator=gen)
    return pack_int3(q), scale, zero_point


def data(w: MBQInt3Tensor) -> Weight:
    return w.qdata, w.scale, w.zero_point


def random_x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


EPS = torch.finfo(torch.float32).eps


def assert_right(y: Tensor, x: Tensor, w: Weight, bias: Tensor | None, group_size: int, eps: float = EPS) -> None:
    """Against fp64: a few roundings of the terms in the arithmetic's eps, and the output's own."""
    qdata, scale, zero_point = w
    n, k = scale.shape[0], x.shape[-1]
    groups = torch.arange(k) // group_size
    dense = (unpack_int3(qdata, n, k).double() - zero_point[:, groups]) * scale[:, groups].double()
    expected = nn.functional.linear(x.double(), dense, None if bias is None else bias.double())
    # The zero point is subtracted from the sum, not from each weight: the terms are q and z, not q - z.
    size = x.double().abs() @ ((7 + zero_point[:, groups]) * scale[:, groups].double()).t()
    rounding = 4 * eps * size + torch.finfo(y.dtype).eps * expected.abs()
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    assert ((y.double() - expected).abs() <= rounding).all()


@pytest.fixture
def few_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MBQ_AO_CPU_COMPILE", raising=False)
    monkeypatch.setattr(int3_cpu, "MIN_WEIGHTS_PER_ROW", 0)


@pytest.fixture(params=[8, 16], ids="{} lanes".format)
def uncompiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, few_weights: None) -> Iterator[None]:
    """The kernel's program for every weight, run op by op."""
    monkeypatch.setattr(int3_cpu, "_LANES", request.param)
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, few_weights: None) -> list[tuple[int, int]]:
    """The groups in a tile and the rows of x of each kernel asked for; the kernel itself does not work."""
    calls = []

    def kernel(per_tile: int, num_rows: int) -> None:
        calls.append((per_tile, num_rows))
        raise RuntimeError("no compiler\nand a second line")

    monkeypatch.setattr(int3_cpu, "_kernel", kernel)
    monkeypatch.setattr(int3_cpu, "_no_compiler", threading.Event())
    return calls


class TestValues:
    @pytest.mark.parametrize("group_size", GROUPS)
    @pytest.mark.parametrize(("n", "k"), SHAPES)
    def test_few_rows(self, n: int, k: int, group_size: int, uncompiled: None) -> None:
        w, bias = weight(n, k, group_size), random_x(n)
        for rows in (1, 3, 6):
            x = random_x(rows, k)
            assert_right(int3_linear(x, *w, bias, group_size), x, w, bias, group_size)

    @pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_dtypes(self, scale_dtype: torch.dtype, x_dtype: torch.dtype, uncompiled: None) -> None:
        w, bias, x = weight(70, 300, 64, scale_dtype), random_x(70, dtype=scale_dtype), random_x(2, 300, dtype=x_dtype)
        assert_right(int3_linear(x, *w, bias, 64), x, w, bias, 64)

    def test_shapes_and_strides_of_x(self, uncompiled: None) -> None:
        w = weight(64, 256, 128)
        for x in (random_x(256), random_x(2, 3, 256), random_x(256, 5).t(), random_x(2, 1, 256).expand(2, 4, 256)):
            assert_right(int3_linear(x, *w, None, 128), x, w, None, 128)
        assert int3_linear(random_x(0, 256), *w, None, 128).shape == (0, 64)

    def test_slices_of_a_weight(self, uncompiled: None) -> None:
        w, x = MBQInt3Tensor.from_hp(random_x(128, 512), 64), random_x(2, 512)
        rows, columns = w[64:], w[:, 128:384]
        assert_right(nn.functional.linear(x, rows), x, data(rows), None, 64)
        x = x[:, 128:384]
        assert_right(nn.functional.linear(x, columns), x, data(columns), None, 64)

    def test_data_at_an_odd_offset(self, uncompiled: None) -> None:
        qdata, scale, zero_point = w = weight(64, 256, 128)
        shifted = torch.cat([qdata.new_zeros(1), qdata.flatten()])[1:].view(qdata.shape)
        x = random_x(2, 256)
        assert_right(int3_linear(x, shifted, scale, zero_point, None, 128), x, w, None, 128)

    def test_a_row_does_not_depend_on_the_others(self, uncompiled: None) -> None:
        w, x = weight(64, 256, 32), random_x(6, 256)
        alone = [int3_linear(x[row : row + 1], *w, None, 32) for row in (1, 5)]
        x[2] = x[4] = float("nan")
        assert torch.equal(int3_linear(x, *w, None, 32)[1::4], torch.cat(alone))

    @pytest.mark.parametrize("native", [False, True], ids=["emulated", "native"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_many_rows_in_pieces(self, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(int3_cpu, "_multiplies", lambda _: native)
        w, bias, x = weight(100, 288, 64), random_x(100), random_x(40, 288, dtype=dtype)
        pieces = []
        dequantize = int3_cpu.dequantize_reference

        def record(*args) -> Tensor:
            pieces.append((args[1].shape[0], args[-1]))
            return dequantize(*args)

        monkeypatch.setattr(int3_cpu, "dequantize_reference", record)
        monkeypatch.setattr(int3_cpu, "_CHUNK", 288 * 40)
        y = int3_linear(x, *w, bias, 64)
        computed_in = dtype if native else torch.float32
        assert pieces == [(32, computed_in)] * 3 + [(4, computed_in)]
        assert_right(y, x, w, bias, 64, eps=torch.finfo(computed_in).eps)


class TestWhenItCompiles:
    def test_without_a_compiler_one_warning_and_the_same_result(self, calls: list[tuple[int, int]]) -> None:
        w, x = weight(64, 256, 64), random_x(1, 256)
        with pytest.warns(UserWarning, match=r"C\+\+ compiler\? \(RuntimeError: no compiler\)$"):
            y = int3_linear(x, *w, None, 64)
        assert_right(y, x, w, None, 64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            int3_linear(x, *w, None, 64)
        assert calls == [(2, 1)]

    def test_many_rows_small_weights_and_on_request_do_not(
        self, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        int3_linear(random_x(int3_cpu.MAX_ROWS + 1, 256), *weight(64, 256, 128), None, 128)
        int3_linear(random_x(1, 128), *weight(64, 128, 128), None, 128)
        int3_linear(random_x(1, 256), *weight(32, 256, 128), None, 128)
        monkeypatch.setattr(int3_cpu, "MIN_WEIGHTS_PER_ROW", 64 * 256)
        int3_linear(random_x(2, 256), *weight(64, 256, 128), None, 128)
        monkeypatch.setenv("MBQ_AO_CPU_COMPILE", "0")
        int3_linear(random_x(1, 256), *weight(64, 256, 128), None, 128)
        assert calls == []
        monkeypatch.delenv("MBQ_AO_CPU_COMPILE")
        with pytest.warns(UserWarning, match="no compiler"):
            int3_linear(random_x(1, 256), *weight(64, 256, 128), None, 128)
        assert calls == [(1, 1)]

    @pytest.mark.parametrize(
        ("group_size", "per_tile"), [(32, 4), (64, 2), (128, 1), (256, 1), (300, 1)], ids=lambda value: str(value)
    )
    def test_one_kernel_a_number_of_groups_in_a_tile(
        self, group_size: int, per_tile: int, calls: list[tuple[int, int]]
    ) -> None:
        with pytest.warns(UserWarning, match="no compiler"):
            int3_linear(random_x(int3_cpu.MAX_ROWS, 300), *weight(64, 300, group_size), None, group_size)
        assert calls == [(per_tile, 4)]


def linear(n: int, k: int) -> nn.Linear:
    layer = nn.Linear(k, n)
    layer.weight = nn.Parameter(MBQInt3Tensor.from_hp(random_x(n, k), 128), requires_grad=False)
    return layer


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(int3_cpu._ROWS, marks=pytest.mark.benchmark)],
    ids="{} rows in a call".format,
)
def rows_in_a_call(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch.compile takes minutes for the kernel of several rows where little else is free: `make test-all` does it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int3_cpu, "_ROWS", request.param)
        yield request.param


def test_compiled(rows_in_a_call: int, few_weights: None) -> None:
    """Five shapes, threads, dtypes and gradient modes share the compilation for one row, for two and for four; their
    values are right."""
    torch._dynamo.reset()
    counters.clear()
    int3_cpu._kernel.cache_clear()
    int3_cpu._compiled.clear()
    w, x = weight(100, 576, 128), random_x(2, 576)
    results = []
    threads = [threading.Thread(target=lambda: results.append(int3_linear(x, *w, None, 128))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for y in results:
        assert_right(y, x, w, None, 128)
    modes = itertools.cycle([torch.no_grad, torch.inference_mode, torch.enable_grad])
    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.bfloat16, torch.float32])
    for ((n, k), group_size), dtype in zip(itertools.product(SHAPES, (128, 10**6)), dtypes, strict=False):
        w, bias = weight(n, k, group_size, dtype), random_x(n, dtype=dtype)
        for rows in (1, 2, 7, 8):
            x = random_x(rows, k, dtype=dtype)
            with next(modes)():
                assert_right(int3_linear(x, *w, bias, group_size), x, w, bias, group_size)
    columns = MBQInt3Tensor.from_hp(random_x(64, 512), 128)[:, 256:]
    x = random_x(2, 256)
    assert_right(nn.functional.linear(x, columns), x, data(columns), None, 128)
    graphs = 1 if rows_in_a_call == 1 else 3  # one row, two, and four
    assert counters["stats"]["unique_graphs"] == graphs

    model = nn.Sequential(linear(160, 256), nn.ReLU(), linear(96, 160))
    x = random_x(2, 256).requires_grad_()
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, model(x))
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert counters["stats"]["unique_graphs"] == graphs + 1  # the model's own

    # Without a bias, which would make another tensor of it, the result is the caller's as any other.
    x, gain = random_x(2, 256).requires_grad_(), nn.Parameter(torch.ones(64))
    y = int3_linear(x, *weight(64, 256, 128), None, 128)
    (y * gain).sum().backward()
    assert not y.is_inference() and x.grad.isfinite().all() and gain.grad.isfinite().all()


def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile

    def uncompiled(fn: object, *, options: object, **kwargs: object) -> object:
        return compiled(fn, backend="eager", **kwargs)

    monkeypatch.setattr(torch, "compile", uncompiled)
    int3_cpu._kernel.cache_clear()
    int3_cpu._factors.cache_clear()
    int3_cpu._compiled.clear()


def test_more_kernels_than_recompilations(monkeypatch: pytest.MonkeyPatch, few_weights: None) -> None:
    """torch.compile's limit is for one of them, and beyond it the weight is unpacked."""
    eager(monkeypatch)
    threads = torch.get_num_threads()
    try:
        for group_size, number in [(128, 1), (64, 1), (32, 1), (128, 2), (128, 3)]:
            torch.set_num_threads(number)
            x, w = random_x(1, 256), weight(64, 256, group_size)
            with torch._dynamo.config.patch(recompile_limit=2):
                y = int3_linear(x, *w, None, group_size)
            assert_right(y, x, w, None, group_size)
        assert not int3_cpu._no_compiler.is_set()
    finally:
        torch.set_num_threads(threads)
        int3_cpu._kernel.cache_clear()
        int3_cpu._compiled.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_default_dtype(dtype: torch.dtype, uncompiled: None) -> None:
    int3_cpu._kernel.cache_clear()
    int3_cpu._factors.cache_clear()
    w, x = weight(64, 256, 128), random_x(3, 256)
    torch.set_default_dtype(dtype)
    try:
        y = int3_linear(x, *w, None, 128)
    finally:
        torch.set_default_dtype(torch.float32)
        int3_cpu._factors.cache_clear()
        int3_cpu._kernel.cache_clear()
    assert_right(y, x, w, None, 128)


@given(linear_cases.cases(max_rows=8, group_sizes=(128, 256)))  # the kernels of test_compiled
@settings(max_examples=60, derandomize=True, deadline=None)
def test_compiled_fuzz(rows_in_a_call: int, case: linear_cases.Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int3_cpu, "MIN_WEIGHTS_PER_ROW", 0)
        linear_cases.assert_right(torch.ops.mbq_ao.int3_linear(*case.arguments()), case)


@pytest.mark.parametrize("k", [17, 34, 64, 100])
def test_a_nan_beside_the_rows_reaches_none_of_them(k: int) -> None:
    """Matmuls in 16 bits may read past a row's end."""
    x = torch.randn(33, k + 3, dtype=torch.bfloat16)
    x[:, k:] = torch.nan
    x[5, 0] = torch.nan
    weight = MBQInt3Tensor.from_hp(torch.randn(40, k, dtype=torch.bfloat16), 32)
    y = torch.nn.functional.linear(x[:, :k], weight)
    assert y.isnan().any(1).nonzero().tolist() == [[5]]
