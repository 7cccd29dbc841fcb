"""Which tokens an expert gets, and how they weigh in its search."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import MIXTURES
from mixtures import OPTIONS, batches_for, moe, routing
from models import build_batch, build_model, model_inputs
from test_matrix import KINDS
from torch import Tensor, nn

from mbq_ao import mbq_config, quantize_
from mbq_ao.calibration import mbq
from mbq_ao.calibration.batch import collect_batches
from mbq_ao.calibration.capture import capture_streams, find_blocks
from mbq_ao.calibration.experts import experts_as_linears
from mbq_ao.calibration.routing import ExpertRows, common, expert_rows
from mbq_ao.calibration.scale_search import SearchResult, search_scale

pytestmark = pytest.mark.filterwarnings("ignore:no vision token found")


@pytest.mark.parametrize("family", MIXTURES)
def test_tokens_and_shares_are_the_router_s(family: str) -> None:
    """What is found by sending token numbers through the experts, against what the router says."""
    model = build_model(family)
    expected = routing(model, build_batch(family, 12))
    blocks, batches = find_blocks(model), collect_batches(model, [build_batch(family, 12)])
    *_, (index, (name, block)) = enumerate(blocks.items())
    inputs: list[Tensor] = []
    with experts_as_linears(model, blocks, batches, None) as found:
        with torch.no_grad():
            handle = moe(model).register_forward_pre_hook(lambda m, a: inputs.append(a[0].flatten(0, -2)))
            (stream,) = capture_streams(model, blocks, batches)
            for i, earlier in enumerate(list(blocks.values())[:index]):
                stream.hidden = stream.between(i + 1, stream.call(i, stream.hidden).run(earlier))
        handle.remove()
        for parameter in found[name]:
            rows = expert_rows(block, stream.call(index, stream.hidden), {}, found[name], parameter, with_shares=True)
            assert rows is not None
            shares = torch.zeros_like(expected)
            for e, tokens in enumerate(rows.tokens):
                shares[tokens, e] = rows.share[e]
                assert len(rows.x[e]) == len(tokens)
                if parameter.name.endswith("gate_up_proj") and len(tokens):
                    cosine = nn.functional.cosine_similarity(rows.x[e], inputs[0][tokens])
                    torch.testing.assert_close(cosine, torch.ones_like(cosine))
            torch.testing.assert_close(shares, expected, atol=1e-5, rtol=1e-4)


def test_common_rows() -> None:
    def rows(*tokens: list[int]) -> ExpertRows:
        numbers = [torch.tensor(t, dtype=torch.long) for t in tokens]
        return ExpertRows([n[:, None] * 10.0 for n in numbers], numbers, [n / 2 for n in numbers])

    first, second = common(rows([4, 1, 3], [2], []), rows([0, 3, 4], [], [5]))
    for part in (first, second):
        assert [t.tolist() for t in part.tokens] == [[3, 4], [], []]
        assert part.x[0].tolist() == [[30.0], [40.0]] and part.share[0].tolist() == [1.5, 2.0]


def served_loss(model: nn.Module, original: nn.Module, batches: Any, e: int, power: float) -> float:
    """sum over tokens and channels of share^power |served down(h) - down(h)| of expert e in layer 0, over n C."""
    total, count = 0.0, 0
    for batch in batches:
        share = routing(original, batch, 0)[:, e]
        seen: list[Tensor] = []
        handle = moe(original, 0).register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0].flatten(0, -2)))
        with torch.no_grad():
            original(**model_inputs(batch))
        handle.remove()
        tokens = share.nonzero().flatten()
        outputs = []
        for part in (moe(original, 0).experts, moe(model, 0).experts):
            with torch.no_grad():
                gate, up = nn.functional.linear(seen[0][tokens], part.gate_up_proj[e]).chunk(2, -1)
                outputs.append(nn.functional.linear(nn.functional.silu(gate) * up, part.down_proj[e]))
        error = (outputs[0] - outputs[1]).abs().sum(-1)
        total += float((share[tokens] ** power * error).sum())
        count += len(tokens) * outputs[0].shape[-1]
    return total / count


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("route_weighted", [False, True])
def test_an_expert_s_loss_is_that_of_the_served_expert(
    route_weighted: bool, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with the routing in its weights, that of an independent computation from the router's output."""

    def take_the_last(*args: Any, **options: Any) -> SearchResult:
        return search_scale(*args, **{**options, "choose": False})

    monkeypatch.setattr("mbq_ao.calibration.block.search_scale", take_the_last)
    model, original, batches = build_model("mixtral"), build_model("mixtral"), batches_for("mixtral")
    config = mbq_config(batches, precision=precision, balance=False, **OPTIONS)
    settings = replace(config.settings(), route_weighted=route_weighted)
    chosen = lambda module, fqn: fqn.endswith("layers.0.mlp.experts.down_proj")  # noqa: E731
    plan, report = mbq.calibrate(model, batches, settings, filter_fn=chosen, progress=False)
    plan.apply(model)
    assert [g.linears for g in report.groups] == [[f"mlp.experts.down_proj.{e}"] for e in range(4)]
    for e, group in enumerate(report.groups):
        assert group.alpha > 0 and group.fold == "rows"
        expected = served_loss(model, original, batches, e, float(route_weighted))
        assert group.loss == pytest.approx(expected, rel=1e-3)
    assert report.num_linears == 4


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("family", ["mixtral", "llama4", "qwen2_moe"])
def test_the_loss_of_the_shared_scale_is_that_of_the_served_module(
    family: str, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_the_last(*args: Any, **options: Any) -> SearchResult:
        return search_scale(*args, **{**options, "choose": False})

    monkeypatch.setattr("mbq_ao.calibration.block.search_scale", take_the_last)
    model, batches = build_model(family), batches_for(family)

    @torch.no_grad()
    def outputs() -> Tensor:
        seen: list[Tensor] = []
        take = lambda m, a, y: seen.append((y[0] if isinstance(y, tuple) else y).flatten(0, -2))  # noqa: E731
        handle = moe(model).register_forward_hook(take)
        for batch in batches:
            model(**model_inputs(batch))
        handle.remove()
        return torch.cat(seen)

    before = outputs()
    config = mbq_config(
        batches,
        precision=precision,
        balance=False,
        filter_fn=lambda module, fqn: ".1." in fqn and fqn.endswith("experts.gate_up_proj"),
        **OPTIONS,
    )
    report = quantize_(model, config, progress=False)
    assert report is not None
    (group,) = report.groups
    assert group.fold == "weight" and group.alpha > 0 and group.linears[-1].endswith("experts.gate_up_proj")
    assert (before - outputs()).abs().mean().item() == pytest.approx(group.loss, rel=1e-3)
