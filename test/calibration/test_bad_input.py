"""Bad models and options: a clear error each (the thing, the value, the rule, the way out), and the model untouched."""

import re
import warnings
from typing import Any

import pytest
import torch
import torchao.quantization as torchao_quantization
from expecttest import assert_expected_inline as expect
from families import REFUSED
from model_matrix import refusal
from models import assert_unchanged, build_batch, build_model, snapshot
from refusals import refused
from torch import Tensor, nn

from mbq_ao import Int3WeightOnlyConfig, ScaleGroup, mbq_config, quantize_

LAYERS = "model.language_model.layers"


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
    quantize_(model, mbq_config([build_batch("llava")], group_size=32, n_grid=2, recipe="mbq"), progress=False)
    before = dict(model.named_parameters())
    with pytest.raises(ValueError) as caught:
        quantize_(model, mbq_config([build_batch("llava")], group_size=32, recipe="mbq"), progress=False)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    expect(
        str(caught.value),
        """\
model.language_model.layers.0.self_attn.q_proj.weight is already quantized (MBQInt3Tensor): calibration needs \
full-precision weights; load the full-precision model again""",
    )


def test_a_model_quantized_to_w4a8_already(model: nn.Module) -> None:
    options: Any = {"precision": "w4a8", "n_grid": 2}
    quantize_(model, mbq_config([build_batch("llava")], **({"recipe": "mbq"} | options)), progress=False)
    with pytest.raises(ValueError, match=r"q_proj.weight is already quantized \(MBQW4A8Tensor\)"):
        quantize_(model, mbq_config([build_batch("llava")], **({"recipe": "mbq"} | options)), progress=False)


def test_a_scale_that_overflows_float16_loses_the_search() -> None:
    weight, s = torch.full((4, 8), 60.0, dtype=torch.float16), torch.full((8,), 2000.0)
    for precision in ("w3a16", "w4a8"):
        quantizer = mbq_config([], precision=precision).quantizer()
        output = nn.functional.linear(torch.ones(1, 8, dtype=torch.float16), quantizer.stand_in(weight, s))
        assert not output.isfinite().any()
        with pytest.raises(ValueError, match="holds NaN or infinite values"):
            quantizer.quantize(weight, s)


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


