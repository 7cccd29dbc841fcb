"""Packed weights of experts, (E, N, K): stacked, indexed, sharded and copied as the (N, K) ones they consist of."""

import copy
import io
import pickle
import textwrap

import expecttest
import pytest
import torch
from packed_weights import (
    DTYPES,
    LINEAR_OPS,
    E,
    G,
    K,
    Kind,
    N,
    assert_same,
    assert_same_data,
    each_kind,
    experts,
    quantized,
    random_experts,
    random_x,
)
from torch import nn

from mbq_ao import MBQInt3Tensor

TENSOR_INDICES = [
    torch.tensor([1]),
    torch.tensor([2, 0, 2], dtype=torch.int32),
    [0, 2],
    torch.tensor([True, False, True]),
]
VIEWS = [0, -1, torch.tensor(1), slice(1, 3), slice(0, 0), slice(None, None, 2)]


def holder(w: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.gate_up_proj = nn.Parameter(w, requires_grad=False)
    return module


@each_kind
class TestQuantizing:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("pre_scale", [False, True], ids=["", "act_pre_scale"])
    @pytest.mark.parametrize(("e", "n", "k", "group_size"), [(3, 96, 384, 64), (1, 40, 100, 32), (130, 33, 70, None)])
    def test_is_each_expert_quantized_and_stacked(
        self, e: int, n: int, k: int, group_size: int | None, pre_scale: bool, dtype: torch.dtype, kind: Kind
    ) -> None:
        plain = random_experts(e, n, k, dtype)
        w = experts(kind, e, n, k, group_size, pre_scale, dtype)
        assert (w.shape, w.dtype, w.block_size) == (plain.shape, dtype, [1, 1, group_size or k])
        assert (w.stride(), w.mT.stride()) == (plain.stride(), plain.mT.stride())
        scales = w.act_pre_scale.unbind() if pre_scale else [None] * e
        each = [kind.from_hp(p, group_size, act_pre_scale=s) for p, s in zip(plain, scales, strict=True)]
        assert_same_data(torch.stack(each), w)
        assert_same(w.dequantize(), torch.stack([one.dequantize() for one in each]))
        assert_same(w.mT.dequantize(), w.dequantize().mT)
        assert w.quantized_nbytes() == sum(one.quantized_nbytes() for one in each)

    def test_from_a_weight_of_other_strides(self, kind: Kind) -> None:
        plain = random_experts()
        assert_same_data(kind.from_hp(plain.mT.contiguous().mT, G), kind.from_hp(plain, G))

    def test_fake_quantize(self, kind: Kind) -> None:
        if kind is MBQInt3Tensor:
            assert_same(kind.fake_quantize(random_experts(), G), experts(kind).dequantize())

    def test_one_expert_that_is_not_finite(self, kind: Kind) -> None:
        plain = random_experts()
        plain[1, 2, 3] = float("nan")
        with pytest.raises(ValueError, match="NaN or infinite"):
            kind.from_hp(plain)


@each_kind
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
class TestExperts:
    @pytest.mark.parametrize("index", VIEWS, ids=str)
    def test_one_and_runs_of_them_are_views(self, index, transposed: bool, kind: Kind) -> None:
        w = experts(kind, pre_scale=True)
        seen = w.mT if transposed else w
        part = seen[index]
        assert type(part) is kind
        assert_same(part.dequantize(), seen.dequantize()[index])
        assert_same(part.act_pre_scale, w.act_pre_scale[index])
        assert part.qdata.untyped_storage().data_ptr() == w.qdata.untyped_storage().data_ptr()

    @pytest.mark.parametrize("index", TENSOR_INDICES, ids=str)
    def test_gathered_by_a_tensor(self, index, transposed: bool, kind: Kind) -> None:
        w = experts(kind, pre_scale=True)
        seen = w.mT if transposed else w
        part = seen[index]
        assert_same(part.dequantize(), seen.dequantize()[index])
        assert_same(part.act_pre_scale, w.act_pre_scale[index])
        if isinstance(index, torch.Tensor) and index.dtype != torch.bool:
            assert_same_data(seen.index_select(0, index), part)
            assert_same_data(seen[index[0]], part[0])

    def test_taken_apart_and_put_together(self, transposed: bool, kind: Kind) -> None:
        w = experts(kind, e=4, pre_scale=True)
        seen = w.mT if transposed else w
        assert [one.shape for one in seen] == [seen.shape[1:]] * 4
        for parts in (seen.chunk(2), seen.split([1, 3]), seen.split(3)):
            assert_same(torch.cat([p.dequantize() for p in parts]), seen.dequantize())
        assert_same_data(torch.stack(w.unbind()), w)
        assert_same_data(torch.cat(w.split(3)), w)
        for e, one in enumerate(seen.unbind()):
            assert_same_data(one, seen.select(0, e))

    def test_swapping_the_last_two_dimensions(self, transposed: bool, kind: Kind) -> None:
        w = experts(kind, pre_scale=True)
        seen = w.mT if transposed else w
        for swapped in (seen.mT, seen.transpose(-2, -1), seen.transpose(1, 2), seen.permute(0, 2, 1)):
            assert_same(swapped.dequantize(), seen.dequantize().mT)
            assert_same_data(swapped.mT, seen)
        assert_same_data(seen.permute(0, 1, 2), seen)
        assert_same_data(seen[1].t(), seen.mT[1])

    @pytest.mark.parametrize("group_size", [32, 128, None])
    def test_shards_of_rows_and_columns(self, group_size: int | None, transposed: bool, kind: Kind) -> None:
        w = experts(kind, group_size=group_size, pre_scale=True)
        seen, rows, columns = (w.mT, 2, 1) if transposed else (w, 1, 2)
        for dim, size in ((rows, 32), (columns, 128), (rows - 3, 32), (columns - 3, 128)):
            for part, plain in zip(seen.split(size, dim), seen.dequantize().split(size, dim), strict=True):
                assert_same(part.dequantize(), plain)
            if not transposed and group_size is not None:
                assert_same_data(torch.cat(seen.split(size, dim), dim), seen)
        assert_same(seen.narrow(columns, 128, 128).act_pre_scale, w.act_pre_scale[:, 128:256])


@each_kind
class TestCopies:
    def test_conversions(self, kind: Kind) -> None:
        w = experts(kind, pre_scale=True)
        half = holder(w).to(torch.bfloat16).gate_up_proj
        assert half.dtype == half.scale.dtype == half.act_pre_scale.dtype == torch.bfloat16
        assert_same(half.scale, w.scale.bfloat16())
        meta = w.to("meta")
        assert (meta.shape, meta[1].shape, meta.qdata.device.type) == (w.shape, (N, K), "meta")
        assert_same(torch.zeros_like(w).dequantize(), torch.zeros(E, N, K))
        for other in (w.clone(), copy.deepcopy(w), pickle.loads(pickle.dumps(w)), w.mT.contiguous().mT):
            assert_same_data(other, w)
        assert_same(torch.empty(E, N, K).copy_(experts(kind)), experts(kind).dequantize())

    @pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
    def test_save_and_load_with_weights_only(self, transposed: bool, kind: Kind) -> None:
        w = experts(kind, pre_scale=True)
        module = holder(w.mT if transposed else w)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        for assign in (False, True):
            file.seek(0)
            target = holder(torch.zeros_like(module.gate_up_proj))
            target.load_state_dict(torch.load(file, weights_only=True), assign=assign)
            assert_same_data(target.gate_up_proj.data, module.gate_up_proj.data)

    def test_experts_are_copied_into_a_whole(self, kind: Kind) -> None:
        w = experts(kind, pre_scale=True)
        whole = torch.empty_like(w)
        for e in range(E):
            whole[e].copy_(w[e])
        assert_same_data(whole, w)

    def test_caching_key(self, kind: Kind) -> None:
        key = experts(kind)._stable_hash_for_caching()
        assert key == experts(kind)._stable_hash_for_caching()
        others = [
            experts(kind, e=2),
            experts(kind, e=1),
            quantized(kind),
            experts(kind).mT,
            experts(kind, pre_scale=True),
        ]
        others += [experts(other) for other in LINEAR_OPS if other is not kind]
        assert len({key, *(w._stable_hash_for_caching() for w in others)}) == 7


class TestTexts(expecttest.TestCase):
    def says(self, call, error: type[Exception] = NotImplementedError) -> str:
        with self.assertRaises(error) as caught:
            call()
        return textwrap.fill(str(caught.exception), 100)

    def test_repr(self) -> None:
        self.assertExpectedInline(
            textwrap.fill(repr(experts(MBQInt3Tensor, pre_scale=True).mT), 100),
            """\
MBQInt3Tensor(shape=(3, 384, 96), group_size=64, dtype=torch.float32, act_pre_scale, transposed,
device=cpu)""",
        )

    def test_shapes_that_do_not_fit(self) -> None:
        w = experts(MBQInt3Tensor)
        self.assertExpectedInline(
            self.says(lambda: MBQInt3Tensor.from_hp(torch.zeros(2, 2, 2, 2)), ValueError),
            """\
a weight must be (N, K) or, with experts, (E, N, K) in bfloat16, float16 or float32, got
torch.float32 of shape (2, 2, 2, 2)""",
        )
        self.assertExpectedInline(
            self.says(lambda: MBQInt3Tensor.from_hp(random_experts(), act_pre_scale=torch.ones(K)), ValueError),
            """act_pre_scale must be one factor an input channel, (3, 384), got (384,)""",
        )
        self.assertExpectedInline(
            self.says(lambda: w._replace(scale=w.scale[:2]), ValueError),
            """scale of a 3 x 96 x 384 weight, group_size 64, must be (3, 96, 6), got (2, 96, 6)""",
        )
        self.assertExpectedInline(
            self.says(lambda: w._replace(qdata=w.qdata[:2]), ValueError),
            """\
qdata of a 3 x 96 x 384 weight must be int16 (3, 3, 3, 3, 32, 8), got torch.int16 (2, 3, 3, 3, 32,
8); make it with pack_int3""",
        )

    def test_stacking(self) -> None:
        one, other = quantized(MBQInt3Tensor), quantized(MBQInt3Tensor, 64)
        self.assertExpectedInline(
            self.says(lambda: torch.stack([one, other]), ValueError),
            """\
stacking MBQInt3Tensors needs one shape, group size and dtype, got shape=(96, 384), group_size=64,
dtype=torch.float32, shape=(64, 384), group_size=64, dtype=torch.float32""",
        )
        self.assertExpectedInline(
            self.says(lambda: torch.stack([one, one], 1)),
            """\
aten.stack.default: only 2-D weights can be stacked, along dimension 0, got dimension 1 of
MBQInt3Tensor(shape=(96, 384), group_size=64, dtype=torch.float32, device=cpu)""",
        )
        self.assertExpectedInline(
            self.says(lambda: torch.stack([experts(MBQInt3Tensor)] * 2)),
            """\
aten.stack.default: only 2-D weights can be stacked, along dimension 0, got dimension 0 of
MBQInt3Tensor(shape=(3, 96, 384), group_size=64, dtype=torch.float32, device=cpu)""",
        )
        self.assertExpectedInline(
            self.says(lambda: torch.stack([one, quantized(MBQInt3Tensor, pre_scale=True)]), ValueError),
            """cannot stack MBQInt3Tensors with and without act_pre_scale""",
        )

    def test_views_and_indices(self) -> None:
        w = experts(MBQInt3Tensor)
        self.assertExpectedInline(
            self.says(lambda: w.view(E * N, K)),
            """aten.view.default: an MBQInt3Tensor (3, 96, 384) has no view of shape (288, 384)""",
        )
        self.assertExpectedInline(
            self.says(lambda: w.transpose(0, 1)),
            """\
aten.transpose.int: only the last two dimensions of MBQInt3Tensor(shape=(3, 96, 384), group_size=64,
dtype=torch.float32, device=cpu) can be swapped, got the order [1, 0, 2]""",
        )
        self.assertExpectedInline(
            self.says(lambda: w[:, 0]),
            """\
aten.select.int: of a quantized weight only experts can be picked, along dimension 0 of three, got
dimension 1 of MBQInt3Tensor(shape=(3, 96, 384), group_size=64, dtype=torch.float32, device=cpu);
call dequantize() first""",
        )
        self.assertExpectedInline(
            self.says(lambda: w[0, 0]),
            """\
aten.select.int: of a quantized weight only experts can be picked, along dimension 0 of three, got
dimension 0 of MBQInt3Tensor(shape=(96, 384), group_size=64, dtype=torch.float32, device=cpu); call
dequantize() first""",
        )
        self.assertExpectedInline(
            self.says(lambda: w[torch.zeros(2, 2, dtype=torch.long)]),
            """\
aten.index.Tensor: the index of experts must be a scalar or 1-D, and nothing beside it, got [(2, 2)]
for MBQInt3Tensor(shape=(3, 96, 384), group_size=64, dtype=torch.float32, device=cpu)""",
        )
        self.assertExpectedInline(
            self.says(lambda: w[:, torch.tensor([0])]),
            """\
aten.index.Tensor: of a quantized weight only experts can be picked, along dimension 0 of three, got
dimension 1 of MBQInt3Tensor(shape=(3, 96, 384), group_size=64, dtype=torch.float32, device=cpu);
call dequantize() first""",
        )
        self.assertExpectedInline(
            self.says(lambda: w[:, ::2], ValueError),
            """\
a slice of MBQInt3Tensor(shape=(3, 96, 384), group_size=64, dtype=torch.float32, device=cpu) must
have step 1, got 2; call dequantize() and slice that""",
        )
        with self.assertRaises(IndexError):
            w[E]

    def test_products(self) -> None:
        w = experts(MBQInt3Tensor)
        self.assertExpectedInline(
            self.says(lambda: nn.functional.linear(random_x(2, K), w)),
            """linear: only the weight, 2-D and not transposed, can be quantized; call dequantize() first""",
        )
        self.assertExpectedInline(
            self.says(lambda: torch.bmm(random_x(E, 2, N), w)),
            """bmm: a quantized weight w can be in x @ w.mT and w @ x.mT only; call dequantize() first""",
        )
        self.assertExpectedInline(
            self.says(lambda: random_x(2, K) @ w.mT, ValueError),
            """\
x must have three dimensions, the first for the 3 experts of MBQInt3Tensor(shape=(3, 384, 96),
group_size=64, dtype=torch.float32, transposed, device=cpu), got shape (2, 384)""",
        )
        self.assertExpectedInline(
            self.says(lambda: torch.bmm(random_x(E, 2, 128), w.mT), ValueError),
            """\
the last dimension of x must be 384, as MBQInt3Tensor(shape=(3, 384, 96), group_size=64,
dtype=torch.float32, transposed, device=cpu) has it, got x of shape (3, 2, 128)""",
        )
