"""docs/models.md: what `quantize_` does with every model family of the tests.

    python test/model_matrix.py     writes the page

test/calibration/test_matrix.py quantizes the same models and fails where the page says something else.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported; without a GPU it interprets

import torch
import transformers
from families import FAMILIES, MIXTURES, REFUSED, Family
from models import build_batch, build_model, model_inputs
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as OFFERED

from mbq_ao import mbq_config, quantize_
from mbq_ao.calibration.capture import find_blocks
from mbq_ao.calibration.report import CalibrationReport

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
REGENERATE = "run `python test/model_matrix.py` and look at what it changes in docs/models.md"
INTRO = """\
# Models

Layers, and what takes a scale, are found by structure, not looked up: a model need not be on this page to work. Those
on it are tested, each as a tiny random model of its real class, in W3A16 and in W4A8: folding the scales leaves the
logits unchanged (relative change below 1e-5), and the quantized model's logits are finite.

All linears of the decoder layers are quantized; with `recipe="mbq"` with a scale, which is folded into the norm or the
linear before them and costs nothing when the model runs. The exceptions:

* *kept*: the scale stays beside the quantized weight (`act_pre_scale`) and divides the input, because what makes the
  input cannot take it: an activation that does not scale (GELU), a norm without a weight, a hidden state that
  something else reads too, or values whose rows lie between those of queries and keys.
* *left*: not quantized. In the layers, what is no linear, or none that is called as one; and the linears of the
  language model beside its layers. Embeddings and `lm_head` always stay, and towers and projectors unless asked for
  with `mbq_config(targets=...)` or `mbq_config(vision=...)`.

Written by `python test/model_matrix.py` with transformers {version}.
"""
HEADER = """\
| family | class | decoder layers | kept | left |
|---|---|---|---|---|"""
GROUPS = """\
## Scale groups

Who takes whose scale, in the order in which a layer runs. `weight`: a norm's weight; `one_plus_weight`: of a norm that
multiplies by 1 + weight; `rows`: a linear's rows; `act_pre_scale`: kept.
"""
REFUSALS = """\
## Refused

| family | error |
|---|---|"""
OTHERS = """\
## Not tested

They may work: `quantize_` checks every fold on the model itself, and `print(report)` says what it found. Of the
image-text-to-text models of transformers {version} no test covers: {names}.

Mixtures of experts have tests of their own: {mixtures}.

FastVLM, Gemma 3n and Perception LM need timm, which the tests do without; the decoder of Gemma 3n is `gemma3n_text`
above."""


@dataclass(frozen=True)
class Entry:
    """What the page says of a family."""

    row: str
    groups: str


def entry(family: str, model: nn.Module, report: CalibrationReport) -> Entry:
    """What is true of a family, by the report on its model."""
    blocks = find_blocks(model)
    kept = {n: None for g in report.groups if g.producer is None for n in g.linears}
    inside = [_in_layer(name, blocks) for name in report.not_quantized + report.not_scaled]
    beside = _linears_beside(model, blocks)
    cells = (
        family,
        f"`{type(model).__name__}`",
        f"`{next(iter(blocks)).rpartition('.')[0]}`",
        _names(kept),
        _names([*inside, *beside]),
    )
    texts: dict[str, list[str]] = {}
    for block in blocks:
        lines = [
            f"  {g.producer} -> {', '.join(g.linears)} | {g.fold}"
            if g.producer
            else f"  {', '.join(g.linears)} | {g.fold}"
            for g in report.groups
            if g.block == block
        ]
        texts.setdefault("\n".join(lines), []).append(block.rpartition(".")[2])
    groups = "\n".join(f"layers {', '.join(indices)}\n{text}" for text, indices in texts.items())
    return Entry(f"| {' | '.join(cells)} |", groups)


def _in_layer(name: str, blocks: Mapping[str, nn.Module]) -> str:
    return next(name.removeprefix(f"{b}.") for b in blocks if name.startswith(f"{b}."))


def _linears_beside(model: nn.Module, blocks: Mapping[str, nn.Module]) -> list[str]:
    inside = {module for block in blocks.values() for module in block.modules()}
    inside.add(model.get_output_embeddings())
    found = {name: m for name, m in model.get_decoder().named_modules() if not name.startswith("embed_tokens")}
    return [re.sub(r"\.\d+", ".*", n) for n, m in found.items() if isinstance(m, nn.Linear) and m not in inside]


def _names(names: Iterable[str]) -> str:
    short = dict.fromkeys(name.removesuffix(".weight") for name in names)
    return ", ".join(f"`{name}`" for name in short) or "-"


def refusal(family: str) -> str:
    """The row of a family that is refused."""
    model = build_model(REFUSED[family])
    try:
        quantize_(model, mbq_config([build_batch(REFUSED[family])], group_size=32, recipe="mbq"), progress=False)
    except (ValueError, RuntimeError) as error:
        return f"| {family} | {type(error).__name__}: {error} |"
    raise AssertionError(f"{family} is not refused any more: move it to FAMILIES")


def not_tested(tested: str) -> str:
    """The paragraph on the other models of this version of transformers; `tested`: the tables of those that are."""
    mixtures = {family.config().model_type for family in MIXTURES.values()}
    rest = sorted(name for name, model in OFFERED.items() if model not in tested and name not in mixtures)
    return OTHERS.format(version=transformers.__version__, names=", ".join(rest), mixtures=", ".join(sorted(mixtures)))


def measure(name: str, family: Family) -> Entry:
    entries = set()
    for precision in ("w3a16", "w4a8"):
        model = build_model(family)
        batches = [build_batch(family, 9), build_batch(family, 12, seed=2)]
        config = mbq_config(batches, precision=precision, group_size=32, n_grid=3, recipe="mbq")
        report = quantize_(model, config, progress=False)
        with torch.no_grad():
            assert report.logits_error < 1e-5 and model(**model_inputs(batches[0])).logits.isfinite().all(), name
        entries.add(entry(name, model, report))
    (only,) = entries  # of both precisions the same
    return only


def page(entries: Mapping[str, Entry]) -> str:
    """The whole page."""
    kinds: dict[str, list[str]] = {}
    for name, found in entries.items():
        kinds.setdefault(found.groups, []).append(name)
    version = transformers.__version__
    table = "\n".join([HEADER, *(found.row for found in entries.values())])
    groups = "\n\n".join(f"### {', '.join(names)}\n\n```text\n{text}\n```" for text, names in kinds.items())
    refused = "\n".join([REFUSALS, *(refusal(name) for name in REFUSED)])
    parts = [INTRO.format(version=version), table, GROUPS, groups, refused, not_tested(table + refused)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def read_page(text: str) -> dict[str, Entry]:
    """What the page says of every family, in its order."""
    rows = re.findall(r"^(\| (\w+) \| `.*)$", text, re.MULTILINE)
    sections = re.findall(r"^### (.*)\n\n```text\n([^`]*)\n```$", text, re.MULTILINE)
    groups = {name: block for names, block in sections for name in names.split(", ")}
    return {name: Entry(row, groups[name]) for row, name in rows}


def main() -> None:
    warnings.filterwarnings("ignore", message="no vision token found")
    entries = {}
    for name, family in FAMILIES.items():
        print(name, file=sys.stderr)
        entries[name] = measure(name, family)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(entries), encoding="utf-8")


if __name__ == "__main__":
    main()
