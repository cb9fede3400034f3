"""Streams and who reads them: errors at the call, asynchronous streams, leaving, abandoning.

The backend says what its script says.
"""

import asyncio
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from engines import LONG, TEXT, one_at_a_time
from helpers import BOUND_S, Held, Running, is_running, wait_until
from internals import set_leaving
from interrupts import Refusals

from orion_oie import (
    AnswerStream,
    EngineClosedError,
    InvalidRequestError,
    OrionInferenceEngine,
    QueueFullError,
    RequestCancelledError,
    RequestHandle,
    RequestState,
    UnknownAgentError,
    WorkerTimeoutError,
)
from orion_oie.backends import fake
from orion_oie.backends.fake import FakeAnswer


def in_loop(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, BOUND_S))


# What is wrong is raised at the call


@pytest.mark.parametrize(
    ("query", "options", "error"),
    [
        ("", {}, InvalidRequestError),
        (None, {}, InvalidRequestError),
        ("Hello?", {"temprature": 1}, InvalidRequestError),
        ("Hello?", {"max_tokens": 0}, InvalidRequestError),
        ("Hello?", {"json_schema": {"type": "colour"}}, InvalidRequestError),
        ("Hello?", {"agent": "nobody"}, UnknownAgentError),
        ("Hello?", {"chunk_by": "letter"}, InvalidRequestError),
    ],
)
def test_a_wrong_request_is_no_stream(
    make_engine, query: Any, options: dict[str, Any], error: type[Exception]
) -> None:
    """stream and astream raise before there is an event; submit leaves it to the handle."""
    engine = make_engine()

    async def make() -> None:
        engine.astream(query, **options)

    with pytest.raises(error):
        engine.stream(query, **options)
    with pytest.raises(error):
        in_loop(make())
    if "chunk_by" not in options:
        handle = engine.submit(query, **options)
        with pytest.raises(error):
            handle.result(BOUND_S)
    assert engine.stats().running == 0


