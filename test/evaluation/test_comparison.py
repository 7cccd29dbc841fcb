"""Tables of several results, and lists of what became wrong, of results made by hand."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason='EVALUATION IS NOT TESTED: pip install "mbq_ao[eval]"')
from PIL import Image

from mbq_ao.evaluation import bad_cases, compare, load_results
from mbq_ao.evaluation.records import save_results, tracker_of
from mbq_ao.evaluation.task_set import find_tasks

RIGHT = {"a": [1, 1, 1, 0, 1, 0], "b": [1, 0, 1, 1, 0, 0]}
LOGLIKELIHOODS = {"a": [-50.0, -20.0, -31.0], "b": [-52.0, -23.0, -30.5]}
WORDS = [20, 7, 12]


def results(name: str) -> dict[str, Any]:
    """Six answers to easy_vqa, three passages' likelihoods, as lm-eval has them."""
    right, likelihoods = RIGHT[name], LOGLIKELIHOODS[name]
    common = {"filter": "none", "prompt_hash": "p", "target_hash": "t", "doc_hash": "d"}
    answers = [
        {
            **common,
            "doc_id": i,
            "doc": {"question": f"question {i}", "answer": "red"},
            "target": "red",
            "arguments": [(f"<image>question {i}", {"until": ["\n"]}, {"visual": ["hash"]})],
            "resps": [["red" if r else "a ```blue```"]],
            "filtered_resps": ["red" if r else "a ```blue```"],
            "metrics": ["exact_match"],
            "exact_match": np.float64(r),
        }
        for i, r in enumerate(right)
    ]
    passages = [
        {
            **common,
            "doc_id": i,
            "doc": {"text": f"text {i}"},
            "target": f"text {i}",
            "arguments": [(f"text {i}",)],
            "resps": [[x]],
            "filtered_resps": [x],
            "metrics": ["word_perplexity"],
            "word_perplexity": (x, words),
        }
        for i, (x, words) in enumerate(zip(likelihoods, WORDS, strict=True))
    ]
    mean = sum(right) / 6
    return {
        "results": {
            "easy_vqa": {
                "alias": "easy_vqa",
                "exact_match,none": mean,
                "exact_match_stderr,none": math.sqrt(mean * (1 - mean) / 5),
            },
            "text_perplexity": {
                "word_perplexity,none": math.exp(-sum(likelihoods) / sum(WORDS)),
                "word_perplexity_stderr,none": "N/A",
            },
        },
        "higher_is_better": {"easy_vqa": {"exact_match": True}, "text_perplexity": {"word_perplexity": False}},
        "versions": {"easy_vqa": 1.0, "text_perplexity": 1.0},
        "n-samples": {"easy_vqa": {"effective": 6}, "text_perplexity": {"effective": 3}},
        "config": {"model": name},
        "mbq_ao": {"nbytes": {"a": 4_000_000, "b": 1_250_000}[name]},
        "samples": {"easy_vqa": answers, "text_perplexity": passages},
    }


def test_differences_and_their_errors() -> None:
    comparison = compare(results("a"), results("b"))
    accuracy, perplexity = comparison.rows
    # The paired standard error of a mean in its usual form.
    differences = np.array(RIGHT["b"]) - np.array(RIGHT["a"])
    second = accuracy.scores[1]
    assert second.difference == pytest.approx(differences.mean())
    assert second.difference_error == pytest.approx(differences.std(ddof=1) / math.sqrt(6))
    assert accuracy.scores[0].standard_error == results("a")["results"]["easy_vqa"]["exact_match_stderr,none"]
    # Perplexity with each passage left out, one by one.
    left_out = {
        name: [math.exp(-(sum(x) - x[i]) / (sum(WORDS) - WORDS[i])) for i in range(3)]
        for name, x in LOGLIKELIHOODS.items()
    }
    difference = np.subtract(left_out["b"], left_out["a"])
    expected = math.sqrt(2 / 3 * ((difference - difference.mean()) ** 2).sum())
    assert perplexity.scores[1].difference_error == pytest.approx(expected)
    assert perplexity.scores[0].standard_error == pytest.approx(math.sqrt(2) * np.std(left_out["a"]))


def test_table() -> None:
    comparison = compare(results("a"), results("b"))
    assert comparison.markdown() == (
        "| task | metric | n | a | b | difference |\n"
        "| --- | --- | ---: | ---: | ---: | ---: |\n"
        "| easy_vqa | exact_match ↑ | 6 | 0.6667 ± 0.21 | 0.5 ± 0.22 | -0.1667 ± 0.31 |\n"
        "| text_perplexity | word_perplexity ↓ | 3 | 13.33 ± 1.2 | 14.96 ± 2.2 | +1.63 ± 1.3 |\n"
        "| size | MB ↓ |  | 4.0 | 1.2 |  |\n"
    )
    assert comparison.table().row_count == 3
    json.dumps(comparison.to_dict(), allow_nan=False)
    named = compare(results("a"), names=["x|y"])
    assert named.markdown().startswith("| task | metric | n | x\\|y |\n")


