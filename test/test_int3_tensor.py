"""MBQInt3Tensor: what quantizing gives, and the values of a linear, compiled or not."""

import pytest
import torch
import torch.nn.functional as F
from int3_tensors import DTYPES, K, N, assert_same, linear, quantized, random_weight, random_x
from torch import Tensor, nn
from torch.testing import FileCheck

from mbq_ao import MBQInt3Tensor
from mbq_ao.kernels.layout import packed_shape


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
