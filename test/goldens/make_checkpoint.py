"""Write checkpoint_v<format version>: a tiny model with both kinds of weights, and what it computes.

A checkpoint of every format version is kept: run this once when the version changes, never to replace one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from mbq_ao import MBQInt3Tensor, MBQW4A8Tensor, save_pretrained
from mbq_ao.safetensors_format import FORMAT_VERSION


def main() -> None:
    folder = Path(__file__).parent / f"checkpoint_v{FORMAT_VERSION}"
    if folder.exists():
        sys.exit(f"{folder} exists; a checkpoint of a released format is never replaced")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            pre_scale = torch.rand(weight.shape[1]) + 0.5 if name.endswith(("o_proj", "down_proj")) else None
            if "self_attn" in name:
                packed = MBQInt3Tensor.from_hp(weight, 64, pre_scale)
            else:
                packed = MBQW4A8Tensor.from_hp(weight, 32 if "down" in name else None, pre_scale)
            module.weight = nn.Parameter(packed, requires_grad=False)
    save_pretrained(model, folder)
    golden = {"input_ids": torch.arange(3, 20)[None]}
    with torch.no_grad():
        golden["logits"] = model(input_ids=golden["input_ids"]).logits
    for name, weight in model.named_parameters():
        if isinstance(weight, (MBQInt3Tensor, MBQW4A8Tensor)):
            golden[name] = weight.dequantize()
            if weight.act_pre_scale is not None:
                golden[f"{name}.act_pre_scale"] = weight.act_pre_scale
    save_file(golden, folder / "golden.safetensors")


if __name__ == "__main__":
    main()
