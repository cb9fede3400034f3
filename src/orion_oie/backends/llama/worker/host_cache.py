"""States of sequences that left the KV cache: kept in the host's memory, ready to come back.

Every cell in the cache slows every step down, also those of conversations that are silent; a
saved state costs nothing until it is wanted, and coming back takes a thousandth of the time of
computing it again. Bounded in bytes; the longest unused goes first, prefixes of agents last.
Nothing native here.
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
class ParkedState:
    """The state behind `tokens`. A prefix is the beginning that an agent's requests share; a
    preempted one is of a task that will go on. For `rough_tokens` see `Slot`."""

    tokens: list[int]
    data: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    session_id: str | None = None
    is_prefix: bool = False
    is_preempted: bool = False
    rough_tokens: int = 0
    last_used: int = 0


class Arena:
    """Buffers from one stretch of memory. Memory that was touched once is used again: to have the
    system hand out fresh pages takes ten times as long as to write to them."""

    def __init__(self, size: int) -> None:
        memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(memory, np.uint8, size)
        self._taken: dict[int, int] = {}  # the end of each buffer, by its beginning

    @property
    def free_bytes(self) -> int:
        """What no buffer takes, in all gaps."""
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

    def pack(self, buffers: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """Move all buffers to the beginning, so that what is free is one gap. `buffers` are all
        there are; the same with their contents come back, in the same order."""
        moved = list(buffers)
        self._taken.clear()
        for index in sorted(range(len(buffers)), key=lambda i: buffers[i].ctypes.data):
            place = self.allocate(buffers[index].nbytes)
            assert place is not None
            place[:] = buffers[index]
            moved[index] = place
        return moved

    def free(self, buffer: NDArray[np.uint8]) -> None:
        """Take a buffer back."""
        del self._taken[buffer.ctypes.data - self._bytes.ctypes.data]


class ParkingLot:
    """Keeps states up to `limit_bytes` in all."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._arena = Arena(-(-limit_bytes // _ALIGNMENT) * _ALIGNMENT)
        self._states: list[ParkedState] = []
        self._uses = 0

    def __iter__(self) -> Iterator[ParkedState]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def room_for(self, size: int, *, is_preempted: bool = False) -> NDArray[np.uint8] | None:
        """A buffer of `size` bytes for a state, for which others are given up; None when it is
        too large, or would drive out that of a preempted task."""
        pinned = sum(s.data.nbytes for s in self._states if s.is_preempted and not is_preempted)
        if size > self.limit_bytes - pinned:
            return None
        while (buffer := self._arena.allocate(size)) is None:
            if size <= self._arena.free_bytes:
                self._pack()
                continue
            victim = self._most_dispensable()
            if victim.is_preempted and not is_preempted:
                return None
            self._drop(victim)
        return buffer

    def add(self, state: ParkedState) -> None:
        """Keep a state whose data is in a buffer of `room_for`."""
        self._states.append(state)
        self.used_bytes += state.data.nbytes
        self.touch(state)

    @contextmanager
    def pinned(self, state: ParkedState) -> Iterator[None]:
        """Inside, no other state drives this one out."""
        was_preempted, state.is_preempted = state.is_preempted, True
        try:
            yield
        finally:
            state.is_preempted = was_preempted

    def touch(self, state: ParkedState) -> None:
        """Note that a state was used."""
        self._uses += 1
        state.last_used = self._uses

    def remove(self, state: ParkedState) -> None:
        """Give up a state that is back in a slot for good."""
        self._drop(state)

    def drop_beginnings_of(self, tokens: Sequence[int]) -> None:
        """Give up what a longer state of the same conversation makes useless."""
        for state in [s for s in self._states if not (s.is_prefix or s.is_preempted)]:
            length = len(state.tokens)
            if length <= len(tokens) and state.tokens == tokens[:length]:
                self._drop(state)

    def has_prefix(self, tokens: Sequence[int]) -> bool:
        """True when exactly these tokens are kept as a prefix."""
        return any(state.is_prefix and state.tokens == tokens for state in self._states)

    def has_state(self, tokens: Sequence[int], *, or_longer: bool) -> bool:
        """True when the state behind these tokens is kept, or one that goes on from there."""
        length = len(tokens) if or_longer else None
        return any(state.tokens[:length] == tokens for state in self._states)

    def _pack(self) -> None:
        moved = self._arena.pack([state.data for state in self._states])
        for state, data in zip(self._states, moved, strict=True):
            state.data = data

    def _most_dispensable(self) -> ParkedState:
        # Prefixes are favoured up to a part of the room: prompts that nobody repeats must not
        # drive out conversations.
        prefix_bytes = sum(state.data.nbytes for state in self._states if state.is_prefix)
        is_favoured = prefix_bytes <= PREFIX_PART * self.limit_bytes
        return min(
            self._states,
            key=lambda s: (s.is_preempted, s.is_prefix and is_favoured, s.last_used),
        )

    def _drop(self, state: ParkedState) -> None:
        self._states.remove(state)
        self._arena.free(state.data)
        self.used_bytes -= state.data.nbytes
