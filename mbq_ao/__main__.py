"""Command line: `python -m mbq_ao demo`."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Literal


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mbq_ao", description=sys.modules["mbq_ao"].__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="quantize a vision-language model and compare it with full precision and plain rounding",
    )
    demo.add_argument("--model", help="a hub name or local path; default: the small model that comes with this package")
    demo.add_argument("--samples", type=int, default=16, help="calibration pairs (default: %(default)s)")
    demo.add_argument("--images", type=int, default=80, help="test images to ask about (default: %(default)s)")
    demo.add_argument(
        "--precision",
        choices=("w3a16", "w4a8"),
        default="w3a16",
        help="w4a8 compares with SmoothQuant, too (default: %(default)s)",
    )
    demo.add_argument(
        "--group-size",
        choices=("32", "64", "128", "row"),
        help="input channels that share a scale (default: row for w4a8, else 128, and 64 for the demo model, which is "
        "576 wide)",
    )
    demo.add_argument("--recipe", choices=("best", "paper"), default="best")
    demo.add_argument("--seed", type=int, default=0, help="draws the calibration pairs (default: %(default)s)")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the results")
    options = parser.parse_args(arguments)
    group_size: int | Literal["auto"] | None = 64 if options.precision == "w3a16" and not options.model else "auto"
    if options.group_size:
        group_size = None if options.group_size == "row" else int(options.group_size)

    # transformers imports more of torchao, whose deprecation remarks would open the demo's output.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    from mbq_ao.demo.run import run_demo

    try:
        run_demo(
            model_name=options.model,
            num_samples=options.samples,
            num_images=options.images,
            precision=options.precision,
            group_size=group_size,
            recipe=options.recipe,
            seed=options.seed,
            output=options.output,
        )
    except ImportError as error:  # says what to install
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
