"""States of sequences that left the KV cache: kept in the host's memory, ready to come back.

Every cell in the cache slows every step down, also those of conversations that are silent; a
saved state costs nothing until it is wanted, and coming back takes a thousandth of the time of
computing it again. Bounded in bytes; the longest unused goes first, prefixes of agents last.
Nothing native here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(eq=False)
class ParkedState:
    """The state behind `tokens`. A prefix is the beginning that an agent's requests share; a
    preempted one is of a task that will go on."""

    tokens: list[int]
    data: NDArray[np.uint8]
    session_id: str | None = None
    is_prefix: bool = False
    is_preempted: bool = False
    last_used: int = 0


class ParkingLot:
    """Keeps states up to `limit_bytes` in all."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._states: list[ParkedState] = []
        self._uses = 0

    def __iter__(self) -> Iterator[ParkedState]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def add(self, state: ParkedState) -> bool:
        """Keep a state, giving up others for it; False when it is too large, or would drive out
        that of a preempted task."""
        if state.data.nbytes > self.limit_bytes:
            return False
        while self.used_bytes + state.data.nbytes > self.limit_bytes:
            victim = self._most_dispensable()
            if victim.is_preempted and not state.is_preempted:
                return False
            self._drop(victim)
        self._states.append(state)
        self.used_bytes += state.data.nbytes
        self.touch(state)
        return True

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

    def _most_dispensable(self) -> ParkedState:
        # Prefixes are favoured up to half of the room: prompts that nobody repeats must not
        # drive out all conversations.
        prefix_bytes = sum(state.data.nbytes for state in self._states if state.is_prefix)
        is_favoured = prefix_bytes <= self.limit_bytes / 2
        return min(
            self._states,
            key=lambda s: (s.is_preempted, s.is_prefix and is_favoured, s.last_used),
        )

    def _drop(self, state: ParkedState) -> None:
        self._states.remove(state)
        self.used_bytes -= state.data.nbytes
