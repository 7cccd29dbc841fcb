"""`mbq-ao inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbq_ao.cli.console import Json, UserError, console
from mbq_ao.cli.models import ModelName, loading, local_folder, shown

if TYPE_CHECKING:
    from mbq_ao.cli.stored_weights import StoredTensor, StoredWeight, WeightStatistics


def inspect(
    model: ModelName,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the weights, and what the calibration gained, into this folder.",
            rich_help_panel="Output",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Read the files' headers only: shapes and sizes, no statistics.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every tensor with its checksum.")] = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Show what is in a quantized checkpoint: precision, size and scales of every weight.

    Examples:

    `mbq-ao inspect llava-w3 --plot pictures`

    `mbq-ao inspect llava-w3 --verify --json`

    It reads the files, weight by weight, and builds no model: it takes little memory whatever the size. MODEL may also
    be a file that `mbq_ao.save_safetensors` wrote. "saturated" is the share of the smallest and the largest code;
    sound checkpoints have no scales that are 0.
    """
    if quick and plot is not None:
        raise typer.BadParameter("--plot draws the statistics, which --quick leaves out")
    path = _files_of(model)

    from tqdm.auto import tqdm

    from mbq_ao.cli.stored_weights import checkpoint_files, read_headers, statistics

    files = checkpoint_files(path)
    if verify:
        from mbq_ao.hf_quantizer import verify_shard
        from mbq_ao.safetensors_format import verify_file

        for file in tqdm(files, desc="checksums"):
            if not (verify_file(file) if path.is_file() else verify_shard(file)):
                raise UserError(f"--verify: there are no checksums of {file}; it may be sound all the same")
    weights, others = read_headers(files)
    found = {} if quick else {w.name: statistics(w) for w in tqdm(weights, desc="weights", leave=False)}
    result = {
        "path": str(path),
        "settings": _settings(path),
        "weights": [_record(weight, found.get(weight.name)) for weight in weights],
        "totals": _totals(weights, others),
        "verified": verify,
    }
    _show(result)
    if plot is not None:
        result["plots"] = _draw(path, weights, found, plot)
    return result


def _files_of(model: str) -> Path:
    path = local_folder(model)
    if path is not None:
        return path
    from huggingface_hub import snapshot_download

    with loading(shown(model)):
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json"]))


def _settings(path: Path) -> dict[str, Any]:
    if path.is_file():
        return {}
    return json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"]


def _record(weight: StoredWeight, found: WeightStatistics | None) -> dict[str, Any]:
    return {
        "name": weight.name,
        "precision": weight.precision,
        "shape": list(weight.shape),
        "group_size": weight.group_size,
        "act_pre_scale": "act_pre_scale" in weight.parts,
        "nbytes": weight.nbytes,
        "bits_per_weight": 8 * weight.nbytes / weight.num_weights,
        **({} if found is None else asdict(found)),
    }


def _totals(weights: list[StoredWeight], others: dict[str, StoredTensor]) -> dict[str, Any]:
    parts = {
        "quantized": [(weight.num_weights, weight.nbytes) for weight in weights],
        "other": [(prod(tensor.shape), tensor.nbytes) for tensor in others.values()],
    }
    totals: dict[str, Any] = {"nbytes": sum(nbytes for sizes in parts.values() for _, nbytes in sizes)}
    for which, sizes in parts.items():
        numbers, nbytes = sum(n for n, _ in sizes), sum(b for _, b in sizes)
        totals |= {
            f"num_{which}": len(sizes),
            f"num_{which}_parameters": numbers,
            f"{which}_nbytes": nbytes,
            f"{which}_bits_per_weight": 8 * nbytes / numbers if numbers else None,
        }
    return totals


def _show(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    has_statistics = any("codes" in weight for weight in result["weights"])
    columns = ["weight", "precision", "shape", "group", "MB", "bits/weight"]
    columns += ["scale min", "median", "max", "saturated", "zero scales"] if has_statistics else []
    for column in columns:
        table.add_column(column, justify="left" if column in ("weight", "precision") else "right", no_wrap=True)
    for weight in result["weights"]:
        row = [
            weight["name"] + (" (pre-scaled)" if weight["act_pre_scale"] else ""),
            weight["precision"],
            " x ".join(map(str, weight["shape"])),
            "row" if weight["group_size"] >= weight["shape"][-1] else str(weight["group_size"]),
            f"{weight['nbytes'] / 1e6:.2f}",
            f"{weight['bits_per_weight']:.2f}",
        ]
        if has_statistics:
            row += [_number(weight[f"scale_{name}"]) for name in ("min", "median", "max")]
            row += [f"{100 * weight['saturated']:.1f}%", f"{100 * weight['zero_scales']:.2g}%"]
        table.add_row(*row)
    console().print(table)
    totals = result["totals"]
    for which, what in (("quantized", "quantized weights"), ("other", "other tensors")):
        size = f"{totals[f'num_{which}_parameters'] / 1e6:.1f}M parameters, {totals[f'{which}_nbytes'] / 1e6:.1f} MB"
        bits = totals[f"{which}_bits_per_weight"]
        print(f"{totals[f'num_{which}']} {what}: {size}" + ("" if bits is None else f", {bits:.2f} bits each"))
    print(f"all: {totals['nbytes'] / 1e6:.1f} MB" + (", checksums verified" if result["verified"] else ""))
    if bad := [weight["name"] for weight in result["weights"] if weight.get("bad_scales")]:
        print(f"DAMAGED: scales that are NaN or infinite in {', '.join(bad)}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _draw(path: Path, weights: list[StoredWeight], found: dict[str, WeightStatistics], folder: Path) -> list[str]:
    """Save the pictures; their paths."""
    from mbq_ao.calibration.report import CalibrationReport
    from mbq_ao.cli.plot import plot_weights
    from mbq_ao.hf_quantizer import REPORT

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"--plot must be a folder, {folder} is a file") from error
    pictures = [folder / "weights.png"]
    plot_weights(weights, found).savefig(pictures[0], dpi=150, bbox_inches="tight")
    if path.is_dir() and (path / REPORT).is_file():
        pictures.append(folder / "sensitivity.png")
        CalibrationReport.from_json(path / REPORT).plot(pictures[-1])
    else:
        print(f"no picture of the sensitivity: there is no {REPORT}, which calibrated models are saved with")
    for picture in pictures:
        print(f"drawn: {picture}")
    return [str(picture) for picture in pictures]
