"""Error propagation and padding on whole models. The numbers are held to an oracle in test_paper_oracle.py."""

from typing import Any

import pytest
import torch
from models import build_batch, build_model, pad_right
from torch import Tensor

from mbq_ao import mbq_config, quantize_

GROUP_SIZE, N_GRID = 32, 5
pytestmark = pytest.mark.filterwarnings("ignore:no vision token found")


def losses_of(batch: dict[str, Tensor], **options: Any) -> list[list[float]]:
    config = mbq_config([batch], group_size=GROUP_SIZE, n_grid=N_GRID, balance=False, **({"recipe": "mbq"} | options))
    report = quantize_(build_model("llama_mha"), config, progress=False)
    assert report is not None
    assert all(g.alpha == g.losses.index(min(g.losses)) / N_GRID for g in report.groups)
    return [g.losses for g in report.groups]


@pytest.fixture
def padded() -> dict[str, Tensor]:
    """Two samples, the second with four padding tokens on the right."""
    long, short = build_batch("llama_mha", num_text=14), pad_right(build_batch("llama_mha", num_text=10, seed=2), 14)
    return {key: torch.cat([long[key], short[key]]) for key in short}


def test_propagation_changes_all_but_the_first_group(padded: dict[str, Tensor]) -> None:
    without, with_ = (losses_of(padded, recipe="paper", propagate_error=p) for p in (False, True))
    assert with_[0] == pytest.approx(without[0])
    assert all(a != pytest.approx(b, rel=1e-3) for a, b in zip(with_[1:], without[1:], strict=True))


def test_best_mode_does_not_see_padding(padded: dict[str, Tensor]) -> None:
    """The padded batch calibrates as its two samples do one by one."""
    config = {"group_size": GROUP_SIZE, "n_grid": N_GRID, "balance": False}
    alone = [build_batch("llama_mha", num_text=14), build_batch("llama_mha", num_text=10, seed=2)]
    reports = [
        quantize_(build_model("llama_mha"), mbq_config(data, **({"recipe": "mbq"} | config)), progress=False)
        for data in ([padded], alone)
    ]
    first, second = ([g.losses for g in report.groups] for report in reports if report is not None)
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert losses_of(padded, recipe="paper")[0] != pytest.approx(first[0], rel=1e-3)
