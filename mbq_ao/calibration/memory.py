"""How much memory a calibration needs, before it is started.

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(name), dtype=torch.bfloat16)
    print(estimate(model, n_samples=128, tokens=1500))

With a compute_device (or device) other than where the model lies, the device holds at its peak the small rest of the
model and the largest of what comes there one after the other. In bytes, with b bytes an element of the model and

    W   parameters of the largest decoder layer        C   hidden size
    w   its largest weight                             I   its widest activation, the intermediate size
    g   its largest set of linears that read one x     V   vocabulary size
    T   tokens of the largest calibration batch        K   answer tokens of one batch
    k   inputs of a set of linears that read one x     l   its outputs; m the smaller of k and l, 0 for "gptq"
    n   batches                                        c   tokens searched at a time, at most 8192 and T

    embeddings      V C b + K V (b + 12)                             the table or the head, and the answers' logits
    sensitivity     W b + T (8 I + 16 C) b                           with balance: a layer, and its activations for the
                                                                     backward pass
    probing         4 (W + g + w) + 4 T (4 I + 6 C)                  an fp32 copy of a layer, its folded weights
    search          3 W b + (8 + 2 b) w + T (I + C) b                a layer, scales tried at once, a batch of the
                                        + c ((4 I + 4 C) b + 8 C)    group's input and target, a chunk of tokens
    fitting         3 W b + 24 k l + 16 k^2 + 8 k m + T I (b + 8)    a layer, the weights that read one x, its second
                                                                     moments, a batch of x; 1 MB more with "best"

"best" and "gptq" fit, the other recipes search. None of them depends on n, or on the number of layers L. The host holds

    model           all parameters
    packed          L W bits / 8: what the model becomes
    streams         n T C b, twice with propagate_error, "best" or "gptq"
    group           2 n T (I + C) b: input and target of the group that is searched, and of its counted tokens
    checkpoints     L T C b, with balance

besides the calibration data. Attention is taken to be fused (sdpa, flash attention); without, h heads add up to
h T T (3 b + 8) in the sensitivity pass. The constants are upper bounds, held against measurements by
test/calibration/test_device_memory.py and benchmarks/calibration_memory.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from mbq_ao.calibration import error_compensation, scale_search
from mbq_ao.calibration.capture import find_blocks
from mbq_ao.calibration.residency import large_parts
from mbq_ao.calibration.settings import RECIPES

_BITS = {"w3a16": 3.25, "w4a8": 4.0}  # of a packed weight, scales and zero points of groups of 128 included
_GB = 1e9


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by name. The device needs the largest of `phases` beside `resident`, the host all of `host`.

    whole_model_transfers: bytes that capture and sensitivity bring to the device; the model three times a batch, once
    where modalities are not weighed.
    """

    resident: int
    phases: dict[str, int]
    host: dict[str, int]
    whole_model_transfers: int

    @property
    def device_peak(self) -> int:
        return self.resident + max(self.phases.values())

    @property
    def host_peak(self) -> int:
        return sum(self.host.values())

    def __str__(self) -> str:
        def show(parts: dict[str, int]) -> str:
            return ", ".join(f"{name} {nbytes / _GB:.1f}" for name, nbytes in parts.items())

        return (
            f"device: {self.device_peak / _GB:.1f} GB, that is {self.resident / _GB:.1f} all the time and the largest "
            f"of {show(self.phases)}\nhost: {self.host_peak / _GB:.1f} GB, that is {show(self.host)}\n"
            f"to the device in capture and sensitivity: {self.whole_model_transfers / _GB:.0f} GB"
        )


