"""`evaluate` on tiny models: scores against computations by hand, checkpoints, files, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_models import save_tiny_vlm, tiny_vlm
from models import assert_nothing_left, build_model
from processors import build_processor, build_tokenizer
from torch import Tensor

pytest.importorskip("lm_eval", reason='EVALUATION IS NOT TESTED: pip install "mbq_ao[eval]"')
import lm_eval
from lm_eval.tasks import TaskManager

from mbq_ao import Int3WeightOnlyConfig, MBQInt3Tensor, evaluate, quantize_
from mbq_ao.demo.evaluate import answer
from mbq_ao.evaluation import compare, list_tasks, load_results
from mbq_ao.evaluation.task_set import TASKS, find_tasks

LOCAL = "easy_vqa,easy_vqa_nll,text_perplexity"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vlm(tmp_path_factory.mktemp("checkpoints") / "w3", quantized=True)


def docs(task: str) -> Any:
    names, manager = find_tasks(task)
    return manager.load(names)["tasks"][task].eval_docs


@torch.no_grad()
def nll(model: Any, inputs: dict[str, Tensor], num_answer: int) -> Tensor:
    """-log p of the last tokens of a prompt, each."""
    logits = model(**inputs).logits[0, -num_answer - 1 : -1]
    return -logits.log_softmax(-1).gather(-1, inputs["input_ids"][0, -num_answer:, None])[:, 0]


def test_scores_are_those_computed_by_hand() -> None:
    model, processor = tiny_vlm(quantized=True)
    model.train()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    results = evaluate(model, LOCAL, processor=processor, limit=3, batch_size=2, max_length=4096, log_samples=True)
    assert model.training
    assert before == {name: id(parameter) for name, parameter in model.named_parameters()}
    assert_nothing_left(model)
    assert processor.tokenizer.padding_side == "right"
    model.eval()
    assert results["results"].keys() == {"easy_vqa", "easy_vqa_nll", "text_perplexity"}
    assert results["mbq_ao"]["quantization"]["weights"] == {"MBQInt3Tensor": 14}
    assert results["mbq_ao"]["chat_template_applied"] == {
        "easy_vqa": True,
        "easy_vqa_nll": True,
        "text_perplexity": False,
    }

    questions = docs("easy_vqa")
    for row in results["samples"]["easy_vqa"]:
        doc = questions[row["doc_id"]]
        reply = answer(model, processor, doc["image"], doc["question"], max_new_tokens=8)
        assert row["filtered_resps"] == [reply.split("\n")[0].strip()]
    expected = []
    for doc in (questions[i] for i in range(3)):
        prompt = f"[user]<image>{doc['question']}<end>\n[assistant]{doc['answer']}"
        inputs = processor(text=[prompt], images=[doc["image"]], return_tensors="pt")
        size = len(processor.tokenizer(doc["answer"], add_special_tokens=False)["input_ids"])
        expected.append(float(nll(model, inputs, size).sum()))
    assert results["results"]["easy_vqa_nll"]["nll,none"] == pytest.approx(sum(expected) / 3, rel=1e-5)

    passages, total = docs("text_perplexity"), 0.0
    for text in (passages[i]["text"] for i in range(3)):
        ids = [processor.tokenizer.bos_token_id, *processor.tokenizer.encode(text, add_special_tokens=False)]
        total += float(nll(model, {"input_ids": torch.tensor([ids])}, len(ids) - 1).sum())
    size = sum(len(passages[i]["text"].encode()) for i in range(3))
    assert results["results"]["text_perplexity"]["bits_per_byte,none"] == pytest.approx(
        total / size / math.log(2), rel=1e-5
    )


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_families(family: str) -> None:
    """Prompts of two different images in one batch are answered as one by one; their likelihoods can be computed."""
    model, processor = build_model(family), build_processor(family)
    results = evaluate(
        model, "easy_vqa,easy_vqa_nll", processor=processor, limit=2, batch_size=2, bootstrap_iters=0, log_samples=True
    )
    questions = docs("easy_vqa")
    for row in results["samples"]["easy_vqa"]:
        doc = questions[row["doc_id"]]
        reply = answer(model, processor, doc["image"].convert("RGB"), doc["question"])
        assert row["filtered_resps"] == [reply.split("\n")[0].strip()]
    assert all(0 < row["nll"] < 100 for row in results["samples"]["easy_vqa_nll"])


def test_a_quantized_lm_head_stays_apart_from_the_embedding_it_was_tied_to() -> None:
    model = build_model("llama", tie_word_embeddings=True)
    quantize_(model, Int3WeightOnlyConfig(group_size=32), lambda module, fqn: fqn == "lm_head")
    results = evaluate(model, "text_perplexity", processor=build_tokenizer(), limit=1, max_length=4096)
    assert isinstance(model.lm_head.weight, MBQInt3Tensor) and "tie_weights" not in vars(model)
    assert results["mbq_ao"]["quantization"]["weights"] == {"MBQInt3Tensor": 1}


def test_checkpoint_and_files(checkpoint: Path, tmp_path: Path) -> None:
    """By path as in memory; what is written is what was returned."""
    model, processor = tiny_vlm(quantized=True)
    options: dict[str, Any] = {"limit": 2, "max_length": 4096, "log_samples": True}
    expected = evaluate(model, LOCAL, processor=processor, **options)
    results = evaluate(checkpoint, LOCAL, **options, output=tmp_path, device="cpu")
    assert results["results"] == expected["results"]
    assert results["mbq_ao"]["quantization"]["weights"] == expected["mbq_ao"]["quantization"]["weights"]
    (file,) = tmp_path.rglob("results_*.json")
    assert len(list(file.parent.glob("samples_*.jsonl"))) == 3
    loaded = load_results(tmp_path)
    assert loaded["results"] == results["results"]
    assert loaded["model_name"] == loaded["config"]["model"] == str(checkpoint)
    assert {"task_hashes", "chat_template_sha", "n-samples", "configs", "versions"} <= loaded.keys()
    assert compare(loaded, loaded) == compare(results, results)


def test_lm_evals_own_classes_load_our_checkpoints(checkpoint: Path) -> None:
    stock = lm_eval.simple_evaluate(
        "hf-multimodal",
        model_args={"pretrained": str(checkpoint), "device": "cpu"},
        tasks=["easy_vqa"],
        task_manager=TaskManager(include_path=TASKS, include_defaults=False),
        limit=3,
        apply_chat_template=True,
    )
    assert stock is not None
    ours = evaluate(checkpoint, "easy_vqa", limit=3, device="cpu", log_samples=True)
    replies = [[row["resps"] for row in r["samples"]["easy_vqa"]] for r in (stock, ours)]
    assert replies[0] == replies[1]


def test_a_model_of_text() -> None:
    model, tokenizer = build_model("llama"), build_tokenizer()
    results = evaluate(model, ["text_perplexity"], processor=tokenizer, limit=1, max_length=64)
    assert results["results"]["text_perplexity"]["bits_per_byte,none"] > 0
    assert results["mbq_ao"]["quantization"] is None
    with pytest.raises(ValueError, match=r"easy_vqa: questions about images, but .* takes text only"):
        evaluate(model, "easy_vqa", processor=tokenizer, limit=1)


def test_own_tasks(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"include: {TASKS}/text_perplexity.yaml\ntask: mine\n")
    assert find_tasks("mine,text_perplexity", tmp_path)[0] == ["mine", "text_perplexity"]
    assert find_tasks("easy_vqa*")[0] == ["easy_vqa", "easy_vqa_nll", "easy_vqa_one_word"]
    assert {"mine", "easy_vqa"} <= set(list_tasks(tmp_path, include_defaults=False))


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ("easy_vqa", {"limit": 0}, "limit must be a number of questions from 1, or a share of them below 1, got 0"),
        ("easy_vqa", {"limit": 2.5}, "limit must be .* got 2.5"),
        ("easy_vqa", {"batch_size": 0}, "batch_size must be a whole number from 1, got 0"),
        ("easy_vqa", {"batch_size": "auto"}, "batch_size must be a whole number from 1, got 'auto'"),
        ("", {}, "at least one task"),
        ("easy_vqa", {"include_path": "nowhere"}, "there is no folder nowhere"),
        ("easy_vqa", {"processor": None}, "comes without its processor"),
        ("easy_vqa", {"device": "cpu"}, "a model in memory is evaluated as it is"),
        (
            "easy_vqa",
            {"limit": 1, "max_length": 20},
            "a prompt with its images has 4. tokens, max_length=20 leaves .* 12",
        ),
        ("easy_vqa_nll", {"limit": 1, "max_length": 20}, "a prompt with its images has .* tokens, max_length=20"),
    ],
)
def test_refusals(tasks: str, options: dict[str, Any], message: str) -> None:
    model, processor = tiny_vlm()
    with pytest.raises(ValueError, match=message):
        evaluate(model, tasks, **{"processor": processor, **options})


def test_unknown_task_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = TaskManager(include_path=TASKS, include_defaults=False)  # lm-eval's own take seconds to read
    monkeypatch.setattr("mbq_ao.evaluation.task_set.TaskManager", lambda **ignored: manager)
    with pytest.raises(ValueError, match=r"there is no task 'easy_vqas'; near it are easy_vqa, .*list_tasks\(\)"):
        evaluate("anything", "easy_vqas")


def test_refused_checkpoints(tmp_path: Path) -> None:
    build_model("llava").save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="bare has no processor"):
        evaluate(tmp_path / "bare", "easy_vqa", limit=1, device="cpu")
    with pytest.raises(TypeError, match="must be a transformers model, a path or a hub name, got int"):
        evaluate(3, "easy_vqa")  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        evaluate(tmp_path / "bare", "easy_vqa", output=tmp_path / "file")


def test_a_processor_without_chat_template_gets_the_plain_prompt() -> None:
    model, processor = build_model("llava"), build_processor("llava", chat_template=None)
    results = evaluate(model, "easy_vqa_nll", processor=processor, limit=2, log_samples=True)
    assert results["mbq_ao"]["chat_template_applied"] == {"easy_vqa_nll": False}
    assert results["samples"]["easy_vqa_nll"][0]["arguments"][0][0].startswith("<image>what")