def test_a_request_that_nobody_can_take_is_no_stream(make_engine) -> None:
    """A full queue and a closed engine are raised at the call, and so is a bug in a router."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held}, max_queue=1, **one_at_a_time())
    running = [engine.submit("One?")]
    held.wait_for()
    running.append(engine.submit("Two?"))
    with pytest.raises(QueueFullError):
        engine.stream("Three?")
    with pytest.raises(QueueFullError):
        engine.astream("Three?")
    held.let_go.set()
    for handle in running:
        handle.result(BOUND_S)
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.stream("Hello?")
    with pytest.raises(EngineClosedError):
        engine.astream("Hello?")

    class Broken:
        def route(self, *_: object) -> None:
            raise ZeroDivisionError

    broken = make_engine(router=Broken())
    with pytest.raises(ZeroDivisionError):
        broken.stream("Hello?")
    with pytest.raises(ZeroDivisionError):
        broken.submit("Hello?").result(BOUND_S)
    assert broken.stats().running == 0


def test_what_goes_wrong_later_is_raised_by_the_reader(make_engine) -> None:
    """After the text that came; the call itself succeeds."""
    engine = make_engine({"*": FakeAnswer("one two", error=WorkerTimeoutError("stuck"))})
    seen: list[str] = []

    async def read() -> None:
        async for event in engine.astream("Hello?"):
            seen.append(event.text)

    with pytest.raises(WorkerTimeoutError):
        in_loop(read())
    assert seen == ["one ", "two"]


# Asynchronous streams


def test_an_asynchronous_stream_has_its_result(make_engine) -> None:
    """After the loop, before it, or without it; its handle has the rest."""
    engine = make_engine()

    async def main() -> None:
        stream = engine.astream("Hello?", chunk_by="word")
        assert isinstance(stream, AnswerStream)
        assert [event.text async for event in stream] == ["One ", "fine ", "answer."]
        assert (await stream.result()).content == TEXT
        assert stream.handle.state is RequestState.SUCCESS
        assert await stream.started() is stream.handle
        assert repr(stream) == f"<AnswerStream of {stream.handle!r}>"
        assert [event async for event in stream] == []
        whole = engine.astream("Hello?")
        assert (await whole.result()).content == TEXT
        assert "".join([event.text async for event in whole]) == TEXT
        async with engine.astream("Hello?") as left_late:
            first = await anext(left_late)
            rest = [event.text async for event in left_late]
        assert first.text + "".join(rest) == TEXT
        assert (await left_late.result()).content == TEXT

    in_loop(main())


def test_a_closed_stream_is_over(make_engine) -> None:
    """aclose ends the request, waits for that, and may be repeated; then there are no events."""
    engine = make_engine({"*": LONG})

    async def main() -> None:
        stream = engine.astream("Hello?")
        await anext(stream)
        await stream.aclose()
        await stream.aclose()
        assert stream.handle.state is RequestState.CANCELLED
        assert [event async for event in stream] == []
        with pytest.raises(RequestCancelledError):
            await stream.result()

    in_loop(main())


def test_a_stream_that_begins_later(make_engine) -> None:
    """It begins once, with whoever comes first; a failed beginning may be repeated; closed before
    it began, it never begins."""
    engine = make_engine({"*": LONG})
    begun: list[RequestHandle] = []
    refusals = [QueueFullError("full")]

    async def begin() -> RequestHandle:
        await asyncio.sleep(0)
        if refusals:
            raise refusals.pop()
        begun.append(engine.stream("Hello?"))
        return begun[-1]

    async def main() -> None:
        stream = AnswerStream(begin)
        with pytest.raises(InvalidRequestError, match="has not begun"):
            stream.handle  # noqa: B018 (the access is the test)
        with pytest.raises(QueueFullError):
            await anext(stream)
        first, second = await asyncio.gather(stream.started(), stream.started())
        assert first is second is stream.handle
        assert begun == [first]
        await stream.aclose()
        closed = AnswerStream(begin)
        await closed.aclose()
        assert [event async for event in closed] == []
        with pytest.raises(InvalidRequestError, match="closed before"):
            await closed.result()
        late = AnswerStream(begin)
        starting = asyncio.create_task(late.started())
        await asyncio.sleep(0)
        await late.aclose()
        with pytest.raises(RequestCancelledError):
            await (await starting)

    in_loop(main())
    assert len(begun) == 2


def test_a_cancelled_reader_ends_its_request(make_engine) -> None:
    """At once, though the stream is still known; other tasks go on."""
    engine = make_engine({"*": LONG})

    async def main() -> None:
        stream = engine.astream("Hello?")

        async def read() -> None:
            async for _ in stream:
                pass

        reading = asyncio.create_task(read())
        while not stream.handle.stats.tokens:
            await asyncio.sleep(0.001)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        with pytest.raises(RequestCancelledError):
            await stream.result()

    in_loop(main())


# Leaving


class SlowToCancel:
    """The generations of the fake backend end late after a cancel: when they are let go."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.cancelled = self.ended = 0
        self.let_go = threading.Event()
        generate = fake.FakeModel.generate

        def late(model: Any, *arguments: Any) -> Any:
            try:
                return generate(model, *arguments)
            except RequestCancelledError:
                self.cancelled += 1
                assert self.let_go.wait(BOUND_S)
                self.ended += 1
                raise

        patch.setattr(fake.FakeModel, "generate", late)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowToCancel:
    return SlowToCancel(monkeypatch)


