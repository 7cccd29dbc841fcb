"""Saving and loading quantized transformers models: `save_pretrained`, `from_pretrained`.

model.save_pretrained("qwen-w3")                       # after quantize_; the report goes into its README.md
model = mbq_ao.from_pretrained("qwen-w3")              # or AutoModel....from_pretrained after `import mbq_ao`
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file

from mbq_ao.hf_quantizer import (
    CHECKSUMS,
    LOADING,
    METHOD,
    REPORT,
    Loading,
    MBQCheckpointConfig,
    MBQHfQuantizer,
    packed_weights,
)
from mbq_ao.safetensors_format import checksums, listed
from mbq_ao.tensor_parallel import check_whole

if TYPE_CHECKING:
    from mbq_ao.calibration.report import CalibrationReport


def attach(
    model: nn.Module, report: CalibrationReport | None = None, config: MBQCheckpointConfig | None = None
) -> None:
    """Make a quantized transformers model one that transformers knows to be quantized. Other modules are left alone.

    Sets what transformers' `from_pretrained` sets, and lets `model.save_pretrained` be ours.
    report: what `quantize_` found.  config: as it was loaded; None: made of the report and the model.
    """
    if not isinstance(model, PreTrainedModel) or not packed_weights(model):
        return
    if config is None:
        config = MBQCheckpointConfig(
            **({} if report is None else {**report.settings, "calibration": report.calibration})
        )
        config.describe(model)
    quantizer = MBQHfQuantizer(config, pre_quantized=True)
    quantizer.report = report
    model.config.quantization_config = config
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
    model.save_pretrained = MethodType(save_pretrained, model)


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    *args: Any,
    report: CalibrationReport | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """`PreTrainedModel.save_pretrained` of a quantized model, with a model card, with checksums, all or nothing.

    save_directory: a folder, made if missing; other files in it (the processor's) stay. Its checkpoint is replaced
        once the new one is complete: a failure leaves what was there.
    report: shown in the card, and kept as mbq_report.json, which `CalibrationReport.from_json` reads. None: the one
        that `quantize_` returned for this model, if it was this process.
    Other arguments (max_shard_size, variant, ...) go to transformers.

    Raises ValueError if the model has no quantized weights, or tensors of another quantization library, or is tensor
    parallel or offloaded, and with push_to_hub=True; OSError if the folder cannot be written.
    """
    if push_to_hub:
        raise ValueError("save_pretrained(push_to_hub=True) is not supported; call model.push_to_hub(repo_id)")
    check_whole(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, MBQHfQuantizer):
        if not packed_weights(model):
            raise ValueError(f"this {type(model).__name__} has no quantized weights: call mbq_ao.quantize_ first")
        attach(model)
        quantizer = model.hf_quantizer
    report = report or quantizer.report
    with complete_or_not_at_all(save_directory) as staging:
        type(model).save_pretrained(model, staging, *args, **kwargs)
        shards = sorted(staging.glob("*.safetensors"))
        if shards:
            table = {shard.name: _checksums_of(shard) for shard in shards}
            (staging / CHECKSUMS).write_text(json.dumps(table, indent=0) + "\n", encoding="utf-8")
            (staging / "README.md").write_text(model_card(model, report), encoding="utf-8")
            if report is not None:
                report.to_json(staging / REPORT)


@contextmanager
def complete_or_not_at_all(save_directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write a checkpoint to, which takes its place in `save_directory` once it is complete.

    Nothing happens if it has no safetensors in the end: another rank writes them then. Raises NotADirectoryError.
    """
    target = Path(save_directory)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"save_directory must be a folder, {target} is a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same file system, for the renames; beside the target, since that may not exist yet.
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.unfinished-", dir=target.parent))
    try:
        yield staging
        if any(staging.glob("*.safetensors")):
            for file in staging.iterdir():
                file.chmod(0o666 & ~_umask())  # safetensors makes its own private
                _sync(file)
            _publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def saved_as(model: PreTrainedModel, quantizer: HfQuantizer) -> Iterator[None]:
    """Inside, transformers' `save_pretrained` writes the model by this quantizer and its config."""
    config, before = model.config, getattr(model, "hf_quantizer", None)
    config_before = getattr(config, "quantization_config", None)
    model.hf_quantizer, config.quantization_config = quantizer, quantizer.quantization_config
    try:
        yield
    finally:
        model.hf_quantizer, config.quantization_config = before, config_before
        if before is None:
            del model.hf_quantizer
        if config_before is None:
            del config.quantization_config


def from_pretrained(name_or_path: str | os.PathLike[str], *, verify: bool = True, **kwargs: Any) -> PreTrainedModel:
    """Load a quantized checkpoint with the class that config.json names.

    verify: compare the tensors with the checksums saved beside them.  kwargs: as transformers' `from_pretrained`
    takes them (device_map, distributed_config, dtype, attn_implementation, revision, ...).

    Raises ValueError if the checkpoint is not ours, damaged, incomplete or of a newer format; transformers itself would
    only warn of some of that, and fill in random numbers. OSError if there is no such checkpoint.
    """
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(name_or_path, **hub_arguments(kwargs))
    method = quant_method(config)
    if method != METHOD:
        importable = method in ("gptq", "awq", "torchao")
        raise ValueError(
            f"{name_or_path} is not an mbq checkpoint: its config.json has "
            + ("no quantization_config" if method is None else f"quant_method {method!r}")
            + "; load it with "
            + ("mbq_ao.import_checkpoint" if importable else "transformers, and quantize it with mbq_ao.quantize_")
        )
    if verify and not os.path.isdir(name_or_path):
        # transformers fetches shards and config from the hub, but does not know of this file beside them.
        cached_file(
            name_or_path,
            CHECKSUMS,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub_arguments(kwargs),
        )
    return load_filled(name_or_path, config, Loading(verify), kwargs)[0]


def load_any(name_or_path: str | os.PathLike[str], config: Any = None, **kwargs: Any) -> PreTrainedModel:
    """A checkpoint of ours, or any that transformers' Auto classes load, in evaluation mode and its own dtype.

    config: where it is known.  kwargs: as transformers' `from_pretrained` takes them. Raises as `from_pretrained`.
    """
    config = config or AutoConfig.from_pretrained(name_or_path, **hub_arguments(kwargs))
    if quant_method(config) == METHOD:
        return from_pretrained(name_or_path, config=config, **kwargs).eval()
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return kind.from_pretrained(name_or_path, config=config, **{"dtype": "auto", **kwargs}).eval()


def load_filled(
    name_or_path: str | os.PathLike[str], config: Any, loading: Loading, kwargs: Mapping[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    """transformers' `from_pretrained` of the class that config names, and the tensors that the model has no place for.

    loading: what the quantizer is told, and says.  kwargs: of `from_pretrained`.
    Raises ValueError if the checkpoint is damaged or does not fill the model.
    """
    (architecture,) = config.architectures or [None]
    cls = getattr(transformers, architecture or "", None)
    if cls is None:
        raise ValueError(
            f"{name_or_path} is of the class {architecture}, which is not in transformers {transformers.__version__}"
        )
    token = LOADING.set(loading)
    try:
        model, info = cls.from_pretrained(name_or_path, config=config, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"{name_or_path} is damaged: {error}; copy or download it again") from error
    except RuntimeError as error:
        if loading.error is not None:
            raise ValueError(f"cannot load {name_or_path}: {loading.error}") from error
        raise
    finally:
        LOADING.reset(token)
    lacking = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if lacking:
        raise ValueError(
            f"{name_or_path} does not fill a {architecture}: {listed(lacking)} missing, or of another shape there"
        )
    return model, sorted(info["unexpected_keys"])


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that say where on the hub."""
    return {
        key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if key in kwargs
    }


def quant_method(config: PreTrainedConfig) -> str | None:
    """Which library quantized the checkpoint of this config; None: none did."""
    settings = getattr(config, "quantization_config", None)
    return settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)


def model_card(model: PreTrainedModel, report: CalibrationReport | None) -> str:
    """README.md of a checkpoint."""
    config: MBQCheckpointConfig = model.config.quantization_config
    weights = packed_weights(model).values()
    quantized = sum(w.quantized_nbytes() for w in weights)
    before = sum(w.numel() * w.element_size() for w in weights)
    settings = {k: v for k, v in config.to_dict().items() if k not in ("quant_method", "parameters", "calibration")}
    settings |= {f"calibration: {k}": v for k, v in (config.calibration or {}).items()}
    lines = [
        "---",
        "library_name: transformers",
        "tags: [mbq, mbq_ao, quantized]",
        "---",
        "",
        f"# {type(model).__name__}, {config.precision or 'low-bit'} by mbq_ao",
        "",
        "**Loading this needs the package `mbq_ao`.** Without it transformers prints a warning about an unknown",
        "quantization type and returns a model with random weights.",
        "",
        "```python",
        "import mbq_ao",
        "",
        'model = mbq_ao.from_pretrained("PATH OR NAME OF THIS CHECKPOINT")',
        "```",
        "",
        f"{len(weights)} weights quantized: {before / 1e6:.1f} MB in {model.dtype} -> {quantized / 1e6:.1f} MB.",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in settings.items()),
        "",
    ]
    if report is not None:
        lines += ["## Calibration", "", "```", str(report), "```", ""]
    return "\n".join(lines)


def _checksums_of(shard: Path) -> dict[str, str]:
    with safe_open(shard, framework="pt") as file:
        return checksums({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  (not a dict)


def _sync(file: Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def _publish(staging: Path, target: Path) -> None:
    """Move the complete checkpoint to its place: as one rename, or file by file into a folder that is there."""
    staging.chmod(0o777 & ~_umask())  # mkdtemp's own is private
    if not target.exists():
        staging.rename(target)
        return
    new = {file.name for file in staging.iterdir()}
    stale = [f for f in (*target.glob("*.safetensors*"), *target.glob(REPORT)) if f.name not in new]
    # config.json comes last: until then the old one stands beside shards that it describes just as well or not at all.
    for file in sorted(staging.iterdir(), key=lambda f: f.name == "config.json"):
        os.replace(file, target / file.name)
    for file in stale:
        file.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
