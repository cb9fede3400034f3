"""Who may write a file: locks that the system releases when their holder dies.

A lock lies beside its file, as `NAME.lock`. Threads of one process exclude one another, too.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orion_oie.cancellation import CancelScope
from orion_oie.errors import DownloadError

_POLL_S = 0.05


def lock_path(path: Path) -> Path:
    """Where the lock of a file lies."""
    return path.with_name(path.name + ".lock")


@contextlib.contextmanager
def locked(path: Path, scope: CancelScope, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a file; whoever waits for it can be cancelled."""
    while (lock := try_lock(path)) is None:
        on_wait()
        scope.check()
        time.sleep(_POLL_S)
    with lock:
        yield


def try_lock(path: Path) -> Any:
    """The open lock of a file; None when somebody else holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = lock_path(path).open("w")
    except FileNotFoundError:  # somebody removed the folder just now
        return None
    except OSError as error:
        raise DownloadError(
            f"{path.parent} cannot be written to ({error.strerror}): choose another cache_dir",
            path=str(path),
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever removed the file meanwhile left us the lock of nothing.
        if os.fstat(file.fileno()).st_nlink > 0:
            return file
    except BlockingIOError:
        pass
    file.close()
    return None
