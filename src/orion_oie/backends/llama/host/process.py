"""The process of a worker: its interpreter, its socket, its environment, its output.

A spare worker may be started ahead: it imports its modules and waits. Needs POSIX: the child
inherits the socket as an open descriptor, so that it has no address. The client exchanges the
messages.
"""

import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import BinaryIO

from orion_oie.backends.llama.host.child import Child
from orion_oie.errors import WorkerError

KILLED_GRACE_S = 5.0
_OUTPUT_BYTES_SHOWN = 2000
# Turns of a loop before a thread of OpenMP that waits gives its core away; some 50 us. The default,
# 300,000, lets all threads spin for as long as another program has the core of one of them: beside
# one such program on two cores, 8 sequences are then decoded at 60 instead of 100 tokens/s. With
# 100 a lone sequence is a third slower, because the threads sleep within each step.
_SPINS = "1000"
_MAX_START_S = 5.0
_LOOK_S = 0.2  # where the system does not notify of the end of a process
_READ_BYTES = 64 << 10

# The messages of `multiprocessing.connection`, which the worker uses: a size, then as many bytes. A
# size that needs more than 31 bits comes after a -1.
_SIZE, _LONG_SIZE = struct.Struct("!i"), struct.Struct("!iQ")
_LONGEST = 0x7FFFFFFF
# A write to a dead worker must not end a host that restored the default action of SIGPIPE.
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)


