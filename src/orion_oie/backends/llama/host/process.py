"""Starts the process of a worker: its interpreter, its socket, its environment, its output.

A spare one may be started ahead: it imports what it needs and waits. Needs POSIX: the socket is
handed to the child as an open descriptor, so that no address of it exists anywhere. What is said
over it is the client's business.
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
_MOST_TO_START_S = 5.0

WorkerProcess = tuple["subprocess.Popen[bytes]", "Connection[Any, Any]", BinaryIO]


def start_worker() -> WorkerProcess:
    """Start a worker; returns the process, the connection to it, and the file that collects what
    it prints. Raises `WorkerError` when it cannot be started."""
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
    output = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the worker is buried)
    # -P and an explicit path: the worker imports what this process would, not what happens to
    # lie in the working directory. A session of its own: Ctrl-C is the host's alone.
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
    """At most one worker that is started before anybody needs it, while `is_calm()`. Within
    `starting()` it imports what it needs, which keeps a core busy."""

    def __init__(
        self,
        is_calm: Callable[[], bool] | None,
        starting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._is_calm = is_calm
        self._starting = starting
        self._lock = threading.Lock()
        self._spare: tuple[WorkerProcess, dict[str, str]] | None = None
        self._is_over = threading.Event()

    def take(self) -> WorkerProcess:
        """The spare worker if there is one, else a new one. Raises `WorkerError`."""
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is not None:
            worker, inherited = spare
            # What it inherited may be out of date.
            if worker[0].poll() is None and inherited == environment():
                return worker
            _end(worker)
        return start_worker()

    def refill(self, delay_s: float = 0.0) -> None:
        """Start a spare worker after a while, unless there is one or memory is short; on a thread
        of its own."""
        if self._is_calm is not None and self._spare is None and not self._is_over.is_set():
            threading.Thread(
                target=self._start, args=(delay_s,), name="orion-spare", daemon=True
            ).start()

    def _start(self, delay_s: float) -> None:
        assert self._is_calm is not None
        if self._is_over.wait(delay_s) or not self._is_calm():
            return
        with self._starting():
            with self._lock:
                if self._spare is None and not self._is_over.is_set():
                    with contextlib.suppress(WorkerError):  # whoever needs one will hear of it
                        self._spare = start_worker(), environment()
                spare = self._spare
            if spare is not None:
                with contextlib.suppress(OSError, ValueError):  # it was ended meanwhile
                    spare[0][1].poll(_MOST_TO_START_S)  # until it says hello; nothing is read
        if self._is_over.is_set():  # meanwhile
            self.kill()

    @property
    def is_over(self) -> bool:
        """True after `kill`."""
        return self._is_over.is_set()

    def kill(self) -> None:
        """End the spare worker, for good. Takes no lock: it may be called from anywhere."""
        self._is_over.set()
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
    """What a child process needs to import what this one would, without backtraces of llama.cpp."""
    paths = [path or os.getcwd() for path in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GGML_NO_BACKTRACE": "1"}


def beginning_of(output: BinaryIO) -> str:
    """The first words of what a worker printed: where an assertion or a signal is named."""
    output.seek(0)
    return output.read(_OUTPUT_BYTES_SHOWN).decode("utf-8", "replace").strip()
