"""`mbq-ao quantize`."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mbq_ao.cli.console import Json, UserError
from mbq_ao.cli.demo import GroupSize, as_group_size
from mbq_ao.cli.models import Device, Dtype, ModelName, chosen_device, load_config, load_model, load_processor

if TYPE_CHECKING:
    from torch import nn
    from torchao.core.config import AOBaseConfig

    from mbq_ao.calibration.report import CalibrationReport

_DATA, _METHOD, _WHERE, _OUTPUT = "Data", "Method (mbq_config)", "Where", "Output"


def quantize(
    model: ModelName,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the quantized checkpoint.", rich_help_panel=_OUTPUT)
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Conversations, .jsonl or .json: LLaVA's and ShareGPT4V's files, chat messages, or rows of image, "
            "question and answer.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    no_data: Annotated[
        bool, typer.Option("--no-data", help="Plain rounding, without calibration.", rich_help_panel=_DATA)
    ] = False,
    image_folder: Annotated[
        Path | None, typer.Option(help="What the images' paths are relative to.", rich_help_panel=_DATA)
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Rows to draw.", rich_help_panel=_DATA)] = 128,
    seed: Annotated[int, typer.Option(help="Of the draw.", rich_help_panel=_DATA)] = 0,
    mode: Annotated[
        Literal["single", "interleave", "few_shot"],
        typer.Option(
            help="One row a batch; or two, with text from --texts between them or not.", rich_help_panel=_DATA
        ),
    ] = "single",
    texts: Annotated[
        Path | None, typer.Option(help="A text file, for --mode interleave.", rich_help_panel=_DATA)
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Leave out longer rows (tokens).", rich_help_panel=_DATA)
    ] = None,
    precision: Annotated[
        Literal["w3a16", "w4a8"],
        typer.Option(help="3-bit weights; or 4-bit weights and 8-bit activations.", rich_help_panel=_METHOD),
    ] = "w3a16",
    group_size: Annotated[
        GroupSize | None,
        typer.Option(
            help="Input channels that share a scale; default: 128 for w3a16, row for w4a8.", rich_help_panel=_METHOD
        ),
    ] = None,
    recipe: Annotated[
        Literal["best", "mbq", "paper", "smoothquant", "gptq"],
        typer.Option(
            help="best fits weights to their inputs; mbq and paper search scales, modalities balanced; the others are "
            "baselines.",
            rich_help_panel=_METHOD,
        ),
    ] = "best",
    targets: Annotated[
        Literal["decoder", "decoder+vision"], typer.Option(help="What is calibrated.", rich_help_panel=_METHOD)
    ] = "decoder",
    vision: Annotated[
        Literal["w3a16", "w4a8"] | None,
        typer.Option(help="Round the vision tower as well, without calibration.", rich_help_panel=_METHOD),
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    work_dir: Annotated[
        Path | None,
        typer.Option(
            help="Keeps each finished layer, so that the same call goes on after a crash.", rich_help_panel=_WHERE
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint in --output.", rich_help_panel=_OUTPUT)
    ] = False,
    as_json: Json = False,
) -> dict[str, Any] | None:
    """Quantize a model and save it, calibrated on your conversations.

    Examples:

    `mbq-ao quantize llava-hf/llava-onevision-qwen2-7b-ov-hf --data conversations.jsonl --output llava-w3`

    `mbq-ao quantize ./my-model --no-data --precision w4a8 --output my-model-w4a8`

    The model stays in main memory; a GPU gets one decoder layer at a time. Several GPUs share the samples:
    `torchrun --nproc-per-node=8 -m mbq_ao quantize ...`
    """
    if (data is None) != no_data:
        raise typer.BadParameter("give --data FILE, or --no-data for plain rounding (not both)")
    if no_data and (
        given := [n for n, v in (("work-dir", work_dir), ("image-folder", image_folder), ("texts", texts)) if v]
    ):
        raise typer.BadParameter(f"--no-data calibrates nothing: leave out --{given[0]}")
    if no_data and (recipe, targets, vision) != ("best", "decoder", None):
        raise typer.BadParameter("--no-data rounds the decoder: leave out --recipe, --targets and --vision")
    for option, path in (("--data", data), ("--texts", texts)):
        if path is not None and not path.is_file():
            raise UserError(f"{option}: there is no file {path}")
    if image_folder is not None and not image_folder.is_dir():
        raise UserError(f"--image-folder: there is no folder {image_folder}")
    _check_output(output, model, overwrite)
    from mbq_ao.pretrained import quant_method

    model_config = load_config(model)
    if (method := quant_method(model_config)) is not None:
        raise UserError(f"{model} is quantized already ({method}); give the full-precision model")
    compute_device = chosen_device(device)

    import mbq_ao
    from mbq_ao.calibration.data import calibration_data, with_dtype
    from mbq_ao.pretrained import save_pretrained

    # Checked before the long work: its options first, the data next.
    config = mbq_ao.mbq_config(
        [],
        precision=precision,
        group_size=as_group_size(group_size),
        recipe=recipe,
        targets=targets,
        vision=None if vision is None else _rounding(vision),
    )
    processor = _processor(model, needed=data is not None)
    batches = []
    if data is not None:
        batches = calibration_data(
            data,
            processor,
            n_samples=samples,
            seed=seed,
            image_folder=image_folder,
            mode=mode,
            texts=None if texts is None else texts.read_text(encoding="utf-8"),
            max_length=max_length,
        )
    quantized = load_model(model, model_config, dtype=dtype)
    report: CalibrationReport | None = None
    with _rank() as rank:
        if no_data:
            quantizer = config.quantizer()
            _round_decoder(quantized, quantizer.rounding(group_size=quantizer.group_size))
        else:
            batches = [with_dtype(batch, quantized.dtype) for batch in batches]
            report = mbq_ao.quantize_(
                quantized, replace(config, calib_data=batches), compute_device=compute_device, work_dir=work_dir
            )
        if rank:
            return None
        save_pretrained(quantized, output, report=report)
        if processor is not None:
            processor.save_pretrained(output)
    return _show(model, output, quantized, report)


def _check_output(output: Path, model: str, overwrite: bool) -> None:
    """Raise UserError where the checkpoint could not be saved, or would replace something."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output must be a folder, {output} is a file")
    if output.exists() and Path(model).exists() and output.samefile(model):
        raise UserError(f"--output {output} is the model itself; give another folder")
    if not overwrite and any(output.glob("*.safetensors")):
        raise UserError(f"--output {output} holds a checkpoint; give another folder, or --overwrite")
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    for folder in (parent, output) if output.exists() else (parent,):
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"--output {output}: cannot write to {folder}: {error.strerror}") from error


