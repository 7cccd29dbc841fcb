"""`mbq-ao demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

GroupSize = Literal["32", "64", "128", "row"]


def demo(
    model: Annotated[
        str | None,
        typer.Option(help="A hub name or local path; default: the small model of this package."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration pairs.")] = 16,
    images: Annotated[int, typer.Option(min=1, help="Test images to ask about.")] = 80,
    precision: Annotated[Literal["w3a16", "w4a8"], typer.Option(help="w4a8 compares with SmoothQuant, too.")] = "w3a16",
    group_size: Annotated[
        GroupSize | None,
        typer.Option(
            help="Input channels that share a scale; default: row for w4a8, else 128, and 64 for the demo's own model, "
            "which is 576 wide."
        ),
    ] = None,
    recipe: Annotated[Literal["best", "mbq", "paper", "gptq"], typer.Option(help="As `mbq_config` has it.")] = "best",
    seed: Annotated[int, typer.Option(help="Draws the calibration pairs.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo_output"),
) -> None:
    """Quantize a vision-language model and compare it with full precision and plain rounding.

    Example: `mbq-ao demo --precision w4a8`
    """
    from mbq_ao.demo.run import run_demo

    run_demo(
        model_name=model,
        num_samples=samples,
        num_images=images,
        precision=precision,
        group_size=64 if group_size is None and precision == "w3a16" and model is None else as_group_size(group_size),
        recipe=recipe,
        seed=seed,
        output=output,
    )


def as_group_size(value: GroupSize | None) -> int | Literal["auto"] | None:
    """What `mbq_config` takes."""
    if value is None:
        return "auto"
    return None if value == "row" else int(value)
