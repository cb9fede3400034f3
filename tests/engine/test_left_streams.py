"""A stream that nobody reads any more ends its request, and one that is read reaches its reader
whole."""

import asyncio
import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engines import LONG, TEXT, MakeEngine, is_observed, one_at_a_time
from helpers import BOUND_S, Held, Running, wait_until

from orion_oie import (
    OrionInferenceEngine,
    RequestCancelledError,
    RequestHandle,
    RequestState,
    TokenEvent,
)
from orion_oie.backends.fake import FakeAnswer


@pytest.fixture
def engine(make_engine: MakeEngine) -> OrionInferenceEngine:
    """One that would write for fifteen seconds."""
    return make_engine({"*": LONG}, **one_at_a_time())


def by_break(handle: RequestHandle) -> None:
    for _ in handle:
        break


def by_an_exception(handle: RequestHandle) -> None:
    with contextlib.suppress(ZeroDivisionError):
        for _ in handle:
            1 / 0  # noqa: B018 (it fails)


def by_an_interruption(handle: RequestHandle) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        for _ in handle:
            raise KeyboardInterrupt


def by_close(handle: RequestHandle) -> None:
    events = iter(handle)
    next(events)
    events.close()


def by_a_slice(handle: RequestHandle) -> None:
    assert len(list(itertools.islice(handle, 3))) == 3


def by_the_last_of_two(handle: RequestHandle) -> None:
    first, second = iter(handle), iter(handle)
    next(first), next(second)
    first.close()
    assert next(second).text == "word "
    second.close()


async def async_by_break(handle: Any) -> None:
    async for _ in handle:
        break


async def async_by_an_exception(handle: Any) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async for _ in handle:
            1 / 0  # noqa: B018 (it fails)


async def async_by_cancelling_the_task(handle: Any) -> None:
    task = asyncio.ensure_future(read_slowly(handle))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def read_slowly(handle: Any) -> None:
    async for _ in handle:
        await asyncio.sleep(BOUND_S)


WAYS = [by_break, by_an_exception, by_an_interruption, by_close, by_a_slice, by_the_last_of_two]
ASYNC_WAYS = [async_by_break, async_by_an_exception, async_by_cancelling_the_task]


@pytest.mark.parametrize("leave", WAYS)
@pytest.mark.parametrize("kind", ["stream", "chat"])
def test_a_left_loop_ends_the_request(
    engine: OrionInferenceEngine, leave: Callable[[RequestHandle], None], kind: str
) -> None:
    """Also while the handle is still there; its result says so."""
    chat = engine.chat()
    handle = (engine if kind == "stream" else chat).stream("Hello?")
    leave(handle)
    with pytest.raises(RequestCancelledError, match="nobody reads it any more"):
        handle.result(BOUND_S)
    assert handle.state is RequestState.CANCELLED
    assert chat.history == []
    assert engine.stats().running == 0


@pytest.mark.parametrize("leave", ASYNC_WAYS)
@pytest.mark.parametrize("kind", ["stream", "astream", "chat"])
def test_a_left_asynchronous_loop_ends_the_request(
    engine: OrionInferenceEngine, leave: Callable[[Any], Any], kind: str
) -> None:
    """Also while the handle, or the stream, is still there."""

    async def main() -> None:
        stream: Any
        if kind == "chat":
            stream = engine.chat().astream("Hello?")
        else:
            stream = getattr(engine, kind)("Hello?")
        await leave(stream)
        while engine.stats().running:
            await asyncio.sleep(0.001)
        with pytest.raises(RequestCancelledError):
            await (stream if kind == "stream" else stream.result())

    asyncio.run(asyncio.wait_for(main(), BOUND_S))
    assert engine.stats().requests.cancelled == 1


