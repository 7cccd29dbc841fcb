"""lm-eval's hf-multimodal over a model and a processor that are there already, with likelihoods given images.

What differs from lm-eval's class: it loads its processor by the model's `name_or_path`, which a quantized model in
memory does not have (or which names another); it computes no log-likelihoods given images; and it cuts prompts that are
too long, in the middle of an image's tokens if need be.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.hf_vlms import DEFAULT_IMAGE_PLACEHOLDER, HFMultimodalLM
from lm_eval.models.utils import replace_placeholders
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from mbq_ao.calibration.labels import Rendered, encode
from mbq_ao.evaluation.answers import answer_logits, answer_score


class ImageTextLM(HFMultimodalLM):
    """For tasks in which every request has images."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, **options: Any) -> None:
        self._given = processor
        super().__init__(model, **options)

    def _create_tokenizer(self, *args: Any, **kwargs: Any) -> None:
        self.processor, self.tokenizer = self._given, self._given.tokenizer

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log p(continuation | images, context) in nats, and whether each of its tokens is the arg max.

        One request at a time, since images of different sizes do not go into one batch.
        """
        bar = tqdm(requests, desc="Running loglikelihood requests with images", disable=disable_tqdm)
        return [self._loglikelihood(*request.args) for request in bar]

    def _loglikelihood(self, context: str, continuation: str, media: dict[str, Any]) -> tuple[float, bool]:
        if not self.chat_applied:
            context = replace_placeholders(context, DEFAULT_IMAGE_PLACEHOLDER, self.image_token, self.max_images)
        # A blank belongs to the token after it, as in lm-eval's own `_encode_pair`.
        start = len(context.rstrip(" "))
        text = context + continuation
        batch = encode(self.processor, Rendered(text, ((start, len(text)),), media["visual"], []))
        self._check_length(batch["input_ids"].shape[1], self.max_length)
        greedy, nll = answer_score(*answer_logits(self.model, batch))
        return -nll, greedy

    def tok_batch_multimodal_encode(
        self,
        strings: list[str],
        images: list[list[Any]],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> Any:
        encoding = super().tok_batch_multimodal_encode(strings, images, padding_side, None, truncation)
        self._check_length(encoding["input_ids"].shape[1], left_truncate_len or self.max_length)
        return encoding

    def _check_length(self, length: int, limit: int) -> None:
        if length > limit:
            raise ValueError(
                f"a prompt with its images has {length} tokens, max_length={self.max_length} leaves room for {limit}: "
                "pass a larger max_length, or smaller images"
            )
