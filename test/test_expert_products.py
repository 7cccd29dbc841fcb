"""Products of experts' packed weights: bmm, matmul and grouped_mm, compiled or not, are the linears of each expert."""

import pytest
import torch
import torch.nn.functional as F
from packed_weights import DTYPES, E, K, Kind, N, assert_same, each_kind, experts, random_x
from torch import Tensor

from mbq_ao.packed_weight import PackedWeight

OFFS = [[2, 5, 9], [0, 9, 9], [0, 0, 0], [3, 3, 7], [0, 0, 9]]  # of 9 rows


def offsets(ends: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(ends, dtype=dtype)


def row_by_row(x: Tensor, w: PackedWeight, ends: list[int]) -> Tensor:
    """What grouped_mm is to be, expert by expert; zeros where none has the row."""
    parts = [F.linear(x[start:end], w[e]) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - ends[-1], w.shape[1])])


def grouped_mms() -> list:
    from transformers.integrations import moe  # noqa: F401  (registers its op)

    return [F.grouped_mm, torch._grouped_mm, torch.ops.transformers.grouped_mm_fallback]


@each_kind
class TestValues:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("pre_scale", [False, True], ids=["", "act_pre_scale"])
    @pytest.mark.parametrize("ends", OFFS, ids=str)
    def test_grouped(self, ends: list[int], pre_scale: bool, dtype: torch.dtype, kind: Kind) -> None:
        w, x = experts(kind, pre_scale=pre_scale, dtype=dtype), random_x(9, K, dtype=dtype)
        expected = row_by_row(x, w, ends)
        for grouped_mm in grouped_mms():
            assert_same(grouped_mm(x, w.mT, offs=offsets(ends)), expected)
        assert_same(torch.ops.aten._grouped_mm(x, w.mT, offsets(ends)), expected)
        # A parameter (E, K, N) as gpt-oss has it.
        assert_same(F.grouped_mm(x, torch.nn.Parameter(w.mT, requires_grad=False), offs=offsets(ends)), expected)

    @pytest.mark.parametrize("pre_scale", [False, True], ids=["", "act_pre_scale"])
    def test_batched(self, pre_scale: bool, kind: Kind) -> None:
        w, x = experts(kind, pre_scale=pre_scale), random_x(E, 2, K)
        expected = torch.stack([F.linear(rows, one) for rows, one in zip(x, w, strict=True)])
        for y in (torch.bmm(x, w.mT), x @ w.mT, torch.matmul(x, w.mT), x.bmm(w.mT), F.grouped_mm(x, w.mT)):
            assert_same(y, expected)
        for y in (torch.bmm(w, x.mT), w @ x.mT, torch.ops.aten.bmm(w, x.mT)):
            assert_same(y, expected.mT)
        assert_same(x[0] @ w[0].mT, expected[0])
        assert_same(w[0] @ x[0].mT, expected[0].mT)

    def test_batched_of_gathered_experts(self, kind: Kind) -> None:
        """A weight for each token and expert chosen by it, as transformers' batched_mm has it."""
        w, chosen = experts(kind, pre_scale=True), torch.tensor([2, 0, 0, 1, 2])
        x = random_x(5, K)
        y = torch.bmm(w[chosen], x.unsqueeze(-1)).squeeze(-1)
        assert_same(y, torch.stack([F.linear(row, w[e]) for row, e in zip(x, chosen, strict=True)]))

    def test_sizes_that_tiles_do_not_divide(self, kind: Kind) -> None:
        w, x = experts(kind, 5, 33, 100, 32), random_x(7, 100)
        ends = [1, 1, 4, 6, 7]
        assert_same(F.grouped_mm(x, w.mT, offs=offsets(ends, torch.int64)), row_by_row(x, w, ends))

    def test_no_experts_and_no_rows(self, kind: Kind) -> None:
        w = experts(kind)
        assert F.grouped_mm(random_x(0, K), w.mT, offs=offsets([0] * E)).shape == (0, N)
        assert torch.bmm(random_x(E, 0, K), w.mT).shape == (E, 0, N)
        assert torch.bmm(random_x(0, 2, K), w[:0].mT).shape == (0, 2, N)

    def test_autocast_is_followed_where_torch_does(self, kind: Kind) -> None:
        w, x = experts(kind), random_x(E, 2, K)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.bmm(x, w.mT).dtype == torch.bfloat16
            assert (x[0] @ w[0].mT).dtype == torch.bfloat16

    def test_gradients_reach_x(self, kind: Kind) -> None:
        w, ends = experts(kind, pre_scale=True), [3, 3, 7]
        grad = random_x(9, N)
        plain = w.dequantize() * w.act_pre_scale[:, None]
        expected = torch.cat([grad[:3] @ plain[0], grad[3:7] @ plain[2], torch.zeros(2, K)])
        for grouped_mm in grouped_mms():
            x = random_x(9, K).requires_grad_()
            grouped_mm(x, w.mT, offs=offsets(ends)).backward(grad)
            torch.testing.assert_close(x.grad, expected)
        for product in (torch.bmm, torch.matmul):
            x = random_x(E, 3, K).requires_grad_()
            product(x, w.mT).backward(grad.view(E, 3, N))
            torch.testing.assert_close(x.grad, grad.view(E, 3, N) @ plain)
        x = random_x(E, 3, K).requires_grad_()
        torch.bmm(w, x.mT).mT.backward(grad.view(E, 3, N))
        torch.testing.assert_close(x.grad, grad.view(E, 3, N) @ plain)

    def test_offs_that_do_not_fit(self, kind: Kind) -> None:
        w, x = experts(kind), random_x(9, K)
        for ends in ([2, 1, 9], [2, 5, 10], [-1, 5, 9]):
            with pytest.raises(ValueError, match=r"offs must not decrease .* the 9 rows of x at most"):
                F.grouped_mm(x, w.mT, offs=offsets(ends))
        with pytest.raises(ValueError, match=r"offs must be int32 or int64 \(3,\), one for each expert"):
            F.grouped_mm(x, w.mT, offs=offsets([2, 9]))
        with pytest.raises(ValueError, match="last dimension of x must be 384"):
            F.grouped_mm(random_x(9, 128), w.mT, offs=offsets([2, 5, 9]))
        with pytest.raises(NotImplementedError, match="bias must be None and the output in x's dtype"):
            F.grouped_mm(x, w.mT, offs=offsets([2, 5, 9]), out_dtype=torch.bfloat16)


