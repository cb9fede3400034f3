"""stream_text: any text in pieces, with pauses, callbacks, a cancel and numbers."""

import asyncio
import gc
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from engines import LONG
from helpers import BOUND_S, Clock, Running, wait_until

from orion_oie import InvalidRequestError, TextStats, TextStreamer, TokenEvent, stream_text
from orion_oie.engine.streaming import split_words

PROSE = "Hello there. How are you? Fine"


class Pauses:
    """Sleeps by moving a clock, and counts."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.slept: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.clock.tick(seconds)

    async def later(self, seconds: float) -> None:
        self(seconds)
        await asyncio.sleep(0)


def streamed(text: Any, chunk_by: Any = "word", pauses: Pauses | None = None, **more: Any) -> Any:
    """A stream that does not sleep."""
    pauses = pauses or Pauses()
    return stream_text(
        text, chunk_by, clock=pauses.clock, sleep=pauses, sleep_async=pauses.later, **more
    )


async def taken(stream: TextStreamer) -> list[str]:
    return [event.text async for event in stream]


def in_both_ways(text: Any, chunk_by: Any) -> list[str]:
    """The pieces by `for`, which are those by `async for`."""
    pieces = [event.text for event in streamed(text, chunk_by)]
    assert asyncio.run(taken(streamed(text, chunk_by))) == pieces
    return pieces


async def apart(*parts: Any) -> AsyncIterator[Any]:
    for part in parts:
        await asyncio.sleep(0)
        yield part


# Pieces


@pytest.mark.parametrize(
    ("chunk_by", "pieces"),
    [
        ("token", ["Hello", " there", ".", " How", " are", " you", "?", " Fine"]),
        ("word", ["Hello ", "there. ", "How ", "are ", "you? ", "Fine"]),
        ("sentence", ["Hello there. ", "How are you? ", "Fine"]),
        (lambda text: ([], text), [PROSE]),
        (lambda text: (re.findall("..", text), text[len(text) // 2 * 2 :]), None),
    ],
)
def test_a_text_comes_in_pieces(chunk_by: Any, pieces: list[str] | None) -> None:
    """Tokens, words, sentences, or what the caller's function cuts; together they are the text."""
    got = in_both_ways(PROSE, chunk_by)
    assert "".join(got) == PROSE
    assert pieces is None or got == pieces


@pytest.mark.parametrize("text", ["  two\n\nlines  ", "你好。再见！", "…", "é́", " ", "x" * 10_000])
@pytest.mark.parametrize("chunk_by", ["token", "word", "sentence"])
def test_no_character_is_lost(text: str, chunk_by: str) -> None:
    """White space, other scripts, marks and long words come out as they went in."""
    assert "".join(in_both_ways(text, chunk_by)) == text


def test_parts_of_an_iterable_are_joined_and_cut() -> None:
    """Parts that cut through words are joined; by "token" they come as they are."""
    parts = ["Hel", "lo the", "", "re. Bye"]
    assert in_both_ways(parts, "word") == ["Hello ", "there. ", "Bye"]
    assert in_both_ways(parts, "token") == ["Hel", "lo the", "re. Bye"]
    assert [e.text for e in streamed(part for part in parts)] == ["Hello ", "there. ", "Bye"]


def test_parts_may_come_from_an_asynchronous_iterable() -> None:
    """They are joined and cut in the same way."""
    assert asyncio.run(taken(streamed(apart("One. T", "wo"), "sentence"))) == ["One. ", "Two"]


@pytest.mark.parametrize("empty", ["", [], [""], iter(())])
def test_an_empty_text_has_no_pieces(empty: Any) -> None:
    """It is complete at once."""
    seen: list[tuple[str, TextStats]] = []
    stream = streamed(empty, on_complete=lambda text, stats: seen.append((text, stats)))
    assert list(stream) == []
    assert seen == [("", TextStats(0, 0.0, None))]


# Pauses and numbers


def test_there_is_a_pause_between_two_pieces() -> None:
    """30 ms unless told otherwise; none before the first and none after the last."""
    for take in (list, lambda stream: asyncio.run(taken(stream))):
        pauses = Pauses()
        take(streamed("one two three", pauses=pauses))
        assert pauses.slept == [0.03] * 2
        pauses = Pauses()
        take(streamed("one two three", pauses=pauses, typewriter_delay=0.5))
        assert pauses.slept == [0.5] * 2
        pauses = Pauses()
        take(streamed("one two three", pauses=pauses, typewriter_delay=0))
        assert pauses.slept == []


def test_events_and_stats_tell_the_time() -> None:
    """Events count from the first step; the numbers are those of the pieces given out."""
    pauses = Pauses()
    stream = streamed("one two three", pauses=pauses, typewriter_delay=0.5)
    pauses.clock.tick(7)  # before the first step: it does not count
    assert stream.stats == TextStats(0, 0.0, None)
    assert list(stream) == [
        TokenEvent("one ", 0, 0.0),
        TokenEvent("two ", 1, 500.0),
        TokenEvent("three", 2, 1000.0),
    ]
    pauses.clock.tick(7)
    assert stream.stats == TextStats(3, 1000.0, 3.0)
    assert stream.text == "one two three"
    assert repr(stream) == "<TextStreamer after 3 pieces>"


