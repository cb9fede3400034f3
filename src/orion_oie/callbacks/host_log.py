"""The application's logging, written to from a callback thread.

Handlers and filters are code of the application: they may block, raise, and call the library while
the logging machinery holds their locks. So nothing in the library logs by itself: what it has to
say goes through here.
"""

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from orion_oie.callbacks.delivery import Delivery

logger = logging.getLogger("orion_oie")
logger.addHandler(logging.NullHandler())

_Line = tuple[Callable[[], None], Callable[[BaseException], None]]


def post(write: Callable[[], None], on_error: Callable[[BaseException], None]) -> None:
    """Call `write`, which logs, in the order of these calls; `on_error` with what it raises."""
    _lines.put((write, on_error))


def log(level: int, message: str, *args: object, error: BaseException | None = None) -> None:
    """Log a line that belongs to no event, with the traceback of `error`. A handler that fails on
    it is passed over."""
    post(partial(logger.log, level, message, *args, exc_info=error), lambda _error: None)


def is_enabled_for(level: int) -> bool:
    """True unless nothing of this level is logged."""
    try:
        return logger.isEnabledFor(level)
    except Exception:  # noqa: BLE001 (a class of the application: writing will show it)
        return True


def flush(timeout_s: float) -> bool:
    """Wait until everything has been written, for `timeout_s` seconds at most; False if it has
    not."""
    return _lines.flush(timeout_s)


def _write(line: _Line) -> None:
    write, on_error = line
    try:
        write()
    except BaseException as error:  # noqa: BLE001 (code of the application)
        on_error(error)


def _lines_anew() -> "Delivery[Any]":
    return Delivery(_write, lambda _error: None)


_lines = _lines_anew()


def _begin_anew() -> None:
    global _lines
    _lines = _lines_anew()


if hasattr(os, "register_at_fork"):  # a fork may have a copy in the middle of a line
    os.register_at_fork(after_in_child=_begin_anew)