@each_kind
class TestCompile:
    def test_one_graph_for_all_routings(self, kind: Kind) -> None:
        graphs = []

        def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
            graphs.append(graph)
            return graph

        w = experts(kind, pre_scale=True)
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x, offs: F.grouped_mm(x, w.mT, offs=offs), fullgraph=True, dynamic=True, backend=backend
        )
        for rows in (9, 12, 100):
            for ends in ([2, 5, 9], [0, 0, 8]):
                x = random_x(rows, K)
                assert_same(compiled(x, offsets(ends)), row_by_row(x, w, ends))
        assert len(graphs) == 1

    def test_inductor_compiles_all_products_and_their_backward(self, kind: Kind) -> None:
        w, offs = experts(kind, pre_scale=True), offsets([2, 5, 6])

        def products(x: Tensor, w: Tensor, chosen: Tensor) -> Tensor:
            rows = x.flatten(0, 1)
            gathered = torch.bmm(w[chosen], rows[:4].unsqueeze(-1)).squeeze(-1)
            grouped = [grouped_mm(rows, w.mT, offs=offs) for grouped_mm in grouped_mms()]
            return torch.cat([torch.bmm(x, w.mT).flatten(0, 1), gathered, x[0] @ w[1].mT, *grouped])

        torch._dynamo.reset()
        grouped_mms()
        x, chosen = random_x(E, 2, K).requires_grad_(), torch.tensor([2, 0, 0, 1])
        y = torch.compile(products, fullgraph=True)(x, w, chosen)
        assert_same(y, products(x, w, chosen))
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        (expected,) = torch.autograd.grad(products(x, w, chosen).square().sum(), x)
        torch.testing.assert_close(grad, expected)

    @pytest.mark.parametrize("offs", [None, offsets([2, 2, 6])], ids=str)
    @pytest.mark.parametrize("pre_scale", [False, True], ids=["", "act_pre_scale"])
    def test_opcheck(self, pre_scale: bool, offs: Tensor | None, kind: Kind) -> None:
        w = experts(kind, 3, 40, 96, 32, pre_scale)
        name = "int3" if "zero_point" in kind.tensor_data_names else "w4a8"
        data = [*(getattr(w, name) for name in kind.tensor_data_names), w.act_pre_scale]
        x = random_x(6, 96).requires_grad_()
        ops = torch.ops.mbq_ao
        torch.library.opcheck(getattr(ops, f"{name}_grouped_mm").default, (x, *data, 32, offs))
        backward = getattr(ops, f"{name}_grouped_mm_backward").default
        torch.library.opcheck(backward, (random_x(6, 40), *data, 96, 32, offs))
