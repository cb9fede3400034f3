"""What happened, as events: dotted names with fields, logged, kept and handed to subscribers.

An event goes through one `EventLog` per engine. Texts of users and models are replaced by their
length unless `log_content` asks for them. Nothing is printed here: the events go to the standard
library's logger "orion_oie", which is silent until the application configures logging.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_CONTENT_FIELDS = frozenset({"query", "content", "text", "answer", "prompt", "system_prompt"})

logging.getLogger("orion_oie").addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. `at` is seconds since the epoch.

    Names: request.received, request.state, request.routed, request.succeeded, request.failed,
    request.cancelled, request.fallback, request.replayed, model.loading (a step of a load: the
    fields of `LoadProgress`), model.loaded, model.fetched, model.load_failed, model.log,
    pool.evicted, pool.unloaded, worker.crashed, breaker.changed, router.degraded (a stage of the
    router fails; told once, until it works again), engine.started, engine.closed.
    """

    name: str
    at: float
    fields: Mapping[str, Any] = field(default_factory=dict)
    request_id: str | None = None


Subscriber = Callable[[Event], None]


class EventLog:
    """Takes events from all threads; keeps the last `capacity` of them."""

    def __init__(self, capacity: int, *, log_content: bool = False) -> None:
        # structlog imports rich when it is installed: a tenth of a second that a mere
        # `import orion_oie` should not cost.
        import structlog

        self._recent: deque[Event] = deque(maxlen=capacity)
        self._subscribers: dict[int, Subscriber] = {}
        self._next_key = 0
        self._lock = threading.Lock()
        self._log_content = log_content
        self._logger = structlog.wrap_logger(
            logging.getLogger("orion_oie"),
            processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
            wrapper_class=structlog.stdlib.BoundLogger,
            cache_logger_on_first_use=True,
        )

    def publish(
        self, event_name: str, /, request_id: str | None = None, level: str = "info", **fields: Any
    ) -> None:
        """Log an event and hand it to every subscriber, on this thread, with no lock held."""
        shown = fields if self._log_content else redacted(fields)
        event = Event(event_name, time.time(), shown, request_id)
        with self._lock:
            self._recent.append(event)
            subscribers = list(self._subscribers.values())
        bound = self._logger if request_id is None else self._logger.bind(request_id=request_id)
        getattr(bound, level)(event_name, orion=dict(shown))
        for subscriber in subscribers:
            try:
                subscriber(event)
            except Exception:
                logging.getLogger("orion_oie").exception("a subscriber failed on %s", event_name)

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call `subscriber` for every event from now on; returns the undo."""
        with self._lock:
            key = self._next_key
            self._next_key += 1
            self._subscribers[key] = subscriber

        def unsubscribe() -> None:
            with self._lock:
                self._subscribers.pop(key, None)

        return unsubscribe

    def export(self) -> list[dict[str, Any]]:
        """The recent events, oldest first, as JSON-compatible dictionaries."""
        with self._lock:
            events = list(self._recent)
        return [
            {"event": e.name, "at": e.at, "request_id": e.request_id, **e.fields} for e in events
        ]


def redacted(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with every text of a user or a model replaced by its length."""
    return {
        name: f"<{len(value)} characters>"
        if name in _CONTENT_FIELDS and isinstance(value, str)
        else value
        for name, value in fields.items()
    }
