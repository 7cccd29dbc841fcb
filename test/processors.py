"""Tiny real processors of several families, made offline; their tokens are those of the tiny models in models.py."""

from __future__ import annotations

import string
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import transformers as tf
from families import IMAGE, IMAGE_END, IMAGE_START, VIDEO
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE

SPECIAL = ("<pad>", "<s>", "<end>", "<unk>")
CHARACTERS = [c for c in string.printable if c not in "\t\r\x0b\x0c"]
MERGES = [("r", "e"), ("re", "d"), (" ", "red"), ("\n", "\n"), ("a", "t"), ("c", "at")]

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '[' + message['role'] + ']' }}
{%- if message['content'] is string %}{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}{{- part['text'] }}
{%- elif part['type'] == 'image' %}{{- '<image>' }}{%- else %}{{- '<video>' }}{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<end>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}"""

# The same text, with the marks that transformers has for the answers.
MARKED_TEMPLATE = """\
{%- for message in messages %}
{{- '[' + message['role'] + ']' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'][0]['text'] + '<end>' }}{%- endgeneration %}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}{{- part['text'] }}{%- else %}{{- '<image>' }}{%- endif %}
{%- endfor %}
{{- '<end>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}"""


def build_tokenizer(media: dict[str, int] | None = None, **options: Any) -> tf.PreTrainedTokenizerFast:
    """Characters, a few merges and special tokens.  media: the tokens of images and videos, 120 and more."""
    media = media or {"<image>": IMAGE}
    tokens = [*SPECIAL, *CHARACTERS, *("".join(pair) for pair in MERGES)]
    assert len(tokens) <= IMAGE
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)} | media, MERGES, unk_token="<unk>"))
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*SPECIAL, *media)])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<end>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        **options,
    )


class Frames:
    """Stands in for the families' video processors, which need torchvision: frames as Qwen's patches."""

    merge_size = temporal_patch_size = 2
    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, images: Any) -> None:
        self.images = images
        self.seen: list[Any] = []

    def __call__(self, videos: Any, **options: Any) -> dict[str, Any]:
        self.seen.append(videos)
        frames = [frame for video in videos[0] for frame in video]
        patches = self.images(frames, return_tensors="pt")
        grid = torch.tensor([[len(video), *patches["image_grid_thw"][0, 1:].tolist()] for video in videos[0]])
        return {
            "pixel_values_videos": patches["pixel_values"],
            "video_grid_thw": grid,
            "video_metadata": [SimpleNamespace(sampled_fps=24.0)] * len(videos[0]),
        }


def _with_stand_in(kind: Any, images: Any, *args: Any, **options: Any) -> Any:
    """The real processor class with Frames for its video processor, which is no subclass of what it asks for."""
    checked = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda self, name, argument: None})
    return checked(images, *args, video_processor=Frames(images), **options)


def _llava() -> Any:
    return tf.LlavaProcessor(
        tf.CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False),
        build_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_next() -> Any:
    images = tf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 56], [56, 28]]
    )
    return tf.LlavaNextProcessor(images, build_tokenizer(), patch_size=14, vision_feature_select_strategy="full")


def _llava_onevision() -> Any:
    images = tf.LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 28], [28, 56]]
    )
    tokenizer = build_tokenizer({"<image>": IMAGE, "<video>": VIDEO})
    return _with_stand_in(
        tf.LlavaOnevisionProcessor, images, tokenizer, num_image_tokens=4, vision_feature_select_strategy="full"
    )


def _qwen2_5_vl() -> Any:
    images = tf.Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56}, patch_size=14)
    media = {
        "<|image_pad|>": IMAGE,
        "<|video_pad|>": VIDEO,
        "<|vision_start|>": IMAGE_START,
        "<|vision_end|>": IMAGE_END,
    }
    return _with_stand_in(tf.Qwen2_5_VLProcessor, images, build_tokenizer(media))


def _gemma3() -> Any:
    images = tf.Gemma3ImageProcessorPil(size={"height": 28, "width": 28}, do_pan_and_scan=False)
    names = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokenizer = build_tokenizer(
        {"<image>": IMAGE, "<boi>": IMAGE_START, "<eoi>": IMAGE_END}, extra_special_tokens=names
    )
    return tf.Gemma3Processor(images, tokenizer, image_seq_length=4)


def _mllama() -> Any:
    images = tf.MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=2)
    return tf.MllamaProcessor(images, build_tokenizer({"<|image|>": IMAGE, "<|python_tag|>": VIDEO}))


PROCESSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "llava": (_llava, "<image>"),
    "llava_next": (_llava_next, "<image>"),
    "llava_onevision": (_llava_onevision, "<image>"),
    "qwen2_5_vl": (_qwen2_5_vl, "<|vision_start|><|image_pad|><|vision_end|>"),
    "gemma3": (_gemma3, "<boi>"),
    "mllama": (_mllama, "<|image|>"),
}
"""How to make each, and what its chat template writes where an image is."""


def build_processor(family: str = "llava", chat_template: str | None = CHAT_TEMPLATE) -> Any:
    make, place = PROCESSORS[family]
    processor = make()
    if chat_template is not None:
        chat_template = chat_template.replace("<image>", place).replace("<video>", place.replace("image", "video"))
    processor.chat_template = chat_template
    return processor
