"""Quantizing a few rows at a time: bit for bit what all rows at once give, and in little memory."""

import pytest
import torch
from live_bytes import LiveBytes
from packed_weights import DTYPES, Kind, assert_same, assert_same_data, each_kind, random_weight
from torch import Tensor

from mbq_ao import MBQInt3Tensor, quant_primitives
from mbq_ao.quant_primitives import by_row_slabs
from mbq_ao.quantize import W3A16Quantizer


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4096 weights."""
    monkeypatch.setattr(quant_primitives, "_SLAB_CPU", 4096 // torch.get_num_threads())


def test_every_row_is_given_once_and_in_order(small_slabs: None) -> None:
    w = random_weight(103, 100, torch.bfloat16)
    seen = []

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.float32
        seen.append(x.shape[0])
        return x.to(w.dtype), x[:, 0].reshape(-1, 4)[:, :1] if x.shape[0] % 4 == 0 else x[::4, :1]

    same, every_fourth = by_row_slabs(halves, w, multiple=4)
    assert seen == [40, 40, 23]
    assert_same(same, w)
    assert_same(every_fourth, w[::4, :1].float())


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(200, 384), (97, 300), (40, 5000), (31, 64)])
@pytest.mark.parametrize("group_size", [64, None])
def test_packed_weights_are_the_same(
    kind: Kind, dtype: torch.dtype, n: int, k: int, group_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = random_weight(n, k, dtype)
    at_once = kind.from_hp(w, group_size)
    monkeypatch.setattr(quant_primitives, "_SLAB_CPU", 1)
    assert_same_data(kind.from_hp(w, group_size), at_once)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [64, None])
def test_stand_ins_are_the_same(dtype: torch.dtype, group_size: int | None, small_slabs: None) -> None:
    w = random_weight(97, 300, dtype)
    s = torch.rand(300, generator=torch.Generator().manual_seed(0)) + 0.5
    scaled = (w.float() * s).to(dtype)
    packed = MBQInt3Tensor.from_hp(scaled, group_size).dequantize()
    assert_same(MBQInt3Tensor.fake_quantize(scaled, group_size), packed)
    assert_same(W3A16Quantizer(group_size).stand_in(w, s), packed / s.to(dtype))


@each_kind
def test_nan_in_a_late_row_is_found(kind: Kind, small_slabs: None) -> None:
    w = random_weight(200, 384)
    w[199, 383] = torch.nan
    with pytest.raises(ValueError, match="200 x 384 weight to quantize holds NaN or infinite"):
        kind.from_hp(w, 64)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_the_result_and_a_few_copies_of_a_slab(kind: Kind, dtype: torch.dtype, small_slabs: None) -> None:
    w = random_weight(1024, 512, dtype)
    with LiveBytes([w]) as live:
        packed = kind.from_hp(w, 64)
    slab = max(4096, 512 * kind.TILE_N) * 4  # bytes in fp32
    assert live.peak <= packed.quantized_nbytes() + 4.5 * slab
    assert live.peak < w.numel() * 2  # not even one 16-bit copy of all
