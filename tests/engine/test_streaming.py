"""The text of an answer reaches every reader whole, in pieces, however it is cut."""

import asyncio
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from helpers import BOUND_S, Running, run_all, wait_until
from hypothesis import given
from hypothesis import strategies as st
from internals import expect_pending

from orion_oie.engine.streaming import (
    Splitter,
    TextStream,
    split_sentences,
    split_tokens,
    split_words,
    splitter_of,
)
from orion_oie.errors import InvalidRequestError, WorkerCrashedError
from orion_oie.schemas.results import TokenEvent

SPLITTERS = [split_tokens, split_words, split_sentences]
texts = st.text(
    alphabet=st.one_of(st.characters(), st.sampled_from(list(" .!?…。！？\n\t\"')]」』）ab1"))),
    max_size=60,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def pushed(pieces: list[str], splitter: Splitter = split_tokens) -> list[str]:
    """What a reader gets when `pieces` are pushed one after another."""
    stream = TextStream(splitter)
    for piece in pieces:
        stream.push(piece, 1)
    stream.close()
    return [event.text for event in stream]


def read(stream: TextStream) -> list[TokenEvent]:
    return list(stream)


def reader(stream: TextStream) -> Running:
    """A reader on a thread of its own that is already waiting for events."""
    running = Running(read, stream)
    wait_until(lambda: stream.is_observed)
    return running


async def read_async(stream: TextStream) -> list[TokenEvent]:
    return [event async for event in stream]


def shown(events: list[TokenEvent]) -> list[str]:
    """The texts of events, a restart as "<restart>"."""
    return [event.text if event.kind == "text" else "<restart>" for event in events]


# Splitters


@pytest.mark.parametrize("splitter", SPLITTERS)
@given(text=texts, cuts=st.lists(st.integers(0, 60)))
def test_no_cut_changes_the_text(splitter: Splitter, text: str, cuts: list[int]) -> None:
    """The pieces of any text, pushed in any cut, join to that text; none is empty."""
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = pushed([text[a:b] for a, b in itertools.pairwise(edges)], splitter)
    assert "".join(pieces) == text
    assert all(pieces)


@pytest.mark.parametrize("splitter", SPLITTERS)
@given(text=texts)
def test_a_splitter_has_nothing_left_to_say(splitter: Splitter, text: str) -> None:
    """What a splitter holds back, asked again, is still held back."""
    _, rest = splitter(text)
    assert splitter(rest) == ([], rest)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("one two  three", ["one ", "two ", " three"]),
        ("  one\ntwo ", ["  one\n", "two "]),
        ("one", ["one"]),
        ("   ", ["   "]),
        ("", []),
    ],
)
def test_words(text: str, pieces: list[str]) -> None:
    """A word comes as soon as it has white space behind it."""
    assert pushed(list(text), split_words) == pieces


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One. Two! Three? Four", ["One. ", "Two! ", "Three? ", "Four"]),
        ('He said "no." She left.', ['He said "no." ', "She left."]),
        ("Wait... what?! Yes.", ["Wait... ", "what?! ", "Yes."]),
        ("line one\nline two\n\nthree", ["line one\n", "line two\n", "\n", "three"]),
        ("你好。再见！好", ["你好。", "再见！", "好"]),
        ("Pi is 3.14 today. Next one. End", ["Pi is 3.14 today. ", "Next one. ", "End"]),
        ("Open file.py now! Then a.b.c\nEnd", ["Open file.py now! ", "Then a.b.c\n", "End"]),
        ("- item.\n- next", ["- item.\n", "- next"]),
        ("no end", ["no end"]),
    ],
)
def test_sentences(text: str, pieces: list[str]) -> None:
    """A sentence or a line comes with the white space behind it; a dot inside a word ends none."""
    assert pushed(list(text), split_sentences) == pieces


