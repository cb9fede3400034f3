"""Divides the cores among the workers that compute at this moment.

llama.cpp's threads wait for each other by spinning: two workers with two threads each on two cores
answer at less than half the speed of one thread each. So a worker that is alone gets all cores, and
each that joins it takes its share; a worker that nobody asks anything has none. One that is being
started or loaded keeps one core busy: threads that spin beside it would wait for it a hundred times
as long as they compute. What a worker is told takes effect between two of its steps.

Only counts and divides: how a worker is told is its client's business.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol


class Member(Protocol):
    """A worker, as the governor sees it. `most_threads` is what its owner allows it; None, all."""

    @property
    def most_threads(self) -> int | None: ...

    def use_threads(self, threads: int) -> None:
        """Compute with so many threads from now on. Must return at once."""
        ...


def divided(cores: int, most: Sequence[int | None]) -> list[int]:
    """Threads for each active worker, in the order in which they became active.

    Nobody gets less than one, or more than its `most`; what that leaves goes to the others, one
    each, the earliest first. With more workers than cores, all have one: the system shares them
    out, and single threads do not spin.
    """
    shares = [1] * len(most)
    left = cores - len(most)
    while left > 0:
        open_ = [i for i, limit in enumerate(most) if limit is None or shares[i] < limit]
        if not open_:
            break
        fewest = min(shares[i] for i in open_)
        shares[next(i for i in open_ if shares[i] == fewest)] += 1
        left -= 1
    return shares


class _OneCore:
    """Something that keeps a core busy and cannot be told anything."""

    most_threads = 1

    def use_threads(self, threads: int) -> None:
        pass


class ThreadGovernor:
    """Keeps the shares of the workers of one backend. Each `join` needs its `leave`."""

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._lock = threading.Lock()
        self._uses: dict[Member, int] = {}
        # Also of those that are idle now: what they were told last still holds.
        self._told: weakref.WeakKeyDictionary[Member, int] = weakref.WeakKeyDictionary()

    def join(self, member: Member) -> None:
        """One more request is being computed by a worker."""
        with self._lock:
            self._uses[member] = self._uses.get(member, 0) + 1
            if self._uses[member] == 1:
                self._divide()

    def leave(self, member: Member) -> None:
        """One request less."""
        with self._lock:
            self._uses[member] -= 1
            if self._uses[member] == 0:
                del self._uses[member]
                self._divide()

    @contextmanager
    def one_core(self) -> Iterator[None]:
        """Leave a core to what is done meanwhile."""
        core = _OneCore()
        self.join(core)
        try:
            yield
        finally:
            self.leave(core)

    def _divide(self) -> None:
        shares = divided(self._cores, [member.most_threads for member in self._uses])
        # Who gets less is told first: for a moment there are too few threads, not too many.
        by_change = sorted(
            zip(self._uses, shares, strict=True),
            key=lambda pair: pair[1] - self._told.get(pair[0], 0),
        )
        for member, threads in by_change:
            if self._told.get(member) != threads:
                self._told[member] = threads
                member.use_threads(threads)
