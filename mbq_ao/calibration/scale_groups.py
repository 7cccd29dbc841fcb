"""Find a block's scale groups without knowing its architecture: propose by data flow, accept by invariance.

1. Trace: one forward shows which linears read the same storage. They form a group and share one s.
2. Probe: multiply the rows (or the norm weight) of an earlier module by known factors, run the block
   and look at the group's input. If every channel was multiplied by the factor of one row, that module
   produces the input, and the factors say which row feeds which channel: the identity, the last half of a
   fused projection, or value heads shared by several query heads. No head count is needed.
3. Accept: for random s, scale the linears' columns by s and fold 1 / s into the producer. The block's
   output must not change. This refuses a producer that something else reads as well.

s is made of powers of two, which change no bit of a product: else a token whose two best experts are nearly equal could
be routed to the other one, and an output that moves by that says nothing about the fold.

The error in step 3 is judged against the change that scaling without folding makes, not against the
output: beside a residual outlier of 1e4 a wrong fold moves the output by 2e-6 and would pass, while
against the unfolded change wrong folds lie at 0.1-1 and right ones at 1e-6.

All of it runs on an fp32 copy of the block. Values that leave the block by another way than its output
are not seen; the check of the whole model's logits (mbq.py) covers them.
Tables of architectures, as AWQ-like tools have them, were rejected: they break with every release.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mbq_ao.calibration.capture import ModuleCall, first_tensor, hooked, inputs_in
from mbq_ao.calibration.expert_groups import expert_parameters, find_expert_groups
from mbq_ao.calibration.experts import ExpertLinear
from mbq_ao.calibration.fold import RowMap, ScaleGroup, Scaling, folded_parameters
from mbq_ao.calibration.residency import forget_residency

_LEVELS = 64  # probe factors per digit: far enough apart to be told from rounding
_TOLERANCE = 1e-3  # of the unfolded change; right folds are at 1e-6, wrong ones above 0.1


@dataclass
class Trace:
    """One forward of a block: leaf modules in the order of their calls, and the storages they read and wrote.

    num_rows: how many rows of a module's input are not zero.
    called: names of all modules whose own forward ran; what merely holds others (ModuleDict), or is entered by
        another method than its forward (Gemma 3n's AltUp), is not among them.
    """

    block: nn.Module
    order: list[str]
    reads: dict[str, int]
    writes: dict[str, int]
    num_rows: dict[str, int]
    called: set[str]

    def linear_groups(self) -> list[tuple[str, ...]]:
        """Of all but experts, which read copies."""
        groups: dict[int, list[str]] = {}
        for name in dict.fromkeys(self.order):
            module = self.block.get_submodule(name)
            if is_linear(module) and not isinstance(module, ExpertLinear):
                groups.setdefault(self.reads[name], []).append(name)
        return [tuple(names) for names in groups.values()]

    def before(self, name: str) -> list[str]:
        """The modules called before `name`, nearest first."""
        return list(dict.fromkeys(self.order[: self.order.index(name)][::-1]))


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


class BlockProber:
    """Runs experiments on an fp32 copy of a block, on the device of its call.

    call: one call of the block with real hidden states of at least two tokens.
    """

    def __init__(self, block: nn.Module, call: ModuleCall) -> None:
        self.block = _fp32_copy(block, call.hidden.device)
        self.call = call.map_tensors(lambda t: t.float() if t.is_floating_point() else t)
        self.trace, self.output = self._trace()
        self._unprobed: tuple[str, Tensor] | None = None  # a linear and its input, kept as it is asked for repeatedly
        if not any(is_linear(self._module(n)) for n in self.trace.order) and any(map(is_linear, self.block.modules())):
            raise ValueError(
                f"a copy of this {type(block).__name__} runs none of its linears, so no scale group can be found: was "
                "its forward replaced by a function that holds the original? Undo that, or use functools.partial"
            )

    @torch.no_grad()
    def _trace(self) -> tuple[Trace, Tensor]:
        trace = Trace(self.block, [], {}, {}, {}, set())
        alive = []  # a freed storage's address may be given to another tensor

        def enter(name: str, args: tuple[Tensor, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                alive.append(args[0])
                trace.order.append(name)
                trace.reads[name] = args[0].untyped_storage().data_ptr()
                trace.num_rows[name] = int((args[0] != 0).any(-1).sum())

        def leave(name: str, output: object) -> None:
            if isinstance(output, Tensor):
                alive.append(output)
                trace.writes[name] = output.untyped_storage().data_ptr()

        def hooks() -> Iterator[object]:
            for name, module in self.block.named_modules():
                yield module.register_forward_pre_hook(lambda m, a, name=name: trace.called.add(name))
                if isinstance(getattr(module, "weight", None), nn.Parameter) and not list(module.children()):
                    yield module.register_forward_pre_hook(lambda m, a, name=name: enter(name, a))
                    yield module.register_forward_hook(lambda m, a, y, name=name: leave(name, y))

        with hooked(hooks()):
            output = self.call.run(self.block)
        return trace, output

    def find_all(self) -> list[ScaleGroup]:
        """All groups of the block's nn.Linear modules, in the order in which they run.

        A group whose input nothing can be shown to produce has producer None.
        """
        experts = find_expert_groups(self)
        grouped = {name for group in experts for name in group.linears}
        others = [self.complete(ScaleGroup(n)) for n in self.trace.linear_groups() if not grouped.intersection(n)]
        return sorted(others + experts, key=lambda g: self.position(g.linears[0]))

    def position(self, linear: str) -> int:
        """When the linear is run first; of an expert, when the first one of its parameter is."""
        parameter = linear.rpartition(".")[0]
        of_experts = isinstance(self._module(linear), ExpertLinear)
        same = [n == linear or (of_experts and n.rpartition(".")[0] == parameter) for n in self.trace.order]
        return same.index(True)

    def complete(self, group: ScaleGroup) -> ScaleGroup:
        """Fill in what the group leaves open: producer, fold, row map, inspected module.

        What the group names is kept: its producer is the only candidate, its fold and row map the only way to fold
        into it. Raises ValueError if the block's output changes with that, or if the names do not fit the block.
        """
        self._check_names(group)
        inspect = self.inspected(group) if group.inspect is None else group.inspect
        group = replace(group, inspect=inspect)
        candidates = self.trace.before(group.linears[0]) if group.producer is None else [group.producer]
        for producer in candidates:
            for found in self._proposals(group, producer):
                if self.preserve_output([found]):
                    return replace(found, mixes_tokens=self._mixes_tokens(found))
        if group.producer is not None:
            raise ValueError(
                f"scaling {', '.join(group.linears)} and folding 1/s into {group.producer} "
                + ("" if group.fold is None else f"(fold={group.fold!r}, {group.row_map}) ")
                + "changes the block's output: name another producer, or leave producer, fold and row_map to be found"
            )
        return group

    def _proposals(self, group: ScaleGroup, producer: str) -> Iterator[ScaleGroup]:
        """The group as given if it says all, then the foldings found by probing that agree with what it says."""
        if group.producer is not None and group.fold is not None:
            yield group
        for found in self._foldings(group, producer):
            if group.fold in (None, found.fold) and group.row_map in (RowMap(), found.row_map):
                yield found

    def _check_names(self, group: ScaleGroup) -> None:
        for name in group.linears:
            if any(f"{name}.".startswith(f"{parameter}.") for parameter in expert_parameters(self.block)):
                raise ValueError(f"scale_groups cannot name experts: {name!r} in {group}; they are then not scaled")
            if name not in self.trace.reads or not is_linear(self._module(name)):
                raise ValueError(f"scale group names {name!r}, which is not a linear that this block runs: {group}")
            if group.inspect and not f"{name}.".startswith(f"{group.inspect}."):
                raise ValueError(f"inspect of a scale group must be a module that contains {name!r}: {group}")
        if group.producer is not None and group.producer not in self.trace.reads:
            raise ValueError(f"producer {group.producer!r} is not a norm or linear that this block runs: {group}")
        if len({self._module(name).in_features for name in group.linears}) > 1:
            raise ValueError(f"the linears of a scale group must read the same input, got different widths: {group}")
        if group.producer is not None and group.fold is not None:
            self._check_fold(group)

    def _check_fold(self, group: ScaleGroup) -> None:
        """Raise ValueError unless the producer has what the given fold and row map speak of."""
        assert group.producer is not None
        num_channels = self._module(group.linears[0]).in_features
        producer = self._module(group.producer)
        if (group.fold == "rows") != is_linear(producer):
            raise ValueError(f'fold="rows" is for a linear, the other folds are for a norm, got {group}')
        row_map, num_rows = group.row_map, producer.weight.shape[0]
        num_shared, rest = divmod(num_channels, row_map.repeats)
        needed = row_map.offset + num_shared if group.fold == "rows" else num_channels
        fits = needed <= num_rows if group.fold == "rows" else needed == num_rows
        if rest or num_shared % row_map.width or not fits:
            raise ValueError(f"{group} does not fit: {group.producer} has {num_rows} rows, x {num_channels} channels")

    def inspected(self, group: ScaleGroup) -> str:
        """A single linear is compared itself if its input comes from a linear; else the module around the group.

        Always a module whose forward runs: only there is a call to be recorded and replayed.
        """
        parents = [name.rpartition(".")[0].split(".") for name in group.linears]
        common = []
        for parts in zip(*parents, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        parent = ".".join(p for p in common if p)
        if len(group.linears) > 1:
            while parent not in self.trace.called:
                parent = parent.rpartition(".")[0]
            return parent
        only = group.linears[0]
        # The first linear of a module (a fused qkv_proj) stands for the module; a later one (o_proj) for itself.
        siblings = [n for n in self.trace.order if parent and n.startswith(parent + ".") and is_linear(self._module(n))]
        stands_for_it = len(siblings) > 1 and siblings[0] == only
        return parent if stands_for_it and parent in self.trace.called else only

    @torch.no_grad()
    def read_past_forward(self) -> list[str]:
        """The linears whose weight the block reads without calling them: a quantized weight might not do what it does.

        (Mamba's dt_proj.) Linears that neither run nor are read, such as experts without a token, are not among them.
        """
        silent = [n for n, m in self.block.named_modules() if is_linear(m) and n not in self.trace.called]
        return [name for name in silent if self._depends_on(name)] if silent and self._depends_on(*silent) else []

    def _depends_on(self, *linears: str) -> bool:
        without = {f"{name}.weight": torch.full_like(self._module(name).weight, torch.nan) for name in linears}
        return not torch.equal(self.call.run(self.block, without), self.output)

    def _module(self, name: str) -> nn.Module:
        return self.block.get_submodule(name)

    def input_of(self, linear: str, parameters: dict[str, Tensor]) -> Tensor:
        """(tokens, in_features) at the input of a linear, with some of the block's parameters replaced."""
        return inputs_in(self.call, self.block, [linear], parameters)[0]

    def _unprobed_input(self, linear: str) -> Tensor:
        """`input_of` the block as it is."""
        if self._unprobed is None or self._unprobed[0] != linear:
            self._unprobed = (linear, self.input_of(linear, {}))
        return self._unprobed[1]

    @torch.no_grad()
    def _foldings(self, group: ScaleGroup, producer: str) -> Iterator[ScaleGroup]:
        """The ways in which `producer` may feed the group, found by probing."""
        module, linear = self._module(producer), group.linears[0]
        num_channels = self._module(linear).in_features
        weight = module.weight
        if is_linear(module):
            if (row_map := self.find_row_map(producer, linear, num_channels)) is not None:
                yield replace(group, producer=producer, fold="rows", row_map=row_map)
        elif weight.ndim == 1 and weight.numel() == num_channels:
            before = self._unprobed_input(linear)
            factors = torch.linspace(0.5, 1.5, num_channels, device=weight.device)
            for fold, probe in (("weight", weight * factors), ("one_plus_weight", (1 + weight) * factors - 1)):
                changed = {f"{producer}.weight": probe}
                if getattr(module, "bias", None) is not None:
                    changed[f"{producer}.bias"] = module.bias * factors
                after = self.input_of(linear, changed)
                if (after - before * factors).norm() <= _TOLERANCE * (after - before).norm():
                    yield replace(group, producer=producer, fold=fold)  # type: ignore[arg-type]

    def find_row_map(self, producer: str, linear: str, num_channels: int) -> RowMap | None:
        num_rows = self._module(producer).out_features
        others = num_rows - num_channels
        # A fused projection is probed in its last part alone: scaling its queries and keys, or its gate, would
        # change more than the values it feeds. These are the up half of gate_up, and v of qkv with shared heads.
        for start in dict.fromkeys((0, others, num_rows - others // 2)):
            if 0 <= start < num_rows and (digits := self._read_digits(producer, linear, start)) is not None:
                return _fit_row_map(*digits, num_channels, num_rows)
        return None

    def _read_digits(self, producer: str, linear: str, start: int) -> tuple[Tensor, Tensor] | None:
        """Read the producer's row of every channel off one probe a digit of the row's number, from row `start` on.

        Returns (row of each channel, whether the channel is alive), or None where a channel is not the
        multiple of one row.
        """
        module = self._module(producer)
        num_digits = next(n for n in range(1, 9) if _LEVELS**n >= module.out_features)
        row = torch.arange(module.out_features, device=module.weight.device) - start
        before = self._unprobed_input(linear)
        power = before.square().sum(0)
        alive = power > 0
        found = torch.zeros_like(power, dtype=torch.long)
        for digit in range(num_digits):
            factors = torch.where(row < 0, 1.0, 0.5 + (row // _LEVELS**digit % _LEVELS) / _LEVELS)
            changed = {f"{producer}.weight": module.weight * factors[:, None]}
            if module.bias is not None:
                changed[f"{producer}.bias"] = module.bias * factors
            after = self.input_of(linear, changed)
            if after.shape != before.shape:
                return None
            ratio = (after * before).sum(0) / power.clamp(min=torch.finfo(power.dtype).tiny)
            residual = (after - ratio * before).square().sum(0).sqrt() / power.sqrt()
            level = (ratio - 0.5) * _LEVELS
            off = (level - level.round()).abs()
            if not ((residual[alive] < 1e-3).all() and (off[alive] < 0.1).all()):
                return None
            found += level.round().long() * _LEVELS**digit
        return (found + start, alive) if alive.any() else None

    @torch.no_grad()
    def preserve_output(self, groups: Sequence[ScaleGroup]) -> bool:
        """Step 3: scale and fold with a random s, all groups at once; the block's output must not move."""
        generator = torch.Generator().manual_seed(0)
        scalings = []
        for group in groups:
            num_channels = self._module(group.linears[0]).weight.shape[1]
            s = 2.0 ** torch.randint(-1, 2, (num_channels,), generator=generator)
            scalings.append(Scaling(group, group.row_map.tie(s).to(self.output.device)))
        folded = folded_parameters(self.block, scalings)
        columns_only = {name: folded[name] for group in groups for name in group.weight_names()}
        control = (self.call.run(self.block, columns_only) - self.output).norm()
        error = (self.call.run(self.block, folded) - self.output).norm()
        return bool(control > 0) and bool(error <= _TOLERANCE * control)

    @torch.no_grad()
    def _mixes_tokens(self, group: ScaleGroup) -> bool:
        """Whether a change of the producer's output at the first token reaches the linears at other tokens."""
        assert group.producer is not None
        before = self._unprobed_input(group.linears[0])

        def perturb(module: nn.Module, args: object, output: Tensor) -> Tensor:
            output = first_tensor(output).clone()
            output.view(-1, output.shape[-1])[0] += 1.0
            return output

        with hooked([self._module(group.producer).register_forward_hook(perturb)]):
            after = self.input_of(group.linears[0], {})
        return not torch.equal(before[1:], after[1:])


def _fp32_copy(block: nn.Module, device: torch.device) -> nn.Module:
    """A copy on the device, of fp32 parameters that need no gradient; those that are all that already are shared."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)

    # What the memo holds is not copied, so that no second copy in another dtype, or on another device, is made.
    memo: dict[int, Tensor] = {id(p): nn.Parameter(copied(p), requires_grad=False) for p in block.parameters()}
    memo |= {id(b): copied(b).clone() for b in block.buffers()}
    result = copy.deepcopy(block, memo).eval()
    forget_residency(result)
    return result


def _fit_row_map(row: Tensor, alive: Tensor, num_channels: int, num_rows: int) -> RowMap | None:
    """The RowMap that agrees with the rows read off the living channels, if any does.

    Channels that are zero on this input (a dead ReLU) say nothing about their row; the pattern of the
    others decides, which is why arbitrary permutations are not accepted.
    """
    channel = torch.arange(num_channels, device=row.device)
    offsets = (row - channel)[alive]
    if (offsets == offsets[0]).all() and 0 <= (offset := int(offsets[0])) <= num_rows - num_channels:
        return RowMap(offset=offset)
    for num_shared in range(num_channels // 2, 0, -1):  # rows that are shared by several channels
        if num_channels % num_shared:
            continue
        repeats = num_channels // num_shared
        # A fused projection may hold the shared rows at any multiple; the first living channel tells.
        for width in _divisors(num_shared):
            candidate = RowMap(width=width, repeats=repeats)
            expected = candidate.rows(num_channels).to(row.device)
            offset = int((row - expected)[alive][0])
            if 0 <= offset <= num_rows - num_shared and torch.equal(row[alive], (expected + offset)[alive]):
                return replace(candidate, offset=offset)
    return None


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