@pytest.mark.parametrize("splitter", SPLITTERS)
@pytest.mark.parametrize("unit", [".", "?!", "a", " ", "3.1", '"', "。", "'.", ".) "])
def test_splitters_take_linear_time(splitter: Splitter, unit: str) -> None:
    """A hundred thousand characters of one kind are split within seconds."""
    text = unit * (100_000 // len(unit))
    started = time.monotonic()
    splitter(text)
    assert time.monotonic() - started < 5


def test_a_name_or_a_function_gives_the_splitter() -> None:
    """chunk_by is the name of a splitter or one of the caller's own."""
    assert splitter_of("token") is split_tokens
    assert splitter_of("word") is split_words
    assert splitter_of("sentence") is split_sentences
    assert splitter_of(split_words) is split_words


@pytest.mark.parametrize("wrong", ["words", "", None, 3, ["token"]])
def test_another_name_is_refused(wrong: object) -> None:
    """A chunk_by that is neither raises InvalidRequestError and says what is allowed."""
    with pytest.raises(InvalidRequestError, match="'token', 'word', 'sentence'"):
        splitter_of(wrong)


def test_a_splitter_of_the_callers_own() -> None:
    """The caller's splitter decides the pieces; what it holds back comes at the end."""

    def by_comma(text: str) -> tuple[list[str], str]:
        *pieces, rest = re.split(r"(?<=,)", text)
        return pieces, rest

    assert pushed(["a,b", "c,d", "e"], by_comma) == ["a,", "bc,", "de"]


@pytest.mark.parametrize(
    "splitter",
    [
        lambda text: ([text.strip()], ""),
        lambda text: ([text.upper()], ""),
        lambda text: ([text], text),
        lambda _text: ([], ""),
    ],
    ids=["strips", "changes", "doubles", "swallows"],
)
def test_a_splitter_that_changes_text_is_refused(splitter: Splitter) -> None:
    """A splitter whose pieces and rest are not the text raises InvalidRequestError for its reader,
    not for the writer."""
    stream = TextStream(splitter)
    stream.push(" a b ", 1)
    with pytest.raises(InvalidRequestError, match="loses or changes text"):
        next(iter(stream))


@pytest.mark.parametrize("wrong", [None, ["ab"], ([1], ""), (["ab"], None)])
def test_a_splitter_that_returns_nonsense_is_the_callers_mistake(wrong: object) -> None:
    """A splitter that returns something else raises InvalidRequestError."""
    stream = TextStream(lambda _text: wrong)
    stream.push("ab", 1)
    with pytest.raises(InvalidRequestError, match="chunk_by"):
        next(iter(stream))


def test_a_splitter_that_raises_is_the_callers_mistake() -> None:
    """What a splitter raises becomes the cause of an InvalidRequestError."""
    stream = TextStream(lambda text: 1 / 0)
    stream.push("ab", 1)
    with pytest.raises(InvalidRequestError, match="ZeroDivisionError") as caught:
        next(iter(stream))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# Readers


def test_events_are_numbered_and_timed() -> None:
    """Events carry their index and the milliseconds since the start of the stream."""
    clock = Clock()
    stream = TextStream(clock=clock)
    clock.now_s += 0.5
    stream.push("a", 1)
    clock.now_s += 0.25
    stream.push("b", 2)
    stream.close()
    assert list(stream) == [TokenEvent("a", 0, 500.0), TokenEvent("b", 1, 750.0)]


def test_every_reader_sees_every_event() -> None:
    """Readers that wait, one that comes in the middle and one after the end see the same."""
    stream = TextStream()
    early = [reader(stream) for _ in range(3)]
    stream.push("a", 1)
    stream.push("b", 1)
    middle = Running(read, stream)
    stream.push("c", 1)
    stream.close()
    late = Running(read, stream)
    for running in (*early, middle, late):
        assert shown(running.join()) == ["a", "b", "c"]


def test_readers_and_writer_at_once() -> None:
    """Under load every reader, synchronous or not, sees every event once and in order."""
    stream = TextStream(split_words)
    pieces = [f"{n} " for n in range(400)]

    def write() -> None:
        for piece in pieces:
            stream.push(piece, 1)
        stream.close()

    runs = run_all(
        [
            write,
            *[lambda: read(stream)] * 3,
            *[lambda: asyncio.run(read_async(stream))] * 3,
        ]
    )
    for run in runs[1:]:
        assert shown(run.join()) == pieces


def test_the_error_comes_after_the_text() -> None:
    """A stream that ends with an error gives out what it has, held back text too, then raises."""
    stream = TextStream(split_words)
    waiting = Running(lambda: [(e.text, seen.append(e.text)) for e in stream])
    seen: list[str] = []
    stream.push("one tw", 2)
    stream.close(WorkerCrashedError("gone"))
    with pytest.raises(WorkerCrashedError, match="gone"):
        waiting.join()
    assert seen == ["one ", "tw"]
    with pytest.raises(WorkerCrashedError, match="gone"):
        list(stream)


def test_an_empty_answer_has_no_events() -> None:
    """A stream without text ends without events, and has no time to first text."""
    stream = TextStream()
    stream.push("", 3)
    assert not stream.has_text
    stream.close()
    assert list(stream) == []
    assert stream.text == ""
    assert stream.stats().ttft_ms is None


def test_text_is_what_was_given_out() -> None:
    """`text` grows with the events; `joined` gives the same without counting as a look."""
    stream = TextStream(split_words)
    stream.push("one tw", 2)
    assert stream.joined() == "one "
    assert not stream.is_observed
    assert stream.text == "one "
    assert stream.is_observed
    stream.flush()
    assert stream.text == stream.joined() == "one tw"
    stream.flush()
    assert stream.text == "one tw"


# Restart


def test_a_restart_nobody_saw_is_silent() -> None:
    """Without an observer, the voided text leaves no trace."""
    stream = TextStream(split_words)
    stream.push("void this", 2)
    stream.restart()
    assert not stream.has_text
    stream.push("good ", 1)
    stream.close()
    assert list(stream) == [TokenEvent("good ", 0, pytest.approx(0, abs=BOUND_S * 1e3))]


def test_a_restart_that_was_seen_is_an_event() -> None:
    """A reader of voided text, waiting or late, gets a restart event; the text begins again."""
    stream = TextStream(split_words)
    running = reader(stream)
    stream.push("void this", 2)
    stream.restart()
    assert stream.text == ""
    stream.push("good end", 2)
    stream.close()
    events = running.join()
    assert shown(events) == ["void ", "<restart>", "good ", "end"]
    assert [event.index for event in events] == [0, 1, 2, 3]
    assert stream.text == "good end"
    assert list(stream) == events


def test_a_look_at_the_text_counts_as_seen() -> None:
    """After `text` was read, a restart cannot be silent."""
    stream = TextStream()
    stream.push("void", 1)
    assert stream.text == "void"
    stream.restart()
    stream.close()
    assert shown(list(stream)) == ["void", "<restart>"]


def test_restarts_may_repeat() -> None:
    """After several restarts the text is that of the last attempt."""
    stream = TextStream()
    assert not stream.text
    for attempt in ("a", "b", "c"):
        stream.push(attempt, 1)
        if attempt != "c":
            stream.restart()
    stream.close()
    assert shown(list(stream)) == ["a", "<restart>", "b", "<restart>", "c"]
    assert stream.text == "c"


# Asynchronous readers


def test_async_iteration_gives_the_same() -> None:
    """An asynchronous reader gets the events while they come from another thread."""
    stream = TextStream()

    async def main() -> list[str]:
        task = asyncio.create_task(read_async(stream))
        while not stream.is_observed:
            await asyncio.sleep(0)
        for piece in ("a", "b", "c"):
            await asyncio.to_thread(stream.push, piece, 1)
        await asyncio.to_thread(stream.close)
        return shown(await asyncio.wait_for(task, BOUND_S))

    assert asyncio.run(main()) == ["a", "b", "c"]


def test_async_readers_get_the_error_after_the_text() -> None:
    """An asynchronous reader gets the text, then the error."""
    stream = TextStream()
    stream.push("a", 1)
    stream.close(WorkerCrashedError("gone"))
    seen: list[str] = []

    async def main() -> None:
        async for event in stream:
            seen.append(event.text)

    with pytest.raises(WorkerCrashedError, match="gone"):
        asyncio.run(main())
    assert seen == ["a"]


def wakers_of(stream: TextStream) -> int:
    """The number of readers that the writer has to wake: one left behind changes nothing else."""
    return len(stream._wakers)


def test_leaving_an_async_loop_early_leaves_nothing() -> None:
    """After a break, the writer has nobody left to wake and goes on; another reader sees all."""
    stream = TextStream()
    stream.push("a", 1)

    async def main() -> None:
        async for _ in stream:
            break
        while wakers_of(stream):
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(main(), BOUND_S))
    stream.push("b", 1)
    stream.close()
    assert shown(list(stream)) == ["a", "b"]


