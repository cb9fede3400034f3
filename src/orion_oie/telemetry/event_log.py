"""The log of one engine's events: it keeps them, logs them and hands them to subscribers.

Prints nothing: events go to the standard library's logger "orion_oie", which is silent until the
application configures logging. A line of it is the event's name and its short facts; the record has
all fields as `orion` and the name as `event_name`. Which events there are is in `events.py`.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from orion_oie.telemetry.events import Event, redacted

Subscriber = Callable[[Event], None]

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_logger = logging.getLogger("orion_oie")
_logger.addHandler(logging.NullHandler())


class EventLog:
    """Takes events from all threads; keeps the last `capacity` of them."""

    def __init__(self, capacity: int, *, log_content: bool = False) -> None:
        # structlog imports rich when it is installed: a tenth of a second that a mere
        # `import orion_oie` should not cost.
        import structlog

        self._recent: deque[Event] = deque(maxlen=capacity)
        self._subscribers: tuple[tuple[object, Subscriber], ...] = ()
        self._lock = threading.Lock()
        self._log_content = log_content
        self._structured = structlog.wrap_logger(
            _logger,
            processors=[structlog.stdlib.render_to_log_kwargs],
            wrapper_class=structlog.stdlib.BoundLogger,
            cache_logger_on_first_use=True,
        )

    def publish(self, event: Event) -> None:
        """Log an event and hand it to every subscriber, on this thread, with no lock held."""
        if not self._log_content:
            event = redacted(event)
        self._recent.append(event)  # atomic, like reading the tuple of subscribers
        # Several events belong to each request: their fields are gathered only for a reader.
        if _logger.isEnabledFor(_LEVELS[event.level]):
            self._write(event)
        for _key, subscriber in self._subscribers:
            try:
                subscriber(event)
            except Exception:
                _logger.exception("a subscriber failed on %s", event.name)

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call `subscriber` for every event from now on; returns the undo."""
        key = object()  # one callback may be subscribed twice
        with self._lock:
            self._subscribers = (*self._subscribers, (key, subscriber))

        def unsubscribe() -> None:
            with self._lock:
                self._subscribers = tuple(one for one in self._subscribers if one[0] is not key)

        return unsubscribe

    def export(self) -> list[dict[str, Any]]:
        """The recent events, oldest first, as JSON-compatible dictionaries."""
        with self._lock:
            events = list(self._recent)
        return [
            {"event": e.name, "at": e.at, "request_id": e.request_id, **e.fields} for e in events
        ]

    def _write(self, event: Event) -> None:
        bound = self._structured
        if event.request_id is not None:
            bound = bound.bind(request_id=event.request_id)
        getattr(bound, event.level)(event.in_one_line(), event_name=event.name, orion=event.fields)