def test_the_usual_pauses_are_real_and_short() -> None:
    """Without injected time the stream sleeps, and measures it."""
    stream = stream_text("one two", typewriter_delay=0.001)
    assert stream.run() == "one two"
    assert stream.stats.total_ms >= 1
    waited = stream_text("one two", typewriter_delay=0.001)
    assert asyncio.run(taken(waited)) == ["one ", "two"]
    assert waited.stats.total_ms >= 1


# Callbacks


def test_callbacks_get_the_whole_text_so_far() -> None:
    """on_token with each event before the reader has it; on_complete once, with the numbers."""
    calls: list[Any] = []
    pauses = Pauses()
    more = {
        "on_token": lambda text, event: calls.append((text, event.index)),
        "on_complete": lambda text, stats: calls.append((text, stats)),
        "typewriter_delay": 0.25,
    }
    expected = [("a ", 0), ("a b ", 1), ("a b c", 2), ("a b c", TextStats(3, 500.0, 6.0))]
    assert streamed("a b c", pauses=pauses, **more).run() == "a b c"
    assert calls == expected
    calls.clear()

    async def main() -> str:
        return await streamed("a b c", pauses=pauses, **more)

    assert asyncio.run(main()) == "a b c"
    assert calls == expected


@pytest.mark.parametrize("name", ["on_token", "on_complete"])
def test_a_failing_callback_ends_the_stream(name: str) -> None:
    """What it raises is the cause of an InvalidRequestError, by `for` and by `async for`."""

    def fail(*_: Any) -> None:
        raise KeyError("broken")

    for take in (list, lambda stream: asyncio.run(taken(stream))):
        stream = streamed("a b", **{name: fail})
        with pytest.raises(InvalidRequestError, match=f"{name} raised KeyError") as caught:
            take(stream)
        assert isinstance(caught.value.__cause__, KeyError)
        assert stream.cancel() is False
        assert stream.text == ("a " if name == "on_token" else "a b")


@pytest.mark.parametrize("name", ["on_token", "on_complete"])
def test_only_a_plain_function_can_be_called(name: str) -> None:
    """A coroutine function would never run, and something else cannot be called."""

    async def later(*_: Any) -> None:
        raise AssertionError

    for wrong in (later, 3, "print"):
        with pytest.raises(InvalidRequestError, match=f"{name}: allowed is a plain function"):
            stream_text("a", **{name: wrong})


# Cancelling and leaving


def test_a_cancelled_stream_gives_out_nothing_more() -> None:
    """The loop ends without an error, and on_complete is not called."""
    completed: list[str] = []
    for is_async in (False, True):
        pauses = Pauses()
        stream = streamed("a b c", pauses=pauses, on_complete=lambda t, _: completed.append(t))
        seen: list[str] = []

        def see(event: TokenEvent, stream: TextStreamer = stream, seen: Any = seen) -> None:
            seen.append(event.text)
            if len(seen) == 2:
                assert stream.cancel() is True

        async def main(stream: TextStreamer = stream, see: Any = see) -> None:
            async for event in stream:
                see(event)

        if is_async:
            asyncio.run(main())
        else:
            for event in stream:
                see(event)
        assert seen == ["a ", "b "]
        assert (stream.is_cancelled, stream.text, pauses.slept) == (True, "a b ", [0.03])
        assert stream.cancel() is False
    assert completed == []


def test_another_thread_may_cancel() -> None:
    """A long pause ends at once."""
    stream = stream_text("a b", typewriter_delay=3600)
    running = Running(stream.run)
    wait_until(lambda: stream.text == "a ")
    assert stream.cancel() is True
    assert running.join() == "a "


def test_a_stream_cancelled_before_it_began_is_empty() -> None:
    """Nothing is read from its parts beyond the first."""
    stream = streamed(["a ", "b "])
    assert stream.cancel() is True
    assert list(stream) == []
    assert stream.text == ""


def test_a_cancelled_task_ends_the_stream() -> None:
    """It raises CancelledError as usual, and completes nothing."""
    completed: list[str] = []
    stream = stream_text("a b", typewriter_delay=3600, on_complete=lambda t, _: completed.append(t))

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream, 0.02)

    asyncio.run(main())
    assert (stream.text, completed, stream.cancel()) == ("a ", [], False)


def test_a_loop_that_was_left_may_be_continued() -> None:
    """A second loop goes on where the first one stopped; after the end there is nothing."""
    stream = streamed("a b c")
    for event in stream:
        assert event.text == "a "
        break
    assert [event.text for event in stream] == ["b ", "c"]
    assert list(stream) == []
    assert stream.run() == "a b c"


