"""Packed weights sliced, split, joined and transposed."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from packed_weights import (
    K,
    Kind,
    N,
    assert_same,
    assert_same_data,
    each_kind,
    expected_linear,
    experts,
    quantized,
    random_x,
)

from mbq_ao import MBQW4A8Tensor

SLICES = [(0, 0, 32), (0, 32, N), (0, 64, 96), (0, 0, N), (1, 0, 128), (1, 128, 384), (1, 256, K), (0, 32, 32)]


@each_kind
class TestShapes:
    @pytest.mark.parametrize("pre_scale", [False, True], ids=["", "act_pre_scale"])
    @pytest.mark.parametrize("group_size", [32, 64, 128, None])
    @pytest.mark.parametrize(("dim", "start", "end"), SLICES)
    def test_slice(self, dim: int, start: int, end: int, group_size: int | None, pre_scale: bool, kind: Kind) -> None:
        w = quantized(kind, group_size=group_size, pre_scale=pre_scale)
        where = (slice(None),) * dim + (slice(start, end),)
        part = w[where]
        assert type(part) is kind
        assert_same(part.dequantize(), w.dequantize()[where])
        assert_same(part.t().dequantize(), w.t().dequantize()[where[::-1] if dim == 1 else (slice(None), where[0])])
        if pre_scale and dim == 1:
            assert_same(part.act_pre_scale, w.act_pre_scale[start:end])
        assert part.qdata.untyped_storage().data_ptr() == w.qdata.untyped_storage().data_ptr()  # a view

    @pytest.mark.parametrize("dim", [0, 1])
    @pytest.mark.parametrize("group_size", [32, 64, None])
    def test_every_run_of_whole_tiles(self, group_size: int | None, dim: int, kind: Kind) -> None:
        w = quantized(kind, group_size=group_size, pre_scale=True)
        plain, tile = w.dequantize(), (kind.TILE_N, kind.TILE_K)[dim]
        for start, end in combinations(range(0, w.shape[dim] + 1, tile), 2):
            assert_same(w.narrow(dim, start, end - start).dequantize(), plain.narrow(dim, start, end - start))

    def test_slice_of_a_transpose(self, kind: Kind) -> None:
        w = quantized(kind)
        assert_same(w.t()[128:256].dequantize(), w.dequantize().t()[128:256])
        assert_same(w.t()[:, 32:].dequantize(), w.dequantize().t()[:, 32:])

    def test_ends_that_are_not_aligned_are_fine_at_the_end(self, kind: Kind) -> None:
        w = quantized(kind, 70, 300, 32)
        assert_same(w[64:].dequantize(), w.dequantize()[64:])
        assert_same(w[:, 256:].dequantize(), w.dequantize()[:, 256:])
        assert_same(w[:, -44:].dequantize(), w.dequantize()[:, 256:])

    def test_empty_slices(self, kind: Kind) -> None:
        for w in (quantized(kind), quantized(kind, group_size=None), quantized(kind, 40, 100, 128)):
            assert w[:0].dequantize().shape == (0, w.shape[1])
            assert w[:, :0].dequantize().shape == (w.shape[0], 0)
            assert_same_data(w[:, :], w)
            x, bias = random_x(2, 3, w.shape[1]), random_x(w.shape[0])
            assert F.linear(x, w[:0]).shape == (2, 3, 0)
            assert_same(F.linear(x[..., :0], w[:, :0], bias), bias.expand(2, 3, -1))

    def test_narrow_split_chunk(self, kind: Kind) -> None:
        w, plain = quantized(kind), quantized(kind).dequantize()
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
    def test_cat_undoes_split(self, pre_scale: bool, dim: int, kind: Kind) -> None:
        w = quantized(kind, pre_scale=pre_scale)
        assert_same_data(torch.cat(w.chunk(3, dim=dim), dim=dim), w)

    def test_halves_of_a_scale_a_row_laid_together_serve(self, kind: Kind) -> None:
        """Halves of 1152 columns are nine tiles of W4A8, and no whole number of 128 columns."""
        k = 1152 if kind is MBQW4A8Tensor else 1536
        w = quantized(kind, 32, k, None)
        both = torch.cat(w.chunk(2, dim=1), dim=1)
        assert both.group_size == k // 2
        assert_same(both.dequantize(), w.dequantize())
        torch.testing.assert_close(F.linear(random_x(3, k), both), F.linear(random_x(3, k), w), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dim", [0, 1])
    @pytest.mark.parametrize("group_size", [32, 64, 128, None])
    def test_split_where_no_view_serves(self, group_size: int | None, dim: int, kind: Kind) -> None:
        """Within tiles and within groups, which become smaller; the values are the same."""
        sizes = [(50, 45, 5), (160, 32, 108)][dim]
        w = quantized(kind, 100, 300, group_size, pre_scale=True)
        for part, expected in zip(w.split(sizes, dim), w.dequantize().split(sizes, dim), strict=True):
            assert_same(part.dequantize(), expected)
            x = random_x(3, part.shape[1])
            torch.testing.assert_close(F.linear(x, part), expected_linear(x, part), rtol=1e-4, atol=1e-4)
        for part, expected in zip(w.t().split(sizes, 1 - dim), w.t().dequantize().split(sizes, 1 - dim), strict=True):
            assert_same(part.dequantize(), expected)

    def test_splits_of_experts_and_rows_that_are_joined(self, kind: Kind) -> None:
        w = experts(kind, 2, 100, 192, 64, pre_scale=True)
        for dim in (1, 2):
            for t, d in ((w, dim), (w.mT, 3 - dim)):
                for part, expected in zip(t.chunk(2, d), t.dequantize().chunk(2, d), strict=True):
                    assert_same(part.dequantize(), expected)
        assert_same_data(torch.cat(w.split([70, 30], 1), dim=1), w)
        assert_same_data(torch.cat(w[0].split([70, 30])), w[0])

    def test_an_empty_slice_at_the_end_of_any_size(self, kind: Kind) -> None:
        w = quantized(kind, 40, 100, 32)
        assert w[40:].shape == (0, 100) and w[:, 100:].shape == (40, 0)

    def test_cat_with_a_ragged_last_part(self, kind: Kind) -> None:
        w = quantized(kind, 70, 300, 32)
        assert_same_data(torch.cat([w[:64], w[64:]]), w)
        assert_same_data(torch.cat([w[:, :256], w[:, 256:]], dim=1), w)

    def test_view_of_the_same_shape(self, kind: Kind) -> None:
        w = quantized(kind)
        assert_same_data(w.view(N, K), w)
        assert_same_data(w.view(-1, K), w)
        assert_same_data(w.reshape(N, K), w)

    def test_transposing_twice(self, kind: Kind) -> None:
        w = quantized(kind, pre_scale=True)
        assert_same_data(w.t().t(), w)
        assert w.t().shape == (K, N)
        assert w.t().stride() == (1, K)
        assert_same(w.t().dequantize(), w.dequantize().t())

    def test_column_and_row_parallel_shards_compute_the_whole(self, kind: Kind) -> None:
        w, x = quantized(kind, pre_scale=True), random_x(2, K)
        expected = F.linear(x, w)
        columns = torch.cat([F.linear(x, part) for part in w.chunk(3)], dim=1)
        torch.testing.assert_close(columns, expected)
        rows = sum(F.linear(xs, part) for xs, part in zip(x.chunk(3, dim=1), w.chunk(3, dim=1), strict=True))
        # W4A8: a shard chooses the steps of the activation it sees; each side is off by half a step of its own.
        step = (x * w.act_pre_scale).abs().amax(1, keepdim=True) / 127 if kind is MBQW4A8Tensor else 0.0
        assert ((rows - expected).abs() <= step * w.dequantize().abs().sum(1) + 1e-4).all()
