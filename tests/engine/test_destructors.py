"""Destructors take no lock that their thread may hold: garbage is collected anywhere."""

import threading
import weakref
from collections.abc import Callable

from engines import LONG, MakeEngine
from helpers import BOUND_S, Held, Running, is_running, wait_until

from orion_oie.backends.fake import FakeAnswer
from orion_oie.backends.llama.host.process import SpareWorker
from orion_oie.engine.abandoned import AbandonedStreams


class Stream:
    """One that does not end."""

    def done(self) -> bool:
        return False


def within(lock_owner: Callable[[Callable[[], None]], None], call: Callable[[], None]) -> None:
    """Have `call` come while its thread holds a lock; fails if it does not return."""
    Running(lock_owner, call).join()


def during_a_thread_start(call: Callable[[], None]) -> None:
    """Call where `threading` starts a thread, and holds its own lock, which is not reentrant."""
    lock = threading.enumerate.__globals__["_active_limbo_lock"]
    with lock:
        call()


def test_a_stream_dropped_while_a_thread_starts_ends(make_engine: MakeEngine) -> None:
    """The handle of a stream is collected under the lock of `threading`: its request ends soon."""
    engine = make_engine({"*": LONG})
    handles = [engine.stream("Hello?")]
    within(during_a_thread_start, handles.clear)
    wait_until(lambda: engine.stats().requests.cancelled == 1)


def test_a_stream_dropped_while_it_waits_leaves_the_queue(make_engine: MakeEngine) -> None:
    """One that is not answered yet, too: it makes room for others."""
    held = Held(FakeAnswer("Yes."))
    engine = make_engine({"*": held}, slots=1)
    running = engine.submit("Hello?")
    held.wait_for()
    handles = [engine.stream("Hello?")]
    wait_until(lambda: engine.stats().waiting == 1)
    within(during_a_thread_start, handles.clear)
    wait_until(lambda: engine.stats().waiting == 0)
    held.let_go.set()
    running.result(BOUND_S)


def test_a_note_under_the_lock_of_the_notes_is_read() -> None:
    """Garbage may be collected while the notes themselves are changed."""
    streams, told = AbandonedStreams(), threading.Event()

    class Garbage(Stream):
        def __del__(self) -> None:
            streams.note(told.set)

    kept = [Garbage()]
    streams.expect(kept[0])
    gone = weakref.ref(kept[0])
    kept.clear()
    assert gone() is None
    assert told.wait(BOUND_S)


def test_a_slow_end_delays_no_other() -> None:
    """Ending a request may call anybody: the next abandoned stream does not wait for that."""
    streams, let_go, told = AbandonedStreams(), threading.Event(), threading.Event()
    stream = Stream()
    streams.expect(stream)
    for end in (lambda: let_go.wait(3 * BOUND_S), told.set):
        streams.note(end)
    assert told.wait(BOUND_S)
    let_go.set()


def test_a_spare_worker_is_ended_without_a_lock() -> None:
    """An engine that is collected ends its spare worker, and one that was about to be started is
    not started."""
    spare = SpareWorker(lambda: True)
    spare.refill(delay_s=3 * BOUND_S)
    within(during_a_thread_start, spare.kill)
    assert spare.is_over
    spare.kill()
    wait_until(lambda: not is_running("orion-spare"))
