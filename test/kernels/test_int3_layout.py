"""The packed layout: round trips, its drawing pinned, and that a shard is a slice."""

import textwrap

import expecttest
import pytest
import torch

from mbq_ao.kernels.int3_layout import FIELDS, TILE_K, TILE_N, pack_int3, packed_shape, unpack_int3, unpack_int3_rows

SHAPES = [(32, 128), (64, 256), (40, 576), (70, 896), (1, 1), (33, 129), (100, 300)]


def random_q(n: int, k: int) -> torch.Tensor:
    return torch.randint(0, 8, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(n * k))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_unpack_inverts_pack(n: int, k: int) -> None:
    q = random_q(n, k)
    qdata = pack_int3(q)
    assert tuple(qdata.shape) == packed_shape(n, k)
    torch.testing.assert_close(unpack_int3(qdata, n, k), q, rtol=0, atol=0)


def test_three_bits_a_weight_where_tiles_divide() -> None:
    qdata = pack_int3(random_q(4 * TILE_N, 5 * TILE_K))
    assert qdata.nbytes * 8 == 3 * (4 * TILE_N) * (5 * TILE_K)


def test_padding_is_zeros() -> None:
    n, k = 33, 130
    q = unpack_int3(pack_int3(torch.full((n, k), 7, dtype=torch.uint8)), 64, 256)
    assert q.sum() == 7 * n * k


def test_rows_are_found_without_unpacking_the_others() -> None:
    q = random_q(70, 300)
    rows = torch.arange(70).flip(0)
    torch.testing.assert_close(unpack_int3_rows(pack_int3(q), rows, 300), q[rows], rtol=0, atol=0)


def test_a_shard_is_a_slice() -> None:
    q = random_q(128, 512)
    qdata = pack_int3(q)
    torch.testing.assert_close(pack_int3(q[32:96]), qdata[1:3], rtol=0, atol=0)
    torch.testing.assert_close(pack_int3(q[:, 128:384]), qdata[:, 1:3], rtol=0, atol=0)
    torch.testing.assert_close(unpack_int3(qdata[:, 1:3], 128, 256), q[:, 128:384], rtol=0, atol=0)


def test_every_field_is_used_once() -> None:
    places = [place for pair in FIELDS for slab in pair for place in slab]
    assert sorted(places) == sorted([(plane, field) for plane in range(3) for field in range(5)] + [(0, 5)])


def test_rows_of_a_slab_share_their_bit_class() -> None:
    # The kernels add both row blocks of a slab in one accumulator: 2^0, 2^3, 2^6 for fields 0 3, 1 4, 2 R.
    for pair in FIELDS:
        for slab in pair:
            assert len({field % 3 for _, field in slab}) == 1


class TestWhereBitsLive(expecttest.TestCase):
    def test_places_of_a_few_weights(self) -> None:
        lines = []
        for n, k in [
            (0, 0),
            (0, 1),
            (1, 0),
            (8, 0),
            (0, 2),
            (0, 4),
            (0, 8),
            (16, 0),
            (16, 4),
            (0, 32),
            (16, 68),
            (31, 127),
        ]:
            q = torch.zeros(32, 128, dtype=torch.uint8)
            q[n, k] = 7
            words = pack_int3(q)[0, 0]
            where = [
                f"{'abc'[plane]}[lane {lane}, half {half}] = {words[plane, lane, half].item() & 0xFFFF:016b}"
                for plane, lane, half in words.nonzero().tolist()
            ]
            lines += [f"({n}, {k}): {place}" for place in where]
        self.assertExpectedInline(
            "\n".join(lines),
            """\
(0, 0): a[lane 0, half 0] = 0000000000000111
(0, 1): a[lane 0, half 1] = 0000000000000111
(1, 0): a[lane 4, half 0] = 0000000000000111
(8, 0): a[lane 0, half 2] = 0000000000000111
(0, 2): a[lane 0, half 4] = 0000000000000111
(0, 4): c[lane 0, half 0] = 0000000000000111
(0, 8): a[lane 1, half 0] = 0000000000000111
(16, 0): b[lane 0, half 0] = 0000000000000111
(16, 4): c[lane 0, half 0] = 0000111000000000
(0, 32): a[lane 0, half 0] = 0000000000111000
(16, 68): a[lane 0, half 0] = 1000000000000000
(16, 68): b[lane 0, half 0] = 1000000000000000
(16, 68): c[lane 0, half 0] = 1000000000000000
(31, 127): b[lane 31, half 7] = 0111000000000000""",
        )

    def test_error_of_a_wrong_shape(self) -> None:
        qdata = pack_int3(torch.zeros(32, 128, dtype=torch.uint8))
        with self.assertRaises(ValueError) as caught:
            unpack_int3(qdata, 64, 128)
        self.assertExpectedInline(
            textwrap.fill(str(caught.exception), 90),
            """\
qdata of a 64 x 128 weight must be int16 (2, 1, 3, 32, 8), got torch.int16 (1, 1, 3, 32,
8); make it with pack_int3""",
        )
