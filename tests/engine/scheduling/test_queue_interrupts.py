"""Ctrl-C at any place of a call leaves a queue that works, and its lock free."""

import dis
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from helpers import BOUND_S, Running, wait_until

from orion_oie.engine.scheduling import queue as queue_module
from orion_oie.engine.scheduling.queue import RequestQueue
from orion_oie.engine.scheduling.seats import Mutex
from orion_oie.schemas.availability import READY, Availability, ModelState

FOLDER = str(Path(queue_module.__file__).parent)
# After these the interpreter looks whether a signal came.
LOOKS = ("CALL", "RESUME", "JUMP_BACKWARD")
BLOCKED = Availability(ModelState.BLOCKED, blockers=frozenset("x"))


@contextmanager
def interrupt(number: int) -> Iterator[list[str]]:
    """Raise `KeyboardInterrupt` at that place of the block at which the interpreter could, counted
    from 1, in the code of the queue; yields where it was raised."""
    raised: list[str] = []
    left = number
    last: dict[FrameType, str] = {}

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and not raised:
            if last.get(frame, "").startswith(LOOKS):
                left -= 1
                if not left:
                    raised.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
                    raise KeyboardInterrupt
            last[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        return trace

    sys.settrace(trace)
    try:
        yield raised
    finally:
        sys.settrace(None)


def each_place(call: Callable[[int], list[str]]) -> None:
    """Call with 1, 2, ... until nothing is interrupted any more."""
    number = 1
    while call(number):
        number += 1
    assert number > 10


def queue_of(served: list[str], found: dict[str, Availability]) -> RequestQueue[str]:
    return RequestQueue(
        served.append, limit=9, availability_of=found.get, per_model=2, max_threads=2
    )


@pytest.mark.parametrize("is_idle", [True, False])
def test_an_interrupted_put_does_nothing_or_all(is_idle: bool) -> None:
    """The item is served once, or not at all; the next one is served, by a thread that could take
    the lock."""

    def put_at(number: int) -> list[str]:
        served: list[str] = []
        queue = queue_of(served, {"a": READY, "b": BLOCKED})
        if not is_idle:
            queue.put("waits", model="b")
        with interrupt(number) as raised, suppress(KeyboardInterrupt):
            queue.put("first", model="a")
        queue.put("second", model="a")
        wait_until(lambda: "second" in served)
        if not raised:
            wait_until(lambda: "first" in served)
        assert served.count("first") <= 1
        assert served.count("first") or not Running(queue.remove, "first").join(), raised
        assert queue.close() == ([] if is_idle else ["waits"])
        return raised

    each_place(put_at)


def test_an_interrupted_remove_keeps_the_queue_whole() -> None:
    """The item still waits, or is gone; what waits beside it is as it was."""

    def remove_at(number: int) -> list[str]:
        served: list[str] = []
        found = {"b": BLOCKED}
        queue = queue_of(served, found)
        for name in ("first", "second", "third"):
            queue.put(name, model="b")
        with interrupt(number) as raised, suppress(KeyboardInterrupt):
            queue.remove("second")
        is_there = Running(queue.position, "second").join() is not None
        assert Running(queue.remove, "second").join() == is_there
        assert [one.item for one in queue.waiting()] == ["first", "third"]
        found["b"] = READY
        queue.notify()
        wait_until(lambda: sorted(served) == ["first", "third"])
        return raised

    each_place(remove_at)


def test_an_interrupted_question_changes_nothing() -> None:
    """Asking for a position is interrupted anywhere: the next answer is right."""

    def ask_at(number: int) -> list[str]:
        queue = queue_of([], {"b": BLOCKED})
        for name in ("first", "second"):
            queue.put(name, model="b")
        with interrupt(number) as raised, suppress(KeyboardInterrupt):
            queue.position("second")
        assert Running(queue.position, "second").join() == 2
        assert queue.close() == ["first", "second"]
        return raised

    each_place(ask_at)


def test_an_interrupt_leaves_the_lock_free() -> None:
    """Wherever it comes while the lock is taken, also if its owner has it already."""

    def take_at(number: int) -> list[str]:
        lock = Mutex()
        with interrupt(number) as raised, suppress(KeyboardInterrupt), lock:
            pass
        other = Running(lambda: lock.acquire(timeout=BOUND_S) and lock.release())
        other.join()
        return raised

    number = 1
    while take_at(number):
        number += 1
    assert number > 2
