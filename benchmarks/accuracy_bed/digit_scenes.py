"""Scenes of handwritten digits with questions that need counting, reading and places: the second test bed's data.

    64 x 64 image, a 4 x 4 board of cells of 16 pixels      "how many digits are there?"       "four"
    2 to 6 cells hold a digit in one of four inks           "what digit is in the top left?"   "seven" | "none"
                                                            "what color is the three?"         "blue"
                                                            "read the digits"                  "seven, three, one"

The digits are scikit-learn's (`load_digits`: 1,797 of 8 x 8 pixels, 43 writers, UCI ML Repository, CC BY 4.0), twice
enlarged. Test scenes are made of digits that no training scene has. Everything follows from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mbq_ao.demo.data import VqaRow

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {"red": (200, 30, 30), "green": (20, 130, 40), "blue": (30, 60, 200), "black": (20, 20, 20)}
BOARD, CELL = 4, 16
PLACES = {"top left": 0, "top right": BOARD - 1, "bottom left": BOARD * (BOARD - 1), "bottom right": BOARD**2 - 1}
FEWEST, MOST = 2, 6
TEST_SHARE = 5  # every fifth digit is the test's


@dataclass(frozen=True)
class Scene:
    """A board: cell -> (digit, ink), cells in reading order; and its picture."""

    cells: dict[int, tuple[int, str]]
    image: Image.Image


def load_scenes(split: str, count: int, seed: int = 0) -> list[Scene]:
    """`count` scenes of the split "train" or "test".  Raises ValueError for another split."""
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    from sklearn.datasets import load_digits

    digits = load_digits()
    own = [i for i in range(len(digits.target)) if (i % TEST_SHARE == 0) == (split == "test")]
    of_digit = [[i for i in own if digits.target[i] == d] for d in range(10)]
    rng = random.Random(f"{split} {seed}")
    return [_scene(digits.images, of_digit, rng) for _ in range(count)]


def _scene(images: np.ndarray, of_digit: Sequence[Sequence[int]], rng: random.Random) -> Scene:
    # Corners are asked about, so they are filled more often than their share.
    corners = [cell for cell in PLACES.values() if rng.random() < 0.5]
    others = [cell for cell in range(BOARD**2) if cell not in corners]
    number = rng.randint(max(FEWEST, len(corners)), MOST)
    chosen = sorted(corners + rng.sample(others, number - len(corners)))
    cells = {cell: (rng.randrange(10), rng.choice(list(INKS))) for cell in chosen}
    paper = np.full((BOARD * CELL, BOARD * CELL, 3), 255.0) - rng.uniform(0, 25)
    for cell, (digit, ink) in cells.items():
        strokes = images[rng.choice(of_digit[digit])] / 16  # 0..1
        strokes = np.kron(strokes, np.ones((CELL // 8, CELL // 8)))[..., None]
        y, x = divmod(cell, BOARD)
        place = paper[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL]
        place += strokes * (np.array(INKS[ink]) - place)
    return Scene(cells, Image.fromarray(paper.clip(0, 255).astype(np.uint8)))


def ask(scene: Scene, image_id: int, rng: random.Random, per_kind: int = 2) -> list[VqaRow]:
    """Questions about one scene: some of each kind, yes and no equally often."""
    digits = [digit for digit, _ in scene.cells.values()]
    found: list[tuple[str, str]] = [
        ("how many digits are there?", WORDS[len(digits)]),
        ("read the digits", ", ".join(WORDS[d] for d in digits)),
        ("what is the largest digit?", WORDS[max(digits)]),
    ]
    for place in rng.sample(list(PLACES), per_kind):
        cell = scene.cells.get(PLACES[place])
        found.append((f"what digit is in the {place}?", "none" if cell is None else WORDS[cell[0]]))
    absent = [d for d in range(10) if d not in digits]
    for present in (True, False):
        digit = rng.choice(digits if present else absent)
        found.append((f"is there {'an' if digit == 8 else 'a'} {WORDS[digit]}?", "yes" if present else "no"))
    inks = [ink for _, ink in scene.cells.values()]
    ink = rng.choice(list(INKS))
    found.append((f"how many digits are {ink}?", WORDS[inks.count(ink)]))
    single = [(digit, ink) for digit, ink in scene.cells.values() if digits.count(digit) == 1]
    for digit, ink in rng.sample(single, min(per_kind, len(single))):
        found.append((f"what color is the {WORDS[digit]}?", ink))
    return [VqaRow(scene.image, question, answer, image_id) for question, answer in found]


def load_digit_vqa(split: str, count: int, seed: int = 0) -> list[VqaRow]:
    """About ten rows for each of `count` scenes."""
    rng = random.Random(f"questions {split} {seed}")
    return [row for i, scene in enumerate(load_scenes(split, count, seed)) for row in ask(scene, i, rng)]
