"""Model families as tiny random models of their real classes: `FAMILIES` by name, and `REFUSED`.

To add one: an entry with its config, and what its processor returns for an image, in one of the modules here; then
`python test/model_matrix.py` writes docs/models.md.
"""

from families.language import LANGUAGE
from families.mixtures import MIXTURES
from families.more import MORE
from families.named import MULTIMODAL
from families.parts import IMAGE, IMAGE_END, IMAGE_START, VIDEO, Family
from families.unusual import REFUSED, UNUSUAL

# `MIXTURES` have tests of their own (test/calibration/test_experts.py).
FAMILIES: dict[str, Family] = {**MULTIMODAL, **MORE, **UNUSUAL, **LANGUAGE}
TEXT_ONLY = tuple(name for name, family in (FAMILIES | MIXTURES).items() if family.inputs is None)

__all__ = [
    "FAMILIES",
    "IMAGE",
    "IMAGE_END",
    "IMAGE_START",
    "LANGUAGE",
    "MIXTURES",
    "MULTIMODAL",
    "REFUSED",
    "TEXT_ONLY",
    "VIDEO",
    "Family",
]
