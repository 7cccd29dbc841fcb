"""Tensor parallel: two real processes compute what one does.

With W4A8 a linear that is split along its input rounds the activations a rank has, with steps of their own; what one
process computes is then the sum over the two halves of the weight (`by_halves`).
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from models import build_batch, build_model, model_inputs
from packaging.version import Version
from packed_weights import LINEAR_OPS, Kind, random_weight, random_x
from processes import on_ranks
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.distributed import DistributedConfig

from mbq_ao import MBQInt3Tensor, MBQW4A8Tensor, from_pretrained, save_pretrained
from mbq_ao.hf_quantizer import MBQCheckpointConfig, MBQHfQuantizer, packed_weights
from mbq_ao.tensor_parallel import is_sharded

pytestmark = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="two processes on CPUs; transformers would give each an accelerator"
)
OLD = Version(transformers.__version__) < Version("5.23")
loads_sharded = pytest.mark.skipif(OLD, reason="transformers before 5.23 loads no quantized checkpoint sharded")
COLUMNS, ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
PLAN = {f"model.language_model.layers.*.self_attn.{n}": "colwise" for n in COLUMNS[:3]}
PLAN |= {f"model.language_model.layers.*.mlp.{n}": "colwise" for n in COLUMNS[3:]}
PLAN |= {
    "model.language_model.layers.*.self_attn.o_proj": "rowwise",
    "model.language_model.layers.*.mlp.down_proj": "rowwise",
}


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def by_halves(linear: nn.Linear, x: Tensor) -> Tensor:
    halves = zip(x.chunk(2, -1), linear.weight.data.chunk(2, 1), strict=True)
    y = sum(F.linear(some, weight) for some, weight in halves)
    return y if linear.bias is None else y + linear.bias


# Two linears, by torch's own parallelize_module


class MLP(nn.Module):
    def __init__(self, kind: Kind, width: int, group_size: int | None, *, extras: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, width, bias=extras), nn.Linear(width, 96, bias=extras)
        for linear in (self.up, self.down):
            pre_scale = torch.linspace(0.5, 1.5, linear.in_features) if extras else None
            weight = kind.from_hp(random_weight(*linear.weight.shape) / 16, group_size, act_pre_scale=pre_scale)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if extras:
                nn.init.normal_(linear.bias, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


LINEARS = [
    {"width": 512, "group_size": 64, "extras": True, "src_data_rank": 0},
    {"width": 512, "group_size": 128, "extras": False, "src_data_rank": None},
    {"width": 320, "group_size": 128, "extras": True, "src_data_rank": 0},  # half a group, and half a tile
    {"width": 200, "group_size": None, "extras": True, "src_data_rank": None},  # one scale for both halves of a row
]


def mlps(rank: int) -> list[Any]:
    """(the output, the parts' shapes) of each case."""
    mesh, results = init_device_mesh("cpu", (2,)), []
    for kind in LINEAR_OPS:
        for case in LINEARS:
            options = dict(case)
            src_data_rank = options.pop("src_data_rank")
            mlp = MLP(kind, **options)
            if src_data_rank == 0 and rank == 1:  # rank 0's counts
                for linear in (mlp.up, mlp.down):
                    linear.weight.qdata.zero_()
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(mlp, mesh, plan, src_data_rank=src_data_rank)
            shapes = [tuple(m.weight.to_local().shape) for m in (mlp.up, mlp.down)]
            with torch.no_grad():
                y = mlp(random_x(2, 3, 256)).clone()
                results.append((y, shapes))
                if case is LINEARS[0]:
                    compiled, ops = compiled_call(mlp, random_x(2, 3, 256))
                    assert torch.equal(compiled, y) and ops.count(LINEAR_OPS[kind].default) == 2
    return results


def compiled_call(module: nn.Module, x: Tensor) -> tuple[Tensor, list[Any]]:
    """What the compiled module returns, and what its one graph calls."""
    ops: list[Any] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        ops.extend(node.target for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    y = torch.compile(module, fullgraph=True, backend=aot_autograd(fw_compiler=record))(x)
    return y, ops


def test_parallelize_module(tmp_path: Path) -> None:
    first, second = on_ranks(2, tmp_path, mlps)
    cases = [(kind, case) for kind in LINEAR_OPS for case in LINEARS]
    for (kind, case), result, other in zip(cases, first, second, strict=True):
        options = {name: value for name, value in case.items() if name != "src_data_rank"}
        mlp, x = MLP(kind, **options), random_x(2, 3, 256)
        hidden = torch.relu(mlp.up(x))
        expected = by_halves(mlp.down, hidden) if kind is MBQW4A8Tensor else mlp.down(hidden)
        half = case["width"] // 2
        for y, shapes in (result, other):
            assert_close(y, expected)
            assert shapes == [(half, 256), (96, half)]


# Models


def quantized_model(family: str, kind: Kind, group_size: int | None = 32, **changes: Any) -> nn.Module:
    """With an act_pre_scale on every linear of the layers, and experts."""
    model = build_model(family, **changes)
    for name, module in model.named_modules():
        if ".layers." not in name or name.endswith((".gate", ".router")):
            continue
        for parameter, value in list(module.named_parameters(recurse=False)):
            if (isinstance(module, nn.Linear) and parameter == "weight") or value.ndim == 3:
                pre_scale = torch.linspace(0.5, 1.5, value.shape[-1]).expand(*value.shape[:-2], -1)
                weight = kind.from_hp(value.detach(), group_size, act_pre_scale=pre_scale)
                module.register_parameter(parameter, nn.Parameter(weight, requires_grad=False))
    return model


@torch.no_grad()
def outputs(model: nn.Module, family: str) -> tuple[Tensor, Tensor]:
    """Logits, and four tokens."""
    batch = model_inputs(build_batch(family))
    tokens = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    return model(**batch).logits, tokens


def expected_outputs(model: nn.Module, family: str) -> tuple[Tensor, Tensor]:
    model = copy.deepcopy(model)
    for name, module in model.get_decoder().named_modules():
        if name.endswith(ROWS) and isinstance(module.weight, MBQW4A8Tensor):
            module.forward = by_halves.__get__(module)
    return outputs(model, family)


MODELS: list[dict[str, Any]] = [
    {"family": "llava", "kind": MBQInt3Tensor},
    {"family": "qwen2_5_vl", "kind": MBQW4A8Tensor},
    {"family": "qwen3_vl", "kind": MBQInt3Tensor, "tp_plan": PLAN},  # transformers' own plan leaves its layers whole
    {"family": "internvl", "kind": MBQW4A8Tensor, "group_size": None},
    {"family": "qwen3_vl_moe", "kind": MBQInt3Tensor, "moe_intermediate_size": 64},
    {"family": "qwen3_vl_moe", "kind": MBQInt3Tensor, "moe_intermediate_size": 64, "ep_size": 2},
]


def build(case: dict[str, Any]) -> nn.Module:
    return quantized_model(**{name: value for name, value in case.items() if name not in ("tp_plan", "ep_size")})


def in_parallel(rank: int, folder: Path) -> list[Any]:
    """(outputs as loaded, outputs as parallelized in memory, how many weights are sharded) of each case."""
    results = []
    for i, case in enumerate(MODELS):
        config = DistributedConfig(tp_size=2, tp_plan=case.get("tp_plan", "auto"), ep_size=case.get("ep_size", 1))
        model = from_pretrained(folder / str(i), distributed_config=config)
        sharded = sum(is_sharded(p) for p in model.parameters())
        in_memory = None
        if case["family"] in ("llava", "qwen2_5_vl"):
            whole = build(case)
            styles = {name: ColwiseParallel() if PLAN[name] == "colwise" else RowwiseParallel() for name in PLAN}
            parallelize_module(whole, init_device_mesh("cpu", (2,)), styles)
            in_memory = outputs(whole, case["family"])
        results.append((outputs(model, case["family"]), in_memory, sharded))
    return results


@loads_sharded
def test_models(tmp_path: Path) -> None:
    expected = []
    for i, case in enumerate(MODELS):
        model = build(case)
        save_pretrained(model, tmp_path / str(i), max_shard_size="60KB")
        expected.append((*expected_outputs(model, case["family"]), len(packed_weights(model))))
    for results in on_ranks(2, tmp_path, in_parallel, folder=tmp_path):
        for case, (logits, tokens, number), (loaded, in_memory, sharded) in zip(MODELS, expected, results, strict=True):
            print(case)
            in_decoder = 12 if "moe" in case["family"] else 14
            assert sharded == in_decoder <= number
            for found in (loaded, in_memory) if in_memory is not None else (loaded,):
                assert_close(found[0], logits)
                assert torch.equal(found[1], tokens)


def others(rank: int, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the argument that DistributedConfig replaces
        model = from_pretrained(folder / "llava", tp_plan="auto", tp_size=2, dtype=torch.bfloat16)
    results["dtypes"] = {p.dtype for p in model.parameters()}
    weights = packed_weights(model).values()
    results["scales"] = {(w.scale.dtype, w.act_pre_scale.dtype) for w in weights}
    with pytest.raises(ValueError) as caught:
        model.save_pretrained(folder / f"again{rank}")
    results["saving"] = str(caught.value)
    auto = DistributedConfig(tp_size=2, tp_plan="auto")
    for name in ("within groups", "damaged"):
        with pytest.raises(ValueError) as caught:
            from_pretrained(folder / name, distributed_config=auto)
        results[name] = str(caught.value)
    with pytest.warns(UserWarning, match="shards none of the quantized weights") as warned:
        from_pretrained(folder / "qwen3_vl", distributed_config=auto)
    results["warning"] = str(warned[0].message)
    dist.barrier()
    with pytest.raises(ValueError) as caught:
        from_pretrained(folder / "llava", distributed_config=DistributedConfig(fsdp_size=2))
    results["fsdp"] = str(caught.value)
    return results


@loads_sharded
def test_what_else_is_asked(tmp_path: Path) -> None:
    for family in ("llava", "qwen3_vl"):
        save_pretrained(quantized_model(family, MBQInt3Tensor), tmp_path / family)
    save_pretrained(quantized_model("llava", MBQInt3Tensor, intermediate_size=96), tmp_path / "within groups")
    save_pretrained(quantized_model("llava", MBQInt3Tensor), tmp_path / "damaged")
    shard = tmp_path / "damaged" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for rank, result in enumerate(on_ranks(2, tmp_path, others, folder=tmp_path)):
        assert result["dtypes"] == {torch.bfloat16} and result["scales"] == {(torch.bfloat16, torch.bfloat16)}
        assert "is a part of a quantized weight, the others are on other ranks" in result["saving"]
        assert not (tmp_path / f"again{rank}").exists()
        assert (
            "layers.0.mlp.down_proj.weight over 2 ranks: cannot split MBQInt3Tensor(shape=(64, 96), group_size=32"
            in result["within groups"]
        )
        assert "parts of 48, 48 columns" in result["within groups"]
        assert "damaged" in result["damaged"] and "checksums" in result["damaged"]
        assert "the tp_plan of Qwen3VLForConditionalGeneration shards none" in result["warning"]
        assert "quantized weights can be sharded tensor parallel only" in result["fsdp"]


@pytest.mark.skipif(not OLD, reason="transformers is new enough")
def test_an_older_transformers_is_told_of() -> None:
    model = build_model("llava")
    model.config.distributed_config = DistributedConfig(tp_size=2, tp_plan="auto")
    quantizer = MBQHfQuantizer(MBQCheckpointConfig())
    with pytest.raises(NotImplementedError, match=r"tensor parallel needs transformers 5\.23 or later, this is 5"):
        quantizer.preprocess_model(model)
