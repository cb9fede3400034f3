"""Locks of files, held by the process that fetches them.

A lock lies beside its file, as `NAME.lock`. It excludes other processes and the other threads of
this one, and the system releases it when its holder dies.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from orion_oie.cancellation import CancelScope
from orion_oie.errors import DownloadError

_POLL_S = 0.05


def lock_path(path: Path) -> Path:
    """The path of a file's lock."""
    return path.with_name(path.name + ".lock")


@contextlib.contextmanager
def locked(path: Path, scope: CancelScope, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a file. While another holds it, wait until `scope` is cancelled; `on_wait`
    is called at every look."""
    while (lock := try_lock(path)) is None:
        on_wait()
        scope.check()
        time.sleep(_POLL_S)
    with lock:
        yield


def try_lock(path: Path) -> AbstractContextManager[object] | None:
    """Take the lock of a file, or return None while another holds it. Leaving the context gives it
    back; any thread may do so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(lock_path(path), thread_local=False).acquire(blocking=False)
    except (Timeout, FileNotFoundError):  # the latter: the folder was removed just now
        return None
    except OSError as error:
        raise DownloadError(
            f"{path.parent} cannot be written to ({error.strerror}): choose another cache_dir",
            path=str(path),
        ) from error
