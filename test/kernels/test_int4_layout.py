"""The packed layout of four bits: round trips, every weight's place as documented, and that a shard is a slice."""

import textwrap

import expecttest
import pytest
import torch
from torch import Tensor

from mbq_ao.kernels.int4_layout import TILE_K, TILE_N, pack_int4, packed_shape, unpack_int4, unpack_int4_rows

SHAPES = [(16, 64), (64, 256), (40, 576), (70, 896), (1, 1), (1, 65), (17, 1), (33, 129), (100, 300), (4304, 1152)]


def random_q(n: int, k: int) -> Tensor:
    return torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(n * k))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_unpack_inverts_pack(n: int, k: int) -> None:
    q = random_q(n, k)
    qdata = pack_int4(q)
    assert tuple(qdata.shape) == packed_shape(n, k)
    assert qdata.is_contiguous()
    assert torch.equal(unpack_int4(qdata, n, k), q)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_weight_is_where_the_layout_says(n: int, k: int) -> None:
    q = random_q(n, k)
    row, column = torch.arange(n)[:, None], torch.arange(k)
    # n = 8 up + g and k = 32 high + 16 hi + 4 t + i, within the tile
    up, g = row % 16 // 8, row % 8
    high, hi, t, i = column % 64 // 32, column % 32 // 16, column % 16 // 4, column % 4
    byte = pack_int4(q)[row // 16, column // 64, 4 * g + t, 8 * hi + 4 * up + i].int()
    nibble = (byte >> 4 * high) & 15
    assert torch.equal(nibble, q.int() & 15)


def test_four_bits_a_weight_where_tiles_divide() -> None:
    assert pack_int4(random_q(4 * TILE_N, 5 * TILE_K)).nbytes * 2 == 4 * TILE_N * 5 * TILE_K


def test_padding_is_zeros() -> None:
    n, k = 17, 66
    assert unpack_int4(pack_int4(torch.full((n, k), -1, dtype=torch.int8)), 32, 128).sum() == -n * k


def test_only_four_bits_are_kept() -> None:
    q = torch.arange(-128, 128).to(torch.int8).view(4, 64)
    assert torch.equal(unpack_int4(pack_int4(q), 4, 64), (q << 4) >> 4)


def test_a_matrix_that_is_not_contiguous() -> None:
    q = random_q(128, 48)
    assert torch.equal(pack_int4(q.t()), pack_int4(q.t().contiguous()))


@pytest.mark.parametrize(("n", "k"), [(70, 300), (1, 1), (16, 64)])
def test_rows_are_found_without_unpacking_the_others(n: int, k: int) -> None:
    q = random_q(n, k)
    for rows in (torch.arange(n).flip(0), torch.tensor([n - 1, 0, 0]), torch.arange(0)):
        assert torch.equal(unpack_int4_rows(pack_int4(q), rows, k), q[rows])


def test_a_shard_is_a_slice() -> None:
    q = random_q(64, 256)
    qdata = pack_int4(q)
    assert torch.equal(pack_int4(q[16:48]), qdata[1:3])
    assert torch.equal(pack_int4(q[:, 64:192]), qdata[:, 1:3])
    assert torch.equal(unpack_int4(qdata[1:3, 1:3], 32, 128), q[16:48, 64:192])
    assert torch.equal(unpack_int4_rows(qdata[1:3, 1:3], torch.tensor([31, 0]), 128), q[[47, 16], 64:192])


class TestTexts(expecttest.TestCase):
    def says(self, call, *args) -> str:
        with self.assertRaises(ValueError) as caught:
            call(*args)
        return textwrap.fill(str(caught.exception), 90)

    def test_what_cannot_be_packed(self) -> None:
        self.assertExpectedInline(
            self.says(pack_int4, torch.zeros(2, 2)),
            """pack_int4 packs an int8 matrix, got torch.float32 of shape (2, 2)""",
        )
        self.assertExpectedInline(
            self.says(pack_int4, torch.zeros(4, dtype=torch.int8)),
            """pack_int4 packs an int8 matrix, got torch.int8 of shape (4,)""",
        )

    def test_qdata_of_another_weight(self) -> None:
        qdata = pack_int4(random_q(16, 64))
        self.assertExpectedInline(
            self.says(unpack_int4, qdata, 32, 64),
            """\
qdata of a 32 x 64 weight must be int8 (2, 1, 32, 16), got torch.int8 (1, 1, 32, 16); make
it with pack_int4""",
        )
        self.assertExpectedInline(
            self.says(unpack_int4, qdata.view(torch.uint8), 16, 64),
            """\
qdata of a 16 x 64 weight must be int8 (1, 1, 32, 16), got torch.uint8 (1, 1, 32, 16);
make it with pack_int4""",
        )
