"""One at a time, in the order of arrival: the line in front of a chat.

A place is a future that is done when its turn has come: a thread waits with `result()`, a coroutine
with `until_done`. It knows nothing of what is done in a turn.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import InvalidStateError

from orion_oie.threads import Future, unbroken

Place = Future[None]


class TurnLine:
    """Lets one in at a time. Thread-safe. Whoever enters must leave, also when it waited in vain;
    a place may be left by any thread, and more than once: also by one that was interrupted while it
    entered or left."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may call the library, anywhere
        self._places: deque[Place] = deque()

    @contextlib.contextmanager
    def place(self) -> Iterator[Place]:
        """A place at the end of the line, which is left behind the block."""
        place = Place()
        try:
            self.enter(place)
            yield place
        finally:
            try:
                self.leave(place)
            except BaseException:  # an interrupt: nobody else could leave it
                self.leave(place)
                raise

    @contextlib.contextmanager
    def place_if_free(self) -> Iterator[Place | None]:
        """`place` in an empty line; None if there is somebody."""
        place = Place()
        try:
            yield place if self._enter_if_free(place) else None
        finally:
            try:
                self.leave(place)
            except BaseException:  # an interrupt: nobody else could leave it
                self.leave(place)
                raise

    def enter(self, place: Place) -> None:
        """Put a new place at the end of the line."""
        with self._lock:
            self._places.append(place)
            if self._places[0] is place:
                place.set_result(None)

    def leave(self, place: Place) -> None:
        """Give up a place; the next one's turn comes if it was the first."""
        with self._lock:
            if place in self._places:
                self._places.remove(place)
            first = self._places[0] if self._places else None
            if first is not None and not first.done():
                unbroken(lambda: _let_in(first), "orion-turn").result()

    def _enter_if_free(self, place: Place) -> bool:
        with self._lock:
            if self._places:
                return False
            self.enter(place)
            return True


def _let_in(place: Place) -> None:
    with contextlib.suppress(InvalidStateError):  # an interrupted `leave` has begun it
        place.set_result(None)
