"""Calls of code that belongs to others, from threads that must go on whatever it does."""

import contextlib
import logging
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


def call_safely(callback: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> bool:
    """Call `callback`, and log what it raises, even `SystemExit`: only the main thread may end the
    program. Returns False if it raised."""
    try:
        callback(*args, **kwargs)
    except BaseException:
        # A handler of the log is code of the application as well.
        with contextlib.suppress(BaseException):
            logging.getLogger("orion_oie").exception("a callback failed")
        return False
    return True
