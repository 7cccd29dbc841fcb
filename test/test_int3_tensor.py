"""MBQInt3Tensor: the values of a linear, and that everything done to weights works or says why not."""

import copy
import io
import pickle
import textwrap

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import FileCheck

from mbq_ao import MBQInt3Tensor
from mbq_ao.kernels.layout import packed_shape

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
N, K, G = 96, 384, 64


def random_weight(n: int = N, k: int = K, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)).to(dtype)


def quantized(n: int = N, k: int = K, group_size: int | None = G, pre_scale: bool = False, **kwargs) -> MBQInt3Tensor:
    factors = torch.rand(k, generator=torch.Generator().manual_seed(1)) + 0.5 if pre_scale else None
    return MBQInt3Tensor.from_hp(random_weight(n, k, **kwargs), group_size, act_pre_scale=factors)


def random_x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def linear(w: MBQInt3Tensor, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=bias, dtype=w.dtype)
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_same_data(a: Tensor, b: Tensor) -> None:
    assert type(a) is type(b) is MBQInt3Tensor
    (names, attributes), (other_names, other_attributes) = a.__tensor_flatten__(), b.__tensor_flatten__()
    assert (names, attributes) == (other_names, other_attributes)
    for name in names:
        assert_same(getattr(a, name), getattr(b, name))


class TestQuantizing:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("group_size", [32, 64, 128, None])
    @pytest.mark.parametrize(("n", "k"), [(96, 384), (40, 576), (33, 100), (1, 1)])
    def test_fake_quantize_is_from_hp_dequantized(
        self, n: int, k: int, group_size: int | None, dtype: torch.dtype
    ) -> None:
        w = random_weight(n, k, dtype)
        q = MBQInt3Tensor.from_hp(w, group_size)
        assert (q.shape, q.dtype, q.device) == (w.shape, w.dtype, w.device)
        assert q.group_size == (group_size or k)
        fake = MBQInt3Tensor.fake_quantize(w, group_size)
        assert type(fake) is Tensor
        assert_same(q.dequantize(), fake)

    def test_seven_eighths_and_more_of_the_memory_is_saved(self) -> None:
        q = quantized(512, 1024, 128, dtype=torch.bfloat16)
        assert q.quantized_nbytes() * 8 == 512 * 1024 * 3 + 512 * 8 * (16 + 8)
        assert tuple(q.qdata.shape) == packed_shape(512, 1024)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_values_that_are_not_finite(self, bad: float) -> None:
        w = random_weight()
        w[3, 5] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            MBQInt3Tensor.from_hp(w)
        with pytest.raises(ValueError, match="act_pre_scale holds values"):
            MBQInt3Tensor.from_hp(random_weight(), act_pre_scale=torch.full((K,), bad))

    def test_gradients_do_not_hang_on_the_quantized_weight(self) -> None:
        w = random_weight().requires_grad_()
        assert not MBQInt3Tensor.from_hp(w).scale.requires_grad


