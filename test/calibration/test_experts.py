"""Mixtures of experts: their groups, what is quantized, what each expert is calibrated on, and what is left alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from families import MIXTURES
from mixtures import OPTIONS, batches_for, moe, routing
from models import (
    assert_unchanged,
    build_batch,
    build_model,
    float_inputs,
    model_inputs,
    snapshot,
)
from test_matrix import KINDS, quantize_losslessly
from torch import Tensor, nn

from mbq_ao import MBQInt3Tensor, fuse_linears_, mbq_config, quantize_
from mbq_ao.calibration import block, experts, mbq
from mbq_ao.calibration.capture import find_blocks
from mbq_ao.calibration.fold import ScaleGroup
from mbq_ao.calibration.report import CalibrationReport, ExpertsReport, GroupReport
from mbq_ao.packed_weight import PackedWeight

pytestmark = pytest.mark.filterwarnings("ignore:no vision token found")


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("family", MIXTURES)
def test_quantize(family: str, precision: Any) -> None:
    model, batches = build_model(family), batches_for(family)
    with torch.no_grad():
        reference = model(**model_inputs(batches[0])).logits
    before = snapshot(model)
    report = quantize_(model, mbq_config(batches, precision=precision, **OPTIONS), progress=False)

    assert report is not None and report.logits_error < 1e-5 and report.not_scaled == []
    routers = {f"{name}.weight" for name in report.routers}
    rest = dict(item for name, block in find_blocks(model).items() for item in block.named_parameters(prefix=name))
    for name, parameter in rest.items():
        is_quantized = parameter.ndim > 1 and not name.endswith("_bias") and name not in routers
        assert isinstance(parameter, KINDS[precision]) == is_quantized, name
    assert routers <= rest.keys() and len(routers) >= len(report.experts) > 0
    assert all(name.endswith("_bias") for name in report.not_quantized)
    three_d = {name: p for name, p in rest.items() if p.ndim == 3}
    assert len(three_d) == 2 * len(report.experts)
    for name, parameter in three_d.items():
        assert parameter.shape == before[name][1].shape and parameter.dtype == before[name][1].dtype, name
    # What is neither quantized nor folded is the same object.
    changed = {f"{g.block}.{n}" for g in report.groups for n in (g.producer, *g.linears) if n}
    for name, (value, copy) in before.items():
        if not any(name.startswith(c.rpartition(".")[0] if c[-1].isdigit() else c) for c in changed):
            assert torch.equal(value, copy) and dict(model.named_parameters()).get(name, value) is value, name

    with torch.no_grad():
        logits = model(**model_inputs(batches[0])).logits
    assert logits.isfinite().all()
    assert 1e-3 < ((logits - reference).norm() / reference.norm()).item() < 0.9
    assert "MBQ" in str(moe(model).experts)
    assert not any("experts" in name for group in fuse_linears_(model) for name in group if "shared" not in name)
    with torch.no_grad():
        assert torch.equal(model(**model_inputs(batches[0])).logits, logits)


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("family", MIXTURES)
def test_only_rounding_changes_the_function(family: str, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build_model(family), build_batch(family, 9)
    before = routing(model, batch)
    assert quantize_losslessly(model, family, monkeypatch, precision=precision) < 1e-5
    after = routing(model, batch)
    assert torch.equal(before != 0, after != 0)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"recipe": "paper"}, {"recipe": "smoothquant"}, {"propagate_error": True}])
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "llama4", "gpt_oss"])
def test_other_recipes(family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    searches = {} if options.get("recipe") == "smoothquant" else {"n_grid": 3}
    config = mbq_config(batches_for(family), group_size=32, **({"recipe": "mbq"} | options), **searches)
    model = build_model(family)
    report = quantize_(model, config, progress=False)
    assert report is not None and report.logits_error < 1e-5 and report.experts[0].num_tokens
    assert isinstance(moe(model).experts.down_proj, MBQInt3Tensor)
    last = {tuple(g.linears): g for g in report.groups if g.block == report.experts[-1].block}
    down = [g for linears, g in last.items() if ".experts.down_proj." in linears[0]]
    assert len(down) == (
        0 if options.get("recipe") == "smoothquant" or (family, *options) == ("gpt_oss", "recipe") else 4
    )
    assert any("experts.gate_up_proj" in n for linears in last for n in linears)
    not_scaled = any("experts.down_proj" in name for name in report.not_scaled)
    assert not_scaled == (not down)
    with torch.no_grad():
        assert model(**model_inputs(config.calib_data[0])).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "gpt_oss", "deepseek_v3"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    model = build_model(family, dtype)
    batches = [float_inputs(b, dtype) for b in batches_for(family)]
    expected = [routing(model, b) for b in batches]
    report = quantize_(model, mbq_config(batches, precision="w4a8", balance=False, **OPTIONS), progress=False)
    assert report is not None and 0 < report.logits_error < 0.1
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert report.experts[-1].num_tokens == sum((r != 0).sum(0) for r in expected).tolist()
    with torch.no_grad():
        assert model(**model_inputs(batches[0])).logits.isfinite().all()


# --- experts that cannot be calibrated ---------------------------------------------------------------------------


def test_experts_without_tokens_are_rounded_plainly() -> None:
    model, original = (build_model("qwen3_moe", num_experts=24, num_experts_per_tok=1) for _ in range(2))
    batch = build_batch("qwen3_moe", 6)
    report = quantize_(model, mbq_config([batch], **OPTIONS), progress=False)
    assert report is not None
    for index, record in enumerate(report.experts):
        chosen = routing(original, batch, index) != 0
        assert record.num_tokens == chosen.sum(0).tolist()
        down = [g for g in report.groups if g.block == record.block and ".down_proj." in g.linears[0]]
        assert [g.num_tokens for g in down] == record.num_tokens
        assert len(record.uncalibrated) >= 18
        for e, group in enumerate(down):
            assert (group.alpha, group.loss) == (0, 0) if e in record.uncalibrated else group.loss > 0
        quantized, plain = moe(model, index).experts.down_proj, moe(original, index).experts.down_proj
        for e in record.uncalibrated:
            assert torch.equal(quantized[e].dequantize(), MBQInt3Tensor.from_hp(plain[e].detach(), 32).dequantize())
        line = f"{record.block}.mlp.experts: no calibration token for {len(record.uncalibrated)} of 24 experts"
        assert line in str(report)
    with torch.no_grad():
        assert model(**model_inputs(build_batch("qwen3_moe", 40, seed=5))).logits.isfinite().all()


def test_experts_whose_tokens_cannot_be_told() -> None:
    """Something that is not a choice lies between the hidden state and the experts."""
    model = build_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda m, a: (a[0].flip(-1), *a[1:]))
    report = quantize_(model, mbq_config(batches_for("mixtral"), **OPTIONS), progress=False)
    assert report is not None and [r.num_tokens for r in report.experts] == [[], []]
    assert "model.layers.1.mlp.experts: it cannot be told which tokens the experts get" in str(report)
    assert isinstance(moe(model).experts.gate_up_proj, MBQInt3Tensor)


# --- what is left alone, refused, restored ------------------------------------------------------------------------


def test_the_filter_gets_the_parameter_s_name_and_no_router() -> None:
    model, names = build_model("qwen2_moe"), []

    def passes(module: nn.Module, fqn: str) -> bool:
        assert isinstance(module, nn.Linear)
        names.append(fqn)
        return fqn.endswith("experts.down_proj")

    report = quantize_(model, mbq_config(batches_for("qwen2_moe"), filter_fn=passes, **OPTIONS), progress=False)
    assert report is not None and report.num_linears == 8
    layer = [n.removeprefix("model.layers.0.") for n in names if ".0." in n]
    assert layer == [
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.experts.{x}_proj" for x in ("gate_up", "down")),
        *(f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")),
    ]
    quantized = [n for n, p in model.named_parameters() if isinstance(p, PackedWeight)]
    assert quantized == [f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)]
    assert f"{'model.layers.0'}.mlp.experts.gate_up_proj" in report.not_quantized
    assert report.routers == [f"model.layers.{i}.mlp.{x}" for i in range(2) for x in ("gate", "shared_expert_gate")]


def test_three_dimensions_that_are_no_experts_are_left_alone() -> None:
    """A parameter that two modules share, and those that are used in other ways."""
    model = build_model("mixtral")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    first.register_parameter("extra", nn.Parameter(torch.randn(4, 64, 64)))
    first.register_forward_hook(lambda m, a, y: y + 0 * a[0] @ m.extra.sum(0))
    second.register_parameter("unused", nn.Parameter(torch.randn(4, 64, 64)))
    before = snapshot(model)
    report = quantize_(model, mbq_config(batches_for("mixtral"), **OPTIONS), progress=False)
    assert report is not None
    left = ("0.mlp.experts.down_proj", "0.mlp.experts.extra", "1.mlp.experts.down_proj", "1.mlp.experts.unused")
    assert sorted(report.not_quantized) == [f"model.layers.{name}" for name in left]
    assert first.down_proj is second.down_proj is before["model.layers.0.mlp.experts.down_proj"][0]
    assert all(isinstance(experts.gate_up_proj, MBQInt3Tensor) for experts in (first, second))


def test_scale_groups_cannot_name_experts() -> None:
    model = build_model("mixtral")
    before = snapshot(model)
    groups = [ScaleGroup(("mlp.experts.gate_up_proj.0",), "post_attention_layernorm")]
    with pytest.raises(ValueError, match=r"scale_groups cannot name experts: 'mlp\.experts\.gate_up_proj\.0'"):
        quantize_(model, mbq_config(batches_for("mixtral"), scale_groups=groups, **OPTIONS), progress=False)
    assert_unchanged(model, before)


def test_quantized_experts_are_not_calibrated_again() -> None:
    model = build_model("mixtral")
    config = mbq_config(batches_for("mixtral"), **OPTIONS)
    quantize_(model, config, lambda module, fqn: fqn.endswith("experts.down_proj"), progress=False)
    with pytest.raises(ValueError, match=r"experts\.down_proj.* is already quantized \(MBQInt3Tensor\)"):
        quantize_(model, config, progress=False)


FUNCTIONS = ["capture_streams", "find_groups", "modality_sensitivity", "check_logits", "_summarise", "check_linears"]


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "llama4"])
@pytest.mark.parametrize("function", [*FUNCTIONS, "expert_rows", "common", "ExpertLinear"])
def test_an_interrupt_leaves_the_model_as_it_was(family: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = {"expert_rows": block, "common": block, "ExpertLinear": experts}.get(function, mbq)
    original, calls = getattr(module, function), iter(range(10**9))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == (3 if function in ("expert_rows", "ExpertLinear") else 0):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    model = build_model(family)
    before = snapshot(model)
    tables = [(m, m._parameters, dict(m._parameters), m._modules, dict(m._modules)) for m in model.modules()]
    implementation = model.config.get_text_config()._experts_implementation
    monkeypatch.setattr(module, function, interrupted)
    config = mbq_config(batches_for(family), propagate_error=True, **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, config, progress=False)
    assert_unchanged(model, before)
    assert model.config.get_text_config()._experts_implementation == implementation
    for m, parameters, its_parameters, modules, its_modules in tables:
        assert m._parameters is parameters and list(parameters.items()) == list(its_parameters.items())
        assert m._modules is modules and list(modules.items()) == list(its_modules.items())


@pytest.mark.parametrize("options", [{}, {"precision": "w4a8", "propagate_error": True}])
def test_a_calibration_is_taken_up_again(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrated(work_dir: Path | None) -> tuple[dict[str, list[Tensor]], dict[str, Any], int]:
        model = build_model("qwen3_vl_moe")
        config = mbq_config(batches_for("qwen3_vl_moe"), **OPTIONS, **options)
        report = quantize_(model, config, progress=False, work_dir=work_dir)
        assert report is not None
        data = {
            name: [getattr(p, part) for part in p.__tensor_flatten__()[0]] if isinstance(p, PackedWeight) else [p]
            for name, p in model.state_dict().items()
        }
        of_the_call = {"seconds": 0, "stage_seconds": {}, "block_seconds": {}, "num_resumed": 0}
        return data, asdict(report) | of_the_call, report.num_resumed

    expected, expected_report, _ = calibrated(None)
    with monkeypatch.context() as patch:
        patch.setattr(mbq, "check_logits", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            calibrated(tmp_path)
    result, report, num_resumed = calibrated(tmp_path)
    assert num_resumed == 2 and report == expected_report
    for name, parts in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(result[name], parts, strict=True)), name


def test_nearly_equal_experts_do_not_fail_the_check_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folding rounds the router's columns, so that a token goes to the other one of two experts."""
    changes = []
    original = mbq.check_logits
    monkeypatch.setattr(mbq, "check_logits", lambda *args: changes.append(original(*args)) or changes[-1])
    model = build_model("mixtral", num_experts_per_tok=1)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.gate.weight
            weight[1:] = weight[0] + 3e-8 * torch.randn_like(weight[1:])
    report = quantize_(model, mbq_config(batches_for("mixtral"), **OPTIONS), progress=False)
    assert report is not None and report.logits_error == changes[0] > 1e-3


