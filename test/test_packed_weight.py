"""MBQInt3Tensor and MBQW4A8Tensor: what quantizing gives, and the values of a linear, compiled or not."""

import pytest
import torch
import torch.nn.functional as F
from packed_weights import (
    DTYPES,
    LINEAR_OPS,
    G,
    K,
    Kind,
    N,
    assert_same,
    each_kind,
    expected_linear,
    linear,
    quantized,
    random_weight,
    random_x,
)
from torch import Tensor, nn
from torch.testing import FileCheck

from mbq_ao import MBQInt3Tensor, MBQW4A8Tensor
from mbq_ao.kernels import int3_layout, int4_layout


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

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("group_size", [32, 64, 128, None])
    @pytest.mark.parametrize(("n", "k"), [(96, 384), (40, 576), (33, 100), (1, 1)])
    def test_w4a8_weights_are_within_half_a_step(
        self, n: int, k: int, group_size: int | None, dtype: torch.dtype
    ) -> None:
        w = random_weight(n, k, dtype)
        q = MBQW4A8Tensor.from_hp(w, group_size)
        assert (q.shape, q.dtype, q.device) == (w.shape, w.dtype, w.device)
        assert q.group_size == (group_size or k)
        step = q.scale.float().repeat_interleave(q.group_size, 1)[:, :k]
        # The half is in fp32; what comes back is rounded once to dtype.
        assert ((q.dequantize().float() - w.float()).abs() <= 0.5 * step + torch.finfo(dtype).eps * w.abs()).all()

    def test_seven_eighths_and_more_of_the_memory_is_saved(self) -> None:
        q = quantized(MBQInt3Tensor, 512, 1024, 128, dtype=torch.bfloat16)
        assert q.quantized_nbytes() * 8 == 512 * 1024 * 3 + 512 * 8 * (16 + 8)
        assert tuple(q.qdata.shape) == int3_layout.packed_shape(512, 1024)

    def test_four_bits_a_weight_and_one_scale_a_row(self) -> None:
        q = quantized(MBQW4A8Tensor, 512, 1024, None, dtype=torch.bfloat16)
        assert q.quantized_nbytes() * 8 == 512 * 1024 * 4 + 512 * 16
        assert tuple(q.qdata.shape) == int4_layout.packed_shape(512, 1024)

    @each_kind
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_values_that_are_not_finite(self, bad: float, kind: Kind) -> None:
        w = random_weight()
        w[3, 5] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            kind.from_hp(w)
        with pytest.raises(ValueError, match="act_pre_scale holds values"):
            kind.from_hp(random_weight(), act_pre_scale=torch.full((K,), bad))
        grid = kind._choose_grid(w, G, w.dtype)
        with pytest.raises(ValueError, match="NaN or infinite"):
            kind._from_grid(w, grid, G)

    @each_kind
    def test_gradients_do_not_hang_on_the_quantized_weight(self, kind: Kind) -> None:
        w = random_weight().requires_grad_()
        assert not kind.from_hp(w).scale.requires_grad


