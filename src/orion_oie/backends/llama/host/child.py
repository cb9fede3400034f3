"""A child process that is watched: its end is noticed, and told as what it was.

The process itself is watched, not its pipes or sockets: a fork of the host holds copies of those,
and they stay open when the child is gone. `subprocess` starts the child and does nothing more with
it: it tells an unknown exit code as 0, and its last waits have no limit.
"""

import os
import select
import signal
import subprocess
import threading
import time
from contextlib import suppress

_LOOK_S = 0.02  # where the system cannot notify


class Child:
    """A child process. Any thread may call any method. None waits without limit.

    In a fork of the process that started it, the child counts as ended, and is never killed.
    """

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.pid = process.pid
        self.exit_code: int | None = None  # None also when the host took it: see `has_ended`
        self.was_killed = False
        self._process = process
        self._host = os.getpid()
        self._lock = threading.RLock()  # a finalizer may kill on a thread that holds it
        self._has_ended = False
        self._descriptor = _watched(process.pid)

    @property
    def descriptor(self) -> int | None:
        """A descriptor that becomes readable when the child ends; None where the system has no
        such descriptors: then ask `has_ended` from time to time."""
        return self._descriptor

    @property
    def is_ours(self) -> bool:
        """False in a fork of the process that started it."""
        return os.getpid() == self._host

    def has_ended(self) -> bool:
        """True when the process is gone. `exit_code` is then negative for a signal, and None when
        nobody can know: the host ignores SIGCHLD, or waits for all its children itself."""
        if not self.is_ours:  # first: another thread may have held the lock when it forked
            return True
        with self._lock:
            if not self._has_ended:
                self._look()
            return self._has_ended

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; False when it is still there after `timeout_s`. A process that hangs
        in the kernel outlives even SIGKILL."""
        ends_at = time.monotonic() + timeout_s
        while not self.has_ended():
            left_s = ends_at - time.monotonic()
            if left_s <= 0:
                return False
            # A debugger may keep a dead process from us for a while: no busy waiting.
            if self._await_end(left_s) and not self.has_ended():
                time.sleep(min(left_s, _LOOK_S))
        return True

    def kill(self) -> None:
        """Send SIGKILL, if it is there; returns at once."""
        if not self.is_ours:
            return
        with self._lock:
            if not self.has_ended():
                self.was_killed = True
                with suppress(ProcessLookupError):
                    if self._descriptor is None:
                        os.kill(self.pid, signal.SIGKILL)
                    else:
                        signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def close(self) -> None:
        """Stop watching."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _await_end(self, timeout_s: float) -> bool:
        """Wait until it may have ended; True at once where the system does not notify."""
        if self._descriptor is None:
            return True
        poll = select.poll()  # `select` cannot take descriptors above 1023
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(timeout_s * 1e3))

    def _look(self) -> None:
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            pid, status = self.pid, None
        if pid == self.pid:
            self._has_ended = True
            self.exit_code = None if status is None else os.waitstatus_to_exitcode(status)
            self._process.returncode = self.exit_code or 0  # so that it never waits for the pid


def signal_name(number: int) -> str:
    """The name of a signal; also of one that has none, such as a real-time signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _watched(pid: int) -> int | None:
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # an old kernel, a sandbox that forbids it, no descriptors left
        return None
