"""Several processes, one calibration: each runs its share of the batches, and all know what all found.

    batches  0 1 2 3 4 5      every rank has all of them, as cheap things (masks, counts) follow from all
    rank 0   0   2     5      runs the model on these
    rank 1     1   3 4

Ranks never add up what they found but integers: they gather it batch by batch, and each does the sums that a single
process does, in the order of the batches. So the result does not depend on how many there are, to the last bit where
their devices compute the same bits.

What they do together is one thing, `each`: every rank gives a value and gets the values of all, or the word that a
rank has failed. A rank that fails gives that word in place of its next value and so meets the others wherever they
are; if it fails while values pass, or dies, its connections break and the others fail at once. None is left waiting.

The connections are our own, gloo between CPUs, whatever the training uses: nothing of ours can come between the
collectives of the program, and nothing needs to know on which device those have to be. What passes in a
search is little: two numbers a channel and a few numbers a scale tried, for each batch and group. Where weights are
fitted to their inputs it is one (K, K) sum of 8-byte integers for each set of linears that read the same x, and with
"best" another of as many rows as the set has outputs, K at most.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

T = TypeVar("T")
_PATIENCE = 30.0  # seconds before a rank that waits for the others to begin says so


class Ranks:
    """One process alone: all batches are its own, and nothing passes."""

    size, is_first = 1, True

    def split(self, costs: Sequence[float]) -> None:
        """Share out the batches, of which these are the costs. To be called before what speaks of batches."""

    def mine(self, values: Sequence[T]) -> list[T]:
        """Of values, one for each batch, those of the batches that this rank runs. Never none."""
        return list(values)

    def gather(self, values: list[T]) -> list[T]:
        """The reverse of `mine`: one value for each batch that this rank runs -> one for each batch, on every rank.

        Values are pickled; tensors in them arrive on the device of this rank's own.
        """
        return values

    def of_parts(self, numbers: Sequence[int]) -> Ranks:
        """The same ranks, where not batches are shared out but their parts, so many of each; at least one in all."""
        return self

    def own(self, values: list[T]) -> list[T]:
        """Of values, one for each batch that this rank runs, those of batches that no other rank runs as well."""
        return values

    def add_up(self, value: Tensor) -> Tensor:
        """The sum of the ranks' tensors. Of integers, as other sums depend on the number of ranks."""
        return value

    def each(self, value: T) -> list[T]:
        """The value of every rank, in their order.

        Raises RuntimeError if another rank has failed or is gone; then this rank takes no further part.
        """
        return [value]

    def on_one(self, compute: Callable[[], T], keys: Sequence[float] | None = None) -> T:
        """What `compute` returns on one rank, for all of them.

        keys: one for each batch that this rank runs; the rank with the least key computes, of equals that with the
        first batch. None: rank 0.
        """
        return compute()


ALONE = Ranks()


