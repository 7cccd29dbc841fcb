"""Experts of a mixture live in 3-D parameters; while calibrating, each of them is an nn.Linear.

    experts.gate_up_proj   nn.Parameter (E, N, K)   becomes   ExpertLinears: E modules, named experts.gate_up_proj.3

The modules' weights are views of the parameter, so nothing is copied, and all that calibration does with linears
(hooks, replaced weights, folding) works on experts as well. The model's own forward calls them: torch hands
`F.linear(x, p[e])`, `x @ p[e]` and `torch.bmm(x, p)` to `__torch_function__` of what stands in the parameter's place.

Which parameters are experts is seen, not looked up: one forward shows those that are used in these three ways and in
no other, and whether they are (E, N, K) or, transposed, (E, K, N). What is used otherwise is left alone, and
listed in the report as not quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mbq_ao.calibration.batch import CalibrationBatch
from mbq_ao.calibration.capture import forward, hooked, last_positions
from mbq_ao.calibration.residency import Placement, computing_on
from mbq_ao.calibration.validate import owners_of_parameters

_PRODUCTS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm)
_linear = torch.nn.functional.linear


class ExpertLinear(nn.Linear):
    """One expert as a linear without a bias. weight: (N, K), a view."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        """F.linear(x, expert) and x @ expert, whose weight is then (K, N): the module's call, hooks and all."""
        operands = [*args, *(kwargs or {}).values()]
        if func not in (_linear, *_PRODUCTS) or not isinstance(operands[1], ExpertLinear):
            return NotImplemented
        y = operands[1](operands[0])
        bias = operands[2] if len(operands) > 2 else None
        return y if bias is None else y + bias


class ExpertLinears(nn.ModuleList):
    """All experts of one 3-D parameter, and what a model's forward asks of that.

    transposed: the parameter is (E, K, N) instead of (E, N, K).
    """

    def __init__(self, parameter: Tensor, transposed: bool) -> None:
        matrices = parameter.detach()
        super().__init__(ExpertLinear(w.transpose(0, 1) if transposed else w) for w in matrices)
        self.transposed = transposed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        """torch.bmm(x, experts): x (E, T, K) -> (E, T, N)."""
        operands = [*args, *(kwargs or {}).values()]
        if func not in _PRODUCTS or not isinstance(operands[1], ExpertLinears):
            return NotImplemented
        return torch.stack([expert(rows) for expert, rows in zip(operands[1], operands[0], strict=True)])

    @property
    def _weight(self) -> Tensor:
        return self[0].weight

    @property
    def shape(self) -> torch.Size:
        matrix = self._weight.shape
        return torch.Size((len(self), *(reversed(matrix) if self.transposed else matrix)))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 3

    @property
    def ndim(self) -> int:
        return 3

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        return self._weight.device

    def joined(self, matrices: Sequence[Tensor]) -> Tensor:
        """The 3-D tensor that stands for these, one (N, K) an expert."""
        return torch.stack(list(matrices)).transpose(-2, -1) if self.transposed else torch.stack(list(matrices))


@dataclass(frozen=True)
class ExpertParameter:
    """A 3-D parameter of a block that holds experts, while `linears` stand in its place.

    owner: the module that has it. name: "experts.gate_up_proj", relative to the block.
    """

    owner: nn.Module
    name: str
    linears: ExpertLinears

    @property
    def owner_name(self) -> str:
        return self.name.rpartition(".")[0]

    def linear_names(self) -> list[str]:
        return [f"{self.name}.{e}" for e in range(len(self.linears))]


@contextmanager
def experts_as_linears(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    batches: Sequence[CalibrationBatch],
    device: torch.device | None,
) -> Iterator[dict[str, list[ExpertParameter]]]:
    """Block name -> its expert parameters, which are ExpertLinears inside; at the end all is as it was.

    The smallest batch shows how the parameters are used. transformers' experts run their eager forward meanwhile, as
    the others (grouped_mm) do not go through one expert at a time.
    """
    found: dict[str, list[ExpertParameter]] = {name: [] for name in blocks}
    places = [
        _Place(block_name, owner, f"{owner_name}.{name}".removeprefix("."))
        for block_name, block in blocks.items()
        for owner_name, owner in block.named_modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.ndim == 3
    ]
    if not places:
        yield found
        return
    shared = {parameter for parameter, names in owners_of_parameters(model).items() if len(names) > 1}
    with ExitStack() as stack:
        for owner in dict.fromkeys(place.owner for place in places):
            _run_eagerly(owner, stack)
        _watch(model, blocks, min(batches, key=lambda b: b.num_tokens), device, places)
        for place in places:
            if place.transposed is not None and place.parameter not in shared:
                linears = ExpertLinears(place.parameter, place.transposed)
                _put(place, linears, stack)
                found[place.block].append(ExpertParameter(place.owner, place.name, linears))
        yield found