def test_layers_that_accelerate_places(model: nn.Module) -> None:
    accelerate = pytest.importorskip("accelerate")
    config = mbq_config([build_batch("llava")], group_size=32, n_grid=2, recipe="mbq")
    everywhere = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "model.language_model"), "cpu")
    accelerate.dispatch_model(model, {**everywhere, "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    with pytest.raises(ValueError) as caught:
        quantize_(model, config, compute_device="meta", progress=False)
    expect(
        str(caught.value),
        """\
accelerate places the layers of this model (device_map; hook on 'the model') and would take them back from 'meta': \
leave out device and compute_device to compute where they are, or load the model with device_map="cpu" and pass \
compute_device""",
    )
    report, expected = (quantize_(m, config, progress=False) for m in (model, build_model("llava")))
    assert report.records() == expected.records()


def test_weights_that_accelerate_offloaded(model: nn.Module) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError) as caught:
        quantize_(model, mbq_config([build_batch("llava")], group_size=32, recipe="mbq"), progress=False)
    expect(
        str(caught.value),
        """\
model.vision_tower.embeddings.class_embedding is on the meta device and has no values, as accelerate offloaded it \
(device_map): load the whole model into the host's memory, from_pretrained(..., device_map="cpu"), and call \
quantize_(..., compute_device="cuda"), which brings one layer at a time to the GPU""",
    )


def test_compute_device_without_a_calibration(model: nn.Module) -> None:
    with pytest.raises(
        ValueError, match="compute_device is for calibration, but Int3WeightOnlyConfig calibrates nothing"
    ):
        quantize_(model, Int3WeightOnlyConfig(), compute_device="cpu")


def test_weights_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = build_model("llava")
    expect(
        refused(model, [build_batch("llava")]).replace("patch_embedding.weight", "<name>"),
        """\
model.vision_tower.embeddings.class_embedding is on the meta device and has no values: load the whole model into \
the host's memory, from_pretrained(..., device_map="cpu"), and call quantize_(..., compute_device="cuda"), which \
brings one layer at a time to the GPU""",
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


class Custom(nn.Module):
    """As remote code may be: no get_decoder, the language model nested, a vision tower with more parameters."""

    def __init__(self, vision_width: int = 96) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.llm = nn.Module()
        self.llm.embed, self.llm.h = nn.Embedding(128, 32), nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
        self.head = nn.Linear(32, 128)
        if vision_width:
            self.visual = nn.Module()
            self.visual.blocks = nn.ModuleList([nn.Linear(vision_width, vision_width)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.llm.embed(input_ids)
        for layer in self.llm.h:
            x = x + layer(x)
        return self.head(x)


def test_a_model_of_which_it_is_unclear_where_the_decoder_is() -> None:
    model, batch = Custom(), build_batch("llama")
    expect(
        refused(model, [batch]),
        """\
Custom has no get_decoder() that leads to its language model, and several lists that may be the decoder layers: llm.h, \
visual.blocks; pass the right one, such as blocks=list(model.llm.h)""",
    )
    with pytest.warns(UserWarning, match="no vision token"):
        report = quantize_(
            model, mbq_config([batch], group_size=32, n_grid=2, blocks=list(model.llm.h), recipe="mbq"), progress=False
        )
        alone = quantize_(
            Custom(vision_width=0), mbq_config([batch], group_size=32, n_grid=2, recipe="mbq"), progress=False
        )
    assert report is not None and alone is not None
    assert {g.block for g in report.groups} == {g.block for g in alone.groups} == {"llm.h.0", "llm.h.1"}


def test_a_block_that_drops_tokens() -> None:
    class Drops(Custom):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            first, second = self.llm.h
            return self.head(second(first(self.llm.embed(input_ids))[:, 1:]))

    with pytest.warns(UserWarning, match="no vision token"):
        text = refused(Drops(vision_width=0), [build_batch("llama")], RuntimeError)
    assert "llm.h.1 on calibration batch 0 is given a hidden state of shape (1, 8, 32), but the block before" in text


@pytest.mark.filterwarnings("ignore:no vision token found")
@pytest.mark.parametrize("family", REFUSED)
def test_kinds_of_models_that_are_refused(family: str) -> None:
    """What they are told is in docs/models.md."""
    exception = RuntimeError if family == "git" else ValueError
    assert refused(build_model(REFUSED[family]), [build_batch(REFUSED[family])], exception) in refusal(family)


def test_images_that_do_not_match_their_tokens(model: nn.Module) -> None:
    good, bad = build_batch("llava"), build_batch("llava")
    bad["input_ids"][0, 3] = 5  # one place of the image less
    before = snapshot(model)
    with pytest.raises(ValueError, match="Image features and image tokens do not match") as caught:
        quantize_(model, mbq_config([good, bad], group_size=32, n_grid=2, recipe="mbq"), progress=False)
    assert_unchanged(model, before)
    expect(
        caught.value.__notes__[-1],
        """\
raised while LlavaForConditionalGeneration ran calibration batch 1: {'input_ids': (1, 15), 'attention_mask': (1, 15), \
'pixel_values': (1, 3, 28, 28)}""",
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
        ("precision", "w2", "precision must be one of 'w3a16', 'w4a8', got 'w2'"),
        ("recipe", "awq", "recipe must be one of 'best', 'mbq', 'paper', 'smoothquant', 'gptq', got 'awq'"),
        ("loss", "l1", "loss must be one of 'mae', 'mse', got 'l1'"),
        ("n_grid", 0, "n_grid must be an integer of at least 1, got 0; the paper uses 20"),
    ],
)
def test_unknown_choices(option: str, value: object, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        mbq_config([], **{option: value})


@pytest.mark.parametrize("size", [100, "row", True])
@pytest.mark.parametrize("options", [{}, {"precision": "w4a8"}, {"precision": "w4a8", "recipe": "paper"}])
def test_group_sizes_that_are_not_supported(options: dict[str, Any], size: Any) -> None:
    with pytest.raises(ValueError) as caught:
        mbq_config([], group_size=size, **options)
    assert str(caught.value) == f"group_size must be 32, 64, 128 or None (one scale a row), got {size!r}"


@pytest.mark.parametrize("option", [{"balance": True}, {"propagate_error": True}, {"n_grid": 5}])
def test_smoothquant_refuses_what_concerns_a_search(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        mbq_config([], recipe="smoothquant", **option)
    values = {"balance": None, "propagate_error": False, "n_grid": 20, **option}
    assert str(caught.value) == (
        'recipe="smoothquant" searches no scales: leave out balance, propagate_error and n_grid, '
        "got balance={balance!r}, propagate_error={propagate_error!r}, n_grid={n_grid!r}; ".format(**values)
        + 'recipe="mbq" takes them'
    )


@pytest.mark.parametrize("recipe", ["best", "gptq"])
@pytest.mark.parametrize("option", [{"scale_groups": []}, {"propagate_error": True}, {"n_grid": 5}])
def test_fits_refuse_what_concerns_a_search(recipe: Any, option: dict[str, Any]) -> None:
    values = {"scale_groups": None, "propagate_error": False, "n_grid": 20, **option}
    with pytest.raises(ValueError) as caught:
        mbq_config([], recipe=recipe, **option)
    assert str(caught.value) == (
        f'recipe="{recipe}" searches no scales: leave out scale_groups, propagate_error and n_grid, '
        "got scale_groups={scale_groups!r}, propagate_error={propagate_error!r}, n_grid={n_grid!r}; ".format(**values)
        + 'recipe="mbq" takes them'
    )


def test_gptq_may_weigh_vision_tokens() -> None:
    assert mbq_config([], recipe="gptq", balance=True).balance
    assert not mbq_config([], recipe="gptq").balance


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
