"""transformers' mixtures of experts with quantized experts: each of its implementations, compiled, trained, saved."""

import copy
import io
from pathlib import Path

import pytest
import torch
from packed_weights import Kind, assert_same_data, each_kind
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, quantize_
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mbq_ao import Int3WeightOnlyConfig, Int8DynamicActivationInt4WeightMBQConfig, MBQInt3Tensor, MBQW4A8Tensor
from mbq_ao.packed_weight import PackedWeight
from mbq_ao.safetensors_format import load_safetensors, save_safetensors

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}
CONFIGS = {MBQInt3Tensor: Int3WeightOnlyConfig, MBQW4A8Tensor: Int8DynamicActivationInt4WeightMBQConfig}
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
EXPERTS = r"re:.*\.experts\.\w*proj\w*"  # with their biases
# Of Llama 4 (E, K, N) is in the model's code only, and of its experts there is one implementation.
FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "llama4"]
each_way = pytest.mark.parametrize(
    ("family", "implementation"),
    [(f, i) for f in FAMILIES for i in IMPLEMENTATIONS if f != "llama4" or i == "eager"],
)


def build(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "qwen3_moe":
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, moe_intermediate_size=96, num_experts=5))
    elif family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=5))
    elif family == "gpt_oss":
        model = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=5))
    else:
        sizes = SIZES | {"num_experts_per_tok": 1, "intermediate_size_mlp": 96, "attention_chunk_size": 32}
        model = Llama4ForCausalLM(Llama4TextConfig(**sizes, num_local_experts=5, interleave_moe_layer_step=1))
    return model.to(dtype).eval()


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".experts")]


def build_pair(
    family: str, kind: Kind, implementation: str, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with quantized experts, and a plain one with the same weights."""
    model = build(family, dtype)
    for module in experts_of(model) if family == "llama4" else ():
        module.is_transposed = True
    quantize_(model, FqnToConfig({EXPERTS: CONFIGS[kind](group_size=32)}), filter_fn=None)
    plain = build(family, dtype)
    plain.load_state_dict(
        {k: v.dequantize() if isinstance(v, PackedWeight) else v for k, v in model.state_dict().items()}
    )
    for each in (model, plain) if family != "llama4" else ():
        each.set_experts_implementation(implementation)
    return model, plain


def ids(length: int = 7) -> Tensor:
    return torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(0))


def assert_near(y: Tensor, expected: Tensor, kind: Kind) -> None:
    """W4A8 rounds the activations, too, and a router may then choose another expert."""
    error = 0.1 if kind is MBQW4A8Tensor else 1e-5 if y.dtype == torch.float32 else 0.02
    assert y.isfinite().all()
    assert (y - expected).norm() <= error * expected.norm()


@each_kind
@each_way
def test_logits_and_gradients_are_those_of_the_dequantized_weights(
    family: str, implementation: str, kind: Kind
) -> None:
    model, plain = build_pair(family, kind, implementation)
    packed = [p for module in experts_of(model) for p in module.parameters() if isinstance(p, kind)]
    assert len(packed) == 4
    assert all(p.transposed == (family in ("gpt_oss", "llama4")) for p in packed)
    embeddings = model.get_input_embeddings()(ids()).detach()
    grads = []
    for each in (model, plain):
        x = embeddings.clone().requires_grad_()
        each(inputs_embeds=x).logits.square().sum().backward()
        grads.append(x.grad)
    assert_near(grads[0], grads[1], kind)
    with torch.no_grad():
        assert_near(model(ids()).logits, plain(ids()).logits, kind)


@each_kind
@pytest.mark.parametrize(
    ("family", "implementation", "dtype"),
    [
        ("qwen3_moe", "batched_mm", torch.float32),
        ("qwen3_moe", "grouped_mm", torch.float32),  # an op of transformers' own
        ("gpt_oss", "grouped_mm", torch.bfloat16),  # torch's
        ("llama4", "eager", torch.float32),  # a bmm, no loop that depends on the data
    ],
)
def test_compiled_in_one_graph_where_the_plain_model_is(
    family: str, implementation: str, dtype: torch.dtype, kind: Kind
) -> None:
    model, _ = build_pair(family, kind, implementation, dtype)
    layer = model.model.layers[0]
    moe = layer.feed_forward if family == "llama4" else layer.mlp  # all of a model takes a minute to compile
    torch._dynamo.reset()
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for length in (7, 12):
            x = torch.randn(2, length, 64).to(dtype)
            torch.testing.assert_close(compiled(x)[0], moe(x)[0])


@each_kind
def test_implementations_agree(kind: Kind) -> None:
    model, _ = build_pair("qwen3_moe", kind, "eager")
    with torch.no_grad():
        expected = model(ids()).logits
        for implementation in IMPLEMENTATIONS[1:]:
            model.set_experts_implementation(implementation)
            torch.testing.assert_close(model(ids()).logits, expected)


@each_kind
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_saved_loaded_copied_and_generating(family: str, kind: Kind, tmp_path: Path) -> None:
    model, _ = build_pair(family, kind, "grouped_mm")
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    save_safetensors(model, tmp_path / "model.safetensors")
    states = [torch.load(file, weights_only=True), load_safetensors(tmp_path / "model.safetensors")]
    loaded = [build(family) for _ in states]
    for other, state in zip(loaded, states, strict=True):
        other.load_state_dict(state, assign=True)
    name = "model.layers.1.mlp.experts.down_proj"
    for other in (*loaded, copy.deepcopy(model)):
        assert_same_data(other.get_parameter_or_buffer(name).data, model.get_parameter_or_buffer(name).data)
        tokens = other.generate(ids(), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(tokens, model.generate(ids(), max_new_tokens=3, do_sample=False, pad_token_id=0))


@each_kind
def test_config_rounds_what_it_names(kind: Kind) -> None:
    model, full = build("gpt_oss"), build("gpt_oss")
    quantize_(model, FqnToConfig({r"re:.*\.0\.mlp\.experts\.\w*proj\w*": CONFIGS[kind](group_size=32)}), filter_fn=None)
    first, second = experts_of(model)
    expected = kind.from_hp(experts_of(full)[0].gate_up_proj.mT, 32).mT
    assert_same_data(first.gate_up_proj.data, expected)
    assert type(first.gate_up_proj_bias) is type(second.gate_up_proj) is nn.Parameter
    assert f"gate_up_proj={first.gate_up_proj}, down_proj={first.down_proj}" in repr(model)
    with pytest.raises(ValueError, match="gate_up_proj of this GptOssExperts is quantized already"):
        quantize_(model, FqnToConfig({EXPERTS: CONFIGS[kind]()}), filter_fn=None)


@each_kind
def test_what_configs_refuse(kind: Kind) -> None:
    with pytest.raises(ValueError, match=r"nothing says .*: set Llama4TextExperts.is_transposed to False or"):
        quantize_(build("llama4"), FqnToConfig({EXPERTS: CONFIGS[kind]()}), filter_fn=None)
    with pytest.raises(ValueError, match=r"this SiLUActivation has no weight to quantize; exclude the module"):
        quantize_(build("mixtral"), FqnToConfig({r"re:.*\.experts\.act_fn": CONFIGS[kind]()}), filter_fn=None)
    layer = nn.Conv1d(8, 8, 3)
    with pytest.raises(ValueError, match=r"the weight of this Conv1d is not that of a linear layer"):
        quantize_(layer, CONFIGS[kind](), filter_fn=lambda module, name: True)
