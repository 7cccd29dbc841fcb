"""The demo's own computations, on a tiny model."""

import torch
from models import build_batch, build_model, model_inputs
from torch import nn

from mbq_ao import MBQInt3Tensor, mbq_config, quantize_
from mbq_ao.demo.run import unpacked_once


@torch.no_grad()
def test_evaluation_on_unpacked_weights_is_evaluation_of_the_served_model() -> None:
    batch = build_batch("olmo2", num_text=40)  # has weights with an act_pre_scale, which stay packed
    model = build_model("olmo2")
    quantize_(model, mbq_config([batch], group_size=32, n_grid=3, balance=False), progress=False)
    unpacked = unpacked_once(model)
    kinds = [isinstance(m.weight, MBQInt3Tensor) for m in unpacked.modules() if isinstance(m, nn.Linear)]
    assert 0 < sum(kinds) < len(kinds)
    assert sum(isinstance(m.weight, MBQInt3Tensor) for m in model.modules() if isinstance(m, nn.Linear)) == 14
    inputs = model_inputs(batch)
    assert torch.equal(unpacked(**inputs).logits, model(**inputs).logits)
