"""The checkpoint format without transformers: what is in the file, what comes back, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mbq_ao import MBQInt3Tensor, MBQW4A8Tensor, load_safetensors, save_safetensors
from mbq_ao.packed_weight import PackedWeight


def build() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 40), nn.Linear(40, 64, bias=False), nn.Linear(64, 7))
    weights = [
        MBQInt3Tensor.from_hp(model[0].weight, 32),
        MBQW4A8Tensor.from_hp(model[1].weight.bfloat16(), None, torch.rand(40)),
        MBQInt3Tensor.from_hp(model[2].weight.half(), 64, torch.rand(64)),
    ]
    for module, weight in zip(model, weights, strict=True):
        module.weight = nn.Parameter(weight, requires_grad=False)
    return model


def assert_same(a: Tensor, b: Tensor) -> None:
    assert type(a) is type(b)
    if not isinstance(a, PackedWeight):
        assert a.dtype == b.dtype and torch.equal(a, b)
        return
    (names, attributes), (names_b, attributes_b) = a.__tensor_flatten__(), b.__tensor_flatten__()
    assert (names, repr(attributes)) == (names_b, repr(attributes_b))
    for name in names:
        assert_same(getattr(a, name), getattr(b, name))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_safetensors(build(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_round_trip(path: Path) -> None:
    state_dict = load_safetensors(path)
    expected = build().state_dict()
    assert state_dict.keys() == expected.keys()
    for name, value in expected.items():
        assert_same(state_dict[name].detach(), value.detach())
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(100, 40), nn.Linear(40, 64, bias=False), nn.Linear(64, 7))
    model.load_state_dict(state_dict, assign=True)
    assert [type(m.weight).__name__ for m in model] == ["MBQInt3Tensor", "MBQW4A8Tensor", "MBQInt3Tensor"]


def test_what_the_file_says(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    assert metadata["mbq_format_version"] == "1" and metadata["format"] == "pt"
    assert json.loads(metadata["mbq_weights"]) == {
        "0.weight": {"type": "MBQInt3Tensor", "shape": [40, 100], "block_size": [1, 32]},
        "1.weight": {"type": "MBQW4A8Tensor", "shape": [64, 40], "block_size": [1, 40]},
        "2.weight": {"type": "MBQInt3Tensor", "shape": [7, 64], "block_size": [1, 64]},
    }
    assert keys == {
        *("0._weight_qdata", "0._weight_scale", "0._weight_zero_point", "0.bias"),
        *("1._weight_qdata", "1._weight_scale", "1._weight_act_pre_scale"),
        *("2._weight_qdata", "2._weight_scale", "2._weight_zero_point", "2._weight_act_pre_scale", "2.bias"),
    }
    assert json.loads(metadata["mbq_checksums"]).keys() == keys


def test_tied_and_transposed_and_unnamed(tmp_path: Path) -> None:
    w = MBQInt3Tensor.from_hp(torch.randn(32, 128), 64)
    plain = torch.randn(4)
    save_safetensors({"weight": w, "a.b": w.t(), "x": plain, "y": plain}, tmp_path / "f")
    loaded = load_safetensors(tmp_path / "f")
    assert_same(loaded["weight"], w)
    assert_same(loaded["a.b"], w.t())
    assert torch.equal(loaded["x"], plain) and torch.equal(loaded["y"], plain)


def rewrite(path: Path, tensors: dict[str, Tensor | None], **metadata: Any) -> None:
    """Change tensors (None: remove) and metadata, and leave the checksums out."""
    with safe_open(path, "pt") as file:
        old = file.metadata()
    old.pop("mbq_checksums", None)
    new = {**load_file(path), **tensors}
    save_file({k: v for k, v in new.items() if v is not None}, path, {**old, **metadata})


def test_damage_is_named(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"damaged, its checksums .*: [\w.]+; copy or download") as caught:
        load_safetensors(path)
    assert any(f": {name}; copy" in str(caught.value) for name in load_file(path))
    load_safetensors(path, verify=False)
    path.write_bytes(content[:-8])
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        load_safetensors(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_safetensors(path.with_name("other"))


def test_a_weight_that_does_not_fit_is_named(path: Path) -> None:
    rewrite(path, {"0._weight_scale": torch.zeros(40, 3)})
    with pytest.raises(ValueError, match=r"0.weight does not fit: scale of a 40 x 100 weight"):
        load_safetensors(path)
    rewrite(path, {"0._weight_scale": None})
    with pytest.raises(ValueError, match=r"is incomplete: 0._weight_scale of the quantized weight 0.weight missing"):
        load_safetensors(path)


def test_versions_and_kinds(path: Path, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "plain")
    with pytest.raises(ValueError, match="is not an mbq checkpoint"):
        load_safetensors(tmp_path / "plain")
    rewrite(path, {}, mbq_weights='{"0.weight": {"type": "MBQInt2Tensor"}}')
    with pytest.raises(ValueError, match=r"0.weight is a MBQInt2Tensor, which this version"):
        load_safetensors(path)
    rewrite(path, {}, mbq_format_version="2")
    with pytest.raises(ValueError, match="has mbq format version 2, but this mbq_ao reads versions up to 1"):
        load_safetensors(path)


def test_a_failure_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = path.read_bytes()

    def full(tensors: Any, filename: Path, metadata: Any) -> None:
        filename.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mbq_ao.safetensors_format.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_safetensors({"x": torch.zeros(3)}, path)
    assert path.read_bytes() == content and [f.name for f in path.parent.iterdir()] == [path.name]


def test_other_libraries_tensors_are_refused(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 64))
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"0.weight is a \w+, which an mbq checkpoint cannot hold"):
        save_safetensors(model, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