class WorkerProcess(Child):
    """The process of a worker, and the messages to and from it. One thread receives, one sends."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", ours: socket.socket, output: BinaryIO
    ) -> None:
        super().__init__(process)
        self._socket = ours
        self._output = output
        self._inbox = bytearray()
        self._sources = select.poll()  # of messages, and of the end
        self._sources.register(ours, select.POLLIN)
        self._look_ms = None if self.descriptor is not None else _LOOK_S * 1e3
        if self.descriptor is not None:
            self._sources.register(self.descriptor, select.POLLIN)

    def send_bytes(self, message: bytes) -> None:
        """Write a message; blocks while the worker reads nothing. Raises `OSError` when it reads no
        more, or was killed."""
        size = len(message)
        head = _SIZE.pack(size) if size <= _LONGEST else _LONG_SIZE.pack(-1, size)
        self._socket.sendall(head + message, _NO_SIGNAL)

    def recv_bytes(self) -> bytes:
        """Wait for the next message. Raises `EOFError` when there is none and none can come: the
        process has ended, or was killed, or has closed its socket."""
        while (message := self._taken()) is None:
            data = self._received()
            if not data:
                raise EOFError
            self._inbox += data
        return message

    def await_bytes(self, timeout_s: float) -> None:
        """Wait for the beginning of a message, on any thread."""
        poll = select.poll()  # the receiver's cannot be shared
        with suppress(ValueError):  # the socket was closed meanwhile
            poll.register(self._socket, select.POLLIN)
            poll.poll(timeout_s * 1e3)

    def kill(self) -> None:
        """End the process, and its messages, also if another process has a copy of its socket.
        Returns at once."""
        super().kill()
        self.hang_up()

    def hang_up(self) -> None:
        """End the messages: what has arrived can still be received, and a thread that sends gets
        an error."""
        if self.is_ours:  # it would end the messages of the host that forked, too
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def end(self, grace_s: float) -> bool:
        """Wait for its end, and after `grace_s` kill it. False when it is still there after that:
        it hangs in the kernel, and keeps its memory."""
        if self.wait(grace_s):
            return True
        self.kill()
        return self.wait(KILLED_GRACE_S)

    def close(self) -> None:
        """Give back its descriptors. No thread may be sending or receiving."""
        self.hang_up()
        self._socket.close()
        self._output.close()
        super().close()

    def said(self) -> str:
        """The beginning of its output, which names an assertion or a signal."""
        with suppress(OSError):
            data = os.pread(self._output.fileno(), _OUTPUT_BYTES_SHOWN, 0)
            return data.decode("utf-8", "replace").strip()
        return ""

    def _received(self) -> bytes:
        """More bytes; none when no more can come."""
        own = self._socket.fileno()
        while True:
            found = self._sources.poll(self._look_ms)
            if any(descriptor == own for descriptor, _event in found):
                with suppress(BlockingIOError):
                    return self._socket.recv(_READ_BYTES, socket.MSG_DONTWAIT)
            elif self.has_ended():  # it ended before this look: all that it wrote would be here
                return b""
            elif found:  # a debugger keeps it from us: no busy waiting
                time.sleep(_LOOK_S)

    def _taken(self) -> bytes | None:
        """The first message, if all of it is here."""
        inbox = self._inbox
        if len(inbox) < _SIZE.size:
            return None
        start = _SIZE.size
        (size,) = _SIZE.unpack_from(inbox)
        if size == -1:
            if len(inbox) < _LONG_SIZE.size:
                return None
            start = _LONG_SIZE.size
            _, size = _LONG_SIZE.unpack_from(inbox)
        if len(inbox) < start + size:
            return None
        message = bytes(memoryview(inbox)[start : start + size])
        del inbox[: start + size]
        return message


@dataclass(frozen=True, slots=True)
class Priority:
    """How workers share the cores with other programs: what is added to the niceness, and the
    logical cores on which they run, None for those of this process."""

    nice: int = 0
    cores: tuple[int, ...] | None = None


def start_worker(priority: Priority = Priority()) -> WorkerProcess:
    """Start a worker. Raises `WorkerError` when it cannot be started."""
    if os.name != "posix":
        raise WorkerError("workers need a POSIX system; on Windows use WSL")
    if not sys.executable:
        raise WorkerError("sys.executable is empty: no interpreter to start a worker with")
    try:
        return _spawn(priority)
    except OSError as error:
        raise WorkerError(f"no worker can be started: {error}") from error


def _spawn(priority: Priority) -> WorkerProcess:
    with ExitStack() as opened:
        ours, theirs = map(opened.enter_context, socket.socketpair())
        output = opened.enter_context(tempfile.TemporaryFile())
        # -P and an explicit path: the worker imports the same modules as this process, not files of
        # the working directory. A session of its own: Ctrl-C reaches the host only.
        command = [sys.executable, "-P", "-X", "faulthandler"]
        command += ["-m", "orion_oie.backends.llama.worker.main", str(theirs.fileno())]
        command += [str(os.getpid()), str(priority.nice), ",".join(map(str, priority.cores or ()))]
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=environment(),
        )
        opened.pop_all()
    theirs.close()
    return WorkerProcess(process, ours, output)


class SpareWorker:
    """At most one worker that is started before it is needed, while `has_spare_memory()`. Its
    imports keep a core busy; they happen inside `starting()`."""

    def __init__(
        self,
        has_spare_memory: Callable[[], bool] | None,
        starting: Callable[[], AbstractContextManager[None]] = nullcontext,
        priority: Priority = Priority(),
    ) -> None:
        self._priority = priority
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
            if not worker.has_ended() and inherited == environment():
                return worker
            _end(worker)
        return start_worker(self._priority)

    def refill(self, delay_s: float = 0.0) -> None:
        """Start a spare worker after a delay, on a thread of its own, unless there is one or memory
        is short."""
        check = self._has_spare_memory
        if check is not None and self._spare is None and not self._is_over:
            with suppress(RuntimeError):  # no thread for it: the next load waits a little longer
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
                    with suppress(WorkerError):  # the next `take` raises it
                        self._spare = start_worker(self._priority), environment()
                spare = self._spare
            if spare is not None:
                spare[0].await_bytes(_MAX_START_S)  # until its hello arrives; nothing is read
        if self._is_over:  # meanwhile
            self.kill()

    @property
    def is_over(self) -> bool:
        """True after `kill`."""
        return self._is_over

    def kill(self) -> None:
        """End the spare worker, for good. Takes no lock, so it may be called from anywhere."""
        self._is_over = True
        with suppress(RuntimeError):  # it is free already
            self._over.release()
        spare, self._spare = self._spare, None
        if spare is not None:
            _end(spare[0])


def _end(worker: WorkerProcess) -> None:
    worker.end(0.0)
    worker.close()


def environment() -> dict[str, str]:
    """The environment in which a child imports the same modules as this process, llama.cpp prints
    no backtraces and its threads do not spin for long, and numpy starts no threads."""
    paths = [path or os.getcwd() for path in sys.path]
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "GGML_NO_BACKTRACE": "1"}
    own = {"GOMP_SPINCOUNT": _SPINS, "OPENBLAS_NUM_THREADS": "1"}
    return {**own, **os.environ, **fixed}
