"""save_pretrained and from_pretrained of transformers models: every family, every way, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, LANGUAGE, MIXTURES, MULTIMODAL
from models import build_batch, build_model, model_inputs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.quantization import quantize_ as torchao_quantize_
from transformers import AutoModelForCausalLM, CompileConfig

import mbq_ao
from mbq_ao import (
    Int3WeightOnlyConfig,
    Int8DynamicActivationInt4WeightMBQConfig,
    MBQInt3Tensor,
    MBQW4A8Tensor,
    from_pretrained,
    mbq_config,
    quantize_,
    save_pretrained,
)
from mbq_ao.packed_weight import PackedWeight


def in_layers(module: nn.Module, fqn: str) -> bool:
    return isinstance(module, nn.Linear) and ".layers." in fqn


def rounded(family: str, dtype: torch.dtype = torch.float32, config: Any = None) -> nn.Module:
    model = build_model(family)
    for parameter in model.parameters():  # `model.to(dtype)` would round the rotary frequencies as well
        parameter.data = parameter.data.to(dtype)
    torchao_quantize_(model, config or Int3WeightOnlyConfig(group_size=32), in_layers)
    return model


@torch.no_grad()
def logits(model: nn.Module, family: str) -> Tensor:
    for parameter in model.parameters():
        if not isinstance(parameter, PackedWeight):  # in a mapped file it may lie at an address that BLAS rounds by
            parameter.data = parameter.data.clone()
    return model(**model_inputs(build_batch(family))).logits


def packed(model: nn.Module) -> dict[str, str]:
    return {n: repr(p) for n, p in model.named_parameters(remove_duplicate=False) if isinstance(p, PackedWeight)}


# Falcon's layers are not `.layers.`; Mamba reads a rounded weight itself; rows of Gemma 3n's AltUp are shorter than a
# group, and their group_size is the row's length after loading.
OTHERS = ("falcon", "mamba", "gemma3n_text")


@pytest.mark.parametrize("family", [*MULTIMODAL, *(name for name in LANGUAGE if name not in OTHERS)])
def test_round_trip(family: str, tmp_path: Path) -> None:
    """Saved, loaded, saved again in shards, loaded by transformers' own class with device_map: nothing moves a bit."""
    model = rounded(family)
    expected, weights = logits(model, family), packed(model)
    assert weights
    save_pretrained(model, tmp_path / "one")
    loaded = from_pretrained(tmp_path / "one")
    assert type(loaded) is type(model) and packed(loaded) == weights
    assert torch.equal(logits(loaded, family), expected)
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = FAMILIES[family].auto.from_pretrained(tmp_path / "shards", device_map="auto")
    assert packed(again) == weights and torch.equal(logits(again, family), expected)