class TestLinear:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("pre_scale", [False, True], ids=["", "act_pre_scale"])
    def test_is_the_linear_of_the_dequantized_weight(self, pre_scale: bool, dtype: torch.dtype) -> None:
        w = quantized(pre_scale=pre_scale, dtype=dtype)
        x, bias = random_x(2, 5, K, dtype=dtype), random_x(N, dtype=dtype)
        scaled = x * w.act_pre_scale if pre_scale else x
        # The weight may be rounded to x's dtype on the way, and the output is.
        size = F.linear(scaled.abs().float(), w.dequantize().abs().float(), bias.abs().float())
        tolerance = 2 * torch.finfo(dtype).eps * size
        for b, y in ((bias.float(), F.linear(x, w, bias)), (None, F.linear(x, weight=w, bias=None))):
            assert y.dtype == dtype
            assert ((y.float() - F.linear(scaled.float(), w.dequantize().float(), b)).abs() <= tolerance).all()

    @pytest.mark.parametrize("pre_scale", [False, True], ids=["", "act_pre_scale"])
    def test_matmul_with_the_transpose(self, pre_scale: bool) -> None:
        w = quantized(pre_scale=pre_scale)
        x, bias = random_x(6, K), random_x(N)
        expected = F.linear(x, w)
        assert_same(x @ w.t(), expected)
        assert_same(torch.mm(x, w.T), expected)
        assert_same(x.view(2, 3, K) @ w.mT, expected.view(2, 3, N))
        torch.testing.assert_close(torch.addmm(bias, x, w.t()), expected + bias)
        torch.testing.assert_close(torch.addmm(expected, x, w.t()), 2 * expected)

    def test_x_of_another_dtype_keeps_it(self) -> None:
        w = quantized(pre_scale=True)
        y = F.linear(random_x(3, K, dtype=torch.bfloat16), w)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), F.linear(random_x(3, K), w), rtol=0.03, atol=0.3)

    def test_autocast_is_followed(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(random_x(3, K), quantized()).dtype == torch.bfloat16

    def test_gradients_reach_x(self) -> None:
        w = quantized(pre_scale=True)
        x, x_ref = random_x(4, K).requires_grad_(), random_x(4, K).requires_grad_()
        F.linear(x, w).square().sum().backward()
        F.linear(x_ref * w.act_pre_scale, w.dequantize()).square().sum().backward()
        torch.testing.assert_close(x.grad, x_ref.grad)

    def test_embedding(self) -> None:
        table = nn.Embedding(50, 100)
        table.weight = nn.Parameter(MBQInt3Tensor.from_hp(table.weight.detach(), 32), requires_grad=False)
        index = torch.tensor([[0, 49, 17], [31, 32, 0]])
        assert_same(table(index), table.weight.dequantize()[index])
        for outside in (50, -1):
            with pytest.raises(IndexError, match="out of range"):
                table(torch.tensor([outside]))


class TestCompile:
    def test_one_op_and_no_recompilation(self) -> None:
        graphs = []

        def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
            graphs.append(graph)
            return graph

        torch._dynamo.reset()
        layer = linear(quantized())
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
        with torch.no_grad():
            for m in (2, 5, 64, 100):
                assert_same(compiled(random_x(m, K)), layer(random_x(m, K)))
        assert len(graphs) == 1

    def test_compiled_linear_is_one_op(self) -> None:
        from torch._dynamo.backends.common import aot_autograd

        code = []

        def record(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
            code.append(graph.code)
            return graph

        torch._dynamo.reset()
        layer = linear(quantized())
        with torch.no_grad():
            y = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=record))(random_x(3, K))
        assert_same(y, layer(random_x(3, K)))
        (graph,) = code
        FileCheck().check_count("torch.ops.mbq_ao.int3_linear.default", 1, exactly=True).check_not("aten").run(graph)

    def test_inductor_compiles_training_of_what_comes_before(self) -> None:
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(8, K), linear(quantized(pre_scale=True)))
        x = random_x(3, 8)
        torch.compile(model, fullgraph=True)(x).sum().backward()
        grad, model[0].weight.grad = model[0].weight.grad, None
        model(x).sum().backward()
        torch.testing.assert_close(grad, model[0].weight.grad)

    def test_export_keeps_one_op(self) -> None:
        layer, x = linear(quantized()).eval(), random_x(3, K)
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("m", min=2)},))
        assert_same(program.module()(random_x(7, K)), layer(random_x(7, K)))
        ops = [node.target for node in program.run_decompositions().graph.nodes if node.op == "call_function"]
        assert ops == [torch.ops.mbq_ao.int3_linear.default]

    def test_compiled_embedding(self) -> None:
        table = nn.Embedding(50, 100)
        table.weight = nn.Parameter(MBQInt3Tensor.from_hp(table.weight.detach(), 32), requires_grad=False)
        index = torch.tensor([[0, 49, 17], [31, 32, 0]])
        assert_same(torch.compile(table, fullgraph=True, backend="aot_eager")(index), table(index))

    def test_caching_key_tells_weights_apart_by_all_but_values(self) -> None:
        key = quantized()._stable_hash_for_caching()
        assert key == quantized()._stable_hash_for_caching()
        others = [quantized(n=64), quantized(group_size=32), quantized(pre_scale=True), quantized().t()]
        others.append(quantized().half())
        assert len({key, *(w._stable_hash_for_caching() for w in others)}) == 6


