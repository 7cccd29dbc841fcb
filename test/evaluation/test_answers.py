"""Divergence of a model from a reference."""

from __future__ import annotations

import pytest
import torch
from models import build_batch, build_model

from mbq_ao.evaluation import divergence


def test_divergence_is_the_formula() -> None:
    model, reference = build_model("llava"), build_model("llava")
    with torch.no_grad():
        model.lm_head.weight.add_(0.3 * torch.randn_like(model.lm_head.weight))
    batches = [build_batch("llava", num_text=n, seed=n) for n in (9, 12)]
    result = divergence(model, reference, batches)
    assert (result.num_tokens, result.num_samples) == (6, 2)
    kl, nll = [], []
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "vision_mask")}
        with torch.no_grad():
            q, p = (m(**inputs).logits[0, -4:-1].softmax(-1) for m in (model, reference))
        kl += (p * (p / q).log()).sum(-1).tolist()
        nll += (-q.log().gather(-1, batch["input_ids"][0, -3:, None])).flatten().tolist()
    assert result.kl == pytest.approx(sum(kl) / 6, rel=1e-4)
    assert result.nll == pytest.approx(sum(nll) / 6, rel=1e-5)
    means = [sum(kl[:3]) / 3, sum(kl[3:]) / 3]
    assert result.standard_error == pytest.approx(abs(means[0] - means[1]) / 2, rel=1e-4)
    assert 0 <= result.same_top < 1
    same = divergence(reference, reference, batches)
    assert (same.kl, same.same_top) == (pytest.approx(0, abs=1e-6), 1.0)
    assert same.nll == same.reference_nll == result.reference_nll


def test_refusals() -> None:
    model = build_model("llava")
    with pytest.raises(ValueError, match="at least one batch"):
        divergence(model, model, [])
    with pytest.raises(ValueError, match=r"batches\[0\] has 2 rows"):
        divergence(model, model, [build_batch("llava", batch_size=2)])
    batch = build_batch("llava")
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="no batch has a labelled token"):
        divergence(model, model, [batch])