def test_a_text_is_streamed_in_one_way() -> None:
    """`for` after `async for`, and the reverse, would mix the pieces: it is refused."""
    stream = streamed("a b")
    next(iter(stream))
    with pytest.raises(InvalidRequestError, match="`for` began it"):
        asyncio.run(taken(stream))
    assert [event.text for event in stream] == ["b"]
    other = streamed("a b")
    assert asyncio.run(taken(other)) == ["a ", "b"]
    with pytest.raises(InvalidRequestError, match="`async for` began it"):
        list(other)


# What is wrong


@pytest.mark.parametrize("wrong", [None, 3, b"bytes", bytearray(b"bytes")])
def test_what_is_no_text_is_refused(wrong: Any) -> None:
    """At the call, with its type."""
    with pytest.raises(InvalidRequestError, match=f"text: .*got {type(wrong).__name__}"):
        stream_text(wrong)


def test_a_part_that_is_no_str_is_refused() -> None:
    """At its step, after the pieces before it."""
    for wrong in (3, None, b"x", TokenEvent("x", 0, 0.0)):
        stream = streamed(["a ", wrong])
        with pytest.raises(InvalidRequestError, match=f"must be a str, got {type(wrong).__name__}"):
            list(stream)
        assert stream.text == "a "
        with pytest.raises(InvalidRequestError, match="must be a str"):
            asyncio.run(taken(streamed(apart("a ", wrong))))


def test_an_asynchronous_iterable_needs_an_asynchronous_loop() -> None:
    """`for` and `run()` say so."""
    with pytest.raises(InvalidRequestError, match="needs `async for`"):
        streamed(apart("a")).run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_by": "letter"}, "chunk_by: 'letter' is not known"),
        ({"chunk_by": None}, "chunk_by: None is not known"),
        ({"typewriter_delay": -1}, "typewriter_delay: .*got -1"),
        ({"typewriter_delay": float("nan")}, "typewriter_delay: .*got nan"),
        ({"typewriter_delay": "fast"}, "typewriter_delay: .*got 'fast'"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    """At the call, with what is allowed."""
    with pytest.raises(InvalidRequestError, match=message):
        stream_text("a", **options)


@pytest.mark.parametrize("wrong", [lambda t: ([t.upper()], ""), lambda t: 1 / 0, lambda t: t])
def test_a_splitter_that_changes_text_is_refused(wrong: Any) -> None:
    """So is one that raises, or returns something else."""
    with pytest.raises(InvalidRequestError, match="chunk_by: the function"):
        streamed("abc", wrong).run()


def test_an_error_of_the_parts_comes_out_as_it_is() -> None:
    """After the pieces that were complete; on_complete is not called."""

    def parts() -> Iterator[str]:
        yield "a b"
        raise OSError("the source is gone")

    completed: list[str] = []
    stream = streamed(parts(), on_complete=lambda text, _: completed.append(text))
    with pytest.raises(OSError, match="the source is gone"):
        list(stream)
    assert (stream.text, completed) == ("a ", [])


# With an engine, and without


def test_the_events_of_an_engine_can_be_streamed_again(make_engine: Any) -> None:
    """A token stream of an engine goes in, sentences come out."""
    engine = make_engine()
    stream = streamed((event.text for event in engine.stream("Hello?")), "sentence")
    assert stream.run() == "One fine answer."

    async def main() -> str:
        return await streamed(event.text async for event in engine.astream("Hello?"))

    assert asyncio.run(asyncio.wait_for(main(), BOUND_S)) == "One fine answer."


def test_dropping_a_stream_drops_its_parts(make_engine: Any) -> None:
    """A request behind it ends, without waiting for the collector of garbage."""
    engine = make_engine({"*": LONG})
    stream = streamed(event.text for event in engine.stream("Hello?"))
    assert next(stream).text == "word "
    gc.disable()
    try:
        del stream
        wait_until(lambda: engine.stats().requests.cancelled == 1)
    finally:
        gc.enable()


def test_a_long_text_takes_linear_time() -> None:
    """A megabyte by word, without on_token, within seconds."""
    started = time.monotonic()
    assert len(streamed("word " * 200_000, typewriter_delay=0).run()) == 1_000_000
    assert time.monotonic() - started < BOUND_S


def test_a_stream_of_words_is_the_splitters() -> None:
    """stream_text cuts as an engine cuts."""
    assert in_both_ways(PROSE, "word") == in_both_ways(PROSE, split_words)


def test_importing_it_loads_no_engine() -> None:
    """Neither the engine nor anything that only an engine needs."""
    heavy = ["orion_oie.engine.engine", "orion_oie.engine.pipeline", "orion_oie.config"]
    heavy += ["asyncio", "llama_cpp", "numpy", "structlog", "transitions"]
    program = (
        "import sys; from orion_oie import stream_text; "
        "text = stream_text('a b', typewriter_delay=0).run(); "
        f"print(text, [m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("a b []\n", "")