def routers_of(block: nn.Module, experts: Iterable[ExpertParameter]) -> list[str]:
    """Names of the modules that choose or weigh the experts: beside them, with one row for each of them or one alone.

    They are small and all tokens' ways depend on them, so they are never quantized.
    """
    rows: dict[str, set[int]] = {}
    for e in experts:
        rows.setdefault(e.owner_name, {1}).add(len(e.linears))
    found = []
    for name, module in block.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2 or isinstance(module, ExpertLinear):
            continue
        for owner, sizes in rows.items():
            beside, _, _ = owner.rpartition(".")
            if weight.shape[0] in sizes and f"{name}.".startswith(f"{beside}." if beside else ""):
                found.append(name)
    return list(dict.fromkeys(found))


@dataclass
class _Place:
    """A 3-D parameter, and what was seen of it. transposed: None as long as no expert was seen, or it is refused."""

    block: str
    owner: nn.Module
    name: str
    transposed: bool | None = None
    refused: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner.get_parameter(self.name.rpartition(".")[2])

    def use(self, transposed: bool | None) -> None:
        """None: in another way than as experts."""
        self.refused |= transposed is None or self.transposed not in (None, transposed)
        self.transposed = None if self.refused else transposed


class _Watch(TorchFunctionMode):
    """Sees every torch function that is given one of the parameters, or one expert of it."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[int, _Place] = {}
        self.experts: dict[int, tuple[_Place, Tensor]] = {}  # the tensor is kept: no other one may get its id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for position, arg in enumerate((*args, *kwargs.values())):
            if place := self.parameters.get(id(arg)):
                if _is_expert(func, args):
                    self.experts[id(result)] = place, result
                elif isinstance(result, Tensor) or position:
                    place.use(True if func in _PRODUCTS and position == 1 else None)
            elif id(arg) in self.experts:
                place, _ = self.experts[id(arg)]
                if func is _linear and position == 1:
                    place.use(False)
                elif isinstance(result, Tensor) or position:
                    place.use(True if func in _PRODUCTS and position == 1 else None)
        return result


def _is_expert(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether this is p[e] with a number."""
    if func is not Tensor.__getitem__:
        return False
    index = args[1]
    return isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point())


@torch.no_grad()
def _watch(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    batch: CalibrationBatch,
    device: torch.device | None,
    places: list[_Place],
) -> None:
    watch = _Watch()

    def enter(owner: nn.Module, args: Any) -> None:  # here, as copies on the device may be in the parameters' places
        watch.parameters |= {id(place.parameter): place for place in places if place.owner is owner}

    def leave(owner: nn.Module, args: Any, output: Any) -> None:  # such copies end soon
        watch.parameters.clear()
        watch.experts.clear()

    owners = list(dict.fromkeys(place.owner for place in places))
    before = (owner.register_forward_pre_hook(enter) for owner in owners)
    after = (owner.register_forward_hook(leave) for owner in owners)
    with computing_on(device, model, blocks.values()), hooked(chain(before, after)), watch:
        forward(model, batch.on(Placement(device)), logits_to_keep=last_positions(batch, 1))


def _run_eagerly(owner: nn.Module, stack: ExitStack) -> None:
    config: Any = getattr(owner, "config", None)
    implementation = getattr(config, "_experts_implementation", None)
    if implementation not in (None, "eager"):
        stack.callback(setattr, config, "_experts_implementation", implementation)
        config._experts_implementation = "eager"


def _put(place: _Place, linears: ExpertLinears, stack: ExitStack) -> None:
    """In the parameter's place; the owner's own tables come back as they were."""
    owner, name = place.owner, place.name.rpartition(".")[2]
    parameters = {n: p for n, p in owner._parameters.items() if n != name}
    for table, changed in (("_parameters", parameters), ("_modules", {**owner._modules, name: linears})):
        stack.callback(owner.__dict__.__setitem__, table, owner.__dict__[table])
        owner.__dict__[table] = changed
