"""Peers' own programs on the beds of benchmarks/accuracy.py, with a peer that is made here."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build_batch, build_model
from processors import build_processor
from torch import Tensor, nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GROUP = 32
PEER = """
import sys
sys.path.insert(0, {benchmarks!r})
from accuracy_bed import peers

def quantize(model, task):
    assert [len(sample) for sample in task.samples] == {lengths} and task.changes == {{"steps": 5}}
    for linear in peers.decoder_linears(model.get_decoder()).values():
        groups = linear.weight.data.unflatten(1, (-1, task.group_size))
        low, high = groups.aminmax(dim=-1, keepdim=True)
        scale = (high - low) / (2**task.bits - 1)
        linear.weight.data = (((groups - low) / scale).round() * scale + low).flatten(1)

peers.PEERS["AutoRound"] = peers.Peer((), quantize)
peers.main()
"""


@pytest.fixture
def peer_runs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from accuracy_bed import peer_runs

    return peer_runs


def rounded(weight: Tensor, bits: int = 3) -> Tensor:
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)
    return ((groups / scale).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).flatten(1)


def test_weights_come_back(peer_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a process that compared logits with and without an image, on samples without padding."""
    model = build_model("llava").requires_grad_(False)
    calib = [build_batch("llava", batch_size=2), build_batch("llama")]
    calib[0]["attention_mask"][1, -3:] = 0
    length = calib[0]["input_ids"].shape[1]
    program = tmp_path / "peer.py"
    program.write_text(PEER.format(benchmarks=str(BENCHMARKS), lengths=[length, length - 3, 9]))
    monkeypatch.setattr(peer_runs, "PROGRAM", program)
    asked = (model, build_processor("llava"), "w3a16", GROUP, calib)
    found = peer_runs.quantize_by_peer(Path(sys.executable), "AutoRound, steps=5", *asked)
    before = dict(build_model("llava").named_parameters())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".language_model." in name}
    assert linears and changed == {f"{name}.weight" for name in linears}
    assert found["seconds"] > 0 and set(found["versions"]) == {"torch", "transformers"}

    program.write_text("raise SystemExit('out of memory')")
    with pytest.raises(RuntimeError, match=f"^AutoRound failed under {sys.executable}:\nout of memory"):
        peer_runs.quantize_by_peer(Path(sys.executable), "AutoRound", *asked)


def test_what_is_no_quantization_is_refused(peer_runs: Any) -> None:
    decoder = build_model("llava").get_decoder().requires_grad_(False)
    good = {k: p.clone() for k, p in decoder.named_parameters() if "layers." in k}
    good |= {k: rounded(p) for k, p in good.items() if p.dim() == 2}
    norm, linear = "layers.0.input_layernorm.weight", "layers.1.mlp.up_proj.weight"
    good[norm] *= 2  # as peers do that fold scales

    def take(changes: dict[str, Tensor]) -> None:
        peer_runs.take_weights(decoder, good | changes, 3, GROUP, "hqq package")

    own = decoder.get_parameter(linear).clone()
    with pytest.raises(ValueError, match=rf"did not quantize {re.escape(linear)}: 32 values in a group, and 3 bits"):
        take({linear: own})
    with pytest.raises(ValueError, match=r"did not quantize .*: 16 values in a group"):
        take({linear: rounded(own, bits=4)})
    with pytest.raises(ValueError, match="values that are not finite, or in another shape"):
        take({linear: own[:1]})
    with pytest.raises(ValueError, match=r"left other weights than the decoder's: .*'layers\.1\.mlp\.more'"):
        take({"layers.1.mlp.more": own})
    take({})
    assert torch.equal(decoder.get_parameter(linear), good[linear])
    assert torch.equal(decoder.get_parameter(norm), good[norm])
    with pytest.raises(ValueError, match="did not quantize layers"):
        take({})  # what it has been already


def test_a_model_that_became_another_is_refused(peer_runs: Any) -> None:
    from accuracy_bed.peers import Task, check_logits

    model = build_model("llama")
    task = Task("", 3, GROUP, [[3, 4, 5]], {})
    expected = model(torch.tensor([[3, 4, 5]])).logits[:, -1].detach()
    check_logits(model, task, expected)
    with pytest.raises(ValueError, match="has other logits than the one that was handed over"):
        check_logits(model, task, expected.roll(1, 1))


def test_a_peers_environment_needs_nothing_of_ours() -> None:
    source = (BENCHMARKS / "accuracy_bed" / "peers.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) (mbq_ao|torchao|accuracy_bed)", source, re.MULTILINE)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ([], "give --peer-python"),
        (["--peer-python", "nowhere/python"], "--peer-python nowhere/python is no file"),
        (["--precision", "w4a8"], "rounds weights only"),
        (["--methods", "AutoRound, 50"], "there is no peer 'AutoRound, 50'"),
    ],
)
def test_what_is_missing(
    more: list[str], error: str, peer_runs: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import accuracy

    monkeypatch.setattr("sys.argv", ["accuracy.py", "--methods", "AutoRound", *more])
    with pytest.raises(SystemExit):
        accuracy.main()
    assert error in " ".join(capsys.readouterr().err.split())


def test_keywords_of_a_peer_are_json(peer_runs: Any) -> None:
    assert peer_runs.peer_of("AutoRound, iters=50, sym=true") == ("AutoRound", {"iters": 50, "sym": True})
    with pytest.raises(ValueError, match="must be JSON"):
        peer_runs.peer_of("llm-compressor GPTQ, actorder=static")
