"""The host cache: states of sequences that were offloaded from the KV cache to host memory.

Every cell in the KV cache slows every step down, also the cells of idle conversations. An offloaded
state costs nothing until it is wanted, and restoring it takes a thousandth of the time of computing
it again. The cache is bounded in bytes; it evicts the least recently used state first, and the
prefixes of agents last. Nothing native happens in this module.
"""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

PREFIX_PART = 1 / 4
_ALIGNMENT = 64


@dataclass(eq=False)
class OffloadedState:
    """The state of a sequence after `tokens`. A prefix is the beginning that the requests of an
    agent share; a preempted state belongs to a task that will go on. See `Slot` for
    `inexact_tokens`."""

    tokens: list[int]
    data: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    session_id: str | None = None
    is_prefix: bool = False
    is_preempted: bool = False
    inexact_tokens: int = 0
    last_used: int = 0


class Arena:
    """Buffers from one block of memory. Pages that were touched once are used again: fresh pages
    from the system cost ten times as much as writing to them."""

    def __init__(self, size: int) -> None:
        memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(memory, np.uint8, size)
        self._taken: dict[int, int] = {}  # the end of each buffer, by its beginning

    @property
    def free_bytes(self) -> int:
        """The bytes that no buffer takes, in all gaps together."""
        return len(self._bytes) - sum(end - start for start, end in self._taken.items())

    def allocate(self, size: int) -> NDArray[np.uint8] | None:
        """A buffer in the first gap that is large enough; None when there is none."""
        start = 0
        for begin in [*sorted(self._taken), len(self._bytes)]:
            if begin - start >= size:
                end = min(start + -(-size // _ALIGNMENT) * _ALIGNMENT, begin)
                self._taken[start] = end
                return self._bytes[start : start + size]
            start = self._taken.get(begin, begin)
        return None

    def compact(self, buffers: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """Move all buffers to the beginning, so that the free bytes are one gap. `buffers` must be
        all that are allocated; the moved ones are returned in the same order."""
        moved = list(buffers)
        self._taken.clear()
        for index in sorted(range(len(buffers)), key=lambda i: buffers[i].ctypes.data):
            target = self.allocate(buffers[index].nbytes)
            if target is None:
                raise ValueError("the buffers are larger than the arena: they are not all from it")
            target[:] = buffers[index]
            moved[index] = target
        return moved

    def free(self, buffer: NDArray[np.uint8]) -> None:
        """Take a buffer back."""
        del self._taken[buffer.ctypes.data - self._bytes.ctypes.data]


class HostCache:
    """Keeps offloaded states, up to `limit_bytes` in all."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._arena = Arena(-(-limit_bytes // _ALIGNMENT) * _ALIGNMENT)
        self._states: list[OffloadedState] = []
        self._uses = 0

    def __iter__(self) -> Iterator[OffloadedState]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def allocate(self, size: int, *, is_preempted: bool = False) -> NDArray[np.uint8] | None:
        """A buffer of `size` bytes for a state; other states are evicted for it. None when it is
        too large, or would evict the state of a preempted task."""
        pinned = sum(s.data.nbytes for s in self._states if s.is_preempted and not is_preempted)
        if size > self.limit_bytes - pinned:
            return None
        while (buffer := self._arena.allocate(size)) is None:
            if size <= self._arena.free_bytes:
                self._compact()
                continue
            victim = self._victim()
            if victim.is_preempted and not is_preempted:
                return None
            self._drop(victim)
        return buffer

    def add(self, state: OffloadedState) -> None:
        """Keep a state whose data is in a buffer from `allocate`."""
        self._states.append(state)
        self.used_bytes += state.data.nbytes
        self.touch(state)

    @contextmanager
    def pinned(self, state: OffloadedState) -> Iterator[None]:
        """Protect a state from eviction by other states."""
        was_preempted, state.is_preempted = state.is_preempted, True
        try:
            yield
        finally:
            state.is_preempted = was_preempted

    def touch(self, state: OffloadedState) -> None:
        """Note that a state was used."""
        self._uses += 1
        state.last_used = self._uses

    def remove(self, state: OffloadedState) -> None:
        """Drop a state that moved back to a slot."""
        self._drop(state)

    def drop_beginnings_of(self, tokens: Sequence[int]) -> None:
        """Drop the states that a longer state of the same conversation makes useless."""
        for state in [s for s in self._states if not (s.is_prefix or s.is_preempted)]:
            length = len(state.tokens)
            if length <= len(tokens) and state.tokens == tokens[:length]:
                self._drop(state)

    def has_prefix(self, tokens: Sequence[int]) -> bool:
        """True when exactly these tokens are kept as a prefix."""
        return any(state.is_prefix and state.tokens == tokens for state in self._states)

    def has_state(self, tokens: Sequence[int], *, or_longer: bool) -> bool:
        """True when the state after these tokens is kept, or one that continues it."""
        length = len(tokens) if or_longer else None
        return any(state.tokens[:length] == tokens for state in self._states)

    def _compact(self) -> None:
        moved = self._arena.compact([state.data for state in self._states])
        for state, data in zip(self._states, moved, strict=True):
            state.data = data

    def _victim(self) -> OffloadedState:
        """The state to evict next."""
        # Prefixes are preferred up to a part of the cache: prompts that nobody repeats must not
        # evict conversations.
        prefix_bytes = sum(state.data.nbytes for state in self._states if state.is_prefix)
        is_preferred = prefix_bytes <= PREFIX_PART * self.limit_bytes
        return min(
            self._states,
            key=lambda s: (s.is_preempted, s.is_prefix and is_preferred, s.last_used),
        )

    def _drop(self, state: OffloadedState) -> None:
        self._states.remove(state)
        self._arena.free(state.data)
        self.used_bytes -= state.data.nbytes
