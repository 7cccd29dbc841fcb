"""Computing on another device: what is there while a layer runs, and that everything returns.

The other device is "meta" here: it computes shapes only, but moves tensors as any device does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import assert_unchanged, build_batch, build_model, float_inputs, model_inputs, snapshot
from torch import nn

from mbq_ao import mbq_config, quantize_
from mbq_ao.calibration.capture import find_blocks
from mbq_ao.calibration.residency import Placement, computing_on, large_parts, resident_on
from mbq_ao.packed_weight import PackedWeight

META = torch.device("meta")


def devices(module: nn.Module) -> set[str]:
    return {t.device.type for t in (*module.parameters(), *module.buffers())}


@pytest.fixture
def model() -> nn.Module:
    model = build_model("llava")
    model.get_decoder().layers[1].register_buffer("extra", torch.ones(3))
    return model


def test_a_layer_is_there_only_while_it_runs(model: nn.Module) -> None:
    layers = list(find_blocks(model).values())
    before = snapshot(model)
    seen: list[list[set[str]]] = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append([devices(x) for x in layers]))
        for layer in layers
    ]
    input_ids = build_batch("llama")["input_ids"].to(META)
    with computing_on(META, model, layers):
        assert [devices(layer) for layer in layers] == [{"cpu"}, {"cpu"}]
        assert model.get_decoder().norm.weight.is_meta and not model.lm_head.weight.is_meta
        assert model(input_ids=input_ids).logits.is_meta
        assert [devices(layer) for layer in layers] == [{"cpu"}, {"cpu"}]
    for handle in handles:
        handle.remove()
    assert seen == [[{"meta"}, {"cpu"}], [{"cpu"}, {"meta"}]]
    assert_unchanged(model, before)


def test_what_is_large(model: nn.Module) -> None:
    layers = list(find_blocks(model).values())
    large = large_parts(model, layers)
    names = {module: name for name, module in model.named_modules()}
    assert [names[part] for part in large] == [
        "model.language_model.layers.0",
        "model.language_model.layers.1",
        "model.vision_tower.encoder.layers.0",
        "model.vision_tower.encoder.layers.1",
        "model.language_model.embed_tokens",
        "lm_head",
    ]
    # Blocks that lie in a member of a list keep that list's member from being one.
    mlps = [layer.mlp for layer in layers]
    assert [names[part].rpartition(".")[2] for part in large_parts(model, mlps)][:2] == ["mlp", "mlp"]
    assert not set(layers) & set(large_parts(model, mlps))


def test_a_tensor_is_kept_once() -> None:
    placement = Placement(META)
    mask = torch.ones(3)
    assert placement.keep(mask) is mask  # it is there already
    fetched = placement.fetch({"mask": mask, "sizes": (mask, 4)})
    assert fetched["mask"].is_meta and fetched["sizes"][1] == 4
    assert placement.keep(fetched)["mask"] is mask
    nowhere = Placement()
    assert nowhere.fetch(mask) is nowhere.keep(mask) is mask


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_everything_returns_after_an_exception(model: nn.Module, exception: type[BaseException]) -> None:
    layers = list(find_blocks(model).values())
    before = snapshot(model)

    def stop(module: nn.Module, args: Any) -> None:
        raise exception("stop")

    handle = layers[1].mlp.register_forward_pre_hook(stop)
    input_ids = build_batch("llama")["input_ids"].to(META)
    with pytest.raises(exception, match="stop"), computing_on(META, model, layers):
        model(input_ids=input_ids)
    handle.remove()
    assert_unchanged(model, before)


def test_a_forward_that_was_replaced_before_is_put_back(model: nn.Module) -> None:
    layers = list(find_blocks(model).values())
    own = layers[0].forward
    layers[0].forward = own
    with computing_on(META, model, layers):
        assert layers[0].forward is not own
    assert layers[0].__dict__["forward"] is own
    assert "forward" not in layers[1].__dict__


def test_a_resident_layer_has_copies(model: nn.Module) -> None:
    layer = model.get_decoder().layers[1]
    layer.mlp.up_proj.weight.requires_grad_(False)
    before = snapshot(layer)
    with resident_on(META, layer):
        assert devices(layer) == {"meta"}
        assert {n: p.requires_grad for n, p in layer.named_parameters()} == {
            n: p.requires_grad for n, (p, _) in before.items() if isinstance(p, nn.Parameter)
        }
        with resident_on(META, layer):  # as when a layer that is there already runs its forward
            assert devices(layer) == {"meta"}
        assert devices(layer) == {"meta"}
    assert_unchanged(layer, before)


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_where_it_is_already_nothing_moves(model: nn.Module, device: torch.device | None) -> None:
    layers = list(find_blocks(model).values())
    before = snapshot(model)
    with computing_on(device, model, layers), resident_on(device, layers[0]):
        assert all(a is b for a, (b, _) in zip(model.parameters(), before.values(), strict=False))
        with torch.no_grad():
            model(**model_inputs(build_batch("llava")))
    assert_unchanged(model, before)


@pytest.mark.parametrize("precision", ["w3a16", "w4a8"])
@pytest.mark.parametrize("propagate_error", [False, True])
def test_with_a_device_the_result_is_the_same(propagate_error: bool, precision: Any) -> None:
    options = {"precision": precision, "group_size": 32, "n_grid": 3, "propagate_error": propagate_error}
    reports, models = [], []
    for device in (None, "cpu", torch.device("cpu")):
        model = build_model("qwen3_vl")
        config = mbq_config([build_batch("qwen3_vl")], **({"recipe": "mbq"} | options))
        reports.append(quantize_(model, config, device=device, progress=False))
        models.append(model)
    for report, model in zip(reports[1:], models[1:], strict=True):
        assert report.records() == reports[0].records()
        for expected, actual in zip(models[0].parameters(), model.parameters(), strict=True):
            if isinstance(expected, PackedWeight):
                assert torch.equal(expected.qdata, actual.qdata)
            assert torch.equal(dense(expected), dense(actual))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_a_model_on_the_host_is_calibrated_on_the_gpu(family: str) -> None:
    batches = [float_inputs(build_batch(family, n, seed=n), torch.bfloat16) for n in (9, 12)]
    config = {"group_size": 32, "n_grid": 5}
    here, there = build_model(family, torch.bfloat16), build_model(family, torch.bfloat16)
    expected = quantize_(here.cuda(), mbq_config(batches, **({"recipe": "mbq"} | config)), progress=False)
    actual = quantize_(there, mbq_config(batches, **({"recipe": "mbq"} | config)), device="cuda", progress=False)
    assert expected is not None and actual is not None
    assert devices(there) == {"cuda"}
    for a, b in zip(actual.groups, expected.groups, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-3)


def dense(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.dequantize() if isinstance(parameter, PackedWeight) else parameter
