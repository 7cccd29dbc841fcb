"""Paper mode of whole models with grouped-query attention and biases, against a plain computation on mutated copies.

The oracle is written from the published procedure and shares nothing with the library, the quantizer included:
factors, search losses and every parameter of the quantized model must come out. Right padding, an answer that
ends before the batch does, and enough layers for the median floor to act.
"""

import copy
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from mbq_ao import MBQInt3Tensor, MBQW4A8Tensor, mbq_config, quantize_

GROUP_SIZE, N_GRID, NUM_TOKENS, HIDDEN = 32, 4, 20, 64
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES),  # biases at q, k and v; o_proj is not scaled
    "llama_biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),  # the bias of up_proj is folded
    "llama_mha_biases": LlamaConfig(  # the bias of v_proj is folded
        **{**SIZES, "num_key_value_heads": 4}, attention_bias=True, mlp_bias=True
    ),
}
Found = list[tuple[str, tuple[str, ...], Tensor]]


def build(family: str) -> nn.Module:
    """Planted outliers make the search choose; no norm weight is 1 and no bias is 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4.0) if parameter.ndim == 2 else parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith(("layernorm.weight", "v_proj.weight", "up_proj.weight")):
                parameter[torch.randperm(parameter.shape[0])[:3]] *= 8.0
    return model


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Three samples of 20, 17 and 14 tokens: prompt 0-1, image 2-7, prompt, an answer of four tokens, padding."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([NUM_TOKENS, NUM_TOKENS - 3, NUM_TOKENS - 6])[:, None]
    position = torch.arange(NUM_TOKENS).expand(3, -1)
    answer = (position < lengths) & (position >= lengths - 4)
    labels = torch.randint(1, 64, (3, NUM_TOKENS), generator=generator)
    return {
        "inputs_embeds": torch.randn(3, NUM_TOKENS, HIDDEN, generator=generator),
        "attention_mask": (position < lengths).long(),
        "labels": labels.masked_fill(~answer, -100),
        "vision_mask": (position >= 2) & (position < 8),
    }


def rounded_in_groups(weight: Tensor) -> Tensor:
    """3 bits, asymmetric."""
    rows = weight.reshape(-1, GROUP_SIZE)
    high, low = rows.amax(1, keepdim=True), rows.amin(1, keepdim=True)
    d = (high - low).clamp(min=1e-5) / 7
    z = (-torch.round(low / d)).clamp(0, 7)
    return ((torch.clamp(torch.round(rows / d) + z, 0, 7) - z) * d).reshape(weight.shape)


def rounded_rows(x: Tensor, num_bits: int) -> Tensor:
    """Symmetric, one scale for all that lies along the last dimension."""
    largest = 2 ** (num_bits - 1) - 1
    d = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / largest
    return torch.clamp(torch.round(x / d), -largest - 1, largest) * d


def quantize_linear_(linear: nn.Module, precision: str) -> None:
    """Simulated: a plain weight of rounded values, and for w4a8 the input rounded before it is multiplied."""
    if precision == "w3a16":
        linear.weight.copy_(rounded_in_groups(linear.weight))
    else:
        linear.weight.copy_(rounded_rows(linear.weight, 4))
        linear.register_forward_pre_hook(lambda module, args: (rounded_rows(args[0], 8),))


def fold_(layer: nn.Module, found: Found) -> None:
    for producer, linears, s in found:
        module = layer.get_submodule(producer)
        module.weight.div_(s[:, None] if isinstance(module, nn.Linear) else s)
        if getattr(module, "bias", None) is not None:
            module.bias.div_(s)
        for name in linears:
            layer.get_submodule(name).weight.mul_(s)


def quantize_linears_(layer: nn.Module, precision: str) -> None:
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            quantize_linear_(module, precision)


def features(layer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The input of every linear, before it is rounded, and the layer's output under ""."""
    seen: dict[str, Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda m, a, n=n: seen.__setitem__(n, a[0]), prepend=True)
        for n, m in layer.named_modules()
        if isinstance(m, nn.Linear)
    ]
    seen[""] = layer(x, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


def inspected_groups(layer: nn.Module) -> list[tuple[str, tuple[str, ...], str, str]]:
    """producer, linears, compared module, and the linear at whose output the gradient is taken."""
    attention, mlp = "self_attn.o_proj", "mlp.down_proj"
    groups = [
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn", attention),
        ("self_attn.v_proj", (attention,), attention, attention),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp", mlp),
        ("mlp.up_proj", (mlp,), mlp, mlp),
    ]
    if layer.self_attn.v_proj.weight.shape != layer.self_attn.o_proj.weight.shape:
        del groups[1]
    return groups


def floored_factors(model: nn.Module, batch: dict[str, Tensor]) -> dict[tuple[int, str], float]:
    """Weight gradients and all, one padded sample at a time."""
    layers = model.model.layers
    masks = {"vision": batch["vision_mask"], "answer": batch["labels"] != -100}
    names = ("self_attn.o_proj", "mlp.down_proj")
    means: dict[tuple[int, str, str], list[float]] = {}
    for row in range(len(batch["labels"])):
        kept: dict[tuple[int, str], Tensor] = {}

        def keep(module: nn.Module, args: Any, output: Tensor, key: tuple[int, str], kept: Any = kept) -> None:
            output.retain_grad()
            kept[key] = output

        handles = [
            layers[i].get_submodule(n).register_forward_hook(lambda m, a, o, k=(i, n): keep(m, a, o, k))
            for i in range(len(layers))
            for n in names
        ]
        sample = {k: v[row : row + 1] for k, v in batch.items() if k != "vision_mask"}
        model(**sample, use_cache=False).loss.backward()
        for handle in handles:
            handle.remove()
        for (i, n), output in kept.items():
            for kind, mask in masks.items():
                means.setdefault((i, n, kind), []).append(output.grad[0][mask[row]].abs().mean().item())
    ratios = {
        (i, n): sum(means[i, n, "vision"]) / sum(means[i, n, "answer"]) for i in range(len(layers)) for n in names
    }
    median = {n: statistics.median(ratios[i, n] for i in range(len(layers))) for n in names}
    return {(i, n): max(r, median[n]) for (i, n), r in ratios.items()}


def distance(error: Tensor, batch: dict[str, Tensor], r: float | None, loss: str) -> float:
    error = error.abs() if loss == "mae" else error.square()
    if r is None:
        return error.mean().item()
    answer, vision = batch["labels"] != -100, batch["vision_mask"]
    if loss == "mae":
        both = (answer.sum() + vision.sum()) * error.shape[-1]
        return ((error[answer].sum() + r * error[vision].sum()) / both).item()
    return (error[answer].mean() + r * error[vision].mean()).item()


def oracle(
    model: nn.Module, batch: dict[str, Tensor], precision: str, balance: bool, loss: str, propagate: bool
) -> list[tuple[str, tuple[str, ...], float | None, list[float]]]:
    """Quantizes `model`; returns producer, linears, factor and losses of every search."""
    factors = floored_factors(model, batch) if balance else {}
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda m, a, k: calls.append((a[0], k)), with_kwargs=True)
    with torch.no_grad():
        model(inputs_embeds=batch["inputs_embeds"], attention_mask=batch["attention_mask"], use_cache=False)
        handle.remove()
        return _search(model, batch, precision, factors, loss, propagate, *calls[0])


