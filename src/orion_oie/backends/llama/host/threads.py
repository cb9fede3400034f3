"""Division of the cores among the workers that compute at the moment.

llama.cpp's threads wait for each other by spinning: two workers with two threads each on two cores
are less than half as fast as with one thread each. So a single active worker gets all cores, and
each one that joins gets its share; a worker without requests has none. A worker that is being
started or loaded keeps one core busy: threads that spin beside it would wait for it a hundred times
as long as they compute. A new number of threads takes effect between two steps of a worker.

This module only counts and divides; the client passes the numbers on to its worker.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol


class Member(Protocol):
    """A worker that takes part. `max_threads` is the limit set by its owner; None means none."""

    @property
    def max_threads(self) -> int | None: ...

    def use_threads(self, threads: int) -> None:
        """Use this many threads from now on. Must return at once."""
        ...


def divide_cores(cores: int, limits: Sequence[int | None]) -> list[int]:
    """Threads for each active worker, in the order in which they became active.

    1. Every worker gets one thread, also with more workers than cores: the system then shares the
       cores out, and single threads do not spin.
    2. The other cores are dealt out one by one, each to the earliest of the workers that have
       fewest and are below their limit.
    """
    shares = [1] * len(limits)
    left = cores - len(limits)
    while left > 0:
        open_ = [i for i, limit in enumerate(limits) if limit is None or shares[i] < limit]
        if not open_:
            break
        fewest = min(shares[i] for i in open_)
        shares[next(i for i in open_ if shares[i] == fewest)] += 1
        left -= 1
    return shares


class _OneCore:
    """Something that keeps a core busy and cannot change that."""

    max_threads = 1

    def use_threads(self, threads: int) -> None:
        pass


class ThreadAllocator:
    """The shares of the workers of one backend. Each `join` needs its `leave`."""

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._lock = threading.Lock()
        self._uses: dict[Member, int] = {}
        # Idle workers included: their last assignment still holds.
        self._assigned: weakref.WeakKeyDictionary[Member, int] = weakref.WeakKeyDictionary()

    def join(self, member: Member) -> None:
        """Count one more request that a worker computes."""
        with self._lock:
            self._uses[member] = self._uses.get(member, 0) + 1
            if self._uses[member] == 1:
                self._divide()

    def leave(self, member: Member) -> None:
        """Count one request less."""
        with self._lock:
            self._uses[member] -= 1
            if self._uses[member] == 0:
                del self._uses[member]
                self._divide()

    @contextmanager
    def one_core(self) -> Iterator[None]:
        """Keep one core free of workers inside the `with` block."""
        core = _OneCore()
        self.join(core)
        try:
            yield
        finally:
            self.leave(core)

    def _divide(self) -> None:
        shares = divide_cores(self._cores, [member.max_threads for member in self._uses])
        # Decreases first: for a moment there are too few threads, not too many.
        by_change = sorted(
            zip(self._uses, shares, strict=True),
            key=lambda pair: pair[1] - self._assigned.get(pair[0], 0),
        )
        for member, threads in by_change:
            if self._assigned.get(member) != threads:
                self._assigned[member] = threads
                member.use_threads(threads)
