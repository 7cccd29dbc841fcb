"""`mbq-ao inspect`: what it reads off the files is what the loaded model has."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from command_line import document, invoke, refusal
from models import build_batch, build_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from mbq_ao import MBQW4A8Tensor, from_pretrained, mbq_config, quantize_, save_safetensors
from mbq_ao.cli import stored_weights
from mbq_ao.kernels.int3_layout import unpack_int3
from mbq_ao.kernels.int4_layout import unpack_int4
from mbq_ao.packed_weight import PackedWeight, plain_shape


def codes(weight: PackedWeight) -> Tensor:
    """Unpacked whole, one expert at a time."""
    unpack = unpack_int4 if isinstance(weight, MBQW4A8Tensor) else unpack_int3
    n, k = plain_shape(weight.shape, weight.transposed)[-2:]
    return torch.stack([unpack(q, n, k) for q in (weight.qdata if weight.ndim == 3 else [weight.qdata])])


def assert_as_loaded(shown: dict, model: torch.nn.Module) -> None:
    packed = {n: p for n, p in model.named_parameters() if isinstance(p, PackedWeight)}
    assert len(shown["weights"]) == shown["totals"]["num_quantized"] == len(packed)
    ends = {".".join(name.split(".")[-4:]): p for name, p in packed.items()}  # the names before are transformers' own
    assert len(ends) == len(packed)
    for weight in shown["weights"]:
        expected = ends[".".join(weight["name"].split(".")[-4:])]
        assert tuple(weight["shape"]) == plain_shape(expected.shape, expected.transposed)
        assert weight["nbytes"] == expected.quantized_nbytes() and weight["group_size"] == expected.group_size
        assert weight["act_pre_scale"] == (expected.act_pre_scale is not None)
        q, low, high = codes(expected), *((-8, 7) if isinstance(expected, MBQW4A8Tensor) else (0, 7))
        assert weight["codes"] == [int((q == code).sum()) for code in range(low, high + 1)]
        assert weight["saturated"] == pytest.approx(((q == low) | (q == high)).float().mean().item())
        assert weight["scale_median"] == expected.scale.float().median().item()
        assert (weight["scale_min"], weight["scale_max"]) == tuple(x.item() for x in expected.scale.aminmax())
        assert weight["zero_scales"] == 0 and weight["bad_scales"] == 0


def test_a_sharded_checkpoint(rounded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_weights, "_SLAB", 64 * 40)  # several slabs a weight
    shown = document("inspect", rounded, "--verify")
    model = from_pretrained(rounded)
    assert_as_loaded(shown, model)
    assert {w["name"].split(".layers.")[0] for w in shown["weights"]} == {"language_model.model"}  # as in the files
    totals = shown["totals"]
    assert totals["nbytes"] == sum(
        p.quantized_nbytes() if isinstance(p, PackedWeight) else p.nbytes for p in model.parameters()
    )
    assert shown["verified"] and shown["settings"]["quant_method"] == "mbq"


@pytest.mark.filterwarnings("ignore:no vision token found")
def test_experts_and_a_calibrated_checkpoint(tmp_path: Path) -> None:
    """gpt-oss has transposed experts, and biases in 2-D parameters beside them."""
    model = build_model("gpt_oss")
    config = mbq_config(
        [build_batch("gpt_oss", 9)], precision="w4a8", group_size=32, n_grid=1, balance=False, recipe="mbq"
    )
    quantize_(model, config, progress=False)
    model.save_pretrained(tmp_path / "m")
    shown = document("inspect", tmp_path / "m", "--plot", tmp_path / "pictures")
    assert_as_loaded(shown, from_pretrained(tmp_path / "m"))
    assert any(len(weight["shape"]) == 3 for weight in shown["weights"])
    pictures = [tmp_path / "pictures" / name for name in ("weights.png", "sensitivity.png")]
    assert shown["plots"] == [str(p) for p in pictures] and all(p.stat().st_size > 10_000 for p in pictures)


def test_the_checkpoint_of_format_version_1() -> None:
    golden = Path(__file__).parents[1] / "goldens" / "checkpoint_v1"
    assert_as_loaded(document("inspect", golden), from_pretrained(golden))


@pytest.mark.filterwarnings("ignore:no vision token found")
def test_a_file_and_quick(tmp_path: Path) -> None:
    model = build_model("llama")
    quantize_(model, mbq_config([build_batch("llama", 9)], n_grid=2, balance=False, recipe="mbq"), progress=False)
    save_safetensors(model, tmp_path / "model.safetensors")
    shown = document("inspect", tmp_path / "model.safetensors", "--verify")
    assert_as_loaded(shown, model)
    quick = document("inspect", tmp_path / "model.safetensors", "--quick")
    assert "codes" not in quick["weights"][0] and quick["totals"] == shown["totals"]


def test_the_table(rounded: Path) -> None:
    """On no terminal: whole lines, no colours."""
    done = invoke("inspect", rounded)
    assert done.exit_code == 0 and "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].split()[:6] == ["weight", "precision", "shape", "group", "MB", "bits/weight"]
    assert "language_model.model.layers.0.mlp.down_proj.weight" in done.stdout
    assert lines[-3].startswith("14 quantized weights: ") and lines[-1].startswith("all: ")


def test_damage_is_seen(rounded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(rounded, tmp_path / "m"))
    shard = (
        folder
        / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][
            "language_model.model.layers.0.mlp.down_proj._weight_scale"
        ]
    )
    from safetensors import safe_open

    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    scale = tensors["language_model.model.layers.0.mlp.down_proj._weight_scale"]
    scale[0, 0], scale[1, 0] = float("nan"), 0.0
    save_file(tensors, shard, metadata)
    weight = next(w for w in document("inspect", folder)["weights"] if "layers.0.mlp.down_proj" in w["name"])
    assert weight["bad_scales"] == 1 and weight["zero_scales"] == pytest.approx(1 / scale.numel())
    assert "DAMAGED: scales that are NaN or infinite in language_model.model." in invoke("inspect", folder).stdout
    assert "layers.0.mlp.down_proj._weight_scale; copy" in refusal("inspect", folder, "--verify")
    (folder / "mbq_checksums.json").unlink()
    assert "there are no checksums of" in refusal("inspect", folder, "--verify")
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "is damaged" in refusal("inspect", folder)
    shard.unlink()
    assert f"{shard.name} missing" in refusal("inspect", folder)


def test_refusals(llava: Path, rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("inspect", llava).startswith(f"{llava} is not an mbq checkpoint: its config.json has no quant")
    assert "it has no config.json" in refusal("inspect", tmp_path)
    assert "there is no folder ./none" in refusal("inspect", "./none")
    assert "its metadata has no mbq_format_version" in refusal("inspect", llava / "model.safetensors")
    newer = Path(shutil.copytree(rounded, tmp_path / "newer"))
    config = json.loads((newer / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (newer / "config.json").write_text(json.dumps(config))
    assert "has mbq format version 2" in refusal("inspect", newer)
    assert invoke("inspect", rounded, "--quick", "--plot", tmp_path).exit_code == 2
    (tmp_path / "file").write_text("")
    assert "is a file" in invoke("inspect", rounded, "--plot", tmp_path / "file").stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "mbq_ao[demo]"' in invoke("inspect", rounded, "--plot", tmp_path / "p").stderr