def test_without_samples_differences_have_no_error() -> None:
    bare = [{k: v for k, v in results(name).items() if k != "samples"} for name in "ab"]
    rows = compare(*bare).rows
    assert [row.scores[1].difference_error for row in rows] == [None, None]
    assert rows[1].scores[0].standard_error is None
    assert "| 13.33 | 14.96 | +1.63 |" in compare(*bare).markdown()


def changed(path: str, value: Any) -> dict[str, Any]:
    result = copy.deepcopy(results("b"))
    *keys, last = path.split("/")
    place: Any = result
    for key in keys:
        place = place[int(key) if isinstance(place, list) else key]
    place[last] = value
    return result


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (changed("n-samples/easy_vqa/effective", 5), "easy_vqa was asked with 6, 5 questions: .* the same limit"),
        (changed("versions/easy_vqa", 2.0), "easy_vqa was asked in the versions 1.0, 2.0"),
        (changed("samples/easy_vqa/3/doc", {"question": "another"}), "easy_vqa was asked with other questions"),
        ({"results": {"mmlu": {}}}, "no task in common: easy_vqa, text_perplexity; mmlu"),
        ("nowhere.json", "there are no results at nowhere.json"),
    ],
)
def test_other_questions_are_refused(other: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(results("a"), other)


def test_refused_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no results_\*\.json"):
        load_results(tmp_path)
    for text, message in (("{", "is not JSON"), ("[1]", "has no results of lm-eval")):
        (tmp_path / "results_1.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_results(tmp_path)
    with pytest.raises(ValueError, match="at least one result"):
        compare()
    with pytest.raises(ValueError, match="names must be as many as the results, 2, got 1"):
        compare(results("a"), results("b"), names=["a"])


def test_bad_cases_in_memory_and_from_files(tmp_path: Path) -> None:
    for name in "ab":
        tracker = tracker_of(tmp_path / name)
        tracker.general_config_tracker.model_name_sanitized = name
        save_results(tracker, results(name))
    record = bad_cases(tmp_path / "a", tmp_path / "b", tmp_path / "files")
    assert record == bad_cases(results("a"), results("b"), tmp_path / "memory")
    for folder in (tmp_path / "files", tmp_path / "memory"):
        assert json.loads((folder / "bad_cases.json").read_text()) == record
    counts = {"metric": "exact_match", "num_samples": 6, "num_broken": 2, "num_mended": 1}
    assert record["tasks"] == {"easy_vqa": counts}
    assert [case["doc_id"] for case in record["cases"]] == [1, 4]
    assert record["cases"][0] == {
        "task": "easy_vqa",
        "doc_id": 1,
        "prompt": "<image>question 1",
        "target": "red",
        "before": "red",
        "after": "a ```blue```",
        "images": ["images/easy_vqa_1.png"],
    }
    names, manager = find_tasks("easy_vqa")
    docs = manager.load(names)["tasks"]["easy_vqa"].eval_docs
    with Image.open(tmp_path / "files" / "images" / "easy_vqa_4.png") as image:
        assert image.tobytes() == docs[4]["image"].convert("RGB").tobytes()
    text = (tmp_path / "files" / "bad_cases.md").read_text()
    assert "* easy_vqa, exact_match: 2 of 6 questions broken, 1 the other way round\n" in text
    assert "![question 1](images/easy_vqa_1.png)\n\n```\n<image>question 1\n```\n" in text


def test_bad_cases_of_choices(tmp_path: Path) -> None:
    """Multiple choice: the answer is the likeliest choice."""

    def chosen(likelihoods: list[float], right: int) -> dict[str, Any]:
        row = {
            "doc_id": 0,
            "doc": {},
            "target": "0",
            "arguments": [("which? ```x```", " red"), ("which? ```x```", " blue")],
            "filtered_resps": [(x, False) for x in likelihoods],
            "metrics": ["acc"],
            "acc": right,
        }
        return {"results": {}, "samples": {"text_perplexity": [row]}}

    record = bad_cases(chosen([-1.0, -2.0], 1), chosen([-3.0, -2.5], 0), tmp_path)
    assert record["cases"][0]["before"] == "red (log-likelihood -1.000)"
    assert record["cases"][0]["after"] == "blue (log-likelihood -2.500)"
    assert "\n````\nwhich? ```x```\n````\n" in (tmp_path / "bad_cases.md").read_text()


def test_bad_cases_are_none_or_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass log_samples=True"):
        bad_cases({"results": {}}, results("b"), tmp_path)
    with pytest.raises(ValueError, match="there are no samples of 'mmlu', only of easy_vqa, text_perplexity"):
        bad_cases(results("a"), results("b"), tmp_path, tasks=["mmlu"])
    assert bad_cases(results("a"), results("b"), tmp_path, tasks=["text_perplexity"]) == {"tasks": {}, "cases": []}
    assert "No task scores its questions as right or wrong." in (tmp_path / "bad_cases.md").read_text()
