"""The demo's own computations, on a tiny model."""

from typing import Any

import pytest
import torch
from models import build_batch, build_model, model_inputs
from torch import nn

from mbq_ao import MBQInt3Tensor, mbq_config, quantize_
from mbq_ao.demo.run import unpacked_once
from mbq_ao.packed_weight import PackedWeight


@pytest.mark.filterwarnings("ignore:no vision token found")
@pytest.mark.parametrize(
    ("precision", "dtype", "num_packed"),
    [("w3a16", torch.float32, 10), ("w4a8", torch.float32, 0), ("w4a8", torch.bfloat16, 14)],
)
@torch.no_grad()
def test_evaluation_on_unpacked_weights_is_evaluation_of_the_served_model(
    precision: Any, dtype: torch.dtype, num_packed: int
) -> None:
    batch = build_batch("olmo2", num_text=40)  # gives some weights an act_pre_scale
    model = build_model("olmo2", dtype)
    config = mbq_config([batch], precision=precision, group_size=32, n_grid=3, balance=False, recipe="mbq")
    quantize_(model, config, progress=False)
    unpacked = unpacked_once(model)
    kept = [m.weight for m in unpacked.modules() if isinstance(m, nn.Linear) and isinstance(m.weight, PackedWeight)]
    assert len(kept) == num_packed
    assert all(isinstance(w, MBQInt3Tensor) == (precision == "w3a16") for w in kept)
    assert sum(isinstance(m.weight, PackedWeight) for m in model.modules() if isinstance(m, nn.Linear)) == 14
    inputs = model_inputs(batch)
    assert torch.equal(unpacked(**inputs).logits, model(**inputs).logits)
