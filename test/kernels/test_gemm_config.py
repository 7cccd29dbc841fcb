"""The choice of a kernel for many rows of x: what it promises, not the figures of the model."""

import dataclasses

import pytest
import torch

from mbq_ao.kernels.gemm_config import (
    MANY,
    cublas_cycles,
    cuts,
    default_gemm_config,
    dequantize_cycles,
    fused_cycles,
    fused_serves,
    split_of,
)

H200, A100, RTX_4090, B200 = (9, 0), (8, 0), (8, 9), (10, 0)
LAYERS = [(4096, 4096), (3584, 18944), (18944, 3584), (1152, 1152)]


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize("k", [1, 128, 129, 1152, 18944])
def test_splits_cover_k_and_none_is_empty(k: int, slices: int, splits: int) -> None:
    config = dataclasses.replace(MANY, block_n=32, slices=slices, splits=splits)
    split_tiles, num_splits = split_of(config, k)
    num_tiles = -(-k // 128)
    assert split_tiles % slices == 0  # or two splits would take the same column tile
    assert num_splits <= splits
    assert (num_splits - 1) * split_tiles < num_tiles <= num_splits * split_tiles


@pytest.mark.parametrize("capability", [H200, A100, RTX_4090, B200, (12, 1), (8, 7), (7, 5)])
@pytest.mark.parametrize(("n", "k"), LAYERS)
def test_few_kernels_serve_all_numbers_of_rows(n: int, k: int, capability: tuple[int, int]) -> None:
    chosen = {
        dataclasses.replace(default_gemm_config(m, n, k, 128, torch.bfloat16, capability), splits=1)
        for m in range(17, 2048, 7)
    }
    assert chosen <= set(cuts(capability))


def test_the_choice_is_the_best_cut_and_the_cheaper_way() -> None:
    for m in (64, 256, 1024, 4096):
        for n, k in LAYERS:
            problem = (m, n, k, 128, torch.bfloat16, H200)
            config = default_gemm_config(*problem)
            best = fused_cycles(config, *problem)
            for cut in cuts(H200):
                assert best <= fused_cycles(cut, *problem)
            other = dequantize_cycles(n, k, H200) + cublas_cycles(m, n, k, H200)
            assert fused_serves(*problem) == (best <= other)


@pytest.mark.parametrize(("n", "k"), LAYERS)
def test_few_rows_are_never_dequantized_and_very_many_are(n: int, k: int) -> None:
    assert fused_serves(17, n, k, 128, torch.bfloat16, H200)
    assert not fused_serves(16384, n, k, 128, torch.bfloat16, H200)
