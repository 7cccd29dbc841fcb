"""A tiny real LlavaProcessor, made offline, whose tokens are those of the tiny models in models.py."""

from __future__ import annotations

import string
from typing import Any

import transformers as tf
from models import IMAGE
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE

SPECIAL = ("<pad>", "<s>", "<end>", "<unk>")
MERGES = [("r", "e"), ("re", "d"), (" ", "red"), ("\n", "\n"), ("W", "h"), ("Wh", "a"), ("Wha", "t"), ("c", "at")]

# Headers as in ChatML; the image where its part is.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '[' + message['role'] + ']' }}
{%- if message['content'] is string %}{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}{{- part['text'] }}{%- else %}{{- '<' + part['type'] + '>' }}{%- endif %}
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
{%- if part['type'] == 'text' %}{{- part['text'] }}{%- else %}{{- '<' + part['type'] + '>' }}{%- endif %}
{%- endfor %}
{{- '<end>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}"""


def build_tokenizer(chat_template: str | None = None) -> tf.PreTrainedTokenizerFast:
    """Characters, a few merges, and special tokens; 120 is `<image>` and fewer than 120 come before it."""
    tokens = [*SPECIAL, *(c for c in string.printable if c not in "\t\r\x0b\x0c")]
    merges = [pair for pair in MERGES if set("".join(pair)) <= set(tokens) | {" ", "\n"}]
    merges = [("a", "t"), *merges]
    tokens += ["".join(pair) for pair in merges]
    vocab = {token: i for i, token in enumerate(tokens)} | {"<image>": IMAGE}
    assert len(tokens) <= IMAGE
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>"))
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*SPECIAL, "<image>")])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<end>",
        unk_token="<unk>",
        extra_special_tokens=["<image>"],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def build_processor(chat_template: str | None = CHAT_TEMPLATE, kind: type = tf.LlavaProcessor, **options: Any) -> Any:
    """An image becomes four tokens, as in models.py's "llava"."""
    images = tf.CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False)
    return kind(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=chat_template,
        **options,
    )
