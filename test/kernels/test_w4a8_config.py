"""The choice of a cut for W4A8: what it promises, not the figures of the model."""

import dataclasses

import pytest

from mbq_ao.kernels.w4a8_config import (
    FEW_SMALL,
    FUSED,
    FUSED_SMALL,
    MANY,
    W4A8Config,
    cuts_for,
    default_w4a8_config,
    split_of,
    w4a8_cycles,
)

H200 = (9, 0)
CAPABILITIES = [H200, (8, 0), (8, 9), (10, 0), (12, 1), (7, 5)]
LAYERS = [(4096, 4096), (3584, 18944), (18944, 3584), (1152, 4304), (16, 64)]


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize("config", [FEW_SMALL, MANY], ids=["few", "many"])
@pytest.mark.parametrize("k", [1, 64, 65, 1152, 18944, 300_000])
def test_splits_cover_k_none_is_empty_and_sums_fit_int32(k: int, config: W4A8Config, splits: int) -> None:
    split_tiles, num_splits = split_of(dataclasses.replace(config, splits=splits), k)
    num_tiles = -(-k // 64)
    assert split_tiles % (config.slices * config.block_k // 64) == 0  # or two splits would take the same column tile
    assert (num_splits - 1) * split_tiles < num_tiles <= num_splits * split_tiles
    assert split_tiles * 64 * 16 * 8 * 127 < 2**31


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize(("n", "k"), LAYERS)
def test_every_number_of_rows_has_one_of_few_kernels(n: int, k: int, group: int, capability: tuple[int, int]) -> None:
    chosen = {
        dataclasses.replace(default_w4a8_config(m, n, k, group, capability), splits=1)
        for m in (1, 7, 8, 9, 16, 17, 100, 1000, 16384)
    }
    assert chosen <= set(cuts_for(group))


def test_the_choice_is_the_best_cut() -> None:
    for m in (1, 16, 64, 1024):
        for n, k in LAYERS:
            best = w4a8_cycles(default_w4a8_config(m, n, k, 0, H200), m, n, k, 0, H200)
            assert all(
                best <= w4a8_cycles(cut, m, n, k, 0, H200)
                for cut in cuts_for(0)
                if cut.block_m >= min(m, 16) and cut.serves(m)
            )


def test_the_grid_is_within_its_limits() -> None:
    for m, n, k, capability in ((1_100_000, 1, 256, (8, 0)), (2_200_000, 32, 32, (12, 0)), (5_000_000, 64, 64, H200)):
        config = default_w4a8_config(m, n, k, 0, capability)
        assert -(-m // config.block_m) <= 65535


def test_a_token_has_a_small_block_and_a_prompt_a_large_one() -> None:
    for n, k in LAYERS[:3]:
        assert dataclasses.replace(default_w4a8_config(1, n, k, 0, H200), splits=1) in (FUSED, FUSED_SMALL)
        assert default_w4a8_config(4096, n, k, 0, H200).block_m >= 128