def test_an_interrupted_reader_ends_the_request(make_engine: MakeEngine) -> None:
    """Ctrl-C while the next piece is waited for."""
    held = Held(LONG)
    engine = make_engine({"*": held})
    handle = engine.stream("Hello?")
    held.wait_for()

    def interrupt() -> None:
        wait_until(lambda: is_observed(handle))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    running = Running(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(handle)
    running.join()
    held.let_go.set()
    with pytest.raises(RequestCancelledError):
        handle.result(BOUND_S)


def test_a_submitted_request_goes_on(make_engine: MakeEngine) -> None:
    """Whoever wants to leave a loop and have the answer asks with `submit`."""
    engine = make_engine({"*": FakeAnswer(TEXT, delay_s=0.005)})
    handle = engine.submit("Hello?")
    by_break(handle)
    assert handle.result(BOUND_S).content == TEXT


def test_a_block_lasts_to_its_end(make_engine: MakeEngine) -> None:
    """In a `with` block a loop may be left and another one begun, in both worlds."""
    engine = make_engine({"*": FakeAnswer(TEXT, delay_s=0.005)})
    with engine.stream("Hello?") as handle:
        by_break(handle)
        assert "".join(event.text for event in handle) == TEXT

    async def main() -> list[str]:
        texts = []
        async with engine.stream("Hello?") as handle:
            await async_by_break(handle)
            texts.append("".join([event.text async for event in handle]))
        async with engine.astream("Hello?") as stream:
            first = await anext(aiter(stream))
            await asyncio.sleep(0.01)
            texts.append(first.text + "".join([event.text async for event in stream]))
        return texts

    assert asyncio.run(asyncio.wait_for(main(), BOUND_S)) == [TEXT, TEXT]
    assert engine.stats().requests.cancelled == 0


@pytest.mark.parametrize("other", ["result", "on_event", "loop"])
def test_another_reader_keeps_the_request(make_engine: MakeEngine, other: str) -> None:
    """A loop that is left ends nothing for those who still read."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held})
    seen: list[TokenEvent] = []
    gate = threading.Event()

    def look(event: TokenEvent) -> None:
        assert gate.wait(BOUND_S)
        seen.append(event)

    handle = engine.stream("Hello?", on_event=look if other == "on_event" else None)
    running = None
    if other != "on_event":
        running = Running(handle.result if other == "result" else lambda: seen.extend(handle))
        held.wait_for()
        wait_until(lambda: running.is_running)
    events = iter(handle)
    held.let_go.set()
    next(events)
    events.close()
    gate.set()
    assert handle.result(BOUND_S).content == TEXT
    if running is not None:
        running.join()
    if other != "result":
        wait_until(lambda: "".join(event.text for event in seen) == TEXT)


# All text is delivered


@pytest.fixture
def slow() -> Iterator[tuple[list[str], Callable[[TokenEvent], None]]]:
    """A callback that takes its time, and what it has got."""
    seen: list[str] = []
    pause = threading.Event()

    def on_event(event: TokenEvent) -> None:
        pause.wait(0.005)
        seen.append(event.text)

    yield seen, on_event
    pause.set()


@pytest.mark.parametrize("way", ["result", "await", "astream", "block", "engine", "shutdown"])
def test_on_event_gets_all_text(make_engine: MakeEngine, slow: Any, way: str) -> None:
    """The result, the end of a block over the handle or the engine, and a shutdown wait for it."""
    seen, on_event = slow
    engine = make_engine({"*": FakeAnswer("a b c d e f")})

    async def use(kind: str) -> None:
        stream = getattr(engine, kind)("Hello?", on_event=on_event)
        await (stream if kind == "stream" else stream.result())

    if way == "result":
        engine.stream("Hello?", on_event=on_event).result(BOUND_S)
    elif way in ("await", "astream"):
        asyncio.run(use("stream" if way == "await" else "astream"))
    elif way == "block":
        with engine.stream("Hello?", on_event=on_event) as handle:
            wait_until(handle.done)
    elif way == "engine":
        with engine:
            wait_until(engine.stream("Hello?", on_event=on_event).done)
    else:
        wait_until(engine.stream("Hello?", on_event=on_event).done)
        engine.shutdown(0.0)
    assert "".join(seen) == "a b c d e f"


def test_the_wait_for_on_event_has_a_limit(make_engine: MakeEngine) -> None:
    """`result(timeout)` gives up, and leaves the callback to go on."""
    engine = make_engine()
    let_go = threading.Event()
    seen: list[str] = []

    def on_event(event: TokenEvent) -> None:
        assert let_go.wait(BOUND_S)
        seen.append(event.text)

    handle = engine.stream("Hello?", on_event=on_event)
    wait_until(handle.done)
    with pytest.raises(TimeoutError):
        handle.result(0.01)
    let_go.set()
    assert handle.result(BOUND_S).content == TEXT
    assert "".join(seen) == TEXT


def test_a_blocked_on_event_does_not_hold_the_next_turn(make_engine: MakeEngine) -> None:
    """A chat goes on when the answer is there, and its history has it."""
    engine = make_engine()
    let_go = threading.Event()
    chat = engine.chat()
    handle = chat.stream("one", on_event=lambda _event: let_go.wait(BOUND_S))
    wait_until(handle.done)
    assert Running(chat.ask, "two").join().content == TEXT
    assert [message.content for message in chat.history] == ["one", TEXT, "two", TEXT]
    let_go.set()