def test_report() -> None:
    def group(linears: list[str], producer: str | None, loss: float, num_tokens: int | None = None) -> GroupReport:
        fold = "rows" if producer else "act_pre_scale"
        return GroupReport("layers.0", producer, linears, fold, loss / 4, [2.0, loss], 2.0, loss, 0.5, 0.5, num_tokens)

    report = CalibrationReport(
        settings={},
        groups=[
            group(["mlp.gate", "mlp.experts.up"], "norm", 1.0),
            *(group([f"mlp.experts.down.{e}"], f"mlp.experts.up.{e}", 1.0 + e / 2, 3 * e) for e in range(3)),
            *(group([f"mlp.others.down.{e}"], None, 1.0, 7) for e in range(2)),
        ],
        experts=[
            ExpertsReport("layers.0", "mlp.experts", [0, 3, 6]),
            ExpertsReport("layers.0", "mlp.others", [7, 7]),
            ExpertsReport("layers.1", "mlp.experts", []),
        ],
        routers=["layers.0.mlp.gate"],
        num_linears=8,
    )
    assert_expected_inline(
        str(report),
        """\
block     linears  folded into    alpha      r  loss RTN  loss  gain
--------  -------  -------------  -----  -----  --------  ----  ----
layers.0  gate up  norm            0.25  0.500         2     1   50%
          down     up              0.38  0.500         6   4.5   25%
          down     act_pre_scale   0.25  0.500         4     2   50%
8 linears: 0.0 MB -> 0.0 MB (nanx smaller), calibrated in 0 s
search loss 42% below plain rounding on average; logits moved by 0.0e+00 (relative) through folding alone
experts: 5; calibration tokens of each: 0 to 7, median 6
layers.0.mlp.experts: no calibration token for 1 of 3 experts; what is theirs alone is rounded plainly: 0
layers.1.mlp.experts: it cannot be told which tokens the experts get; what is theirs alone is rounded plainly
routers, never quantized: layers.0.mlp.gate""",
    )
