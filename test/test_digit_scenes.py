"""The second bed of benchmarks/accuracy.py: scenes of digits, and that their answers are true."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
pytest.importorskip("sklearn")
from accuracy_bed.digit_scenes import BOARD, CELL, INKS, PLACES, WORDS, Scene, ask, load_digit_vqa, load_scenes


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return load_scenes("train", 60, seed=3)


def test_everything_follows_from_the_seed(scenes: list[Scene]) -> None:
    for a, b in zip(scenes, load_scenes("train", 60, seed=3), strict=True):
        assert a.cells == b.cells and a.image.tobytes() == b.image.tobytes()
    assert [s.cells for s in scenes] != [s.cells for s in load_scenes("train", 60, seed=4)]
    rows, again = (load_digit_vqa("test", 3, seed=1) for _ in range(2))
    assert [(r.question, r.answer, r.image_id) for r in rows] == [(r.question, r.answer, r.image_id) for r in again]


def test_pictures_show_what_the_cells_say(scenes: list[Scene]) -> None:
    for scene in scenes:
        pixels = np.asarray(scene.image).astype(float)
        paper = np.median(pixels, (0, 1))
        for cell in range(BOARD**2):
            y, x = divmod(cell, BOARD)
            part = pixels[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL].reshape(-1, 3)
            assert (np.abs(part - paper).max() > 60) == (cell in scene.cells)
            if cell in scene.cells:
                _, ink = scene.cells[cell]
                darkest = part[np.abs(part - paper).sum(1).argmax()]
                assert min(INKS, key=lambda name: np.abs(darkest - INKS[name]).sum()) == ink


def test_answers_are_true(scenes: list[Scene]) -> None:
    kinds = set()
    for scene in scenes:
        digits = [WORDS[d] for d, _ in scene.cells.values()]
        for row in ask(scene, 0, random.Random(0)):
            *_, last = words = row.question.rstrip("?").split()
            if row.question.startswith("how many digits are there"):
                expected = WORDS[len(digits)]
            elif row.question == "read the digits":
                expected = ", ".join(digits)
            elif "largest" in words:
                expected = max(digits, key=WORDS.index)
            elif "in the" in row.question:
                cell = scene.cells.get(PLACES[" ".join(words[-2:])])
                expected = WORDS[cell[0]] if cell else "none"
            elif words[0] == "is":
                expected = "yes" if last in digits else "no"
            elif words[:2] == ["how", "many"]:
                expected = WORDS[sum(ink == last for _, ink in scene.cells.values())]
            else:
                ((_, expected),) = [cell for cell in scene.cells.values() if WORDS[cell[0]] == last]
            assert row.answer == expected, row.question
            kinds.add(words[0] + words[-1] if words[0] == "how" else words[0] + words[1])
    assert len(kinds) >= 6


def test_no_digit_is_in_both_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn import datasets

    digits = datasets.load_digits()
    digits.images = np.zeros_like(digits.images)
    digits.images[:, 0, 0] = 1 + np.arange(len(digits.images)) % 5  # of the test: 1
    monkeypatch.setattr(datasets, "load_digits", lambda: digits)
    for split, own in (("train", {2, 3, 4, 5}), ("test", {1})):
        seen = set()
        for scene in load_scenes(split, 30):
            pixels = np.asarray(scene.image).astype(float)
            for cell, (_, ink) in scene.cells.items():
                y, x = divmod(cell, BOARD)
                paper = pixels[y * CELL + 8, x * CELL + 8]
                seen |= {round(16 * float(((pixels[y * CELL, x * CELL] - paper) / (INKS[ink] - paper)).mean()))}
        assert seen == own


def test_other_splits_are_refused() -> None:
    with pytest.raises(ValueError, match='split must be "train" or "test"'):
        load_scenes("validation", 1)