def _processor(model: str, *, needed: bool) -> Any:
    """The model's processor, which is saved beside the checkpoint; None where it is not needed and cannot be loaded."""
    try:
        return load_processor(model)
    except UserError as error:
        if needed:
            raise
        warnings.warn(f"saved without a processor: {error}", stacklevel=2)
        return None


def _rounding(precision: Literal["w3a16", "w4a8"]) -> AOBaseConfig:
    import mbq_ao

    return mbq_ao.mbq_config([], precision=precision).quantizer().rounding()


def _round_decoder(model: nn.Module, config: AOBaseConfig) -> None:
    """Plain rounding of what calibration would quantize: the decoder layers' linears and experts, not the routers."""
    from torch import nn
    from torchao.quantization import FqnToConfig

    import mbq_ao
    from mbq_ao.calibration.capture import find_blocks
    from mbq_ao.calibration.experts import ExpertLinears, ExpertParameter, routers_of

    chosen: dict[str, AOBaseConfig] = {}
    for block_name, block in find_blocks(model).items():
        experts = []
        for owner_name, owner in block.named_modules():
            for name, parameter in owner.named_parameters(owner_name, recurse=False):
                transposed = getattr(owner, "is_transposed", None)
                if parameter.ndim == 3 and isinstance(transposed, bool):
                    experts.append(ExpertParameter(owner, name, ExpertLinears(parameter, transposed)))
                elif parameter.ndim == 3 and not isinstance(owner, nn.Conv1d):
                    warnings.warn(
                        f"left as it is: {block_name}.{name}, of which transformers does not say how it holds its "
                        "experts; calibration finds out (--data)",
                        stacklevel=2,
                    )
        routers = routers_of(block, experts)
        linears = [n for n, m in block.named_modules() if isinstance(m, nn.Linear) and n not in routers]
        chosen |= dict.fromkeys((f"{block_name}.{n}" for n in (*linears, *(e.name for e in experts))), config)
    mbq_ao.quantize_(model, FqnToConfig(chosen), filter_fn=None)


@contextmanager
def _rank() -> Iterator[int]:
    """This process' rank under torchrun, with torch.distributed initialised; else 0."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield 0
        return
    dist.init_process_group()
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _show(name: str, output: Path, model: Any, report: CalibrationReport | None) -> dict[str, Any]:
    """Print what was done, and the same for --json."""
    from mbq_ao.hf_quantizer import packed_weights

    weights = packed_weights(model).values()
    result: dict[str, Any] = {"model": name, "output": str(output), "num_weights": len(weights)}
    result["nbytes_before"] = sum(w.numel() * w.element_size() for w in weights)
    result["nbytes_after"] = sum(w.quantized_nbytes() for w in weights)
    if report is None:
        print(
            f"{len(weights)} weights rounded: {result['nbytes_before'] / 1e6:.1f} MB -> "
            f"{result['nbytes_after'] / 1e6:.1f} MB"
        )
    else:
        fields = ("settings", "calibration", "logits_error", "seconds", "num_resumed")
        result |= {field: getattr(report, field) for field in fields}
        print(report.summary())
    print(f"saved: {output}\nnext:  mbq-ao inspect {output}; mbq-ao generate {output} --prompt ...")
    return result
