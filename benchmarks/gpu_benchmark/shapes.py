"""Which matrices are timed: every linear of the decoders named in `DECODERS`, and three square-ish classics.

Sizes are those of the published config.json of each model on the Hugging Face hub (Qwen/Qwen2.5-VL-*-Instruct,
llava-hf/llava-onevision-qwen2-7b-ov-hf whose text_config is Qwen2-7B, OpenGVLab/InternVL2-8B whose llm_config is
InternLM2.5-7B and has its q, k, v in one matrix).
"""

from __future__ import annotations

from dataclasses import dataclass

ROWS = (1, 2, 4, 8, 16, 64, 512, 2048)


@dataclass(frozen=True)
class Decoder:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    fused_qkv: bool = False

    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of a decoder layer's linears by what they are called."""
        kv = self.hidden // self.heads * self.kv_heads
        if self.fused_qkv:
            attention = {"qkv": (self.hidden + 2 * kv, self.hidden)}
        else:
            attention = {"q": (self.hidden, self.hidden), "k, v": (kv, self.hidden)}
        return attention | {
            "o": (self.hidden, self.hidden),
            "gate, up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


DECODERS = {
    "Qwen2.5-VL-7B, LLaVA-OneVision-7B": Decoder(hidden=3584, intermediate=18944, heads=28, kv_heads=4),
    "InternVL2-8B": Decoder(hidden=4096, intermediate=14336, heads=32, kv_heads=8, fused_qkv=True),
    "Qwen2.5-VL-72B": Decoder(hidden=8192, intermediate=29568, heads=64, kv_heads=8),
    "Qwen2.5-VL-3B": Decoder(hidden=2048, intermediate=11008, heads=16, kv_heads=2),
}
TARGETS = ((4096, 4096), (14336, 4096), (28672, 8192))


def all_shapes() -> dict[tuple[int, int], list[str]]:
    """(N, K) -> where it occurs. The shapes that targets are set for come first: budgets run out at the end."""
    found: dict[tuple[int, int], list[str]] = {shape: [] for shape in TARGETS}
    for model, decoder in DECODERS.items():
        for name, shape in decoder.linears().items():
            found.setdefault(shape, []).append(f"{model}: {name}")
    return found