@pytest.mark.parametrize("group_size", [None, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_trip_w4a8(dtype: torch.dtype, group_size: int | None, tmp_path: Path) -> None:
    model = rounded("llama", dtype, Int8DynamicActivationInt4WeightMBQConfig(group_size=group_size))
    save_pretrained(model, tmp_path / "m")
    loaded = from_pretrained(tmp_path / "m")
    assert packed(loaded).keys() == packed(model).keys() and loaded.dtype == dtype
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


def calibrated(family: str = "llava", precision: Any = "w3a16") -> tuple[nn.Module, Any]:
    model = build_model(family)
    data = [build_batch(family, 9), build_batch(family, 12, seed=2)]
    report = quantize_(
        model, mbq_config(data, precision=precision, group_size=64, n_grid=3, recipe="mbq"), progress=False
    )
    return model, report


@pytest.mark.parametrize("precision", ["w3a16", "w4a8"])
def test_a_calibrated_model(precision: str, tmp_path: Path) -> None:
    model, report = calibrated("olmo2", precision)
    assert any(p.act_pre_scale is not None for p in model.parameters() if isinstance(p, PackedWeight))
    model.save_pretrained(tmp_path / "m")  # transformers' own method
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    for name, value in {
        "quant_method": "mbq",
        "format_version": 1,
        "precision": precision,
        "group_size": 64,
        "recipe": "mbq",
        "num_weights": 14,
        "parameters": {"weight": False},
        "dtype": "float32",
        "mbq_ao_version": mbq_ao.__version__,
        "calibration": report.calibration,
    }.items():
        assert config[name] == value, name
    assert report.calibration["num_batches"] == 2 and len(report.calibration["sha256"]) == 64
    card = (tmp_path / "m" / "README.md").read_text()
    assert str(report) in card and "random weights" in card and f"| recipe | {report.settings['recipe']} |" in card
    loaded = from_pretrained(tmp_path / "m")
    assert torch.equal(logits(loaded, "olmo2"), logits(model, "olmo2"))
    assert loaded.hf_quantizer.quantization_config.to_dict() == config | {"calibration": report.calibration}


@pytest.mark.parametrize("family", MIXTURES)
def test_experts(family: str, tmp_path: Path) -> None:
    model, _ = calibrated(family, "w4a8" if list(MIXTURES).index(family) % 2 else "w3a16")
    weights, expected = packed(model), logits(model, family)
    assert any(".experts." in name and p.ndim == 3 for name, p in model.named_parameters() if name in weights)
    model.save_pretrained(tmp_path / "m", max_shard_size="60KB")
    loaded = from_pretrained(tmp_path / "m")
    assert packed(loaded) == weights and torch.equal(logits(loaded, family), expected)


def test_another_dtype(tmp_path: Path) -> None:
    model = rounded("qwen2_vl")
    save_pretrained(model, tmp_path / "m")
    loaded = from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    save_pretrained(loaded, tmp_path / "half")
    again = from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    ids = {"input_ids": build_batch("llama")["input_ids"]}
    with torch.no_grad():
        assert torch.equal(again(**ids).logits, loaded(**ids).logits)


def test_a_model_with_fused_linears(tmp_path: Path) -> None:
    model = rounded("llama")
    expected = logits(model, "llama")
    mbq_ao.fuse_linears_(model)
    save_pretrained(model, tmp_path / "m")
    assert torch.equal(logits(from_pretrained(tmp_path / "m"), "llama"), expected)


def test_generate_with_a_static_cache_is_compiled(tmp_path: Path) -> None:
    save_pretrained(rounded("llama"), tmp_path / "m")
    model = from_pretrained(tmp_path / "m")
    ids = build_batch("llama")["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    eager = model.generate(ids, **options)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    compiled = model.generate(ids, **options, cache_implementation="static", compile_config=config)
    assert torch.equal(eager, compiled) and hasattr(model, "_compiled_call")


def test_other_files_stay_and_old_shards_go(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    model = rounded("llama")
    save_pretrained(model, folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("x")
    save_pretrained(model, folder)
    assert {f.name for f in folder.iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "mbq_checksums.json", "model.safetensors"),
        *("tokenizer.json", "chat_template.jinja"),
    }
    assert [f.name for f in tmp_path.iterdir()] == ["m"]
    assert {f.stat().st_mode for f in folder.glob("*model*")} == {(folder / "config.json").stat().st_mode}  # no secrets
    assert torch.equal(logits(from_pretrained(folder), "llama"), logits(model, "llama"))


def test_a_failure_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "m"
    save_pretrained(rounded("llama"), folder)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            save_pretrained(rounded("llama_mha"), target)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no quantized weights: call mbq_ao.quantize_ first"):
        save_pretrained(build_model("llama"), tmp_path / "m")
    model = rounded("llama")
    with pytest.raises(ValueError, match=r"call model.push_to_hub\(repo_id\)"):
        save_pretrained(model, tmp_path / "m", push_to_hub=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="must be a folder"):
        save_pretrained(model, tmp_path / "file")
    from torchao.quantization import Int8WeightOnlyConfig

    torchao_quantize_(model, Int8WeightOnlyConfig(), lambda module, fqn: fqn == "lm_head")
    with pytest.raises(ValueError, match=r"lm_head.weight is a \w+, which an mbq checkpoint cannot hold"):
        save_pretrained(model, tmp_path / "m")
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


# --- bad checkpoints --------------------------------------------------------------------------------------------


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Change tensors of layer 0's q_proj, with no checksums to tell of it."""
    (folder / "mbq_checksums.json").unlink()
    prefix = "model.layers.0.self_attn.q_proj."
    new = {**load_file(folder / "model.safetensors"), **{prefix + k: v for k, v in tensors.items()}}
    save_file({k: v for k, v in new.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


def set_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        (config["quantization_config"] if name in config["quantization_config"] else config)[name] = value
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


ALL_PARTS = {f"_weight_{part}": None for part in ("qdata", "scale", "zero_point")}
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (flip_a_bit, r"model.safetensors is damaged, its checksums .*: [\w.]+; copy or download it again"),
    "cut off": (truncate, "is damaged.*; copy or download it again"),
    "another shape": (
        lambda f: change(f, _weight_scale=torch.zeros(63, 2)),
        r"model.layers.0.self_attn.q_proj.weight does not fit: scale of a 64 x 64 weight.* must be \(64, 2\), got",
    ),
    "a part missing": (
        lambda f: change(f, _weight_zero_point=None, _weight_qdata=None),
        "is incomplete: of model.layers.0.self_attn.q_proj.weight it has only scale",
    ),
    "a weight missing": (lambda f: change(f, **ALL_PARTS), "lists 14 quantized weights, but LlamaForCausalLM got 13"),
    "a newer format": (lambda f: set_config(f, format_version=2), "has mbq format version 2, but this mbq_ao reads"),
    "a plain model": (lambda f: set_config(f, quantization_config=None), "has no quantization_config"),
    "another method": (lambda f: set_config(f, quant_method="gptq"), "has quant_method 'gptq'"),
    "an unknown class": (
        lambda f: set_config(f, architectures=["NoSuchModel"]),
        "is of the class NoSuchModel, which is not in transformers",
    ),
    "another architecture": (
        lambda f: set_config(f, hidden_size=96),
        r"\.weight does not fit: qdata|missing, or of another shape there",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_checkpoints(damage: str, tmp_path: Path) -> None:
    do, message = DAMAGE[damage]
    save_pretrained(rounded("llama"), tmp_path / "m")
    do(tmp_path / "m")
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path / "m")


def test_unverified(tmp_path: Path) -> None:
    save_pretrained(rounded("llama"), tmp_path / "m")
    flip_a_bit(tmp_path / "m")
    from_pretrained(tmp_path / "m", verify=False)
    with pytest.raises(ValueError, match="is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_a_missing_shard_and_a_missing_checkpoint(tmp_path: Path) -> None:
    save_pretrained(rounded("llama"), tmp_path / "m", max_shard_size="60KB")
    next((tmp_path / "m").glob("model-00002*")).unlink()
    with pytest.raises((OSError, ValueError), match="model-00002"):
        from_pretrained(tmp_path / "m")
    with pytest.raises(OSError, match="none"):
        from_pretrained(tmp_path / "none")


def test_the_disk_as_a_device_is_refused(tmp_path: Path) -> None:
    save_pretrained(rounded("llama"), tmp_path / "m")
    with pytest.raises(ValueError, match="from where quantized weights cannot be used"):
        from_pretrained(tmp_path / "m", device_map={"model": "disk", "lm_head": "cpu"})


# --- registration -----------------------------------------------------------------------------------------------

LOAD = """
import torch
{first}
from transformers import AutoModelForCausalLM
{then}
model = AutoModelForCausalLM.from_pretrained({path!r})
assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "MBQInt3Tensor"
"""


@pytest.mark.parametrize("when", ["before transformers", "after transformers", "as an entry point of torch"])
def test_transformers_knows_us(when: str, tmp_path: Path) -> None:
    save_pretrained(rounded("llama"), tmp_path / "m")
    first, then = ("import mbq_ao", "") if when.startswith("before") else ("", "import mbq_ao")
    if "entry point" in when:
        first = then = ""
        info = tmp_path / "site" / "mbq_ao_for_this_test-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mbq_ao_for_this_test\nVersion: 0\n")
        (info / "entry_points.txt").write_text("[torch.backends]\nmbq_ao = _mbq_ao_autoload:install\n")
    root = Path(mbq_ao.__file__).parent.parent
    path = f"import sys; sys.path[:0] = [{str(root)!r}, {str(tmp_path / 'site')!r}]\n"
    code = path + LOAD.format(first=first, then=then, path=str(tmp_path / "m"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- the checkpoint of version 1, kept for ever -----------------------------------------------------------------

FIXTURE = Path(__file__).parent / "goldens" / "checkpoint_v1"


def test_the_checkpoint_of_format_version_1() -> None:
    """Made by `python test/goldens/make_checkpoint.py` when the format was new, and never made again."""
    model = from_pretrained(FIXTURE)
    weights = {n: p for n, p in model.named_parameters() if isinstance(p, PackedWeight)}
    attention = {n: p for n, p in weights.items() if "self_attn" in n}
    assert {type(p) for p in attention.values()} == {MBQInt3Tensor}
    assert {type(p) for n, p in weights.items() if n not in attention} == {MBQW4A8Tensor}
    golden = load_file(FIXTURE / "golden.safetensors")
    for name, weight in weights.items():
        assert torch.equal(weight.dequantize(), golden[name]), name
        assert (weight.act_pre_scale is None) == (f"{name}.act_pre_scale" not in golden)
    with torch.no_grad():
        found = model(input_ids=golden["input_ids"]).logits
    assert (found - golden["logits"]).norm() < 1e-4 * golden["logits"].norm()


def test_checksums_come_from_the_hub_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache as the hub's client lays it out, where the shards are and the checksums are not yet."""
    save_pretrained(rounded("llama"), tmp_path / "m")
    folder = tmp_path / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    shutil.copytree(tmp_path / "m", snapshot, ignore=shutil.ignore_patterns("mbq_checksums.json"))
    flip_a_bit(snapshot)

    def download(name: str, file_name: str, **kwargs: Any) -> None:
        assert name == "owner/name" and kwargs["cache_dir"] == tmp_path
        shutil.copy(tmp_path / "m" / file_name, snapshot)

    monkeypatch.setattr("mbq_ao.pretrained.cached_file", download)
    with pytest.raises(ValueError, match="is damaged, its checksums"):
        from_pretrained("owner/name", cache_dir=tmp_path, local_files_only=True)
