"""Given answers: how likely a model finds them, and how far two models differ on them.

Teacher-forced: one pass over prompt and answer gives the logits of every token of the answer, given the ones before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbq_ao.calibration.batch import IGNORE_INDEX, OWN_KEYS


@torch.no_grad()
def answer_logits(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits (T, V) that predict the T tokens with a label, and those tokens (T,), on the model's device.

    batch: what a processor returns for a batch of one, plus `labels` (1, L), -100 on everything but the answer. It is
    moved to the model's device, floating-point inputs to its dtype.
    """
    inputs: dict[str, Any] = {}
    for name, value in batch.items():
        if name in OWN_KEYS:
            continue
        if isinstance(value, Tensor):
            value = value.to(model.device, model.dtype if value.is_floating_point() else None)
        inputs[name] = value
    labels = batch["labels"][0, 1:].to(model.device)
    logits = model(**inputs, use_cache=False).logits[0, :-1]
    return logits[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX]


def answer_score(logits: Tensor, targets: Tensor) -> tuple[bool, float]:
    """Whether every target is the arg max, and -log p of all of them in nats.  logits: (T, V); targets: (T,)."""
    nll = F.cross_entropy(logits.float(), targets, reduction="sum")
    return bool((logits.argmax(-1) == targets).all()), float(nll)


def clustered_standard_error(values: Sequence[float], clusters: Sequence[int]) -> float:
    """Standard error of the mean of values whose errors may be correlated within a cluster (sandwich estimator).

    sqrt(G / (G - 1) * sum_g (sum_{i in g} (v_i - mean))^2) / n for G clusters and n values; NaN for one cluster.
    """
    mean = sum(values) / len(values)
    residuals: dict[int, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        residuals[cluster] = residuals.get(cluster, 0.0) + value - mean
    count = len(residuals)
    if count < 2:
        return math.nan
    return math.sqrt(count / (count - 1) * sum(r * r for r in residuals.values())) / len(values)


@dataclass(frozen=True)
class Divergence:
    """How a model differs from a reference on the tokens of given answers.

    kl: mean of KL(reference || model) over all answer tokens, in nats. standard_error: of it, over the draw of samples.
    same_top: share of tokens where both have the same arg max. nll, reference_nll: mean of -log p(token), in nats.
    """

    kl: float
    standard_error: float
    same_top: float
    nll: float
    reference_nll: float
    num_tokens: int
    num_samples: int

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.4f} (s.e. {self.standard_error:.4f}) nats a token, the same first choice on "
            f"{100 * self.same_top:.1f}%, NLL {self.nll:.4f} against {self.reference_nll:.4f}, "
            f"{self.num_tokens} answer tokens of {self.num_samples} samples"
        )


def divergence(model: nn.Module, reference: nn.Module, batches: Sequence[Mapping[str, Any]]) -> Divergence:
    """Compare a quantized model with the one it was made of: KL divergence of what they predict for given answers.

    batches: as `mbq_config` takes them, each a batch of one; `calibration_data` makes them of rows that were not
        calibrated on. Both models are in memory, each on its device.

    Raises ValueError if there is no labelled token, if a batch is not of one, or if the vocabularies differ.
    """
    if not batches:
        raise ValueError("batches must hold at least one batch, got none")
    kl: list[float] = []
    nll: list[float] = []
    reference_nll: list[float] = []
    same: list[bool] = []
    sample: list[int] = []
    for index, batch in enumerate(batches):
        size = batch["input_ids"].shape[0]
        if size != 1:
            raise ValueError(f"batches[{index}] has {size} rows, it must have one: pass them one by one")
        p, targets = answer_logits(reference, batch)
        q, _ = answer_logits(model, batch)
        if p.shape != q.shape:
            raise ValueError(
                f"the models' vocabularies must be the same, they have {q.shape[-1]} and {p.shape[-1]} tokens"
            )
        log_p, log_q = (x.float().log_softmax(-1).to(p.device) for x in (p, q))
        kl += F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).tolist()
        same += (log_p.argmax(-1) == log_q.argmax(-1)).tolist()
        reference_nll += F.nll_loss(log_p, targets, reduction="none").tolist()
        nll += F.nll_loss(log_q, targets, reduction="none").tolist()
        sample += [index] * len(targets)
    count = len(kl)
    if not count:
        raise ValueError("no batch has a labelled token: labels must be other than -100 on the answers")
    return Divergence(
        kl=sum(kl) / count,
        standard_error=clustered_standard_error(kl, sample),
        same_top=sum(same) / count,
        nll=sum(nll) / count,
        reference_nll=sum(reference_nll) / count,
        num_tokens=count,
        num_samples=len(batches),
    )