class TestConversions:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_to_dtype_converts_scales(self, dtype: torch.dtype) -> None:
        w = quantized(pre_scale=True)
        for out in (w.to(dtype), linear(w).to(dtype).weight):
            assert isinstance(out, MBQInt3Tensor)
            assert out.dtype == out.scale.dtype == out.act_pre_scale.dtype == dtype
            assert (out.qdata.dtype, out.zero_point.dtype) == (torch.int16, torch.uint8)
            assert_same(out.scale, w.scale.to(dtype))

    def test_module_in_bf16_computes_in_bf16(self) -> None:
        layer = linear(quantized(pre_scale=True))
        x = random_x(3, K)
        expected = layer(x)
        y = layer.to(torch.bfloat16)(x.bfloat16())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.5)

    def test_to_device(self) -> None:
        w = quantized(pre_scale=True)
        meta = w.to("meta")
        assert meta.device.type == meta.qdata.device.type == meta.act_pre_scale.device.type == "meta"
        assert w.to("cpu") is w
        assert F.linear(torch.empty(2, K, device="meta"), meta).shape == (2, N)

    def test_copies(self) -> None:
        w = quantized(pre_scale=True)
        assert_same_data(w.detach(), w)
        assert w.detach().qdata.data_ptr() == w.qdata.data_ptr()
        assert_same_data(torch.ops.aten.alias.default(w), w)
        for other in (w.clone(), copy.deepcopy(w), pickle.loads(pickle.dumps(w)), w.to(w.dtype, copy=True)):
            assert_same_data(other, w)
            assert other.qdata.data_ptr() != w.qdata.data_ptr()
        assert_same_data(w.contiguous(), w)
        sliced = w[:, 128:256]
        assert_same_data(sliced.contiguous(), sliced.clone())

    def test_copy_in_both_directions(self) -> None:
        w = quantized(pre_scale=True)
        plain = torch.empty(N, K).copy_(w)
        assert_same(plain, w.dequantize())
        target = torch.empty_like(w)
        assert target.copy_(w) is target
        assert_same_data(target, w)

    def test_likes(self) -> None:
        w = quantized(pre_scale=True)
        assert torch.empty_like(w).quantized_nbytes() == w.quantized_nbytes()
        assert_same(torch.zeros_like(w).dequantize(), torch.zeros(N, K))
        assert torch.empty_like(w, dtype=torch.bfloat16).scale.dtype == torch.bfloat16
        assert torch.empty_like(w, device="meta").qdata.device.type == "meta"
        assert isinstance(linear(w).to_empty(device="cpu").weight, MBQInt3Tensor)

    def test_parameter_is_the_tensor(self) -> None:
        layer = linear(quantized())
        assert isinstance(layer.weight, MBQInt3Tensor)
        assert isinstance(layer.weight, nn.Parameter)
        assert not layer.weight.requires_grad

    def test_shards_are_copied_into_a_whole(self) -> None:
        w = quantized()
        whole = torch.empty_like(w)
        for start in (0, 32, 64):
            whole.narrow(0, start, 32).copy_(w.narrow(0, start, 32))
        assert_same_data(whole, w)
        for start in (0, 128, 256):
            whole.narrow(1, start, 128).copy_(quantized().narrow(1, start, 128))
        assert_same_data(whole, w)

    def test_a_parameter_that_asks_for_gradients_gets_none(self) -> None:
        layer = linear(quantized())
        layer.weight.requires_grad_()
        layer(random_x(2, K)).sum().backward()
        assert layer.weight.grad is None
        assert layer.bias.grad is not None


