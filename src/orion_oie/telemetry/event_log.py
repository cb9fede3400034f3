"""The log of one engine's events: it keeps them, logs them and hands them to subscribers.

Prints nothing: events go to the standard library's logger "orion_oie", which is silent until the
application configures logging. A line of it is the event's name and its short facts; the record has
all fields as `orion` and the name as `event_name`. Which events there are is in `events.py`.

Whoever publishes neither waits nor fails: subscribers and the logging run on threads of their own.
"""

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from orion_oie.callbacks import host_log
from orion_oie.callbacks.delivery import Delivery, flush_all
from orion_oie.errors import message_of
from orion_oie.telemetry.events import CallbackFailed, CallbackKind, Event, redacted

Subscriber = Callable[[Event], None]

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_UNSUBSCRIBE_S = 1.0


class EventLog:
    """Takes events from all threads; keeps the last `capacity` of them."""

    def __init__(self, capacity: int, *, log_content: bool = False) -> None:
        # structlog imports rich when it is installed: a tenth of a second that a mere
        # `import orion_oie` should not cost.
        import structlog

        self._recent: deque[Event] = deque(maxlen=capacity)
        self._subscriptions: tuple[Delivery[Event], ...] = ()
        self._lock = threading.RLock()
        self._log_content = log_content
        self._failures = self._lost_before = 0
        self._has_logging_failed = False
        self._structured = structlog.wrap_logger(
            host_log.logger,
            processors=[structlog.stdlib.render_to_log_kwargs],
            wrapper_class=structlog.stdlib.BoundLogger,
            cache_logger_on_first_use=True,
        )

    def publish(self, event: Event) -> None:
        """Keep an event, and have it logged and handed to every subscriber soon, in order. Returns
        at once and never raises."""
        if not self._log_content:
            event = redacted(event)
        self._recent.append(event)  # atomic, like reading the tuple of subscriptions
        # Several events belong to each request: their fields are gathered only for a reader.
        if host_log.is_enabled_for(_LEVELS[event.level]):
            host_log.post(partial(self._write, event), self._note_logging_failure)
        for subscription in self._subscriptions:
            subscription.put(event)

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call `subscriber` for every event from now on, one at a time and in order, on a thread
        that nothing waits for. Returns the undo: it lets the events of before come through, for a
        second at most, and after it no call begins."""
        has_failed = False

        def note_failure(error: BaseException) -> None:
            nonlocal has_failed
            is_first, has_failed = not has_failed, True
            self.note_failure("subscriber", subscriber, error, is_reported=is_first)

        subscription = Delivery(subscriber, note_failure)
        with self._lock:
            self._subscriptions = (*self._subscriptions, subscription)

        def unsubscribe() -> None:
            with self._lock:
                if subscription not in self._subscriptions:
                    return
                kept = tuple(one for one in self._subscriptions if one is not subscription)
                self._subscriptions = kept
                self._lost_before += subscription.lost
            subscription.flush(_UNSUBSCRIBE_S)
            subscription.stop()

        return unsubscribe

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything published so far was logged and handed over, for `timeout_s`
        seconds at most; False if it was not. A subscriber that calls this does not wait for
        itself."""
        ends_at = time.monotonic() + timeout_s
        is_through = flush_all(self._subscriptions, timeout_s)
        return host_log.flush(max(0.0, ends_at - time.monotonic())) and is_through

    def export(self) -> list[dict[str, Any]]:
        """The recent events, oldest first, as JSON-compatible dictionaries."""
        with self._lock:
            events = list(self._recent)
        return [
            {"event": e.name, "at": e.at, "request_id": e.request_id, **e.fields} for e in events
        ]

    # -- what code of the application raised

    @property
    def failures(self) -> int:
        """The number of calls to code of the application that raised."""
        return self._failures

    @property
    def lost(self) -> int:
        """The number of events that subscribers were too slow for."""
        return self._lost_before + sum(one.lost for one in self._subscriptions)

    def note_failure(
        self,
        kind: CallbackKind,
        callback: object,
        error: BaseException,
        *,
        request_id: str | None = None,
        is_reported: bool = True,
    ) -> None:
        """Count what a callback raised, and publish it; without `is_reported` it is counted only,
        because the same callback failed before."""
        if is_reported:
            self.publish(
                CallbackFailed(
                    request_id=request_id,
                    kind=kind,
                    callback=_name(callback),
                    error=type(error).__name__,
                    where=_where(error),
                    text=message_of(error),
                )
            )
        with self._lock:
            self._failures += 1  # whoever sees it finds the event

    def _note_logging_failure(self, error: BaseException) -> None:
        is_first, self._has_logging_failed = not self._has_logging_failed, True
        self.note_failure("logging", host_log.logger, error, is_reported=is_first)

    def _write(self, event: Event) -> None:
        bound = self._structured
        if event.request_id is not None:
            bound = bound.bind(request_id=event.request_id)
        getattr(bound, event.level)(event.in_one_line(), event_name=event.name, orion=event.fields)


def _name(callback: object) -> str:
    name = getattr(callback, "__qualname__", None)
    return name if isinstance(name, str) else type(callback).__name__


def _where(error: BaseException) -> str:
    """The innermost line of the traceback: a file, a line and a function."""
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