class SeveralRanks(Ranks):
    """This process and the others of the group, which all make the same calls. See `joined_ranks`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.is_first = self.rank == 0
        self.can_speak = True  # the next thing that the others will hear of is the next thing that we say
        self.owners: list[int] = []

    def split(self, costs: Sequence[float]) -> None:
        loads = [0.0] * self.size
        self.owners = [0] * len(costs)
        for batch in sorted(range(len(costs)), key=lambda i: -costs[i]):  # the dearest first, to whom has least
            self.owners[batch] = loads.index(min(loads))
            loads[self.owners[batch]] += costs[batch]

    def mine(self, values: Sequence[T]) -> list[T]:
        own = [value for value, owner in zip(values, self.owners, strict=True) if owner == self.rank]
        # With fewer batches than ranks: one runs another's, and `gather` takes the other's word for it. That costs
        # no time and spares everyone the question of what follows from no batch.
        return own or [values[0]]

    def of_parts(self, numbers: Sequence[int]) -> Ranks:
        return _Parts(self, numbers)

    def gather(self, values: list[T]) -> list[T]:
        device = next((leaf.device for leaf in tree_leaves(values) if isinstance(leaf, Tensor)), None)
        by_rank = [iter(part) for part in self.each(tree_map_only(Tensor, lambda t: t.cpu(), values))]
        return tree_map_only(Tensor, lambda t: t.to(device), [next(by_rank[owner]) for owner in self.owners])

    def own(self, values: list[T]) -> list[T]:
        return values if self.rank in self.owners else []

    def each(self, value: T) -> list[T]:
        self.can_speak = False  # interrupted in here, nobody knows who has heard what: then only hanging up is clear
        values = self._told(value)
        self.can_speak = True
        return values

    def add_up(self, value: Tensor) -> Tensor:
        self.can_speak = False
        self._told(None)  # a rank may have failed instead
        total = value.cpu()
        try:
            dist.all_reduce(total, group=self.group)
        except RuntimeError as error:
            raise self._lost(error) from error
        self.can_speak = True
        return total.to(value.device)

    def _told(self, value: T) -> list[T]:
        messages: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(messages, (None, value), group=self.group)
        except RuntimeError as error:
            raise self._lost(error) from error
        if failed := [f"rank {rank}: {word}" for rank, (word, _) in enumerate(messages) if word]:
            raise RuntimeError(f"quantize_ failed on {'; '.join(failed)}. The model is as it was on this rank as well")
        return [value for _, value in messages]

    def _lost(self, error: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"rank {self.rank} lost the other ranks: one has died, was interrupted, or took too long "
            f"({str(error).splitlines()[0]}). The model is as it was"
        )

    def on_one(self, compute: Callable[[], T], keys: Sequence[float] | None = None) -> T:
        chosen = 0
        if keys is not None:
            all_keys = self.gather(list(keys))
            chosen = self.owners[all_keys.index(min(all_keys))]
        return self.each(compute() if chosen == self.rank else None)[chosen]  # type: ignore[return-value]

    def leave(self, error: BaseException | None) -> None:
        """Tell the others how it ended, and hang up."""
        word = error and f"{type(error).__name__}: {error}".removesuffix(": ")
        try:
            if self.can_speak:
                # After a success too: hanging up while others still read the last value would be a failure to them.
                with suppress(RuntimeError):  # nobody there any more
                    dist.all_gather_object([None] * self.size, (word, None), group=self.group)
        finally:
            dist.destroy_process_group(self.group)


class _Parts(SeveralRanks):
    """The ranks of batches, as ranks of their parts. Who has a batch has its parts."""

    def __init__(self, ranks: SeveralRanks, numbers: Sequence[int]) -> None:
        self.ranks, self.rank, self.size, self.is_first = ranks, ranks.rank, ranks.size, ranks.is_first
        self.owners = [owner for owner, number in zip(ranks.owners, numbers, strict=True) for _ in range(number)]

    def each(self, value: T) -> list[T]:
        return self.ranks.each(value)

    def add_up(self, value: Tensor) -> Tensor:
        return self.ranks.add_up(value)


@contextmanager
def joined_ranks(distributed: bool) -> Iterator[Ranks]:
    """The ranks of torch.distributed as one, if it is initialised and has several; else this process alone.

    All of them have to come here. Whatever is raised inside on one is told to the others.
    """
    if not (distributed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield ALONE
        return
    ranks = SeveralRanks(_own_group())
    try:
        yield ranks
    except BaseException as error:
        ranks.leave(error)
        raise
    ranks.leave(None)


def _own_group() -> dist.ProcessGroup:
    rule = (
        f"with torch.distributed initialised, all {dist.get_world_size()} ranks have to call quantize_, and share the "
        "work; pass distributed=False to quantize on one rank alone"
    )
    reminder = threading.Timer(_PATIENCE, warnings.warn, [f"rank {dist.get_rank()} waits for the others: {rule}"])
    reminder.daemon = True
    reminder.start()
    try:
        return dist.new_group(backend="gloo")
    except RuntimeError as error:
        raise RuntimeError(f"rank {dist.get_rank()} could not join the others ({error}): {rule}") from error
    finally:
        reminder.cancel()
