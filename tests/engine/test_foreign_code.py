"""Code of the application that an engine calls may ask it, block and raise anything.

Every engine here serves one request at a time, so a thread that is held shows at once.
"""

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import LONG, TEXT, MakeEngine, delivered, ended, one_at_a_time
from helpers import BOUND_S, Held, Running, no_more_threads, wait_until

from orion_oie import (
    DeadlineExceededError,
    Event,
    InvalidRequestError,
    OrionInferenceEngine,
    RequestHandle,
    RequestState,
    TokenEvent,
)
from orion_oie.backends.fake import FakeAnswer, FakeBackend
from orion_oie.engine.stand_ins import forget_warnings
from orion_oie.pool.footprint_ledger import FILE_NAME
from orion_oie.routing.base import RouteContext
from orion_oie.schemas.results import Route

EVERYTHING = [ValueError("odd"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()]
each_error = pytest.mark.parametrize("error", EVERYTHING, ids=lambda error: type(error).__name__)


class Textless(Exception):  # noqa: N818 (it is odd in every way)
    """An error whose text fails."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """What blocks until the test is over."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def engine(make_engine: MakeEngine) -> OrionInferenceEngine:
    return make_engine(**one_at_a_time())


def raising(error: BaseException) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise error

    return call


def asks(engine: OrionInferenceEngine, answers: list[str]) -> Callable[..., None]:
    """Code that asks the engine once and waits for the answer."""
    lock = threading.Lock()

    def call(*_: object) -> None:
        if lock.acquire(blocking=False):
            answers.append(engine.infer("From within?").content)

    return call


def answers_still(engine: OrionInferenceEngine) -> bool:
    """True if the engine answers, by its one thread, whoever blocks meanwhile."""
    return engine.submit("Still there?").result(BOUND_S).content == TEXT


# Done callbacks


def test_done_callbacks_may_ask(engine: OrionInferenceEngine) -> None:
    """Sixteen requests, asked by done callbacks of sixteen others, are all answered."""
    answers: list[str] = []

    def ask(_handle: RequestHandle) -> None:
        answers.append(engine.infer("And you?").content)

    for _ in range(16):
        engine.submit("Hello?").add_done_callback(ask)
    wait_until(lambda: len(answers) == 16)
    assert answers == [TEXT] * 16


def test_a_blocked_done_callback_delays_nobody(
    make_engine: MakeEngine, never: threading.Event
) -> None:
    """Neither another request's deadline, nor its callback, nor one more of the same request."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held}, **one_at_a_time())
    first = engine.submit("First?")
    held.wait_for()
    called: list[str] = []
    waiting = [engine.submit("Hello?", deadline=0.02), engine.submit("Hello?", deadline=0.03)]
    for handle in waiting:
        handle.add_done_callback(lambda _handle: never.wait(BOUND_S))
        handle.add_done_callback(lambda handle: called.append(handle.id))
    for handle in waiting:
        with pytest.raises(DeadlineExceededError):
            handle.result(BOUND_S / 2)
    wait_until(lambda: len(called) == 2, BOUND_S / 2)
    held.let_go.set()
    assert first.result(BOUND_S).content == TEXT
    assert answers_still(engine)


def test_many_blocked_done_callbacks_hold_back_none(
    engine: OrionInferenceEngine, never: threading.Event
) -> None:
    """One that comes after fifty that never return is called."""
    for _ in range(50):
        engine.submit("Hello?").add_done_callback(lambda _handle: never.wait(BOUND_S))
    called = threading.Event()
    engine.submit("Hello?").add_done_callback(lambda _handle: called.set())
    assert called.wait(BOUND_S / 2)


@each_error
def test_what_a_done_callback_raises_is_counted(
    engine: OrionInferenceEngine, error: BaseException
) -> None:
    """It reaches nobody else; it is an event of the request, and counted."""
    handle = engine.submit("Hello?")
    handle.add_done_callback(raising(error))
    assert handle.result(BOUND_S).content == TEXT
    wait_until(lambda: engine.stats().callback_errors == 1)
    (event,) = [one for one in engine.export_logs() if one["event"] == "callback.failed"]
    assert (event["kind"], event["error"]) == ("done callback", type(error).__name__)
    assert event["request_id"] == handle.id
    assert answers_still(engine)


def test_a_callback_of_the_load_may_block(
    engine: OrionInferenceEngine, never: threading.Event
) -> None:
    """`complete_loading` is a future of the application's: its callbacks hold no thread."""
    handle = engine.submit("Hello?")
    begun = threading.Event()

    def block(_future: object) -> None:
        begun.set()
        never.wait(BOUND_S)

    handle.complete_loading.add_done_callback(block)
    assert begun.wait(BOUND_S)
    assert answers_still(engine)


def test_a_done_callback_comes_when_there_is_a_thread(engine: OrionInferenceEngine) -> None:
    """Without a thread it waits for the next one, and the request ends."""
    handle = engine.submit("Hello?")
    assert handle.result(BOUND_S).content == TEXT
    called: list[str] = []
    with no_more_threads():
        handle.add_done_callback(lambda _handle: called.append("first"))
    handle.add_done_callback(lambda _handle: called.append("second"))
    wait_until(lambda: sorted(called) == ["first", "second"])


# Subscribers


def test_a_subscriber_may_ask_and_plan(engine: OrionInferenceEngine) -> None:
    """Also while it hears of the load of the model that it waits for."""
    answers: list[str] = []
    ask = asks(engine, answers)

    def hear(event: Event) -> None:
        engine.plan("Hello?")
        if event.name == "model.loaded":
            ask()

    engine.subscribe(hear)
    assert engine.submit("Hello?").result(BOUND_S).content == TEXT
    wait_until(lambda: answers == [TEXT])


@pytest.mark.parametrize("name", ["request.received", "model.loading", "request.succeeded"])
def test_a_blocked_subscriber_delays_nobody(
    engine: OrionInferenceEngine, never: threading.Event, name: str
) -> None:
    """Requests are answered, other subscribers hear of it, and the log is kept."""
    heard: list[str] = []
    engine.subscribe(lambda event: event.name == name and never.wait(BOUND_S))
    engine.subscribe(lambda event: heard.append(event.name))
    assert answers_still(engine)
    assert answers_still(engine)
    wait_until(lambda: heard.count("request.succeeded") == 2, BOUND_S / 2)


def test_a_subscriber_may_close_the_engine(engine: OrionInferenceEngine) -> None:
    """A shutdown from within does not wait for itself."""
    heard: list[str] = []

    def close(event: Event) -> None:
        if event.name == "request.succeeded":
            engine.close()
        heard.append(event.name)

    engine.subscribe(close)
    assert answers_still(engine)
    wait_until(lambda: "engine.closed" in heard, BOUND_S / 2)


def test_a_subscriber_may_unload_the_model_that_was_loaded(engine: OrionInferenceEngine) -> None:
    """The thread of the load is not in its way."""
    unloaded: list[bool] = []

    def unload(event: Event) -> None:
        if event.name == "request.succeeded":
            unloaded.append(engine.unload("conversation"))

    engine.subscribe(unload)
    assert answers_still(engine)
    wait_until(lambda: unloaded)
    assert answers_still(engine)


def test_a_damaged_ledger_and_a_subscriber_that_plans(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    """What is wrong is reported while the file is read, and a plan reads it too."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / FILE_NAME).write_text("{ no JSON")
    engine = make_engine(**one_at_a_time(), download={"cache_dir": tmp_path / "cache"})
    heard: list[str] = []

    def plan(event: Event) -> None:
        engine.plan("Hello?")
        heard.append(event.name)

    engine.subscribe(plan)
    assert answers_still(engine)
    wait_until(lambda: "memory.trouble" in heard)


def test_events_that_nobody_takes_are_lost_and_counted(
    make_engine: MakeEngine, never: threading.Event
) -> None:
    """A subscriber that blocks costs a bounded amount of memory: the oldest events are lost."""
    engine = make_engine(max_events=0)
    heard: list[str] = []

    def hear(event: Event) -> None:
        never.wait(2 * BOUND_S)
        heard.append(event.request_id)

    leave = engine.subscribe(hear)
    last = ""
    while not engine.stats().lost_events:
        for _ in range(300):
            last = ended(engine.submit("")).id  # refused: it is quick
    never.set()
    leave()
    assert heard[-1] == last


# Logging


class Odd(logging.Handler):
    """A handler that does what it is told to."""

    def __init__(self, act: Callable[..., None]) -> None:
        super().__init__()
        self._act = act

    def emit(self, record: logging.LogRecord) -> None:
        self._act(record)


@pytest.fixture
def logging_to() -> Iterator[Callable[[Callable[..., None]], None]]:
    """Has the library log to a handler."""
    logger = logging.getLogger("orion_oie")
    level = logger.level
    handlers: list[Odd] = []

    def attach(act: Callable[..., None]) -> None:
        handlers.append(Odd(act))
        logger.addHandler(handlers[-1])
        logger.setLevel(logging.DEBUG)

    yield attach
    logger.setLevel(level)
    for handler in handlers:
        logger.removeHandler(handler)


@each_error
def test_a_handler_that_raises_fails_no_request(
    engine: OrionInferenceEngine, logging_to: Any, error: BaseException
) -> None:
    """Whatever it raises, at every line; the failure is an event once, and counted each time."""
    heard: list[Event] = []
    engine.subscribe(heard.append)
    logging_to(raising(error))
    assert answers_still(engine)
    failed = ended(engine.submit("Hello?", agent="nobody"))
    assert failed.state is RequestState.ERROR
    delivered(engine)
    failures = [event.fields for event in heard if event.name == "callback.failed"]
    assert [(one["kind"], one["error"]) for one in failures] == [("logging", type(error).__name__)]
    assert engine.stats().callback_errors > 5


def test_a_handler_may_ask(engine: OrionInferenceEngine, logging_to: Any) -> None:
    """While the logging machinery holds the handler's lock, the answer is logged too."""
    answers: list[str] = []
    logging_to(asks(engine, answers))
    assert answers_still(engine)
    wait_until(lambda: answers == [TEXT])


def test_a_blocked_handler_delays_nobody(
    engine: OrionInferenceEngine, logging_to: Any, never: threading.Event
) -> None:
    """Neither requests nor subscribers nor the shutdown."""
    logging_to(lambda _record: never.wait(BOUND_S))
    heard: list[str] = []
    engine.subscribe(lambda event: heard.append(event.name))
    assert answers_still(engine)
    wait_until(lambda: "request.succeeded" in heard)
    assert Running(engine.shutdown, 0.0).ends_within(BOUND_S / 2)


def test_a_handler_that_raises_keeps_no_model_in_memory(
    make_engine: MakeEngine, logging_to: Any
) -> None:
    """All models that a load evicts are closed, though the first eviction cannot be logged."""
    logging_to(raising(RuntimeError("the disk of the log is full")))
    backend = FakeBackend(footprints={"a": 100, "b": 100, "c": 200})
    agents = {name: [name] for name in "abc"}
    engine = make_engine(backend, agents, budget=200, predictive=False)
    for name in "ab":
        engine.infer("Hello?", agent=name)
    result = engine.submit("Hello?", agent="c").result(BOUND_S)
    assert sorted(result.receipt.evicted) == ["a@q4", "b@q4"]
    assert list(engine.stats().models) == ["c@q4"]


def test_a_hook_for_warnings_that_raises_fails_no_request(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warning of a stand-in is lost, and counted."""
    engine = make_engine(
        agents={"conversation": ["big", "small"]}, missing=["big"], **one_at_a_time()
    )
    forget_warnings()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", raising(OSError("closed")))
        assert answers_still(engine)
    assert engine.stats().callback_errors == 1


# Routers


class Noting:
    """A router that takes notes."""

    def __init__(self, act: Callable[..., None]) -> None:
        self.act = act

    def route(self, query: str, agents: Any, context: RouteContext) -> Route:
        return Route(agent_id="conversation", confidence=1.0, reason="the only one")

    def note(self, session_id: str, agent_id: str) -> None:
        self.act(session_id, agent_id)


@each_error
def test_a_router_that_fails_to_take_a_note(make_engine: MakeEngine, error: BaseException) -> None:
    """Its session goes on; the failure is counted."""
    engine = make_engine(router=Noting(raising(error)), **one_at_a_time())
    for _ in range(2):
        assert engine.submit("Hello?", session_id="s").result(BOUND_S).content == TEXT
    wait_until(lambda: engine.stats().callback_errors == 2)


def test_a_router_may_ask_when_it_takes_a_note(make_engine: MakeEngine) -> None:
    """The request that it notes has given back its place."""
    router = Noting(lambda *_: None)
    engine = make_engine(router=router, **one_at_a_time())
    answers: list[str] = []
    router.act = asks(engine, answers)
    assert engine.submit("Hello?", session_id="s").result(BOUND_S).content == TEXT
    wait_until(lambda: answers == [TEXT])


def test_a_router_knows_the_turns_before(make_engine: MakeEngine) -> None:
    """A question of a session is routed after the notes of its earlier turns."""
    noted: list[str] = []
    router = Noting(lambda session, _agent: noted.append(session))
    engine = make_engine(router=router)
    seen: list[int] = []
    route = router.route

    def counting(*arguments: Any) -> Route:
        seen.append(len(noted))
        return route(*arguments)

    router.route = counting
    for _ in range(20):
        engine.infer("Hello?", session_id="s")
    assert seen == list(range(20))


def test_a_router_that_blocks_over_a_note_holds_no_thread(
    make_engine: MakeEngine, never: threading.Event
) -> None:
    """Others are answered meanwhile."""
    engine = make_engine(router=Noting(lambda *_: never.wait(BOUND_S)), **one_at_a_time())
    assert engine.submit("Hello?", session_id="s").result(BOUND_S).content == TEXT
    assert answers_still(engine)


# Splitters


def test_a_blocked_splitter_holds_its_reader_alone(
    engine: OrionInferenceEngine, never: threading.Event
) -> None:
    """The request ends, and the next one is answered."""
    threads: list[str] = []

    def split(text: str) -> tuple[list[str], str]:
        threads.append(threading.current_thread().name)
        never.wait(BOUND_S)
        return [text], ""

    handle = engine.stream("Hello?", chunk_by=split)
    reader = Running(list, handle)
    wait_until(lambda: threads)
    wait_until(handle.done)
    assert answers_still(engine)
    assert not [name for name in threads if name.startswith("orion-")]
    never.set()
    assert "".join(event.text for event in reader.join()) == TEXT


def test_a_splitter_may_ask(engine: OrionInferenceEngine) -> None:
    """Also by the one thread that serves."""
    answers: list[str] = []
    ask = asks(engine, answers)

    def split(text: str) -> tuple[list[str], str]:
        ask()
        return [text], ""

    handle = engine.stream("Hello?", chunk_by=split)
    assert "".join(event.text for event in Running(list, handle).join()) == TEXT
    assert answers == [TEXT]


def test_a_splitter_that_fails_ends_the_request(make_engine: MakeEngine) -> None:
    """Its reader gets the error, and so does whoever waits for the result."""
    engine = make_engine({"*": LONG})
    handle = engine.stream("Hello?", chunk_by=raising(Textless()))
    for wait in (lambda: next(iter(handle)), lambda: handle.result(BOUND_S)):
        with pytest.raises(InvalidRequestError, match="the function raised Textless"):
            wait()
    assert handle.state is RequestState.ERROR


# on_event


def test_on_event_may_ask(engine: OrionInferenceEngine) -> None:
    """And wait for the answer, and for the result of its own request."""
    results: list[str] = []
    handles: list[RequestHandle] = []
    told = threading.Event()

    def on_event(_event: TokenEvent) -> None:
        if not results:
            results.append(engine.infer("From within?").content)
            assert told.wait(BOUND_S)
            results.append(handles[0].result(BOUND_S).content)

    handles.append(engine.stream("Hello?", on_event=on_event))
    told.set()
    assert handles[0].result(BOUND_S).content == TEXT
    assert results == [TEXT, TEXT]


@pytest.mark.parametrize("error", [*EVERYTHING, Textless()], ids=lambda one: type(one).__name__)
def test_what_on_event_raises_ends_the_request(
    make_engine: MakeEngine, error: BaseException
) -> None:
    """Whatever it is; it is counted."""
    engine = make_engine({"*": LONG}, **one_at_a_time())
    handle = engine.stream("Hello?", on_event=raising(error))
    with pytest.raises(InvalidRequestError, match="on_event raised") as caught:
        handle.result(BOUND_S)
    assert caught.value.__cause__ is error
    assert engine.stats().callback_errors == 1
