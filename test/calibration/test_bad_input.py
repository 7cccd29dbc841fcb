"""Bad input: a clear error each (the thing, the value, the rule, the way out), and the model untouched."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchao.quantization as torchao_quantization
from expecttest import assert_expected_inline as expect
from models import assert_unchanged, build_batch, build_model, snapshot
from torch import nn

from mbq_ao import Int3WeightOnlyConfig, MBQInt3Tensor, ScaleGroup, mbq_config, quantize_
from mbq_ao.calibration import mbq, sensitivity
from mbq_ao.calibration.settings import RECIPES, CalibrationSettings

LAYERS = "model.language_model.layers"


@pytest.fixture
def model() -> nn.Module:
    return build_model("llava")


def refused(
    model: nn.Module,
    calib_data: Any,
    exception: type[BaseException] = ValueError,
    filter_fn: Any = None,
    **options: Any,
) -> str:
    """The error's text, after checking that the model is what it was."""
    before = snapshot(model)
    with pytest.raises(exception) as caught:
        quantize_(
            model, mbq_config(calib_data, **{"group_size": 32, "n_grid": 2, **options}), filter_fn, progress=False
        )
    assert_unchanged(model, before)
    return str(caught.value)


def quantized(model: nn.Module) -> bool:
    return any(isinstance(p, MBQInt3Tensor) for p in model.parameters())


@pytest.mark.parametrize("calib_data", [[], iter(())], ids=["empty list", "exhausted generator"])
def test_no_batches(model: nn.Module, calib_data: Any) -> None:
    expect(
        refused(model, calib_data),
        """\
calib_data is empty: got no batch; pass at least one dict as a transformers processor returns it (a generator that \
was read before is exhausted: pass a list)""",
    )


def test_one_dict_instead_of_a_list(model: nn.Module) -> None:
    expect(
        refused(model, build_batch("llava"), TypeError),
        """calib_data must be an iterable of dicts, got dict; pass a list of what the processor returns""",
    )


def test_a_batch_that_is_no_dict(model: nn.Module) -> None:
    expect(
        refused(model, [build_batch("llava"), torch.zeros(3)], TypeError),
        """calibration batch 1 must be a dict of model inputs, got Tensor""",
    )


def test_a_batch_without_tokens(model: nn.Module) -> None:
    expect(
        refused(model, [{"pixel_values": torch.zeros(1, 3, 28, 28)}]),
        """calibration batch 0 has neither input_ids nor inputs_embeds, got keys ['pixel_values']""",
    )


def test_input_ids_without_a_batch_dimension(model: nn.Module) -> None:
    expect(
        refused(model, [{"input_ids": torch.ones(5, dtype=torch.long)}]),
        """\
calibration batch 0 needs input_ids of shape (B, T) or inputs_embeds of shape (B, T, C), got (5,)""",
    )


def test_labels_without_an_answer(model: nn.Module) -> None:
    batch = build_batch("llava")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["labels"][:, 0] = 5  # nothing predicts it
    expect(
        refused(model, [build_batch("llava"), batch]),
        """\
labels of calibration batch 1 are all -100 after the first token: no answer to calibrate for (1 of 2 batches); label \
the answer tokens with their ids, or drop the batch""",
    )


def test_labels_of_another_shape(model: nn.Module) -> None:
    batch = build_batch("llava")
    batch["labels"] = batch["labels"][:, 1:]
    expect(
        refused(model, [batch]),
        """labels of calibration batch 0 must have the shape (1, 15) of the inputs, got (1, 14)""",
    )


@pytest.mark.parametrize("key", ["vision_mask", "answer_mask"])
def test_masks_of_another_shape_or_dtype(model: nn.Module, key: str) -> None:
    batch = build_batch("llava")
    length = batch["input_ids"].shape[1]
    text = refused(model, [{**batch, key: torch.ones(1, length - 1, dtype=torch.bool)}])
    assert text == f"{key} of calibration batch 0 must be a bool tensor of shape (1, 15), got torch.bool (1, 14)"
    text = refused(model, [{**batch, key: torch.ones(1, length)}])
    assert text == f"{key} of calibration batch 0 must be a bool tensor of shape (1, 15), got torch.float32 (1, 15)"


