"""The end of several models: side by side, and of each whatever happens to the others."""

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack

from orion_oie.backends.base import LocalModel
from orion_oie.telemetry.callbacks import call_safely

CLOSE_S = 10.0
_LATE_S = 10.0  # beyond its time, for a model that has to be ended by force


def close_all(models: Sequence[LocalModel], timeout_s: float = CLOSE_S) -> None:
    """Close models, all within `timeout_s` together; takes as long as the slowest of them.

    What a `close` raises is logged. An interrupt is raised when each has been closed. If the system
    gives no threads, they are closed one by one, in the same time.
    """
    ends_at = time.monotonic() + timeout_s

    def left_s() -> float:
        return max(0.0, ends_at - time.monotonic())

    def close(model: LocalModel) -> None:
        call_safely(model.close, left_s())

    threads = []
    with ExitStack() as here:
        for model in models[:1]:
            here.callback(close, model)
        for model in models[1:]:
            thread = threading.Thread(target=close, args=(model,), name="orion-close", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system gives no more
                here.callback(close, model)
            else:
                threads.append(thread)
    for thread in threads:
        thread.join(left_s() + _LATE_S)