class TestStateDict:
    def test_save_and_load_with_weights_only(self) -> None:
        layer = linear(quantized(pre_scale=True))
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        for assign in (False, True):
            file.seek(0)
            state = torch.load(file, weights_only=True)
            target = linear(MBQInt3Tensor.from_hp(random_weight() + 1, G, act_pre_scale=torch.ones(K)))
            target.load_state_dict(state, assign=assign)
            assert_same_data(target.weight.data, layer.weight.data)

    def test_into_a_meta_model(self) -> None:
        layer = linear(quantized())
        with torch.device("meta"):
            target = nn.Linear(K, N)
        target.load_state_dict(layer.state_dict(), assign=True)
        assert_same(target(random_x(2, K)), layer(random_x(2, K)))

    def test_into_a_plain_model_dequantizes(self) -> None:
        layer, target = linear(quantized()), nn.Linear(K, N)
        target.load_state_dict(layer.state_dict())
        assert_same(target.weight.data, layer.weight.dequantize())


SLICES = [(0, 0, 32), (0, 32, N), (0, 64, 96), (0, 0, N), (1, 0, 128), (1, 128, 384), (1, 256, K), (0, 32, 32)]


class TestShapes:
    @pytest.mark.parametrize("pre_scale", [False, True], ids=["", "act_pre_scale"])
    @pytest.mark.parametrize("group_size", [32, 64, 128, None])
    @pytest.mark.parametrize(("dim", "start", "end"), SLICES)
    def test_slice(self, dim: int, start: int, end: int, group_size: int | None, pre_scale: bool) -> None:
        w = quantized(group_size=group_size, pre_scale=pre_scale)
        where = (slice(None),) * dim + (slice(start, end),)
        part = w[where]
        assert isinstance(part, MBQInt3Tensor)
        assert_same(part.dequantize(), w.dequantize()[where])
        assert_same(part.t().dequantize(), w.t().dequantize()[where[::-1] if dim == 1 else (slice(None), where[0])])
        if pre_scale and dim == 1:
            assert_same(part.act_pre_scale, w.act_pre_scale[start:end])
        assert part.qdata.untyped_storage().data_ptr() == w.qdata.untyped_storage().data_ptr()  # a view

    def test_slice_of_a_transpose(self) -> None:
        w = quantized()
        assert_same(w.t()[128:256].dequantize(), w.dequantize().t()[128:256])
        assert_same(w.t()[:, 32:].dequantize(), w.dequantize().t()[:, 32:])

    def test_ends_that_are_not_aligned_are_fine_at_the_end(self) -> None:
        w = quantized(70, 300, 32)
        assert_same(w[64:].dequantize(), w.dequantize()[64:])
        assert_same(w[:, 256:].dequantize(), w.dequantize()[:, 256:])
        assert_same(w[:, -44:].dequantize(), w.dequantize()[:, 256:])

    def test_empty_slices(self) -> None:
        for w in (quantized(), quantized(group_size=None), quantized(40, 100, 128)):
            assert w[:0].dequantize().shape == (0, w.shape[1])
            assert w[:, :0].dequantize().shape == (w.shape[0], 0)
            assert_same_data(w[:, :], w)

    def test_narrow_split_chunk(self) -> None:
        w, plain = quantized(), quantized().dequantize()
        assert_same(w.narrow(0, 32, 64).dequantize(), plain.narrow(0, 32, 64))
        for parts, expected in [
            (w.split(32), plain.split(32)),
            (w.split(128, dim=1), plain.split(128, dim=1)),
            (w.split([32, 64]), plain.split([32, 64])),
            (w.split([128, 256], dim=-1), plain.split([128, 256], dim=-1)),
            (w.chunk(3), plain.chunk(3)),
            (w.chunk(3, dim=1), plain.chunk(3, dim=1)),
        ]:
            assert len(parts) == len(expected)
            for part, e in zip(parts, expected, strict=True):
                assert_same(part.dequantize(), e)

    @pytest.mark.parametrize("dim", [0, 1, -1])
    @pytest.mark.parametrize("pre_scale", [False, True], ids=["", "act_pre_scale"])
    def test_cat_undoes_split(self, pre_scale: bool, dim: int) -> None:
        w = quantized(pre_scale=pre_scale)
        assert_same_data(torch.cat(w.chunk(3, dim=dim), dim=dim), w)

    def test_cat_with_a_ragged_last_part(self) -> None:
        w = quantized(70, 300, 32)
        assert_same_data(torch.cat([w[:64], w[64:]]), w)
        assert_same_data(torch.cat([w[:, :256], w[:, 256:]], dim=1), w)

    def test_view_of_the_same_shape(self) -> None:
        w = quantized()
        assert_same_data(w.view(N, K), w)
        assert_same_data(w.view(-1, K), w)
        assert_same_data(w.reshape(N, K), w)

    def test_transposing_twice(self) -> None:
        w = quantized(pre_scale=True)
        assert_same_data(w.t().t(), w)
        assert w.t().shape == (K, N)
        assert w.t().stride() == (1, K)
        assert_same(w.t().dequantize(), w.dequantize().t())

    def test_column_and_row_parallel_shards_compute_the_whole(self) -> None:
        w, x = quantized(pre_scale=True), random_x(2, K)
        expected = F.linear(x, w)
        columns = torch.cat([F.linear(x, part) for part in w.chunk(3)], dim=1)
        rows = sum(F.linear(xs, part) for xs, part in zip(x.chunk(3, dim=1), w.chunk(3, dim=1), strict=True))
        torch.testing.assert_close(columns, expected)
        torch.testing.assert_close(rows, expected)