def test_a_closed_loop_does_not_disturb_the_writer() -> None:
    """A reader whose event loop was closed under it is passed over."""
    stream = TextStream()
    loop = asyncio.new_event_loop()
    events = aiter(stream)
    pending = loop.create_task(anext(events))
    loop.call_soon(loop.stop)
    loop.run_forever()
    assert wakers_of(stream)
    closed = loop.is_closed
    loop.is_closed = lambda: False  # the loop closes between the question and the call
    loop.close()
    try:
        stream.push("a", 1)
        stream.close()
    finally:
        loop.is_closed = closed
        expect_pending(pending)
    assert stream.text == "a"


# Numbers


def test_stats_count_tokens_not_events() -> None:
    """tokens counts what was pushed; the speed is that of the tokens after the first."""
    clock = Clock()
    stream = TextStream(clock=clock)
    assert stream.stats().tokens == 0
    clock.now_s += 2
    stream.push("a", 1)
    stats = stream.stats()
    assert (stats.tokens, stats.ttft_ms, stats.tokens_per_second) == (1, 2000.0, None)
    clock.now_s += 0.5
    stream.push("", 1)
    clock.now_s += 0.5
    stream.push("bc", 3)
    stats = stream.stats()
    assert (stats.tokens, stats.ttft_ms, stats.tokens_per_second) == (5, 2000.0, 4.0)
    assert stream.first_text_ms == 2000.0


