"""Packed weights: what is printed, and that what cannot be done to it says why not."""

import textwrap
from functools import partial

import expecttest
import torch
from packed_weights import N, quantized, random_weight, random_x

from mbq_ao import MBQInt3Tensor, MBQW4A8Tensor

int3, w4a8 = (partial(quantized, kind) for kind in (MBQInt3Tensor, MBQW4A8Tensor))


class TestTexts(expecttest.TestCase):
    """What is printed and what is said when something cannot be done; of W4A8, where more than the name differs."""

    def says(self, error: type[Exception], call) -> str:
        with self.assertRaises(error) as caught:
            call()
        return textwrap.fill(str(caught.exception), 100)

    def test_repr(self) -> None:
        self.assertExpectedInline(
            repr(int3()),
            """MBQInt3Tensor(shape=(96, 384), group_size=64, dtype=torch.float32, device=cpu)""",
        )
        self.assertExpectedInline(
            textwrap.fill(repr(int3(group_size=None, pre_scale=True, dtype=torch.bfloat16).t()), 100),
            """\
MBQInt3Tensor(shape=(384, 96), group_size=384, dtype=torch.bfloat16, act_pre_scale, transposed,
device=cpu)""",
        )
        self.assertExpectedInline(
            repr(w4a8()),
            """MBQW4A8Tensor(shape=(96, 384), group_size=64, dtype=torch.float32, device=cpu)""",
        )

    def test_group_size(self) -> None:
        self.assertExpectedInline(
            self.says(ValueError, lambda: int3(group_size=48)),
            """group_size must be 32, 64, 128 or None (one scale a row), got 48""",
        )

    def test_dtype(self) -> None:
        self.assertExpectedInline(
            self.says(ValueError, lambda: int3(dtype=torch.float64)),
            """\
a weight must be (N, K) or, with experts, (E, N, K) in bfloat16, float16 or float32, got
torch.float64 of shape (96, 384)""",
        )
        self.assertExpectedInline(
            self.says(ValueError, lambda: int3().double()),
            """an MBQInt3Tensor can be bfloat16, float16 or float32, got torch.float64; call dequantize() first""",
        )

    def test_dimensions(self) -> None:
        self.assertExpectedInline(
            self.says(ValueError, lambda: MBQInt3Tensor.from_hp(torch.zeros(3))),
            """\
a weight must be (N, K) or, with experts, (E, N, K) in bfloat16, float16 or float32, got
torch.float32 of shape (3,)""",
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
        w = int3()

        def call() -> None:
            MBQInt3Tensor(w.qdata, w.scale[:, :3], w.zero_point, w.block_size, w.shape)

        self.assertExpectedInline(
            self.says(ValueError, call),
            """scale of a 96 x 384 weight, group_size 64, must be (96, 6), got (96, 3)""",
        )
        other = w4a8()
        self.assertExpectedInline(
            self.says(ValueError, lambda: MBQW4A8Tensor(w.qdata, w.scale, w.block_size, w.shape)),
            """\
qdata of a 96 x 384 weight must be int8 (6, 6, 32, 16), got torch.int16 (3, 3, 3, 32, 8); make it
with pack_int4""",
        )
        self.assertExpectedInline(
            self.says(ValueError, lambda: MBQW4A8Tensor(other.qdata, other.scale[:40], other.block_size, other.shape)),
            """scale of a 96 x 384 weight, group_size 64, must be (96, 6), got (40, 6)""",
        )

    def test_unaligned_slices(self) -> None:
        w = int3()
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
            """\
a slice of MBQInt3Tensor(shape=(96, 384), group_size=64, dtype=torch.float32, device=cpu) must have
step 1, got 2; call dequantize() and slice that""",
        )
        w = w4a8(group_size=128)
        self.assertExpectedInline(
            self.says(ValueError, lambda: w[:8]),
            """\
a slice of an MBQW4A8Tensor must begin and end at a multiple of 16 rows or at the end (tiles are 16
x 64, groups 128), got 0:8 of 96; call dequantize() and slice that""",
        )
        self.assertExpectedInline(
            self.says(ValueError, lambda: w[:, :64]),
            """\
a slice of an MBQW4A8Tensor must begin and end at a multiple of 128 columns or at the end (tiles are
16 x 64, groups 128), got 0:64 of 384; call dequantize() and slice that""",
        )

    def test_copy_of_a_plain_tensor(self) -> None:
        self.assertExpectedInline(
            self.says(ValueError, lambda: int3().copy_(random_weight())),
            """\
cannot copy a plain torch.float32 tensor into MBQInt3Tensor(shape=(96, 384), group_size=64,
dtype=torch.float32, device=cpu); quantize it first with MBQInt3Tensor.from_hp""",
        )

    def test_copy_of_another_kind(self) -> None:
        self.assertExpectedInline(
            self.says(ValueError, lambda: int3().copy_(int3(group_size=32))),
            """\
cannot copy MBQInt3Tensor(shape=(96, 384), group_size=32, dtype=torch.float32, device=cpu) into
MBQInt3Tensor(shape=(96, 384), group_size=64, dtype=torch.float32, device=cpu): shape, group size
and act_pre_scale must agree""",
        )
        self.assertExpectedInline(
            self.says(ValueError, lambda: int3().copy_(w4a8())),
            """\
cannot copy an MBQW4A8Tensor into MBQInt3Tensor(shape=(96, 384), group_size=64, dtype=torch.float32,
device=cpu); quantize its dequantize() first with MBQInt3Tensor.from_hp""",
        )

    def test_cat(self) -> None:
        w = int3(40, 100)
        self.assertExpectedInline(
            self.says(ValueError, lambda: torch.cat([w, w], dim=1)),
            """\
concatenating MBQInt3Tensors along dimension 1 needs one group size and dtype, equal other
dimensions, and every part but the last a multiple of 128, got shape=(40, 100), group_size=64,
dtype=torch.float32, shape=(40, 100), group_size=64, dtype=torch.float32""",
        )
        other = [int3(), int3(group_size=32)]
        self.assertExpectedInline(
            self.says(ValueError, lambda: torch.cat(other)),
            """\
concatenating MBQInt3Tensors along dimension 0 needs one group size and dtype, equal other
dimensions, got shape=(96, 384), group_size=64, dtype=torch.float32, shape=(96, 384), group_size=32,
dtype=torch.float32""",
        )
        pair = [int3(), int3(pre_scale=True)]
        self.assertExpectedInline(
            self.says(ValueError, lambda: torch.cat(pair)),
            """cannot concatenate MBQInt3Tensors with and without act_pre_scale""",
        )
        kinds = [int3(), w4a8()]
        self.assertExpectedInline(
            self.says(NotImplementedError, lambda: torch.cat(kinds)),
            """aten.cat.default: all tensors must be of one quantized type and none transposed""",
        )

    def test_split(self) -> None:
        self.assertExpectedInline(
            self.says(ValueError, lambda: int3(64, 300).chunk(2, dim=1)),
            """\
cannot split MBQInt3Tensor(shape=(64, 300), group_size=64, dtype=torch.float32, device=cpu) into
parts of 150, 150 columns: a part must begin at a multiple of 32, or all of a row have one scale;
take another number of ranks, quantize with group_size=None, or leave this linear out of the plan""",
        )

    def test_pad(self) -> None:
        self.assertExpectedInline(
            self.says(NotImplementedError, lambda: torch.nn.functional.pad(int3(), (0, 1))),
            """\
aten.constant_pad_nd.default: MBQInt3Tensor(shape=(96, 384), group_size=64, dtype=torch.float32,
device=cpu) cannot be padded, as DTensor does to scatter shards of different sizes; have every rank
hold the weight and cut out its own: parallelize_module(..., src_data_rank=None)""",
        )

    def test_view(self) -> None:
        self.assertExpectedInline(
            self.says(NotImplementedError, lambda: int3().view(-1)),
            """aten.view.default: an MBQInt3Tensor (96, 384) has no view of shape (36864,)""",
        )

    def test_wrong_side_of_a_matmul(self) -> None:
        self.assertExpectedInline(
            self.says(NotImplementedError, lambda: random_x(2, N) @ int3()),
            """matmul: a quantized weight w can be in x @ w.mT and w @ x.mT only; call dequantize() first""",
        )

    def test_shared_memory(self) -> None:
        self.assertExpectedInline(
            self.says(NotImplementedError, lambda: int3().share_memory_()),
            """share_memory_ is not supported by MBQInt3Tensor; load the checkpoint in each process instead""",
        )
        assert not int3().is_shared()

    def test_any_other_op_is_named(self) -> None:
        self.assertExpectedInline(
            self.says(NotImplementedError, lambda: int3() + 1),
            """aten.add.Tensor is not implemented for MBQInt3Tensor; call dequantize() first""",
        )
        self.assertIn("aten.index.Tensor", self.says(NotImplementedError, lambda: int3()[torch.tensor([1])]))
