"""Accuracy and answer NLL on visual questions, one question per prompt in the model's own chat template.

A question counts as correct if greedy decoding would reply with exactly the answer and end its turn.  That is read off
one teacher-forced pass: every token of "answer <|im_end|>" must be the arg max given the ones before it.

The questions of one image share everything up to its vision tokens, 88 of about 105 tokens here.  With share_prefix
that part runs once per image and its KV cache is repeated for the questions:

    [system, <image> x 64] -> KV cache -> x n questions, padded on the right -> logits at the answers

Causal attention makes this the same computation as n separate prompts (the padding comes after every token that is
read), four times faster.  share_prefix=False sends each prompt by itself and fits any processor and model of
transformers with a chat template.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ProcessorMixin

from mbq_ao.demo.data import VqaRow, chat_messages, group_by_image, labelled_inputs, prompt_parts
from mbq_ao.evaluation.answers import answer_logits, answer_score, clustered_standard_error


@dataclass(frozen=True)
class Evaluation:
    """Scores over num_questions questions about num_images images.

    accuracy: share of correct replies.  standard_error: of the accuracy over the draw of images; questions of one image
    are not taken as independent.  answer_nll: mean of -log p(whole reply, end of turn included) in nats.
    correct, nll: the same per question, in the order of the rows.
    """

    accuracy: float
    standard_error: float
    answer_nll: float
    num_questions: int
    num_images: int
    correct: list[bool]
    nll: list[float]

    def __str__(self) -> str:
        return (
            f"accuracy {100 * self.accuracy:.2f}% (s.e. {100 * self.standard_error:.2f}), answer NLL "
            f"{self.answer_nll:.4f} on {self.num_questions} questions about {self.num_images} images"
        )


def plain_logits(model: PreTrainedModel, processor: ProcessorMixin, row: VqaRow) -> tuple[Tensor, Tensor]:
    """Logits (T, V) that predict the T tokens of the reply, and those tokens, from one whole prompt."""
    return answer_logits(model, labelled_inputs(processor, row))


def shared_prefix_logits(
    model: PreTrainedModel, processor: ProcessorMixin, group: Sequence[VqaRow]
) -> list[tuple[Tensor, Tensor]]:
    """plain_logits of each row of one image, running the prefix they share once.

    For the processors of prompt_parts, and models with a LLaVA-like `model.model` (the demo VLM is both).
    """
    parts = [prompt_parts(processor, row) for row in group]
    # The last token of a reply is predicted, never read.
    tails = [torch.tensor(question + reply[:-1]) for _, question, reply in parts]
    replies = [torch.tensor(reply, device=model.device) for _, _, reply in parts]
    prefix = processor(text=[parts[0][0]], images=[group[0].image], return_tensors="pt").to(model.device)
    cache = model.model(**prefix, use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(group))
    ids = pad_sequence(tails, batch_first=True, padding_value=processor.tokenizer.pad_token_id).to(model.device)
    mask = torch.ones(len(group), prefix["input_ids"].shape[1] + ids.shape[1], dtype=torch.long, device=model.device)
    hidden = model.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).last_hidden_state
    read = [h[len(t) - len(r) : len(t)] for h, t, r in zip(hidden, tails, replies, strict=True)]
    logits = model.get_output_embeddings()(torch.cat(read)).split([len(r) for r in replies])
    return list(zip(logits, replies, strict=True))


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, processor: ProcessorMixin, rows: Sequence[VqaRow], *, share_prefix: bool = True
) -> Evaluation:
    """Scores `model` on `rows`; see the module's docstring for what counts as correct."""
    if not rows:
        raise ValueError("rows must hold at least one question, got none")
    scores: dict[int, tuple[bool, float]] = {}
    for group in group_by_image(rows):
        if share_prefix:
            results = shared_prefix_logits(model, processor, group)
        else:
            results = [plain_logits(model, processor, row) for row in group]
        scores |= {id(row): answer_score(*result) for row, result in zip(group, results, strict=True)}
    correct = [scores[id(row)][0] for row in rows]
    nll = [scores[id(row)][1] for row in rows]
    image_ids = [row.image_id for row in rows]
    return Evaluation(
        accuracy=sum(correct) / len(rows),
        standard_error=clustered_standard_error([float(c) for c in correct], image_ids),
        answer_nll=sum(nll) / len(rows),
        num_questions=len(rows),
        num_images=len(set(image_ids)),
        correct=correct,
        nll=nll,
    )


@torch.no_grad()
def answer(
    model: PreTrainedModel, processor: ProcessorMixin, image: Image.Image, question: str, max_new_tokens: int = 8
) -> str:
    """The model's greedy reply to one question about an RGB image, as text."""
    text = processor.apply_chat_template(chat_messages(question), add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[image], return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
