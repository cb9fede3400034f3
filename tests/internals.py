"""Access to private parts for the few tests that have no public way; each function says why."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from orion_oie import cancellation
from orion_oie.backends.fake import FakeBackend, FakeModel
from orion_oie.backends.llama.host import devices
from orion_oie.backends.llama.host.client import LlamaModel
from orion_oie.callbacks import threads as callback_threads
from orion_oie.cancellation import CancelScope, DeadlineTimer
from orion_oie.engine import abandoned, handle
from orion_oie.engine.scheduling import queue as queue_module
from orion_oie.engine.scheduling.queue import RequestQueue
from orion_oie.hardware.machine import LlamaDevices

# -- how long threads stay: nobody but a test has a reason to change or to know it


def idle_exit_s() -> float:
    """The seconds after which an idle thread of a queue ends: a bound for what must not last as
    long."""
    return queue_module._IDLE_EXIT_S


def set_idle_exit(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have idle threads of queues end after `seconds`: no test waits for the usual time."""
    monkeypatch.setattr(queue_module, "_IDLE_EXIT_S", seconds)


def set_recheck(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have queues decide again after `seconds` without news: often, or never during a test."""
    monkeypatch.setattr(queue_module, "_RECHECK_S", seconds)


def set_timer_idle_exit(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have idle deadline timers end their thread after `seconds`: no test waits for the usual
    time."""
    monkeypatch.setattr(cancellation, "_IDLE_EXIT_S", seconds)


def set_other_idle_exits(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """The same for the threads that call callbacks, and for readers of abandoned streams."""
    monkeypatch.setattr(callback_threads, "_IDLE_EXIT_S", seconds)
    monkeypatch.setattr(abandoned, "_IDLE_EXIT_S", seconds)


def set_leaving(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have a `with` block over a stream wait `seconds` at most for the end of a cancel."""
    monkeypatch.setattr(handle, "_LEAVING_S", seconds)


# -- cancel scopes and deadlines


def callbacks_of(scope: CancelScope) -> Sequence[Callable[[], None]]:
    """The callbacks that a cancel would call now: a scope has no public list of them."""
    return list(scope._callbacks.values())


def deadlines_of(timer: DeadlineTimer) -> Sequence[object]:
    """The deadlines that a timer still watches: only its threads show it in public."""
    return list(timer._of_scope)


def at_idle_timeout(
    timer: DeadlineTimer, is_due: Callable[[], bool], act: Callable[[], None]
) -> None:
    """Let the idle wait of a timer end in vain once `is_due()`, and call `act` at that moment.

    The race under test lies between the end of that wait and the next look at the deadlines; only
    the timer's own condition reaches that point.
    """
    wait = timer._condition.wait

    def wait_in_vain(timeout: float | None = None) -> bool:
        if timer._pending or not is_due():
            return wait(timeout)
        act()
        return False

    timer._condition.wait = wait_in_vain


def expect_pending(task: "asyncio.Task[Any]") -> None:
    """Have a task whose event loop was closed end without asyncio's complaint: the test meant it,
    and asyncio has no public switch."""
    task._log_destroy_pending = False  # type: ignore[attr-defined]


# -- queues


def busy_of(queue: RequestQueue[Any]) -> int:
    """The number of threads of a queue that serve: the last steps of a request, after its answer,
    show in nothing else."""
    return queue._busy


# -- models and what is known of the machine


def models_of(backend: FakeBackend) -> list[FakeModel]:
    """The models that a fake backend has loaded, to crash them or to see them closed: an engine
    hands out none."""
    return backend._models


def pending_of(model: LlamaModel) -> Sequence[object]:
    """The requests that a worker has not answered: their callers are blocked, and show nothing."""
    return list(model._pending)


def set_known_devices(monkeypatch: pytest.MonkeyPatch, known: LlamaDevices | None) -> None:
    """Replace what this process has found out about the devices, which it keeps for its life; None
    has it ask again."""
    monkeypatch.setattr(devices, "_seen", known)