def estimate(
    model: nn.Module | transformers.PreTrainedConfig,
    n_samples: int,
    tokens: int,
    *,
    answer_tokens: int = 256,
    precision: str = "w3a16",
    recipe: str = "best",
    balance: bool | None = None,
    propagate_error: bool = False,
    blocks: Iterable[nn.Module] | None = None,
) -> MemoryEstimate:
    """What `quantize_(model, mbq_config(...), compute_device=...)` needs, by the formula above.

    model: values are not looked at, so it may be on the meta device; of a config one is built there, in bfloat16 if
        the config names no dtype.
    n_samples: batches.  tokens: of the largest batch, all samples in it together.  answer_tokens: of those, how many
        have labels.  precision, recipe, balance, propagate_error, blocks: as in mbq_config.
    """
    if isinstance(model, transformers.PreTrainedConfig):
        model = _on_meta(model)
    layers = list(find_blocks(model, None if blocks is None else list(blocks)).values())
    b = max(p.element_size() for layer in layers for p in layer.parameters())
    c = _hidden_size(model, layers[0])
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    experts = [p for layer in layers for p in layer.parameters() if p.ndim == 3]  # (E, N, K), a group by themselves
    i = max([max(m.weight.shape) for m in linears] + [max(p.shape[1:]) for p in experts])
    layer = max(map(_num_parameters, layers))
    weight = max([m.weight.numel() for m in linears] + [p[0].numel() for p in experts])
    sets = [
        (k, sum(m.out_features for m in parent.children() if isinstance(m, nn.Linear) and m.in_features == k))
        for layer_ in layers
        for parent in layer_.modules()
        for k in {m.in_features for m in parent.children() if isinstance(m, nn.Linear)}
    ]
    group = max([k * n for k, n in sets] + [p.numel() for p in experts])
    parts = large_parts(model, layers)
    of_layers = set(layers)
    others = [_num_parameters(part) for part in parts if part not in of_layers]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    vocabulary = head.out_features if isinstance(head, nn.Linear) else 0
    inside = {id(p) for part in parts for p in part.parameters()}
    chunk = min(scale_search.CHUNK_TOKENS, tokens)
    total = _num_parameters(model)
    of_all_layers = sum(map(_num_parameters, layers))
    fits, drifts = RECIPES[recipe].fits_weights, RECIPES[recipe].corrects_drift
    sets += [(p.shape[2], p.shape[1]) for p in experts]
    # What drifts is the inputs, or if there are fewer or if they go to the residual, the outputs.
    widths = [n if n == c else min(k, n) for k, n in sets]
    of_set = max(24 * k * n + 16 * k * k + 8 * k * width * drifts for (k, n), width in zip(sets, widths, strict=True))
    searching = 4 * error_compensation.ENTRIES * RECIPES[recipe].search_grid
    fitting = 3 * b * layer + of_set + tokens * i * (b + 8) + searching
    balanced = recipe in ("mbq", "paper") if balance is None else balance
    phases = {
        "embeddings": b * max(others, default=0) + answer_tokens * vocabulary * (b + 12),
        "probing": 4 * (layer + group + weight) + 4 * tokens * (4 * i + 6 * c),
    }
    if balanced:
        phases["sensitivity"] = b * layer + tokens * (8 * i + 16 * c) * b
    if RECIPES[recipe].scaled:
        chunks = chunk * ((4 * i + 4 * c) * b + 8 * c)
        phases["search"] = 3 * b * layer + (8 + 2 * b) * weight + tokens * (i + c) * b + chunks
    if fits:
        phases["fitting"] = fitting
    return MemoryEstimate(
        resident=b * sum(p.numel() for p in model.parameters() if id(p) not in inside),
        phases=phases,
        host={
            "model": b * total,
            "packed": int(of_all_layers * _BITS[precision] / 8),
            "streams": n_samples * tokens * c * b * (1 + (propagate_error or fits)),
            "group": 2 * n_samples * tokens * (i + c) * b,
            "checkpoints": len(layers) * tokens * c * b * balanced,
        },
        whole_model_transfers=(3 if balanced else 1) * n_samples * b * of_all_layers,
    )


def _on_meta(config: transformers.PreTrainedConfig) -> nn.Module:
    is_vlm = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto: Any = transformers.AutoModelForImageTextToText if is_vlm else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, dtype=config.dtype or torch.bfloat16)


def _hidden_size(model: nn.Module, layer: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    if config is not None:
        return config.get_text_config(decoder=True).hidden_size
    return next(m.in_features for m in layer.modules() if isinstance(m, nn.Linear))


def _num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
