"""The process of a worker: its interpreter, its socket, its environment, its output.

A spare worker may be started ahead: it imports its modules and waits. Needs POSIX: the child
inherits the socket as an open descriptor, so that it has no address. The client exchanges the
messages.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from typing import Any, BinaryIO

from orion_oie.errors import WorkerError

_OUTPUT_BYTES_SHOWN = 2000
_MAX_START_S = 5.0

WorkerProcess = tuple["subprocess.Popen[bytes]", "Connection[Any, Any]", BinaryIO]


def start_worker() -> WorkerProcess:
    """Start a worker; returns the process, the connection to it, and the file that collects its
    output. Raises `WorkerError` when it cannot be started."""
    if os.name != "posix":
        raise WorkerError("workers need a POSIX system; on Windows use WSL")
    if not sys.executable:
        raise WorkerError("sys.executable is empty: no interpreter to start a worker with")
    try:
        return _spawn()
    except OSError as error:
        raise WorkerError(f"no worker can be started: {error}") from error


def _spawn() -> WorkerProcess:
    ours, theirs = socket.socketpair()
    output = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the worker has ended)
    # -P and an explicit path: the worker imports the same modules as this process, not files of the
    # working directory. A session of its own: Ctrl-C reaches the host only.
    command = [sys.executable, "-P", "-X", "faulthandler"]
    command += ["-m", "orion_oie.backends.llama.worker.main", str(theirs.fileno())]
    process = subprocess.Popen(
        command,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        env=environment(),
    )
    theirs.close()
    return process, Connection(ours.detach()), output


class SpareWorker:
    """At most one worker that is started before it is needed, while `has_spare_memory()`. Its
    imports keep a core busy; they happen inside `starting()`."""

    def __init__(
        self,
        has_spare_memory: Callable[[], bool] | None,
        starting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._has_spare_memory = has_spare_memory
        self._starting = starting
        self._lock = threading.Lock()
        self._spare: tuple[WorkerProcess, dict[str, str]] | None = None
        self._is_over = False
        # Free once it is over. No event: that has a lock, and `kill` may come from a destructor.
        self._over = threading.Lock()
        self._over.acquire()

    def take(self) -> WorkerProcess:
        """The spare worker if there is one, else a new one. Raises `WorkerError`."""
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is not None:
            worker, inherited = spare
            # Its environment may be out of date.
            if worker[0].poll() is None and inherited == environment():
                return worker
            _end(worker)
        return start_worker()

    def refill(self, delay_s: float = 0.0) -> None:
        """Start a spare worker after a delay, on a thread of its own, unless there is one or memory
        is short."""
        check = self._has_spare_memory
        if check is not None and self._spare is None and not self._is_over:
            threading.Thread(
                target=self._start, args=(delay_s, check), name="orion-spare", daemon=True
            ).start()

    def _start(self, delay_s: float, has_spare_memory: Callable[[], bool]) -> None:
        if self._over.acquire(timeout=delay_s):
            self._over.release()  # for the others that wait
            return
        if not has_spare_memory():
            return
        with self._starting():
            with self._lock:
                if self._spare is None and not self._is_over:
                    with contextlib.suppress(WorkerError):  # the next `take` raises it
                        self._spare = start_worker(), environment()
                spare = self._spare
            if spare is not None:
                with contextlib.suppress(OSError, ValueError):  # it was ended meanwhile
                    spare[0][1].poll(_MAX_START_S)  # until its hello arrives; nothing is read
        if self._is_over:  # meanwhile
            self.kill()

    @property
    def is_over(self) -> bool:
        """True after `kill`."""
        return self._is_over

    def kill(self) -> None:
        """End the spare worker, for good. Takes no lock, so it may be called from anywhere."""
        self._is_over = True
        with contextlib.suppress(RuntimeError):  # it is free already
            self._over.release()
        spare, self._spare = self._spare, None
        if spare is not None:
            _end(spare[0])


def _end(worker: WorkerProcess) -> None:
    process, connection, output = worker
    process.kill()
    process.wait()
    connection.close()
    output.close()


def environment() -> dict[str, str]:
    """The environment in which a child imports the same modules as this process, and llama.cpp
    prints no backtraces."""
    paths = [path or os.getcwd() for path in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GGML_NO_BACKTRACE": "1"}


def beginning_of(output: BinaryIO) -> str:
    """The beginning of a worker's output, which names an assertion or a signal."""
    output.seek(0)
    return output.read(_OUTPUT_BYTES_SHOWN).decode("utf-8", "replace").strip()
