"""Calls of code that belongs to others, by code that must go on whatever they do."""

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


def call_safely(callback: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> bool:
    """Call `callback`, and log what it raises. Returns False if it raised.

    An interrupt of the program, which reaches the main thread alone, passes through. What looks
    like one on another thread is logged.
    """
    try:
        callback(*args, **kwargs)
    except BaseException as error:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and not isinstance(error, Exception):
            raise
        # A handler of the log is code of the application as well.
        with contextlib.suppress(BaseException):
            logging.getLogger("orion_oie").exception("a callback failed")
        return False
    return True
