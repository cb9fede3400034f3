"""A command in a terminal of any width, as somebody would see it."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

import psutil
from helpers import wait_until

COMMAND = [sys.executable, "-m", "orion_oie"]
BOUND_S = 60.0


class Terminal:
    """A command that runs in a terminal. Ends it on exit."""

    def __init__(
        self,
        arguments: Sequence[str],
        columns: int = 80,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**inherited, "TERM": "dumb", **(env or {})},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self.shown = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, text: str) -> str:
        """Read until a text is shown; returns what came up to then, which is read no more."""
        while text not in self.shown:
            assert self._read(), f"{text!r} did not come: {self.shown}"
        found, _, self.shown = self.shown.partition(text)
        return found + text

    def wait_for_more(self) -> None:
        """Read until there is any text that was not waited for."""
        while not self.shown.strip():
            assert self._read(), "nothing came"

    def interrupt_prompt(self) -> None:
        """Ctrl-C at a prompt. Python loses a signal that comes after it has shown the prompt and
        before it waits for a key, so wait until the process sleeps."""
        wait_until(lambda: psutil.Process(self.process.pid).status() == psutil.STATUS_SLEEPING)
        self.process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """Read to the end; returns the exit status and what was shown."""
        while self._read():
            pass
        return self.process.wait(BOUND_S), self.shown

    def _read(self) -> bool:
        ends_at = time.monotonic() + BOUND_S
        while not select.select([self.fd], [], [], 0.2)[0]:
            assert time.monotonic() < ends_at, f"nothing came any more: {self.shown}"
        try:
            came = os.read(self.fd, 65536)
        except OSError:  # nobody has the other end any more
            return False
        self.shown += came.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(came)


def seen(*arguments: str, columns: int = 80, env: Mapping[str, str] | None = None) -> list[str]:
    """The lines that a command shows in a terminal."""
    with Terminal(arguments, columns, env) as terminal:
        status, shown = terminal.end()
    assert status == 0, shown
    return shown.splitlines()