class TestTexts(expecttest.TestCase):
    """What is printed and what is said when something cannot be done."""

    def says(self, error: type[Exception], call) -> str:
        with self.assertRaises(error) as caught:
            call()
        return textwrap.fill(str(caught.exception), 100)

    def test_repr(self) -> None:
        self.assertExpectedInline(
            repr(quantized()), """MBQInt3Tensor(shape=(96, 384), group_size=64, dtype=torch.float32, device=cpu)"""
        )
        self.assertExpectedInline(
            textwrap.fill(repr(quantized(group_size=None, pre_scale=True, dtype=torch.bfloat16).t()), 100),
            """\
MBQInt3Tensor(shape=(384, 96), group_size=384, dtype=torch.bfloat16, act_pre_scale, transposed,
device=cpu)""",
        )

    def test_group_size(self) -> None:
        self.assertExpectedInline(
            self.says(ValueError, lambda: quantized(group_size=48)),
            """group_size must be 32, 64, 128 or None (one scale a row), got 48""",
        )

    def test_dtype(self) -> None:
        self.assertExpectedInline(
            self.says(ValueError, lambda: quantized(dtype=torch.float64)),
            """a weight must be (N, K) in bfloat16, float16 or float32, got torch.float64 of shape (96, 384)""",
        )
        self.assertExpectedInline(
            self.says(ValueError, lambda: quantized().double()),
            """an MBQInt3Tensor can be bfloat16, float16 or float32, got torch.float64; call dequantize() first""",
        )

    def test_dimensions(self) -> None:
        self.assertExpectedInline(
            self.says(ValueError, lambda: MBQInt3Tensor.from_hp(torch.zeros(3))),
            """a weight must be (N, K) in bfloat16, float16 or float32, got torch.float32 of shape (3,)""",
        )
        self.assertExpectedInline(
            self.says(ValueError, lambda: MBQInt3Tensor.from_hp(torch.zeros(0, 3))),
            """a weight must have rows and columns, got shape (0, 3)""",
        )

    def test_act_pre_scale(self) -> None:
        def call() -> None:
            MBQInt3Tensor.from_hp(random_weight(), act_pre_scale=torch.ones(N))

        self.assertExpectedInline(
            self.says(ValueError, call), """act_pre_scale must be one factor an input channel, (384,), got (96,)"""
        )

    def test_inner_tensors_that_do_not_fit(self) -> None:
        w = quantized()

        def call() -> None:
            MBQInt3Tensor(w.qdata, w.scale[:, :3], w.zero_point, w.block_size, w.shape)

        self.assertExpectedInline(
            self.says(ValueError, call),
            """\
scale and uint8 zero_point of a 96 x 384 weight, group_size 64, must be (96, 6), got (96, 3) and
torch.uint8 (96, 6)""",
        )

    def test_unaligned_slices(self) -> None:
        w = quantized()
        self.assertExpectedInline(
            self.says(ValueError, lambda: w[16:]),
            """\
a slice of an MBQInt3Tensor must begin and end at a multiple of 32 rows or at the end (tiles are 32
x 128, groups 64), got 16:96 of 96; call dequantize() and slice that""",
        )
        self.assertExpectedInline(
            self.says(ValueError, lambda: w[:, :64]),
            """\
a slice of an MBQInt3Tensor must begin and end at a multiple of 128 columns or at the end (tiles are
32 x 128, groups 64), got 0:64 of 384; call dequantize() and slice that""",
        )
        self.assertExpectedInline(
            self.says(ValueError, lambda: w[::2]),
            """a slice of an MBQInt3Tensor must have step 1, got 2; call dequantize() and slice that""",
        )

    def test_copy_of_a_plain_tensor(self) -> None:
        self.assertExpectedInline(
            self.says(ValueError, lambda: quantized().copy_(random_weight())),
            """\
cannot copy a plain torch.float32 tensor into MBQInt3Tensor(shape=(96, 384), group_size=64,
dtype=torch.float32, device=cpu); quantize it first with MBQInt3Tensor.from_hp""",
        )

    def test_copy_of_another_kind(self) -> None:
        self.assertExpectedInline(
            self.says(ValueError, lambda: quantized().copy_(quantized(group_size=32))),
            """\
cannot copy MBQInt3Tensor(shape=(96, 384), group_size=32, dtype=torch.float32, device=cpu) into
MBQInt3Tensor(shape=(96, 384), group_size=64, dtype=torch.float32, device=cpu): shape, group size
and act_pre_scale must agree""",
        )

    def test_cat(self) -> None:
        w = quantized(40)
        self.assertExpectedInline(
            self.says(ValueError, lambda: torch.cat([w, w])),
            """\
concatenating MBQInt3Tensors along dimension 0 needs one group size and dtype, equal other
dimensions, and every part but the last a multiple of 32, got shape=(40, 384), group_size=64,
dtype=torch.float32, shape=(40, 384), group_size=64, dtype=torch.float32""",
        )
        pair = [quantized(), quantized(pre_scale=True)]
        self.assertExpectedInline(
            self.says(ValueError, lambda: torch.cat(pair)),
            """cannot concatenate MBQInt3Tensors with and without act_pre_scale""",
        )

    def test_view(self) -> None:
        self.assertExpectedInline(
            self.says(NotImplementedError, lambda: quantized().view(-1)),
            """aten.view.default: an MBQInt3Tensor (96, 384) has no view of shape (36864,)""",
        )

    def test_wrong_side_of_a_matmul(self) -> None:
        self.assertExpectedInline(
            self.says(NotImplementedError, lambda: quantized() @ random_x(K, 2)),
            """aten.mm.default: only x @ w.t() is supported for an MBQInt3Tensor w; call dequantize() first""",
        )

    def test_shared_memory(self) -> None:
        self.assertExpectedInline(
            self.says(NotImplementedError, lambda: quantized().share_memory_()),
            """share_memory_ is not supported by MBQInt3Tensor; load the checkpoint in each process instead""",
        )
        assert not quantized().is_shared()

    def test_any_other_op_is_named(self) -> None:
        self.assertExpectedInline(
            self.says(NotImplementedError, lambda: quantized() + 1),
            """aten.add.Tensor is not implemented for MBQInt3Tensor; call dequantize() first""",
        )
        self.assertIn("aten.index.Tensor", self.says(NotImplementedError, lambda: quantized()[torch.tensor([1])]))