@pytest.mark.parametrize("is_cancelled_before", [False, True])
def test_leaving_waits_for_the_end(
    make_engine, slow: SlowToCancel, is_cancelled_before: bool
) -> None:
    """Behind the block the request has ended, and its slot is free, also if it was cancelled
    before."""
    engine = make_engine({"*": LONG}, **one_at_a_time())

    def leave() -> tuple[RequestState, int, int]:
        with engine.stream("Hello?") as handle:
            next(iter(handle))
            if is_cancelled_before:
                handle.cancel()
        stats = engine.stats()
        return handle.state, stats.running, stats.models["main@q4"].users

    leaving = Running(leave)
    wait_until(lambda: slow.cancelled)
    assert leaving.is_running
    slow.let_go.set()
    assert leaving.join() == (RequestState.CANCELLED, 0, 0)


@pytest.mark.parametrize("way", ["stream", "astream"])
def test_leaving_asynchronously_does_not_block_the_loop(
    make_engine, slow: SlowToCancel, way: str
) -> None:
    """Other tasks go on while the end is waited for: here they bring it about."""
    engine = make_engine({"*": LONG})

    async def let_go() -> None:
        while not slow.cancelled:
            await asyncio.sleep(0.001)
        slow.let_go.set()

    async def main() -> None:
        task = asyncio.create_task(let_go())
        async with getattr(engine, way)("Hello?") as stream:
            await anext(aiter(stream))
        assert slow.ended == 1
        assert engine.stats().running == 0
        await task

    in_loop(main())