def test_embeddings_without_labels(model: nn.Module) -> None:
    expect(
        refused(model, [{"inputs_embeds": torch.randn(1, 6, 64)}]),
        """calibration batch 0 has inputs_embeds and no labels: the loss has no target; pass labels (B, T)""",
    )


def test_batches_without_labels_use_all_text_and_say_so(model: nn.Module) -> None:
    batch = build_batch("llava")
    labelled = dict(batch)
    del batch["labels"]
    with pytest.warns(UserWarning) as caught:
        report = quantize_(model, mbq_config([batch], group_size=32, n_grid=3), progress=False)
    expect(
        str(caught[0].message),
        """\
calibration batch 0 has no labels: all text tokens (neither vision nor padding) are used as answer. Pass labels \
with -100 on the prompt to calibrate for the answers""",
    )
    ids = labelled["input_ids"]
    labelled["labels"] = ids.masked_fill(ids == 120, -100)
    other = quantize_(build_model("llava"), mbq_config([labelled], group_size=32, n_grid=3), progress=False)
    assert report is not None and other is not None
    assert [g.losses for g in report.groups] == [g.losses for g in other.groups]


def test_no_vision_token_switches_the_balance_off_and_says_so() -> None:
    batches = [build_batch("llama")]
    with pytest.warns(UserWarning) as caught:
        report = quantize_(build_model("llama"), mbq_config(batches, group_size=32, n_grid=3), progress=False)
    expect(
        str(caught[0].message),
        """\
no vision token found in any calibration batch: the modality balance is off and every token counts alike. Calibrate \
with images, or pass a bool `vision_mask` of shape (B, T) with each batch""",
    )
    assert report is not None and all(g.sensitivity is None for g in report.groups)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        model.get_parameter(f"{LAYERS}.1.mlp.up_proj.weight")[3, 4] = value
    expect(
        refused(model, [build_batch("llava")]),
        """\
NaN or inf in model.language_model.layers.1.mlp.up_proj.weight: a quantized weight could not represent it; repair \
the checkpoint, or leave the layer out with filter_fn""",
    )


