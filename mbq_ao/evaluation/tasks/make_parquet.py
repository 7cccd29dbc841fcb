"""Makes the data of the tasks in this folder: `python -m mbq_ao.evaluation.tasks.make_parquet`.

easy_vqa.parquet  one question about each of NUM_IMAGES test images of easy-VQA (PyPI `easy-vqa`), images as PNG inside.
                  One question an image, so that the questions are independent draws, as lm-eval's standard error takes
                  them to be.
text.parquet      NUM_PASSAGES passages of the Python language reference, from `pydoc_data.topics` of Python 3.11.

Both are shipped, since the topics change with Python and results must not. README.md has the licences.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets

NUM_IMAGES = 400
NUM_PASSAGES = 100
PASSAGE_LENGTH = 2000  # characters at most
FOLDER = Path(__file__).parent


def vqa_rows(seed: int = 0) -> list[dict[str, Any]]:
    """Rows of image, question, answer and image_id, in the order of easy-VQA's own image ids."""
    from mbq_ao.demo.data import group_by_image, load_easy_vqa

    rng = random.Random(seed)
    groups = rng.sample(group_by_image(load_easy_vqa("test")), NUM_IMAGES)
    rows = [rng.choice(group) for group in sorted(groups, key=lambda group: group[0].image_id)]
    return [{"image": r.image, "question": r.question, "answer": r.answer, "image_id": r.image_id} for r in rows]


def passages(text: str, length: int = PASSAGE_LENGTH) -> list[str]:
    """The text's paragraphs, joined to passages of at most `length` characters where no paragraph is longer."""
    found = [""]
    for paragraph in text.split("\n\n"):
        if found[-1] and len(found[-1]) + 2 + len(paragraph) > length:
            found.append("")
        found[-1] += ("\n\n" if found[-1] else "") + paragraph
    return found


def text_rows() -> list[dict[str, str]]:
    """Passages at even distances among all those of half the full length and more."""
    from pydoc_data.topics import topics

    long = [
        {"topic": topic, "text": passage.strip("\n")}
        for topic in sorted(topics)
        for passage in passages(topics[topic])
        if PASSAGE_LENGTH // 2 <= len(passage) <= PASSAGE_LENGTH
    ]
    return [long[i * len(long) // NUM_PASSAGES] for i in range(NUM_PASSAGES)]


def main() -> None:
    text, image = datasets.Value("string"), datasets.Image()
    features = {"image": image, "question": text, "answer": text, "image_id": datasets.Value("int32")}
    for name, rows, columns in (
        ("easy_vqa", vqa_rows(), features),
        ("text", text_rows(), {"topic": text, "text": text}),
    ):
        data = datasets.Dataset.from_list(rows, features=datasets.Features(columns))
        data.to_parquet(FOLDER / f"{name}.parquet")


if __name__ == "__main__":
    main()
