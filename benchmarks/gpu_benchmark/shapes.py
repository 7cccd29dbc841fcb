"""Which matrices are timed: every linear of the decoders named in `DECODERS`, and three square-ish classics.

Sizes are those of the published config.json of each model on the Hugging Face hub (Qwen/Qwen2.5-VL-*-Instruct,
llava-hf/llava-onevision-qwen2-7b-ov-hf whose text_config is Qwen2-7B, OpenGVLab/InternVL2-8B whose llm_config is
InternLM2.5-7B and has its q, k, v in one matrix).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Shape = tuple[int, int]  # N, K

ROWS = (1, 2, 4, 8, 16, 64, 512, 1024, 2048, 4096)
MAX_ROWS_DECODING = 16


@dataclass(frozen=True)
class Decoder:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    fused_qkv: bool = False

    def linears(self) -> dict[str, Shape]:
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
CUT_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
CUT_ROWS = (1, 16, 64, 512, 2048)
SEVEN_B = tuple(dict.fromkeys(DECODERS["Qwen2.5-VL-7B, LLaVA-OneVision-7B"].linears().values()))


def all_shapes() -> dict[Shape, list[str]]:
    """(N, K) -> where it occurs. The shapes that targets are set for come first: budgets run out at the end."""
    found: dict[Shape, list[str]] = {shape: [] for shape in TARGETS}
    for model, decoder in DECODERS.items():
        for name, shape in decoder.linears().items():
            found.setdefault(shape, []).append(f"{model}: {name}")
    return found


def peer_shapes() -> list[Shape]:
    """Fewer, as there are many peers: those of the targets, and of the models of 7 and 8 billion parameters."""
    return list(dict.fromkeys([*TARGETS, *SEVEN_B, *DECODERS["InternVL2-8B"].linears().values()]))


def in_two_passes(shapes: Iterable[Shape], rows: Iterable[int]) -> list[tuple[Shape, list[int]]]:
    """What is measured, in this order: the rows of decoding for every shape, then those of prefill."""
    few, many = ([m for m in rows if (m <= MAX_ROWS_DECODING) == first] for first in (True, False))
    return [(shape, ms) for ms in (few, many) for shape in shapes if ms]


def names(plan: Iterable[tuple[Shape, list[int]]]) -> list[str]:
    """How what was not reached is called."""
    return [f"{n} x {k}, M = {', '.join(map(str, ms))}" for (n, k), ms in plan]
