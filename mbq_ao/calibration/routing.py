"""Which tokens each expert gets, with what input, and how much its output counts for each of them.

An expert reads gathered rows, which do not say whose they are. So the module around the experts runs once more with
token numbers in place of the hidden state, while every module beside the experts (the router among them) returns what
it returned before: what arrives at the experts are the numbers of their tokens.

    channel 0   1: arrives as the factor on the row, which is 0 for a token that the expert was not chosen for (Llama4
                hands all rows to all experts, times the router's score)
    channel 1.. the token's number in base 16, small enough to survive bfloat16 and the factor

Its share in the output is found alike: while the experts return unit vectors, one channel an expert, the module
returns the factor on each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mbq_ao.calibration.capture import ModuleCall, hooked
from mbq_ao.calibration.experts import ExpertLinear, ExpertParameter
from mbq_ao.calibration.residency import Placement

_BASE, _NUM_DIGITS = 16, 6


@dataclass
class ExpertRows:
    """One batch at one parameter's experts, a tensor an expert.

    x: (n, in_features), its input.  tokens: (n,) int64, their numbers in the batch.
    share: (n,) fp32, the factor on its output for them; 1 where it was not asked for.
    """

    x: list[Tensor]
    tokens: list[Tensor]
    share: list[Tensor]

    def kept(self, placement: Placement) -> ExpertRows:
        return ExpertRows(*placement.keep((self.x, self.tokens, self.share)))


def common(first: ExpertRows, second: ExpertRows) -> tuple[ExpertRows, ExpertRows]:
    """Both, with the tokens alone that an expert got in both, row by row the same."""

    def part(rows: ExpertRows, other: ExpertRows) -> ExpertRows:
        kept = []
        for tokens, others in zip(rows.tokens, other.tokens, strict=True):
            order = tokens.argsort()
            kept.append(order[torch.isin(tokens[order], others)])
        fields = ([t[k] for t, k in zip(values, kept, strict=True)] for values in (rows.x, rows.tokens, rows.share))
        return ExpertRows(*fields)

    return part(first, second), part(second, first)


@torch.no_grad()
def expert_rows(
    block: nn.Module,
    call: ModuleCall,
    parameters: dict[str, Tensor],
    experts: Sequence[ExpertParameter],
    wanted: ExpertParameter,
    *,
    with_shares: bool,
) -> ExpertRows | None:
    """Run the block on `call`, with some of its parameters replaced, and record the inputs of `wanted`.

    experts: all expert parameters of the block. None if the rows' tokens cannot be told: something else than a choice
    and a factor lies between the hidden state and the experts.
    """
    run = _Run(block, [e for e in experts if e.owner_name == wanted.owner_name])
    with hooked(run.hooks()):
        call.run(block, parameters)
    for name, seen in run.calls.items():
        if seen.hidden.shape[:-1].numel() == call.hidden.shape[:-1].numel() and (found := run.tokens(name)) is not None:
            shares = run.shares(name) if with_shares else None
            return _gathered(run.inputs[wanted.name], found, shares)
    return None


class _Run:
    """One run of a block: the inputs of one module's experts, the calls of that module and of the one around it, and
    what the modules beside the experts returned."""

    def __init__(self, block: nn.Module, parameters: Sequence[ExpertParameter]) -> None:
        self.parameters = parameters
        owner = parameters[0].owner_name
        self.around = {name: block.get_submodule(name) for name in (owner, owner.rpartition(".")[0]) if name}
        self.inputs: dict[str, dict[int, Tensor]] = {}  # parameters in the order in which they run
        self.calls: dict[str, ModuleCall] = {}
        self.returned: dict[nn.Module, Any] = {}

    def hooks(self) -> Iterator[Any]:
        yield from _on_inputs(self.parameters, self.inputs)
        for name, module in self.around.items():

            def record(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                call = ModuleCall.record(args, kwargs)
                if isinstance(call.hidden, Tensor):
                    self.calls[name] = call

            yield module.register_forward_pre_hook(record, with_kwargs=True)
            for leaf in _beside(module):
                yield leaf.register_forward_hook(lambda m, a, y: self.returned.__setitem__(m, _copied(y)))

    def tokens(self, name: str) -> list[tuple[Tensor, Tensor]] | None:
        """An expert: (rows of its input that count, (n,) int64; their tokens' numbers).  None: they cannot be told."""
        hidden = self.calls[name].hidden
        if hidden.shape[-1] <= _NUM_DIGITS:
            return None
        numbers = torch.arange(hidden.shape[:-1].numel(), device=hidden.device)
        digits = torch.stack([numbers // _BASE**i % _BASE for i in range(_NUM_DIGITS)], -1)
        coded = torch.zeros(len(numbers), hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
        coded[:, 0] = 1
        coded[:, 1 : 1 + _NUM_DIGITS] = digits.to(hidden.dtype)
        arrived: dict[str, dict[int, Tensor]] = {}
        self._repeat(name, coded.view(hidden.shape), _on_inputs(self.parameters, arrived))
        first = next(iter(self.inputs))
        if arrived.keys() != self.inputs.keys() or arrived[first].keys() != self.inputs[first].keys():
            return None
        found = []
        for e in range(len(self.parameters[0].linears)):
            code = arrived[first].get(e, coded[:0]).float()
            rows = code[:, 0].nonzero().flatten()
            code = code[rows] / code[rows, :1]
            read = code[:, 1 : 1 + _NUM_DIGITS].round().long()
            tokens = (read * _BASE ** torch.arange(_NUM_DIGITS, device=read.device)).sum(-1)
            known = (tokens >= 0) & (tokens < len(numbers))
            if not known.all() or not torch.equal(digits[tokens], read):
                return None
            if any(len(inputs.get(e, ())) != len(arrived[first].get(e, ())) for inputs in self.inputs.values()):
                return None
            found.append((rows, tokens))
        return found if self._explain(found, first, hidden.flatten(0, -2)) else None

    def _explain(self, found: list[tuple[Tensor, Tensor]], first: str, hidden: Tensor) -> bool:
        """Whether the inputs that were seen are those tokens' hidden states but for a factor on each, the others 0."""
        for e, (rows, tokens) in enumerate(found):
            x = self.inputs[first].get(e)
            if x is None:
                continue
            if not nn.functional.cosine_similarity(x[rows].float(), hidden[tokens].float()).gt(0.99).all():
                return False
            others = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, rows, False)
            if x[others].any():
                return False
        return True

    def shares(self, name: str) -> Tensor:
        """(tokens, experts) fp32: the factor on each expert's output."""
        last = next(p for p in self.parameters if p.name == list(self.inputs)[-1])
        num_experts, width = len(last.linears), last.linears[0].out_features
        hidden = self.calls[name].hidden
        outputs = [
            self._repeat(name, hidden, _returning_units(last, first)).flatten(0, -2).float()
            for first in (num_experts, *range(0, num_experts, width))  # the first one: no expert returns anything
        ]
        return torch.cat([y - outputs[0] for y in outputs[1:]], -1)[:, :num_experts]

    def _repeat(self, name: str, hidden: Tensor, hooks: Iterator[Any]) -> Tensor:
        """The module's output on another hidden state; what lies beside the experts returns what it did."""
        module = self.around[name]
        replay = (
            leaf.register_forward_hook(lambda m, a, y: _copied(self.returned[m]))
            for leaf in _beside(module)
            if leaf in self.returned
        )
        with hooked(chain(hooks, replay)):
            return self.calls[name].with_hidden(hidden).run(module)


def _beside(module: nn.Module) -> list[nn.Module]:
    leaves = [m for m in module.modules() if not list(m.children()) and any(True for _ in m.parameters())]
    return [m for m in leaves if not isinstance(m, ExpertLinear)]


def _on_inputs(parameters: Sequence[ExpertParameter], inputs: dict[str, dict[int, Tensor]]) -> Iterator[Any]:
    for parameter in parameters:
        for e, linear in enumerate(parameter.linears):

            def record(module: nn.Module, args: Any, name: str = parameter.name, e: int = e) -> None:
                inputs.setdefault(name, {})[e] = args[0]

            yield linear.register_forward_pre_hook(record)


def _returning_units(parameter: ExpertParameter, first: int) -> Iterator[Any]:
    """Expert first + i returns the i-th unit vector for every token, the others 0."""
    for e, linear in enumerate(parameter.linears):

        def unit(module: nn.Module, args: Any, output: Tensor, channel: int = e - first) -> Tensor:
            output = torch.zeros_like(output)
            if 0 <= channel < output.shape[-1]:
                output[..., channel] = 1
            return output

        yield linear.register_forward_hook(unit)


def _copied(value: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, value)  # modules add to what others returned, in place


def _gathered(inputs: dict[int, Tensor], found: list[tuple[Tensor, Tensor]], shares: Tensor | None) -> ExpertRows:
    some = next(iter(inputs.values()))
    x = [inputs.get(e, some[:0])[rows] for e, (rows, _) in enumerate(found)]
    share = [
        torch.ones(len(tokens), device=some.device) if shares is None else shares[tokens, e]
        for e, (_, tokens) in enumerate(found)
    ]
    return ExpertRows(x, [tokens for _, tokens in found], share)
