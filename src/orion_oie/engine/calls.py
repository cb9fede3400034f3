"""Calls of one engine to code of the application that belongs to a request.

Done callbacks and `on_event` run on callback threads, while the request gives back its place and
its slot. What they raise is counted and published, and goes no further.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from orion_oie.callbacks import threads
from orion_oie.callbacks.line import CallbackLine
from orion_oie.errors import WorkerError
from orion_oie.telemetry.event_log import EventLog
from orion_oie.telemetry.events import CallbackKind
from orion_oie.threads import Future, wait_for_all

_DONE_CALLBACKS_S = 1.0


class Feed:
    """A reader of a stream on a callback thread. `ended` is done when it has got all text."""

    def __init__(self) -> None:
        self.ended: Future[None] = Future()
        self._thread: int | None = None

    @property
    def is_own(self) -> bool:
        """True on the thread of the feed itself, which must not wait for its end."""
        return self._thread == threading.get_ident()

    def run(self, read: Callable[[], None]) -> None:
        """Do the work of the feed, on this thread. `read` must not raise."""
        self._thread = threading.get_ident()
        try:
            read()
        finally:
            self._thread = None  # it does other work next
            self.ended.set_result(None)


class Calls:
    """Done callbacks and feeds of an engine, and the account of what they raised."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._line = CallbackLine()
        self._feeds: set[Feed] = set()

    def call(self, callback: Callable[..., Any], *args: Any, request_id: str) -> None:
        """Call a done callback soon; returns at once. None waits for another one."""
        self._line.put(partial(self._call, callback, args, request_id))

    def feed(self, read: Callable[[], None]) -> Feed:
        """Have a stream read on a thread of its own. Raises `WorkerError` if there is none."""
        feed = Feed()
        self._feeds.add(feed)
        feed.ended.add_done_callback(lambda _ended: self._feeds.discard(feed))
        try:
            threads.run(partial(feed.run, read))
        except WorkerError:
            self._feeds.discard(feed)
            raise
        return feed

    def note_failure(
        self, kind: CallbackKind, callback: object, error: BaseException, *, request_id: str
    ) -> None:
        """Count and publish what a callback raised."""
        self._events.note_failure(kind, callback, error, request_id=request_id)

    def wait(self, timeout_s: float) -> None:
        """Wait until feeds have delivered all text, for `timeout_s` seconds at most, and then a
        little for done callbacks. A callback that calls this does not wait for itself."""
        ends_at = time.monotonic() + timeout_s
        others = [feed.ended for feed in list(self._feeds) if not feed.is_own]
        wait_for_all(others, timeout_s)
        left_s = ends_at - time.monotonic()
        self._line.wait(min(max(left_s, 0.0), _DONE_CALLBACKS_S))

    def _call(self, callback: Callable[..., Any], args: tuple[Any, ...], request_id: str) -> None:
        try:
            callback(*args)
        except BaseException as error:  # noqa: BLE001 (code of the application)
            self.note_failure("done callback", callback, error, request_id=request_id)