def test_activations_that_are_not_finite(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter(f"{LAYERS}.0.post_attention_layernorm.weight")[3] = float("nan")
    expect(
        refused(model, [build_batch("llava")]),
        """\
NaN or inf in the activations at the input of model.language_model.layers.1 on calibration batch 0: the scales would \
be meaningless. Check the model's weights and dtype (float16 overflows where bfloat16 does not) and the batch""",
    )


def test_a_model_quantized_already(model: nn.Module) -> None:
    quantize_(model, mbq_config([build_batch("llava")], group_size=32, n_grid=2), progress=False)
    before = dict(model.named_parameters())
    with pytest.raises(ValueError) as caught:
        quantize_(model, mbq_config([build_batch("llava")], group_size=32), progress=False)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    expect(
        str(caught.value),
        """\
model.language_model.layers.0.self_attn.q_proj.weight is already quantized (MBQInt3Tensor): scales cannot be \
searched on quantized weights; load the full-precision model again""",
    )


def test_linears_shared_between_modules(model: nn.Module) -> None:
    layers = model.get_decoder().layers
    layers[1].mlp.up_proj = layers[0].mlp.up_proj
    expect(
        refused(model, [build_batch("llava")]),
        """\
model.language_model.layers.0.mlp.up_proj.weight and model.language_model.layers.1.mlp.up_proj.weight are one \
parameter: quantizing it for one place would change the other; untie them (copy the weight), or leave both out with \
filter_fn""",
    )


def test_weights_shared_between_linears(model: nn.Module) -> None:
    layers = model.get_decoder().layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    assert "are one parameter: quantizing it for one place" in refused(model, [build_batch("llava")])


def test_weights_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = build_model("llava")
    expect(
        refused(model, [build_batch("llava")]).replace("patch_embedding.weight", "<name>"),
        """\
model.vision_tower.embeddings.class_embedding is on the meta device and has no values: load the model's weights \
before quantize_ (from_pretrained without an offloading device_map)""",
    )


def test_dtypes_that_are_not_supported(model: nn.Module) -> None:
    model.get_decoder().layers.to(torch.float64)
    expect(
        refused(model, [build_batch("llava")]),
        """\
model.language_model.layers.0.self_attn.q_proj.weight has dtype torch.float64; supported are float32, float16 and \
bfloat16: convert the model with .to(torch.bfloat16)""",
    )


def test_a_model_without_decoder_layers() -> None:
    expect(
        refused(nn.Sequential(nn.Linear(8, 8)), [build_batch("llava")]),
        """\
Sequential has no decoder layers: found no nn.ModuleList with parameters; pass blocks=[...] with the layers to \
quantize""",
    )


def test_blocks_of_another_model(model: nn.Module) -> None:
    expect(
        refused(model, [build_batch("llava")], blocks=[nn.Linear(3, 3)]),
        """blocks must be modules of the model, got a Linear that is not in it""",
    )


def test_blocks_that_do_not_run(model: nn.Module) -> None:
    layers = model.get_decoder().layers
    model.add_module("spare", nn.ModuleList([nn.Linear(64, 64)]))
    assert "every block must run once" in refused(
        model, [build_batch("llava")], RuntimeError, blocks=[*layers, model.get_submodule("spare.0")]
    )


def test_blocks_in_another_order(model: nn.Module) -> None:
    layers = list(model.get_decoder().layers)
    text = refused(model, [build_batch("llava")], RuntimeError, blocks=layers[::-1])
    assert "runs model.language_model.layers.0 on calibration batch 0 as its block number 0, where number 1" in text


def test_a_linear_in_two_groups(model: nn.Module) -> None:
    groups = [ScaleGroup(("mlp.gate_proj", "mlp.up_proj")), ScaleGroup(("mlp.up_proj",))]
    assert "mlp.up_proj is in two of scale_groups" in refused(model, [build_batch("llava")], scale_groups=groups)


def test_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        assert "call quantize_ outside of it" in refused(model, [build_batch("llava")])


def test_labels_of_int32_are_labels(model: nn.Module) -> None:
    batch = build_batch("llava")
    wide, narrow = (
        quantize_(
            build_model("llava"), mbq_config([{**batch, "labels": labels}], group_size=32, n_grid=2), progress=False
        )
        for labels in (batch["labels"], batch["labels"].int())
    )
    assert [g.losses for g in wide.groups] == [g.losses for g in narrow.groups]


def test_a_filter_that_matches_nothing(model: nn.Module) -> None:
    expect(
        refused(model, [build_batch("llava")], filter_fn=lambda module, fqn: False),
        """\
nothing to quantize: none of the 14 nn.Linear in the 2 decoder layers passes filter_fn; it is given names like \
'model.language_model.layers.0.self_attn.q_proj'""",
    )


def test_scale_groups_that_cannot_be_folded(model: nn.Module) -> None:
    wrong = ScaleGroup(("mlp.gate_proj", "mlp.up_proj"), producer="input_layernorm")
    text = refused(model, [build_batch("llava")], scale_groups=[wrong])
    assert re.search(r"folding 1/s into input_layernorm changes the block's output", text), text
    text = refused(model, [build_batch("llava")], scale_groups=[ScaleGroup(("mlp.fc9",))])
    assert "'mlp.fc9', which is not a linear that this block runs" in text


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("precision", "w2", "precision must be one of 'w3a16', got 'w2'"),
        ("recipe", "awq", "recipe must be one of 'best', 'paper', got 'awq'"),
        ("loss", "l1", "loss must be one of 'mae', 'mse', got 'l1'"),
        ("n_grid", 0, "n_grid must be an integer of at least 1, got 0; the paper uses 20"),
    ],
)
def test_unknown_choices(option: str, value: object, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        mbq_config([], **{option: value})


def test_group_sizes_that_are_not_supported() -> None:
    with pytest.raises(ValueError) as caught:
        mbq_config([], group_size=100)
    assert "group_size" in str(caught.value) and "100" in str(caught.value) and "128" in str(caught.value)


def interrupting(model: nn.Module, at_call: int) -> Callable[..., Any]:
    calls = iter(range(10**9))

    def hook(module: nn.Module, args: Any) -> None:
        if next(calls) == at_call:
            raise KeyboardInterrupt

    return hook


# In the capture, the sensitivity pass, the search of the second block (twice), and the check of the logits (twice).
@pytest.mark.parametrize("at_call", [0, 1, 2, 5, 6, 7])
def test_interrupted(model: nn.Module, at_call: int) -> None:
    handle = model.get_decoder().layers[1].register_forward_pre_hook(interrupting(model, at_call))
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, mbq_config([build_batch("llava")], group_size=32, n_grid=2), progress=False)
    handle.remove()
    assert_unchanged(model, before)
    assert all(not m.training for m in model.modules())


