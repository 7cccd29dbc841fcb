"""A small Qwen2.5-VL with random weights, and samples for it: what calibration_time.py and overheads.py calibrate.

Needs torch and transformers alone, as the environments of other libraries have them.
"""

from __future__ import annotations

import pathlib
import platform
from dataclasses import dataclass

import torch
from torch import Tensor, nn

IMAGE, VIDEO, IMAGE_START, IMAGE_END, FIRST_WORD = 3, 4, 5, 6, 7


@dataclass(frozen=True)
class Size:
    hidden: int = 512
    intermediate: int = 1408
    layers: int = 2
    samples: int = 8
    image_side: int = 8  # tokens of an image, a side
    words: int = 62

    @property
    def tokens(self) -> int:
        """Of one sample."""
        return self.image_side**2 + 2 + self.words


TINY = Size(hidden=128, intermediate=256, layers=1, samples=2, image_side=2, words=10)


def build_model(size: Size) -> nn.Module:
    """With random weights; norm weights differ from channel to channel, as a search needs something to find."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    heads = size.hidden // 128
    text = {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,  # all groups of both: the peer leaves out o_proj where heads share values
        "vocab_size": 512,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": size.hidden}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                if name.endswith("norm.weight"):
                    parameter.copy_(torch.randn_like(parameter).mul_(0.8).exp_())
            else:
                parameter.normal_(std=1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.mul_(0.25)  # a layer adds little to what it is given, as in trained models
    return model


def build_samples(size: Size, count: int, seed: int) -> list[dict[str, Tensor]]:
    """As a processor returns them, with labels on the last quarter of the words."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.tensor([IMAGE_START, *[IMAGE] * size.image_side**2, IMAGE_END])
    patches, samples = 2 * size.image_side, []
    for _ in range(count):
        words = torch.randint(FIRST_WORD, 512, (size.words,), generator=generator)
        ids = torch.cat([words[:4], image, words[4:]])[None]
        labels = ids.clone()
        labels[:, : -(size.words // 4)] = -100
        samples.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": labels,
                "pixel_values": torch.randn(patches**2, 3 * 2 * 14 * 14, generator=generator),
                "image_grid_thw": torch.tensor([[1, patches, patches]]),
                "mm_token_type_ids": (ids == IMAGE).int(),
            }
        )
    return samples


def inputs(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in sample.items() if name != "labels"}


@torch.no_grad()
def logits(model: nn.Module, samples: list[dict[str, Tensor]]) -> Tensor:
    device = next(model.parameters()).device
    moved = ({name: value.to(device) for name, value in inputs(sample).items()} for sample in samples)
    return torch.cat([model(**sample, use_cache=False).logits.flatten(0, 1) for sample in moved])


def device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    info = pathlib.Path("/proc/cpuinfo")
    names = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"
