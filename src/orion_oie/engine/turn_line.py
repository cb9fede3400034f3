"""One at a time, in the order of arrival: the line in front of a chat.

A place is a future that is done when its turn has come: a thread waits with `result()`, a coroutine
with `until_done`. It knows nothing of what is done in a turn.
"""

import threading
from collections import deque
from concurrent.futures import Future

Place = Future[None]


class TurnLine:
    """Lets one in at a time. Thread-safe. Whoever enters must leave, also when it waited in vain;
    a place may be left by any thread, and more than once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: deque[Place] = deque()

    def enter(self) -> Place:
        """A place at the end of the line."""
        place = Place()
        with self._lock:
            self._places.append(place)
            is_first = len(self._places) == 1
        if is_first:
            place.set_result(None)
        return place

    def enter_if_free(self) -> Place | None:
        """The first place; None if there is somebody."""
        with self._lock:
            if self._places:
                return None
            place = Place()
            self._places.append(place)
        place.set_result(None)
        return place

    def leave(self, place: Place) -> None:
        """Give up a place; the next one's turn comes if it was the first."""
        with self._lock:
            if place not in self._places:
                return
            was_first = self._places[0] is place
            self._places.remove(place)
            following = self._places[0] if was_first and self._places else None
        if following is not None:
            following.set_result(None)
