"""The book of an engine's requests: those that have not ended, and the numbers of those that have.

Each request is received once and ends once, in one step that no signal divides: so the numbers add
up whatever interrupts a caller. It knows nothing of what a request is.
"""

import math
import time
from typing import Generic, Literal, TypeVar

from orion_oie.errors import EngineClosedError
from orion_oie.threads import Condition

Outcome = Literal["succeeded", "failed", "cancelled"]
R = TypeVar("R")


class RequestBook(Generic[R]):
    """Requests of type R by identity. Thread-safe."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._live: dict[R, None] = {}
        self._received = 0
        self._ended: dict[str, int] = {"succeeded": 0, "failed": 0, "cancelled": 0}
        self._is_closed = False
        self._drains_until = math.inf

    def live(self) -> list[R]:
        """The requests that have not ended."""
        with self._changed:
            return list(self._live)

    def counts(self) -> dict[str, int]:
        """The fields of `RequestCounts` that it knows."""
        with self._changed:
            return {"received": self._received, **self._ended}

    # Below, no call stands between the two assignments: handlers of signals run after calls.

    def add(self, request: R) -> None:
        """Receive a request. Raises `EngineClosedError` after `close`."""
        with self._changed:
            if self._is_closed:
                raise EngineClosedError("the engine was shut down; make a new one")
            self._live[request] = None
            self._received += 1

    def end(self, request: R, outcome: Outcome) -> bool:
        """Note that a request has ended; False if it is not in the book, or no more."""
        with self._changed:
            if request not in self._live:
                return False
            del self._live[request]
            self._ended[outcome] += 1
            if not self._live:
                self._changed.notify_all()
            return True

    # -- the end of all

    def close(self) -> None:
        """Take no more requests."""
        with self._changed:
            self._is_closed = True

    def hurry(self, timeout_s: float) -> None:
        """Have `drain` wait for `timeout_s` seconds from now at most. Takes no lock."""
        self._drains_until = min(self._drains_until, time.monotonic() + timeout_s)

    def drain(self) -> None:
        """Wait until no request is left, as long as `hurry` allows."""
        with self._changed:
            while self._live and (left_s := self._drains_until - time.monotonic()) > 0:
                self._changed.wait(min(left_s, _LOOK_AGAIN_S))

    def wait_for_none(self, timeout_s: float) -> None:
        """Wait until no request is left, for `timeout_s` seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._live, timeout_s)


_LOOK_AGAIN_S = 0.1  # `hurry` may be called by the handler of a signal, and wakes nobody
