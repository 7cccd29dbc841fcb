"""What several ranks must have in common: the run they are told to do, each step's result, the new parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mbq_ao.calibration.ranks import Ranks
from mbq_ao.calibration.work_dir import RunDescription, State, Store, differences


def agree(ranks: Ranks, describe: Callable[[], Mapping[str, str]], rule: str) -> None:
    """Raise the same ValueError on every rank unless all describe the same.  rule: what to do about it.

    describe: text by name; one rank alone is not asked.
    """
    if ranks.size == 1:
        return
    first, *others = ranks.each(describe())
    for rank, other in enumerate(others, start=1):
        if found := differences(first, other, "on rank 0", f"on rank {rank}"):
            raise ValueError(f"rank {rank} differs from rank 0: {rule}. What differs:\n{found}")


class SharedStore(Store):
    """The store of rank 0, for all ranks. Only rank 0 reads and writes it; the others need not have one.

    Every rank goes on with rank 0's state of a step, also where it computed its own.
    """

    def __init__(self, ranks: Ranks, store: Store) -> None:
        self.ranks, self.store = ranks, store

    def check(self, describe: Callable[[], RunDescription]) -> None:
        """Raises ValueError if the ranks were not called with the same model, data and settings."""
        run = describe()
        agree(
            self.ranks,
            lambda: run.fingerprint,
            "every rank takes its share of the same work, so call quantize_ with the same model, config and all of "
            "calib_data on each (no distributed sampler), or pass distributed=False",
        )
        self.ranks.on_one(lambda: self.store.check(lambda: run))

    def once(self, name: str, compute: Callable[[], State], *, follows_from: object = None) -> State:
        if self.ranks.is_first:
            state = self.store.once(name, lambda: self._with_others(compute), follows_from=follows_from)
            return self.ranks.each(replace(state, tensors=[t.cpu() for t in state.tensors]))[0]
        answer: Any = self.ranks.each(None)[0]
        if answer is None:  # rank 0 does not know it: all compute, and then it answers
            compute()
            answer = self.ranks.each(None)[0]
        return answer

    def _with_others(self, compute: Callable[[], State]) -> State:
        self.ranks.each(None)
        return compute()