def _search(
    model: nn.Module,
    batch: dict[str, Tensor],
    precision: str,
    factors: dict[tuple[int, str], float],
    loss: str,
    propagate: bool,
    x: Tensor,
    kwargs: dict[str, Any],
) -> list[tuple[str, tuple[str, ...], float | None, list[float]]]:
    x_q = x.clone()
    records = []
    for index, layer in enumerate(model.model.layers):
        clean = features(layer, x, kwargs)
        found: Found = []
        for producer, linears, inspect, gradient in inspected_groups(layer):
            seen = clean
            if propagate:
                served = copy.deepcopy(layer)
                if found:
                    fold_(served, found)
                    quantize_linears_(served, precision)
                seen = features(served, x_q, kwargs)

            def run(block: nn.Module, x: Tensor, inspect: str = inspect) -> Tensor:
                module = block.get_submodule(inspect)
                return module(hidden_states=x, **kwargs)[0] if inspect == "self_attn" else module(x)

            target = run(layer, clean[linears[0]])
            statistic = seen[linears[0]].abs().flatten(0, 1).mean(0)
            r = factors.get((index, gradient))
            losses: list[float] = []
            scales: list[Tensor] = []
            for k in range(N_GRID):
                s = statistic.pow(k / N_GRID).clamp(min=1e-4)
                scales.append(s / (s.max() * s.min()).sqrt())
                changed = copy.deepcopy(layer)
                for name in linears:
                    changed.get_submodule(name).weight.mul_(scales[k])
                    quantize_linear_(changed.get_submodule(name), precision)
                losses.append(distance(target - run(changed, seen[linears[0]] / scales[k]), batch, r, loss))
            records.append((f"model.layers.{index}.{producer}", linears, r, losses))
            found.append((producer, linears, scales[losses.index(min(losses))]))
        fold_(layer, found)
        x = clean[""]
        if propagate:
            served = copy.deepcopy(layer)
            quantize_linears_(served, precision)
            x_q = features(served, x_q, kwargs)[""]
    for layer in model.model.layers:
        quantize_linears_(layer, precision)
    return records


@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("balance,loss", [(True, "mae"), (True, "mse"), (False, "mae")])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["w3a16", "w4a8"])
def test_paper_mode(
    precision: Any, family: str, balance: bool, loss: Any, propagate: bool, batch: dict[str, Tensor]
) -> None:
    expected = build(family)
    records = oracle(expected, batch, precision, balance, loss, propagate)
    model = build(family)
    config = mbq_config(
        [batch],
        precision=precision,
        recipe="paper",
        group_size=GROUP_SIZE,
        n_grid=N_GRID,
        balance=balance,
        loss=loss,
        propagate_error=propagate,
    )
    report = quantize_(model, config, progress=False)
    assert report is not None
    assert len(report.groups) == len(records)
    # What lies between two whole numbers may be rounded to either, by the CPU's last bits.
    tolerance = 1e-3 if precision == "w4a8" else 1e-4
    for group, (producer, linears, r, losses) in zip(report.groups, records, strict=True):
        assert (f"{group.block}.{group.producer}", tuple(group.linears)) == (producer, linears)
        assert group.losses == pytest.approx(losses, rel=tolerance)
        assert round(group.alpha * N_GRID) == losses.index(min(losses))
        assert group.sensitivity == (None if r is None else pytest.approx(r, rel=1e-5))
    for name, parameter in model.named_parameters():
        is_quantized = isinstance(parameter, MBQInt3Tensor | MBQW4A8Tensor)
        value = parameter.dequantize() if is_quantized else parameter.detach()
        assert torch.equal(value, expected.get_parameter(name).detach()), name
    with torch.no_grad():
        served, simulated = (m(inputs_embeds=batch["inputs_embeds"]).logits for m in (model, expected))
    torch.testing.assert_close(served, simulated, rtol=0, atol=1e-4)