def test_interrupted_while_the_plan_is_applied(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10**9))
    parameter = nn.Parameter

    def interrupting_parameter(*args: Any, **kwargs: Any) -> nn.Parameter:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return parameter(*args, **kwargs)

    before = snapshot(model)
    plan, _ = mbq.calibrate(model, [build_batch("llava")], settings_of(n_grid=2), progress=False)
    assert_unchanged(model, before)
    with monkeypatch.context() as patch:
        patch.setattr(mbq.nn, "Parameter", interrupting_parameter)
        with pytest.raises(KeyboardInterrupt):
            plan.apply(model)
    assert next(calls) == 6
    assert_unchanged(model, before)
    plan.apply(model)
    assert quantized(model)


def test_a_move_that_fails_leaves_nothing_quantized(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(model)
    model_to = nn.Module.to

    def failing(self: nn.Module, *args: Any) -> nn.Module:
        if self is not model:
            return model_to(self, *args)
        for parameter in list(self.parameters())[:3]:
            parameter.data = parameter.data.double()  # a part of the model has moved by then
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(nn.Module, "to", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        quantize_(model, mbq_config([build_batch("llava")], group_size=32, n_grid=2), device="cpu", progress=False)
    monkeypatch.undo()
    assert_unchanged(model, before)


def test_interrupted_before_the_sensitivity_pass_has_begun(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clean-up must not stumble over blocks that were not prepared yet."""

    def interrupting_partial(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    before = snapshot(model)
    trainable = [p.requires_grad for p in model.parameters()]
    monkeypatch.setattr(sensitivity, "partial", interrupting_partial)
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, mbq_config([build_batch("llava")], group_size=32, n_grid=2), progress=False)
    assert_unchanged(model, before)
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_interrupted_while_switching_to_evaluation(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model.train()
    original = type(model).eval

    def interrupting_eval(self: nn.Module) -> nn.Module:
        original(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "eval", interrupting_eval)
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, mbq_config([build_batch("llava")], group_size=32, n_grid=2), progress=False)
    assert all(module.training for module in model.modules())


def settings_of(**options: Any) -> CalibrationSettings:
    config = mbq_config([], group_size=32, **options)
    return CalibrationSettings(
        recipe=RECIPES[config.recipe],
        balance=config.balance,
        loss=config.loss,
        propagate_error=config.propagate_error,
        n_grid=config.n_grid,
        quantizer=config.quantizer(),
    )


def test_training_mode_is_restored(model: nn.Module) -> None:
    model.train()
    model.get_decoder().layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    quantize_(model, mbq_config([build_batch("llava")], group_size=32, n_grid=2), progress=False)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_parameters_stay_trainable_or_frozen(model: nn.Module) -> None:
    layers = model.get_decoder().layers
    layers[0].input_layernorm.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    quantize_(model, mbq_config([build_batch("llava")], group_size=32, n_grid=2), progress=False)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (before[name] and not isinstance(parameter, MBQInt3Tensor)), name
    assert layers[1].input_layernorm.weight.requires_grad


def test_torchao_refuses_a_calibration_config(model: nn.Module) -> None:
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"call mbq_ao.quantize_\(model, mbq_config\(calib_data\)\)"):
        torchao_quantization.quantize_(model, mbq_config([build_batch("llava")]))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "config", [Int3WeightOnlyConfig(group_size=32), torchao_quantization.Int8WeightOnlyConfig()], ids=["int3", "int8"]
)
def test_other_configs_pass_through(config: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert quantize_(model, config, lambda module, fqn: fqn == "1") is None
    assert type(model[0].weight) is nn.Parameter
    assert type(model[1].weight) is not nn.Parameter
