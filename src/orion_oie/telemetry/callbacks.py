"""Calls of code that belongs to others, by code that must go on whatever they do."""

import logging
import threading
from collections.abc import Callable
from typing import ParamSpec

from orion_oie.callbacks import host_log

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
        host_log.log(logging.ERROR, "a callback failed", error=error)
        return False
    return True
