"""`mbq-ao generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mbq_ao.cli.console import Json, UserError
from mbq_ao.cli.models import Device, Dtype, ModelName, chosen_device, load_config, load_model, load_processor, one_line


def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="An image; may be given several times.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer at most.")] = 256,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile decoding first: a minute or so, then faster.", rich_help_panel="Where"),
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> dict[str, Any]:
    """Ask a model, quantized or not, about images or without any, and stream its answer.

    Examples:

    `mbq-ao generate llava-w3 --image cat.jpg --prompt "What is on the sofa?"`

    `mbq-ao generate llava-w3 -i before.png -i after.png -p "What has changed?" --json`

    The prompt goes through the model's own chat template; decoding is greedy, so that the answer is always the same.
    """
    images = [_opened(path) for path in image or []]
    config, processor = load_config(model), load_processor(model)
    inputs = _inputs(processor, model, prompt, images)
    computing_on = chosen_device(device)

    import torch
    from transformers import TextStreamer

    from mbq_ao.calibration.data import with_dtype
    from mbq_ao.calibration.labels import tokenizer_of
    from mbq_ao.generation import compile_for_generation

    answering = load_model(model, config, dtype=dtype, device=computing_on)
    num_prompt_tokens = inputs["input_ids"].shape[1]
    if compile:
        compile_for_generation(answering, max_cache_len=num_prompt_tokens + max_new_tokens)
    tokenizer = tokenizer_of(processor)
    inputs = {k: v.to(computing_on) if hasattr(v, "to") else v for k, v in with_dtype(inputs, answering.dtype).items()}
    with torch.no_grad():
        ids = answering.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    new = ids[0, num_prompt_tokens:]
    return {
        "model": model,
        "prompt": prompt,
        "images": [str(path) for path in image or []],
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "num_prompt_tokens": num_prompt_tokens,
        "num_new_tokens": len(new),
    }


def _opened(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except UnidentifiedImageError as error:
        raise UserError(f"--image {path} is no image that Pillow can read") from error


def _inputs(processor: Any, name: str, prompt: str, images: list[Any]) -> dict[str, Any]:
    """What the model takes, batch of one. Raises UserError where the processor cannot make it."""
    from mbq_ao.calibration.labels import Rendered, chat_template_of, process, tokenizer_of

    text_only = tokenizer_of(processor) is processor
    if images and text_only:
        raise UserError(f"{name} takes no images: it has a tokenizer, but no image processor; leave out --image")
    if chat_template_of(processor) is None:
        if images:
            raise UserError(
                f"{name} has no chat template, which says where an image goes in the prompt; leave out --image"
            )
        return process(processor, Rendered(prompt, (), [], []), prompt)
    content = prompt if text_only else [*[{"type": "image"}] * len(images), {"type": "text", "text": prompt}]
    message = {"role": "user", "content": content}
    try:
        text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        return process(processor, Rendered(text, (), images, []), text)
    except ValueError as error:
        raise UserError(f"the processor of {name} refuses the prompt: {one_line(error)}") from error
