"""A small mixture-of-experts VLM, trained from scratch on easy-VQA, and its scores: what moe.py measures with.

    image 64x64 -> CLIP tower (96 wide, 2 layers, 8x8 patches) -> 64 vision tokens
          -> Qwen3-MoE (128 wide, 4 layers, 8 experts of 128, 2 a token) -> one word of the questions and answers

It is transformers' LlavaForConditionalGeneration with a Qwen3MoeConfig, so its experts are those of the real family.
Training: the demo's vision stage (mbq_ao/demo/train.py), then all weights together on the questions, several images a
step, with Switch Transformers' load-balancing loss.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy_bed.exam import PackedQuestions, pixels_of

from mbq_ao.calibration.capture import hooked
from mbq_ao.demo.data import COLORS, IGNORE, SHAPES, VqaRow, group_by_image, load_easy_vqa
from mbq_ao.demo.model import IMAGE_SIZE, NUM_PATCHES, PATCH_SIZE, build_processor, is_trained_directly
from mbq_ao.demo.packing import pack, packed_loss, similar_batches
from mbq_ao.demo.train import SHAPE_WORDS, move_shapes, shape_and_color, shape_images, train_vision

CHAT_TEMPLATE = """\
{%- for message in messages %}{{- '<' + message['role'] + '> ' }}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- '<image>' }}{%- else %}{{- part['text'] }}{%- endif %}
{%- endfor %}
{%- if message['role'] == 'assistant' %}{{- '<eos>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant> ' }}{%- endif %}"""
SPECIAL = ("<pad>", "<eos>", "<unk>", "<user>", "<assistant>")
Steps = tuple[int, int, int]  # of the vision stage, on questions that name a colour or a shape, on all questions
HIDDEN, LAYERS, EXPERTS, EXPERTS_A_TOKEN = 128, 4, 8, 2
BATCH, RATE, TOWER_RATE, WARMUP_STEPS, BALANCING = 6, 1.5e-3, 5e-4, 30, 0.02


def build_untrained(rows: list[VqaRow]) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The float32 model with random weights, and a processor that knows the words of the rows."""
    words = {w for row in rows for w in (*row.question.replace("?", " ?").split(), row.answer)}
    words |= {*COLORS, *SHAPES, "background"}
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *sorted(words)))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[3:])})
    processor = build_processor(tokenizer)
    processor.chat_template = CHAT_TEMPLATE
    text = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        moe_intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=EXPERTS_A_TOKEN,
        norm_topk_prob=True,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    assert len(tokenizer) <= text.vocab_size
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=96,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=NUM_PATCHES,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.25)  # words as far apart as a language model's
    return model, processor


def routers(model: nn.Module) -> list[nn.Module]:
    return [m for name, m in model.named_modules() if name.endswith("mlp.gate")]


def train(seed: int, path: Path, rounds: Sequence[Steps]) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model that was trained with this seed, in eval mode without gradients; read from `path` if that is there."""
    torch.manual_seed(seed)
    rows = load_easy_vqa("train")
    model, processor = build_untrained(rows)
    if path.exists():
        load_model(model, path)
        return model.eval().requires_grad_(False), processor
    for number, steps in enumerate(rounds):
        train_round(model, processor, rows, steps, random.Random(seed + number))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_model(model, str(partial))
    partial.replace(path)
    return model.eval().requires_grad_(False), processor


def train_round(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    rows: list[VqaRow],
    steps: Steps,
    rng: random.Random,
) -> None:
    """The three stages, in place. Each has its own optimizer and schedule."""
    vision_steps, naming_steps, all_steps = steps
    groups = group_by_image(rows)
    pixels = pixels_of(processor, groups)
    labels = [shape_and_color(group) for group in groups]
    train_vision(model, processor, SHAPE_WORDS, shape_images(pixels, labels, rng), vision_steps)
    # Most questions are answered yes or no, two thirds of them rightly without a look: those that name what is seen
    # teach the model to look.
    naming = [[row for row in group if row.answer in (*COLORS, *SHAPES)] for group in groups]
    some = [i for i, group in enumerate(naming) if group]
    _train_jointly(model, processor, [naming[i] for i in some], pixels[some], naming_steps, rng)
    _train_jointly(model, processor, groups, pixels, all_steps, rng)


def _train_jointly(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    groups: list[list[VqaRow]],
    pixels: Tensor,
    steps: int,
    rng: random.Random,
) -> None:
    tower = [p for n, p in model.named_parameters() if is_trained_directly(n)]
    others = [p for n, p in model.named_parameters() if not is_trained_directly(n)]
    optimizer = torch.optim.AdamW(
        [{"params": others, "peak": RATE}, {"params": tower, "peak": TOWER_RATE}], weight_decay=0.01
    )
    logits: list[Tensor] = []
    handles = (m.register_forward_hook(lambda m, a, y: logits.append(y[0])) for m in routers(model))
    start, batches, losses, hits = time.time(), list[list[int]](), list[float](), list[bool]()
    with hooked(handles):
        for step in range(1, steps + 1):
            decay = 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * decay * min(1, step / WARMUP_STEPS)
            batches = batches or similar_batches(groups, BATCH, rng)
            pick = batches.pop()
            batch = pack(processor, [groups[i] for i in pick])
            logits.clear()
            loss, hit = packed_loss(model, batch, move_shapes(pixels[pick], rng))
            # Layer by layer: transformers adds up the counts of all layers, which lets each of them be unbalanced.
            of_layers = [load_balancing_loss_func((x,), EXPERTS, EXPERTS_A_TOKEN, batch.ids != 0) for x in logits]
            balancing = torch.stack(of_layers).mean()
            optimizer.zero_grad()
            (loss + BALANCING * balancing).backward()
            nn.utils.clip_grad_norm_([*others, *tower], 1.0)
            optimizer.step()
            losses.append(loss.item())
            hits += hit[batch.labels[batch.labels != IGNORE] != processor.tokenizer.eos_token_id].tolist()
            if step % 25 == 0:
                print(
                    f"joint {step}: loss {sum(losses) / 25:.4f}, answers {sum(hits) / len(hits):.4f}, "
                    f"balancing {balancing.item():.3f}, {time.time() - start:.0f} s",
                    flush=True,
                )
                losses, hits = [], []


@torch.no_grad()
def routing(parts: list[PackedQuestions], model: LlavaForConditionalGeneration) -> dict[str, Any]:
    """How many test tokens each expert gets, layer by layer, by modality; prompt text is the rest."""
    counts = {kind: torch.zeros(LAYERS, EXPERTS, dtype=torch.long) for kind in ("vision", "answer", "prompt")}
    for part in parts:
        batch = part.batch
        chosen: list[Tensor] = []
        with hooked(m.register_forward_hook(lambda m, a, y, c=chosen: c.append(y[2])) for m in routers(model)):
            part.logits(model)
        vision, answer = batch.ids == model.config.image_token_id, batch.labels != IGNORE
        prompt = (batch.ids != 0) & ~vision & ~answer
        for kind, mask in (("vision", vision), ("answer", answer), ("prompt", prompt)):
            for layer, experts in enumerate(chosen):
                counts[kind][layer] += torch.bincount(experts[mask.flatten()].flatten(), minlength=EXPERTS)
    return {kind: count.tolist() for kind, count in counts.items()}