class TestLinear:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("pre_scale", [False, True], ids=["", "act_pre_scale"])
    def test_int3_is_the_linear_of_the_dequantized_weight(self, pre_scale: bool, dtype: torch.dtype) -> None:
        w = quantized(MBQInt3Tensor, pre_scale=pre_scale, dtype=dtype)
        x, bias = random_x(2, 5, K, dtype=dtype), random_x(N, dtype=dtype)
        scaled = x * w.act_pre_scale if pre_scale else x
        # The weight may be rounded to x's dtype on the way, and the output is.
        size = F.linear(scaled.abs().float(), w.dequantize().abs().float(), bias.abs().float())
        tolerance = 2 * torch.finfo(dtype).eps * size
        for b, y in ((bias, F.linear(x, w, bias)), (None, F.linear(x, weight=w, bias=None))):
            assert y.dtype == dtype
            assert ((y.float() - expected_linear(x, w, b)).abs() <= tolerance).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("pre_scale", [False, True], ids=["", "act_pre_scale"])
    @pytest.mark.parametrize("group_size", [32, None])
    def test_w4a8_is_the_reference(self, group_size: int | None, pre_scale: bool, dtype: torch.dtype) -> None:
        w = quantized(MBQW4A8Tensor, group_size=group_size, pre_scale=pre_scale, dtype=dtype)
        x, bias = random_x(2, 5, K, dtype=dtype), random_x(N, dtype=dtype)
        for b, y in ((bias, F.linear(x, w, bias)), (None, F.linear(x, weight=w, bias=None))):
            expected = expected_linear(x, w, b).to(dtype)
            if group_size is None and dtype != torch.float32:  # sums of integers are exact: nothing could differ
                assert_same(y, expected)
            else:
                torch.testing.assert_close(y, expected, rtol=max(1e-5, 2 * torch.finfo(dtype).eps), atol=1e-4)

    @pytest.mark.parametrize("group_size", [32, None])
    def test_w4a8_is_near_the_linear_of_the_dequantized_weight(self, group_size: int | None) -> None:
        w, x = quantized(MBQW4A8Tensor, group_size=group_size, pre_scale=True), random_x(7, K)
        scaled = x * w.act_pre_scale
        plain = w.dequantize()
        half_steps = scaled.abs().amax(1, keepdim=True) / 254 * plain.abs().sum(1)
        assert ((F.linear(x, w) - F.linear(scaled, plain)).abs() <= 1.001 * half_steps).all()

    @each_kind
    @pytest.mark.parametrize("pre_scale", [False, True], ids=["", "act_pre_scale"])
    def test_matmul_with_the_transpose(self, pre_scale: bool, kind: Kind) -> None:
        w = quantized(kind, pre_scale=pre_scale)
        x, bias = random_x(6, K), random_x(N)
        expected = F.linear(x, w)
        assert_same(x @ w.t(), expected)
        assert_same(torch.mm(x, w.T), expected)
        assert_same(x.view(2, 3, K) @ w.mT, expected.view(2, 3, N))
        torch.testing.assert_close(torch.addmm(bias, x, w.t()), expected + bias)
        torch.testing.assert_close(torch.addmm(expected, x, w.t()), 2 * expected)

    @each_kind
    def test_x_of_another_dtype_keeps_it(self, kind: Kind) -> None:
        w = quantized(kind, pre_scale=True)
        y = F.linear(random_x(3, K, dtype=torch.bfloat16), w)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), F.linear(random_x(3, K), w), rtol=0.03, atol=0.3)

    @each_kind
    def test_autocast_is_followed(self, kind: Kind) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(random_x(3, K), quantized(kind)).dtype == torch.bfloat16

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_autocast_does_not_reach_the_sums_of_integers(self, dtype: torch.dtype) -> None:
        w, x = MBQW4A8Tensor.from_hp(torch.ones(16, 128)), torch.ones(2, 128)
        with torch.autocast("cpu", dtype):
            assert_same(F.linear(x, w), torch.full((2, 16), 128.0, dtype=dtype))  # 127 * 7 * 128 is beyond float16

    @each_kind
    def test_x_of_another_width_is_refused_also_within_a_tile(self, kind: Kind) -> None:
        w = quantized(kind, 16, 100, None)
        for x in (random_x(2, 70), random_x(2, 128)):
            with pytest.raises(ValueError, match=f"dimension of x must be 100, .* got x of shape .2, {x.shape[1]}"):
                F.linear(x, w)
            with pytest.raises(ValueError, match="the last dimension of x must be 100"):
                x @ w.t()

    @each_kind
    @pytest.mark.parametrize("group_size", [32, None])
    def test_gradients_reach_x(self, group_size: int | None, kind: Kind) -> None:
        w = quantized(kind, group_size=group_size, pre_scale=True)
        x, grad = random_x(4, K).requires_grad_(), random_x(4, N)
        F.linear(x, w).backward(grad)
        # W4A8: as if the activation were not rounded.
        torch.testing.assert_close(x.grad, grad @ w.dequantize() * w.act_pre_scale)

    @each_kind
    def test_embedding(self, kind: Kind) -> None:
        table = nn.Embedding(50, 100)
        table.weight = nn.Parameter(kind.from_hp(table.weight.detach(), 32), requires_grad=False)
        for index in (torch.tensor([[0, 49, 17], [31, 32, 0]]), torch.tensor(3), torch.zeros(0, 2, dtype=torch.long)):
            assert_same(table(index), table.weight.dequantize()[index])
        for outside in (50, -1):
            with pytest.raises(IndexError, match="out of range"):
                table(torch.tensor([outside]))


@each_kind
class TestCompile:
    def test_one_op_and_no_recompilation(self, kind: Kind) -> None:
        graphs = []

        def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
            graphs.append(graph)
            return graph

        torch._dynamo.reset()
        layer = linear(quantized(kind))
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
        with torch.no_grad():
            for m in (2, 5, 64, 100):
                assert_same(compiled(random_x(m, K)), layer(random_x(m, K)))
        assert len(graphs) == 1

    def test_compiled_linear_is_one_op(self, kind: Kind) -> None:
        from torch._dynamo.backends.common import aot_autograd

        code = []

        def record(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
            code.append(graph.code)
            return graph

        torch._dynamo.reset()
        # The op of W4A8 takes act_pre_scale, too.
        layer = linear(quantized(kind, pre_scale=kind is MBQW4A8Tensor))
        with torch.no_grad():
            y = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=record))(random_x(3, K))
        assert_same(y, layer(random_x(3, K)))
        (graph,) = code
        op = f"torch.ops.{LINEAR_OPS[kind].default}".replace("::", ".")
        FileCheck().check_count(op, 1, exactly=True).check_not("aten").run(graph)

    def test_inductor_compiles_training_of_what_comes_before(self, kind: Kind) -> None:
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(8, K), linear(quantized(kind, pre_scale=True)))
        x = random_x(3, 8)
        torch.compile(model, fullgraph=True)(x).sum().backward()
        grad, model[0].weight.grad = model[0].weight.grad, None
        model(x).sum().backward()
        torch.testing.assert_close(grad, model[0].weight.grad)

    def test_export_keeps_one_op(self, kind: Kind) -> None:
        layer, x = linear(quantized(kind)).eval(), random_x(3, K)
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("m", min=2)},))
        assert_same(program.module()(random_x(7, K)), layer(random_x(7, K)))
        ops = [node.target for node in program.run_decompositions().graph.nodes if node.op == "call_function"]
        assert ops == [LINEAR_OPS[kind].default]

    def test_compiled_embedding(self, kind: Kind) -> None:
        table = nn.Embedding(50, 100)
        table.weight = nn.Parameter(kind.from_hp(table.weight.detach(), 32), requires_grad=False)
        index = torch.tensor([[0, 49, 17], [31, 32, 0]])
        assert_same(torch.compile(table, fullgraph=True, backend="aot_eager")(index), table(index))

    def test_caching_key_tells_weights_apart_by_all_but_values(self, kind: Kind) -> None:
        key = quantized(kind)._stable_hash_for_caching()
        assert key == quantized(kind)._stable_hash_for_caching()
        others = [quantized(kind, n=64), quantized(kind, group_size=32), quantized(kind, pre_scale=True)]
        others += [quantized(kind).t(), quantized(kind).half()]
        others += [quantized(other) for other in LINEAR_OPS if other is not kind]
        assert len({key, *(w._stable_hash_for_caching() for w in others)}) == 7
