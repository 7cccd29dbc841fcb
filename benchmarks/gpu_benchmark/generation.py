"""How one sequence is generated and timed.

    prefill    vision tower and prompt, eager as in transformers' `generate`, which does not compile it either; the
               vision tower alone; and the language model's part in a CUDA graph, without the host
    decode     one token a step, greedy, static cache: torch.compile'd, and the whole step in one CUDA graph

`generate` itself is not timed: between two steps it works on the host for longer than a quantized step takes.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpu_benchmark.measure import Clock
from gpu_benchmark.tasks import Context

# How a decode step is run, best first; the next is tried where one fails. (torch.compile mode, CUDA graph)
WAYS = (("max-autotune-no-cudagraphs", True), ("default", True), (None, True), ("default", False), (None, False))


class Generation:
    """One sequence: prefill, then decode steps that read and write the same memory, so that they can be replayed."""

    def __init__(
        self, vlm: nn.Module, clock: Clock, inputs: dict[str, Tensor], max_length: int, context: Context
    ) -> None:
        from transformers import StaticCache

        self.vlm, self.clock, self.inputs, self.context = vlm, clock, inputs, context
        self.cache = StaticCache(config=vlm.config.get_text_config(decoder=True), max_cache_len=max_length)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=clock.device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=clock.device)
        self.how: dict[str, Any] = {"tried": []}
        self.step: Callable[[], object] = self._eager_step

    @torch.no_grad()
    def prefill(self) -> None:
        """Start the sequence anew: the prompt, and the first token."""
        self.cache.reset()
        logits = self.vlm(**self.inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits[:, -1:].argmax(-1))
        # Positions count on from the prompt's length. Qwen2.5-VL's run behind it by a constant after an image, which
        # costs the same.
        self.position.fill_(self.inputs["input_ids"].shape[1])

    def _forward(self, token: Tensor, position: Tensor) -> Tensor:
        text = self.vlm.model.language_model
        hidden = text(
            input_ids=token, position_ids=position, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        return self.vlm.lm_head(hidden).argmax(-1)

    @torch.no_grad()
    def _eager_step(self) -> None:
        self._advance(self._forward)

    def _advance(self, forward: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.token.copy_(forward(self.token, self.position))
        self.position.add_(1)

    def prepare_decode(self) -> None:
        """Take the first of WAYS that works; whether it gives the token that the eager step gives is recorded."""
        expected = self._second_token(self._eager_step)
        ways = [("eager" if mode else None, graph) for mode, graph in WAYS[1:3]] if self.context.smoke else list(WAYS)
        if preferred := self.context.options.get("compile_mode"):
            ways.insert(0, (preferred, True))
        for mode, graph in ways:
            try:
                step = self._compiled_step(mode)
                got = self._second_token(step)  # compiles
                if graph:
                    self.prefill()
                    step = self.clock.capture([step])
                    got = self._second_token(step)
            except Exception:
                self.how["tried"].append({"mode": mode, "graph": graph, "error": traceback.format_exc(limit=-3)})
                continue
            self.step = step
            self.how |= {"compile": mode, "graph": graph, "same_token_as_eager": bool(torch.equal(got, expected))}
            return
        raise RuntimeError(f"no way to run a decode step works: {self.how['tried']}")

    def _compiled_step(self, mode: str | None) -> Callable[[], None]:
        if mode is None:
            return self._eager_step
        how = {"backend": "eager"} if mode == "eager" else {"mode": mode}
        torch._dynamo.reset()
        forward = torch.compile(self._forward, dynamic=False, **how)

        def step() -> None:
            with torch.no_grad():
                self._advance(forward)

        return step

    def _second_token(self, step: Callable[[], object]) -> Tensor:
        self.prefill()
        step()
        return self.token.clone()

    def timings(self, new_tokens: int) -> dict[str, Any]:
        """Seconds and bytes, medians of three."""
        if self.clock.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        prefill = _median(self.clock.elapsed(self.prefill) for _ in range(3))

        def decode() -> None:
            for _ in range(new_tokens - 1):
                self.step()

        seconds = []
        for _ in range(3):
            self.prefill()
            seconds.append(self.clock.elapsed(decode))
        row = {"first_token_s": prefill, "decode_s": _median(seconds)}
        row["tokens_per_s"] = (new_tokens - 1) / row["decode_s"]
        row["peak_bytes"] = torch.cuda.max_memory_allocated() if self.clock.on_gpu else 0
        row["vision_s"] = _median(self.clock.elapsed(self._vision) for _ in range(3))
        row["prompt_s"] = prefill - row["vision_s"]
        row["kernels"] = self._kernels()
        return row

    @torch.no_grad()
    def prompt_in_a_graph(self) -> dict[str, Any]:
        """Seconds of the prompt's embeddings through the language model, replayed: no launch from the host counts."""
        text, length = self.vlm.model.language_model, self.inputs["input_ids"].shape[1]
        device, dtype = self.clock.device, self.vlm.lm_head.weight.dtype
        embeds = torch.randn(1, length, self.vlm.lm_head.in_features, device=device).to(dtype)
        positions = torch.arange(length, device=device).unsqueeze(0)

        def prompt() -> None:
            self.cache.reset()
            hidden = text(inputs_embeds=embeds, position_ids=positions, past_key_values=self.cache, use_cache=True)
            self.vlm.lm_head(hidden.last_hidden_state[:, -1:])

        try:
            replay = self.clock.capture([prompt])
            replay()
            return {"prompt_graph_s": _median(self.clock.elapsed(replay) for _ in range(3))}
        except Exception:
            return {"prompt_graph_error": traceback.format_exc(limit=-3)}

    @torch.no_grad()
    def _vision(self) -> None:
        names = ("pixel_values", "image_grid_thw", "image_sizes")
        self.vlm.model.get_image_features(**{name: self.inputs[name] for name in names if name in self.inputs})

    def _kernels(self) -> list[dict[str, Any]]:
        """The eight kernels that a decode step spends most time in, by torch.profiler; empty where that fails."""
        from torch.profiler import ProfilerActivity, profile

        self.prefill()
        activity = ProfilerActivity.CUDA if self.clock.on_gpu else ProfilerActivity.CPU
        try:
            with profile(activities=[activity]) as profiler:
                self.step()
                self.clock.synchronize()
            events = profiler.key_averages()
        except Exception:
            return [{"error": traceback.format_exc(limit=-1)}]
        attribute = "self_device_time_total" if self.clock.on_gpu else "self_cpu_time_total"
        events = sorted(events, key=lambda e: -getattr(e, attribute))[:8]
        return [{"name": e.key[:100], "calls": e.count, "us": getattr(e, attribute)} for e in events]


def _median(values: Any) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