def test_stats_are_those_of_the_present_attempt() -> None:
    """A restart begins the counts again; the time to first text still runs from the start."""
    clock = Clock()
    stream = TextStream(clock=clock)
    stream.push("void", 7)
    stream.restart()
    assert stream.stats().tokens == 0
    assert stream.stats().ttft_ms is None
    clock.now_s += 3
    stream.push("good", 1)
    assert stream.stats().tokens == 1
    assert stream.stats().ttft_ms == 3000.0


def test_stats_may_be_read_while_the_stream_restarts() -> None:
    """Reading the numbers from another thread never fails, whatever the writer does."""
    stream = TextStream()
    is_done = threading.Event()

    def write() -> None:
        ends_at = time.monotonic() + 0.3
        while time.monotonic() < ends_at:
            stream.push("a", 1)
            stream.push("b", 1)
            stream.restart()
        is_done.set()

    def look() -> None:
        while not is_done.is_set():
            for first_ms in (stream.stats().ttft_ms, stream.first_text_ms):
                assert first_ms is None or first_ms >= 0

    for run in run_all([write, look, look]):
        run.join()


# The typewriter


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Collects what readers sleep, instead of sleeping."""
    slept: list[float] = []

    async def sleep(seconds: float, _sleep: Callable[[float], object] = asyncio.sleep) -> None:
        slept.append(seconds)
        await _sleep(0)

    with monkeypatch.context() as patch:
        patch.setattr("orion_oie.engine.streaming.time.sleep", slept.append)
        patch.setattr("asyncio.sleep", sleep)
        yield slept


def test_the_typewriter_pauses_after_each_piece(sleeps: list[float]) -> None:
    """A reader pauses after every piece it takes; the writer does not."""
    stream = TextStream(typewriter_delay_s=0.25)
    for piece in ("a", "b", "c"):
        stream.push(piece, 1)
    stream.close()
    assert sleeps == []
    assert shown(list(stream)) == ["a", "b", "c"]
    assert sleeps == [0.25] * 3
    assert shown(asyncio.run(read_async(stream))) == ["a", "b", "c"]
    assert sleeps == [0.25] * 6


def test_without_a_typewriter_there_is_no_pause(sleeps: list[float]) -> None:
    """A delay of 0 sleeps never."""
    stream = TextStream()
    stream.push("a", 1)
    stream.close()
    assert shown(list(stream)) == shown(asyncio.run(read_async(stream))) == ["a"]
    assert sleeps == []


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf"), "fast", None, True])
def test_a_wrong_delay_is_refused(wrong: object) -> None:
    """A delay that is no number of seconds from 0 on raises InvalidRequestError at once."""
    with pytest.raises(InvalidRequestError, match="typewriter_delay"):
        TextStream(typewriter_delay_s=wrong)
