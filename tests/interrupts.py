"""Errors at a chosen moment: Ctrl-C at any point of a call, no more threads, no more memory.

Python runs the handler of a signal on the main thread when a function begins, and when one that is
written in C has returned. `Interrupted` counts these points in the code of the library, and in that
of `threading` and `concurrent.futures` beneath it, and raises at the one that is wanted. So a test
can go through all of them, which real signals would not.
"""

import concurrent.futures
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType

import pytest

import orion_oie

_PLACES = (
    str(Path(orion_oie.__file__).parent),
    threading.__file__,
    str(Path(concurrent.futures.__file__).parent),
)


@lru_cache(None)
def _is_watched(code: CodeType) -> bool:
    return code.co_filename.startswith(_PLACES)


class Interrupted:
    """Raises an error, or calls a function, at point number `at` of what runs inside, on the thread
    that entered; without `at` it counts the points. It spares what runs beneath destructors, and
    beneath files whose path ends with one of `spared`. `where` is the place of that point."""

    def __init__(
        self,
        at: int | None = None,
        act: type[BaseException] | Callable[[], object] = KeyboardInterrupt,
        spared: tuple[str, ...] = (),
    ) -> None:
        self.at = at
        self.act = act
        self.spared = spared
        self.count = 0
        self.where = ""

    def __enter__(self) -> "Interrupted":
        self._hook, sys.unraisablehook = sys.unraisablehook, lambda _what: None
        sys.setprofile(self._seen)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        sys.unraisablehook = self._hook

    def _seen(self, frame: FrameType, event: str, _arg: object) -> None:
        if event not in ("call", "c_return") or not _is_watched(frame.f_code):
            return
        self.count += 1
        if self.at is not None and self.count >= self.at and not self._is_spared(frame):
            self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            sys.setprofile(None)
            if isinstance(self.act, type):
                raise self.act
            self.act()

    def _is_spared(self, frame: FrameType | None) -> bool:
        while frame is not None:
            code = frame.f_code
            # What is raised beneath a destructor, Python reports and forgets.
            if code.co_name == "__del__" or code.co_filename.endswith(self.spared):
                return True
            frame = frame.f_back
        return False


def points_of(call: Callable[[], object]) -> int:
    """The number of points of a call."""
    with Interrupted() as counting:
        call()
    return counting.count


class Refusals:
    """While it is entered, the threads of the library are counted as they start, and start number
    `number`, and each of a thread called `name`, raises `error`, as when the system gives no
    more."""

    def __init__(
        self, number: int = 0, error: Callable[[str], BaseException] = RuntimeError, name: str = ""
    ) -> None:
        self.asked = self.refused = 0
        self._number = number
        self._error = error
        self._name = name
        self._lock = threading.Lock()
        self._patch = pytest.MonkeyPatch()

    def refuse_next(self) -> None:
        """Refuse the next start."""
        with self._lock:
            self._number = self.asked + 1

    def __enter__(self) -> "Refusals":
        start = threading.Thread.start

        def counted(thread: threading.Thread) -> None:
            if thread.name.startswith("orion-"):
                with self._lock:
                    self.asked += 1
                    is_refused = self.asked == self._number or thread.name == self._name
                    self.refused += is_refused
                if is_refused:
                    raise self._error("can't start new thread")
            start(thread)

        self._patch.setattr(threading.Thread, "start", counted)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
