"""Texts that wait for their vectors, with the calls that wait for them, and their batches.

Bookkeeping only: it computes nothing, waits for nothing and takes no lock; its owner does. A text
is computed once, however many calls want it. Calls take turns: a call with many texts delays one
with few by about one batch.
"""

import heapq
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orion_oie.errors import InvalidRequestError

if TYPE_CHECKING:
    from orion_oie.embeddings.vectors import Row

# A running batch delays the calls that come after it, and even its own cancelled calls.
BATCH_CHARACTERS = 8192


@dataclass(eq=False, slots=True)
class Call:
    """One call of `embed`. `waits_for` maps each missing text to its first index in the list;
    `vectors` are the vectors so far, by key. `refusal` is the error about a text that cannot be
    embedded, and its index."""

    waits_for: "dict[PendingText, int]" = field(default_factory=dict)
    vectors: "dict[bytes, Row]" = field(default_factory=dict)
    alone: "list[PendingText]" = field(default_factory=list)
    refusal: tuple[InvalidRequestError, int] | None = None


@dataclass(eq=False, slots=True)
class PendingText:
    """One text that is not computed yet. `turn` orders the waiting ones. After a failure of unknown
    cause it `is_alone`: each of its calls computes it in a batch of its own texts, so that no other
    call fails."""

    key: bytes
    text: str
    turn: tuple[int, int]
    callers: set[Call] = field(default_factory=set)
    is_running: bool = False
    is_alone: bool = False


class PendingTexts:
    """All texts that are not computed yet, in batches of at most `max_batch` texts and
    `BATCH_CHARACTERS` (a single text may be longer)."""

    def __init__(self, max_batch: int) -> None:
        self._max_batch = max_batch
        self._by_key: dict[bytes, PendingText] = {}
        self._waiting: list[
            tuple[tuple[int, int], PendingText]
        ] = []  # a heap, stale entries included
        self._order = itertools.count()
        self._taken = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def join(self, call: Call, key: bytes, text: str, index: int) -> bool:
        """Let a call wait for a text of its list; True if no other call waits for it."""
        pending = self._by_key.get(key)
        is_new = pending is None
        if pending is None:
            round_ = self._taken + len(call.waits_for) // self._max_batch
            pending = self._by_key[key] = PendingText(key, text, (round_, next(self._order)))
            self._put(pending)
        if call not in pending.callers:
            pending.callers.add(call)
            call.waits_for[pending] = index
            if pending.is_alone:
                call.alone.append(pending)
        return is_new

    def take(self, call: Call) -> list[PendingText]:
        """Start the next batch for a waiting call: the texts of all calls, or the call's own ones
        that must be alone. No batch may be running."""
        call.alone = [pending for pending in call.alone if pending in call.waits_for]
        batch: list[PendingText] = []
        characters = 0
        for pending in list(call.alone) or self._next_waiting():
            characters += len(pending.text)
            if batch and (len(batch) == self._max_batch or characters > BATCH_CHARACTERS):
                if not pending.is_alone:
                    self._put(pending)
                break
            pending.is_running = True
            batch.append(pending)
        self._taken += 1
        return batch

    def _next_waiting(self) -> Iterable[PendingText]:
        while self._waiting:
            pending = heapq.heappop(self._waiting)[1]
            if pending.callers:
                yield pending

    def _put(self, pending: PendingText) -> None:
        heapq.heappush(self._waiting, (pending.turn, pending))

    def resolve(self, pending: PendingText, vector: "Row") -> None:
        """Give the vector to all calls that wait for it."""
        for call in self._end(pending):
            del call.waits_for[pending]
            call.vectors[pending.key] = vector

    def refuse(self, pending: PendingText, error: InvalidRequestError) -> None:
        """Give the error about a text to all calls that wait for it."""
        for call in self._end(pending):
            call.refusal = (error, call.waits_for.pop(pending))

    def _end(self, pending: PendingText) -> set[Call]:
        pending.is_running = False
        del self._by_key[pending.key]
        return pending.callers

    def put_back(self, batch: Iterable[PendingText]) -> None:
        """Return the texts of an unfinished batch to their old places in the queue."""
        for pending in batch:
            if pending.callers:
                pending.is_running = False
                if not pending.is_alone:
                    self._put(pending)
            else:
                self._end(pending)

    def set_apart(self, batch: Iterable[PendingText]) -> None:
        """Let each call compute its texts of a failed batch by itself from now on."""
        batch = list(batch)
        for pending in batch:
            if not pending.is_alone:
                pending.is_alone = True
                for call in pending.callers:
                    call.alone.append(pending)
        self.put_back(batch)

    def leave(self, call: Call) -> None:
        """Remove a call. Texts that no other call waits for are dropped, unless they are being
        computed."""
        for pending in call.waits_for:
            pending.callers.discard(call)
            if not pending.callers and not pending.is_running:
                self._end(pending)
        call.waits_for.clear()
