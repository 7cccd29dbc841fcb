"""Hands a model's decoder to a peer's own program in another environment, and takes the rounded weights back."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from accuracy_bed import peers
from accuracy_bed.peers import EXPECTED, PEERS, REPORT, TASK, WEIGHTS, decoder_linears
from mbq_ao.calibration.labels import tokenizer_of

PROGRAM = Path(peers.__file__)


def peer_of(name: str) -> tuple[str, dict[str, Any]]:
    """One of PEERS and, after commas, keywords of its own call, as JSON: "AutoRound, iters=50".

    Raises ValueError for another name.
    """
    base, *changes = name.split(", ")
    pairs = [change.partition("=") for change in changes]
    if base not in PEERS or not all(separator for _, separator, _ in pairs):
        raise ValueError(f"there is no peer {name!r}: it must be one of {', '.join(PEERS)}, keywords after commas")
    try:
        return base, {key: json.loads(value) for key, _, value in pairs}
    except json.JSONDecodeError as error:
        raise ValueError(f'keywords of {name!r} must be JSON, such as true, null, 50 or "text": {error}') from error


def is_peer(name: str) -> bool:
    return name.split(", ")[0] in PEERS


def quantize_by_peer(
    python: Path,
    name: str,
    model: Any,
    processor: Any,
    precision: str,
    group_size: int,
    calib: Sequence[dict[str, Tensor]],
    threads: int = 1,
) -> dict[str, Any]:
    """The decoder of `model`, in place.  Returns the peer's seconds and the versions of its environment.

    calib: batches padded on the right.  Raises RuntimeError where the peer's process fails, ValueError where its
    weights are not what was asked for.
    """
    base, changes = peer_of(name)
    bits = int(precision[1])
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        samples = leave_decoder(model, [row for batch in calib for row in unpadded(batch)], there)
        tokenizer_of(processor).save_pretrained(there)
        task = {"folder": folder, "bits": bits, "group_size": group_size, "samples": samples, "changes": changes}
        (there / TASK).write_text(json.dumps(task), encoding="utf-8")
        # Nothing of ours or of this environment may be imported there; and there is nothing to look up on a hub.
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
        environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            [str(python), str(PROGRAM), base, folder], env=environment, cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{name} failed under {python}:\n{done.stderr[-4000:]}")
        take_weights(model.get_decoder(), load_file(there / WEIGHTS), bits, group_size, name)
        return json.loads((there / REPORT).read_text(encoding="utf-8"))


def unpadded(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Its rows, batches of one, cut where the attention mask ends."""
    mask = batch["attention_mask"]
    if len(mask) == 1:
        return [batch]
    return [
        {k: v[i : i + 1, :length] if v.shape == mask.shape else v[i : i + 1] for k, v in batch.items()}
        for i, length in enumerate(mask.sum(1).tolist())
    ]


@torch.no_grad()
def leave_decoder(model: Any, samples: Sequence[dict[str, Tensor]], folder: Path) -> list[list[int]]:
    """Writes the decoder as a causal language model, and the logits of the samples' last tokens.

    Returns the samples' token ids: what images became before the decoder are further rows of its embedding table. So
    every peer that takes token ids gets the images, and nothing of a peer has to know what sort of model this was.
    """
    decoder = model.get_decoder()
    table = model.get_input_embeddings().weight
    seen: list[Tensor] = []
    hook = decoder.register_forward_pre_hook(lambda _, __, given: seen.append(given["inputs_embeds"]), with_kwargs=True)
    expected, ids, more = [], [], [table]
    for sample in samples:
        given = {k: v.to(table.device) for k, v in sample.items() if k != "labels"}
        expected.append(model(**given, use_cache=False).logits[0, -1])
        tokens = given["input_ids"][0].clone()
        (embeds,) = seen.pop()
        new = (embeds != table[tokens]).any(-1)
        tokens[new] = sum(map(len, more)) + torch.arange(int(new.sum()), device=tokens.device)
        more.append(embeds[new])
        ids.append(tokens.tolist())
    hook.remove()
    config = copy.deepcopy(decoder.config)
    config.tie_word_embeddings = False  # the table grows, the head does not
    alone: Any = AutoModelForCausalLM.from_config(config, dtype=table.dtype)
    alone.get_decoder().load_state_dict(decoder.state_dict())
    alone.get_output_embeddings().load_state_dict(model.get_output_embeddings().state_dict())
    rows = torch.cat(more)
    alone.resize_token_embeddings(len(rows), mean_resizing=False)
    alone.get_input_embeddings().weight.copy_(rows)
    alone.get_output_embeddings().weight[len(table) :] = 0
    alone.save_pretrained(folder)
    save_file({"logits": torch.stack(expected).cpu()}, folder / EXPECTED)
    return ids


@torch.no_grad()
def take_weights(decoder: nn.Module, found: dict[str, Tensor], bits: int, group_size: int, name: str) -> None:
    """Into the decoder's layers, in place.  found: of each of their parameters, by its name in the decoder.

    Raises ValueError unless every linear is there, changed, with at most 2**bits values in a group, and of all else at
    most vectors (norms, into which a peer may have folded scales) are different.
    """
    own = {k: p for k, p in decoder.named_parameters() if "layers." in k}
    if found.keys() != own.keys():
        raise ValueError(f"{name} left other weights than the decoder's: {sorted(found.keys() ^ own.keys())[:4]} ...")
    linears = {f"{k}.weight" for k in decoder_linears(decoder)}
    for key, weight in own.items():
        made = found[key].to(weight)
        if made.shape != weight.shape or not made.isfinite().all():
            raise ValueError(f"{name} left {key} with values that are not finite, or in another shape")
        if key in linears:
            most = max(_most_values(columns) for columns in made.split(group_size, 1))
            if most > 2**bits or torch.equal(made, weight):
                raise ValueError(f"{name} did not quantize {key}: {most} values in a group, and {bits} bits were asked")
        elif made.dim() > 1 and not torch.equal(made, weight):
            raise ValueError(f"{name} changed {key}, which is no linear's weight")
    for key, weight in own.items():
        weight.copy_(found[key])


def _most_values(columns: Tensor) -> int:
    """Distinct values in a row, of the row that has most."""
    return 1 + int((columns.sort(1).values.diff(dim=1) != 0).sum(1).max())