def test_leaving_waits_for_a_bounded_time(
    make_engine, slow: SlowToCancel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that does not confirm the cancel does not keep the caller for ever."""
    set_leaving(monkeypatch, 0.01)
    engine = make_engine({"*": LONG})
    with engine.stream("Hello?") as handle:
        next(iter(handle))
    assert not handle.done()

    async def main() -> RequestHandle:
        async with engine.stream("Hello?") as handle:
            await anext(aiter(handle))
        return handle

    assert not in_loop(main()).done()
    slow.let_go.set()
    wait_until(lambda: engine.stats().running == 0)


# Abandoned streams


def test_a_dropped_stream_ends_its_request(make_engine) -> None:
    """By leaving a loop over it, by dropping its handle, by closing its only iterator."""
    engine = make_engine({"*": LONG})
    for _ in engine.stream("Hello?"):
        break
    handle = engine.stream("Hello?")
    del handle
    events = iter(engine.stream("Hello?"))
    next(events)
    events.close()
    wait_until(lambda: engine.stats().requests.cancelled == 3)
    assert engine.stats().running == 0
    wait_until(lambda: not is_running("orion-abandoned"))


def test_a_dropped_asynchronous_stream_ends_its_request(make_engine) -> None:
    """Begun or not, of either kind."""
    engine = make_engine({"*": LONG})

    async def main() -> None:
        async for _ in engine.astream("Hello?"):
            break
        async for _ in engine.stream("Hello?"):
            break
        engine.astream("Hello?")
        while engine.stats().requests.cancelled < 3:
            await asyncio.sleep(0.001)

    in_loop(main())


def test_a_left_loop_ends_its_request_in_spite_of_on_event(make_engine) -> None:
    """A loop of an asynchronous stream is its reader; on_event only looks on. A handle that was
    taken out of a stream without a loop goes on."""
    engine = make_engine({"*": LONG})

    async def main() -> None:
        async for _ in engine.astream("Hello?", on_event=lambda _event: None):
            break
        while engine.stats().requests.cancelled < 1:
            await asyncio.sleep(0.001)
        handle = engine.astream("Hello?").handle
        while handle.stats.tokens < 5:
            await asyncio.sleep(0.001)
        await AnswerStream(handle).aclose()

    in_loop(main())
    assert engine.stats().requests.cancelled == 2


def test_a_stream_in_a_cycle_ends_with_the_garbage(make_engine) -> None:
    """Wherever the collector runs, also under a lock of the engine."""
    engine = make_engine({"*": LONG})
    gc.disable()
    try:
        cycle: list[Any] = [engine.stream("Hello?")]
        cycle.append(cycle)
        del cycle
        with parts_lock(engine):
            gc.collect()
    finally:
        gc.enable()
    wait_until(lambda: engine.stats().requests.cancelled == 1)


def parts_lock(engine: OrionInferenceEngine) -> Any:
    """The lock that a cancel needs: no public call holds it for long."""
    return engine._parts.queue._lock


def test_a_stream_that_somebody_has_goes_on(make_engine) -> None:
    """An iterator, a waiting thread, a callback or a task keeps it going without its handle; so
    does nothing for a request that was submitted."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held})
    events = iter(engine.stream("one"))
    waiting = Running(engine.stream("two").result)
    ended: list[str] = []
    engine.stream("three").add_done_callback(lambda handle: ended.append(handle.result().content))
    seen: list[str] = []
    engine.stream("four", on_event=lambda event: seen.append(event.text))
    view = engine.submit("five").view()

    async def main() -> str:
        task = asyncio.ensure_future(wait_for(engine.stream("six")))
        await asyncio.sleep(0)
        held.let_go.set()
        return await task

    async def wait_for(handle: RequestHandle) -> str:
        return (await handle).content

    gc.collect()
    assert in_loop(main()) == TEXT
    assert "".join(event.text for event in events) == TEXT
    assert waiting.join().content == TEXT
    assert view.result(BOUND_S).content == TEXT
    wait_until(lambda: ended == [TEXT])
    wait_until(lambda: "".join(seen) == TEXT)
    assert engine.stats().requests.cancelled == 0


def test_a_view_does_not_keep_a_stream(make_engine) -> None:
    """It shows how the request ends when nobody has the handle."""
    engine = make_engine({"*": LONG})
    view = engine.stream("Hello?").view()
    with pytest.raises(RequestCancelledError, match="nobody reads it any more"):
        view.result(BOUND_S)
    assert view.done()


def test_without_a_thread_an_abandoned_request_goes_on(make_engine) -> None:
    """Nothing is raised where the handle is dropped."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held})
    handle = engine.stream("Hello?")
    view = handle.view()
    held.wait_for()
    with Refusals(name="orion-abandoned") as refusals:
        del handle
        wait_until(lambda: refusals.refused)
    held.let_go.set()
    assert view.result(BOUND_S).content == TEXT


def test_a_fork_ends_no_request_of_its_parent(tmp_path: Path) -> None:
    """The copies of the handles are dropped there without an effect."""
    script = f"""
import gc, os, sys, threading
from pathlib import Path
from helpers import Held, registry_with
from orion_oie import OrionInferenceEngine
from orion_oie.backends.fake import FakeBackend

held = Held()
engine = OrionInferenceEngine(
    registry_with(Path({str(tmp_path)!r}), {{"conversation": ["main"]}}),
    backend=FakeBackend({{"*": held}}),
)
handle = engine.stream("Hello?")
view = handle.view()
held.wait_for()
child = os.fork()
if child == 0:
    del handle
    gc.collect()
    threads = [thread.name for thread in threading.enumerate()]
    os._exit(1 if "orion-abandoned" in threads or not view.cancel() else 0)
_, status = os.waitpid(child, 0)
held.let_go.set()
print(os.waitstatus_to_exitcode(status), handle.result().content)
"""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "0 This is a fake answer.\n", done.stderr


def test_a_program_may_end_with_an_open_stream(tmp_path: Path) -> None:
    """Without a word of complaint."""
    script = f"""
from pathlib import Path
from helpers import registry_with
from orion_oie import OrionInferenceEngine
from orion_oie.backends.fake import FakeAnswer, FakeBackend

engine = OrionInferenceEngine(
    registry_with(Path({str(tmp_path)!r}), {{"conversation": ["main"]}}),
    backend=FakeBackend({{"*": FakeAnswer("word " * 3000, delay_s=0.005)}}),
)
handle = engine.stream("Hello?")
print(next(iter(handle)).text)
"""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "word \n", "")
