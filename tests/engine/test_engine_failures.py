"""What happens when a model fails: fallbacks, replays, breakers.

The backend says what its script says.
"""

import asyncio
from typing import Any

import pytest
from engines import TEXT, Clock, ended, is_observed, names, observed, one_at_a_time, outcomes, texts
from helpers import BOUND_S, Held, Running, wait_until

from orion_oie import (
    CircuitOpenError,
    ModelCorruptError,
    RequestState,
    WorkerCrashedError,
    WorkerTimeoutError,
)
from orion_oie.backends.base import Footprint, GenerationJob, LoadSpec
from orion_oie.backends.fake import FakeAnswer, FakeBackend

# Fallbacks, replays, breakers


def test_the_next_model_answers_when_one_fails(make_engine) -> None:
    """A model that cannot be loaded is followed by the next; receipt and events tell."""
    backend = FakeBackend(
        {"spare": FakeAnswer("From the spare.")},
        load_errors={"main": [ModelCorruptError("bad magic")]},
    )
    engine = make_engine(backend, {"conversation": ["main", "spare", "third"]})
    handle = ended(engine.submit("Hello?"))
    result = handle.result()
    assert (result.content, result.model_id) == ("From the spare.", "spare")
    assert outcomes(handle) == [
        ("main", "primary", "failed"),
        ("spare", "fallback", "answered"),
        ("third", "fallback", "not_needed"),
    ]
    assert handle.receipt.considered[0].error == "ModelCorruptError: bad magic"
    assert handle.receipt.replays == 0
    assert handle.receipt.model.model_id == "spare"
    assert "fallback" in handle.receipt.state_ms
    assert engine.stats().requests.fallbacks == 1
    fallback = next(e for e in engine.export_logs() if e["event"] == "request.fallback")
    assert fallback["error"] == "ModelCorruptError: bad magic"
    assert fallback["request_id"] == handle.id


def test_a_failure_while_generating_falls_back(make_engine) -> None:
    """An error in the middle of an unseen answer leaves no trace in the text."""
    failing = FakeAnswer("Half an ans", error=WorkerTimeoutError("stuck"))
    engine = make_engine(
        {"main": failing, "spare": FakeAnswer(TEXT)}, {"conversation": ["main", "spare"]}
    )
    assert engine.infer("Hello?").content == TEXT


def test_the_conversation_agent_comes_where_that_is_written(make_engine) -> None:
    """When none of an agent's models answers, its fallback agent does, as itself."""
    jobs: list[GenerationJob] = []

    def script(job: GenerationJob) -> FakeAnswer:
        jobs.append(job)
        return FakeAnswer(TEXT)

    backend = FakeBackend({"talk": script}, load_errors={"w1": [ModelCorruptError("bad")]})
    models = {"primary": "w1", "fallback": ["w2"]}
    writer = {"models": models, "fallback_agent": "conversation"}
    engine = make_engine(backend, {"writer": writer, "conversation": ["talk"]}, missing=["w2"])
    handle = ended(engine.submit("Hello?", agent="writer"))
    assert handle.result().agent_id == "conversation"
    assert jobs[0].messages[0].content == "You are the conversation."
    assert handle.receipt.route.agent_id == "writer"
    considered = [(c.agent_id, c.model_id, c.outcome) for c in handle.receipt.considered]
    assert considered == [
        ("writer", "w2", "unavailable"),
        ("writer", "w1", "failed"),
        ("conversation", "talk", "answered"),
    ]


def test_when_all_fail_the_last_error_is_raised(make_engine) -> None:
    """The error of the last model comes out; the receipt has all of them."""
    errors = {"main": [ModelCorruptError("first")], "spare": [ModelCorruptError("second")]}
    engine = make_engine(FakeBackend(load_errors=errors), {"conversation": ["main", "spare"]})
    handle = ended(engine.submit("Hello?"))
    with pytest.raises(ModelCorruptError, match="second"):
        handle.result()
    assert [c.error for c in handle.receipt.considered] == [
        "ModelCorruptError: first",
        "ModelCorruptError: second",
    ]


def test_a_breaker_opens_and_closes(make_engine) -> None:
    """Three failures open the breaker; after the pause one trial decides: open, then closed."""
    clock = Clock()
    failing = FakeAnswer("", error=WorkerTimeoutError("stuck"))
    script = [*[failing] * 4, FakeAnswer(TEXT)]
    engine = make_engine({"main": script}, clock=clock)
    for _ in range(3):
        with pytest.raises(WorkerTimeoutError):
            engine.infer("Hello?")
    handle = ended(engine.submit("Hello?"))
    with pytest.raises(CircuitOpenError, match=r"3 times in a row .* 30\.0 s") as caught:
        handle.result()
    assert caught.value.details["retry_after_s"] == 30.0
    assert outcomes(handle) == [("main", "primary", "circuit_open")]
    assert engine.health().status == "degraded"
    assert engine.health().reasons == ["main:generate is open after 3 failures"]
    clock.now_s += 29.9
    with pytest.raises(CircuitOpenError):
        engine.infer("Hello?")
    clock.now_s += 0.2
    with pytest.raises(WorkerTimeoutError):
        engine.infer("Hello?")
    with pytest.raises(CircuitOpenError):
        engine.infer("Hello?")
    clock.now_s += 30.1
    assert engine.infer("Hello?").content == TEXT
    assert engine.stats().breakers["main:generate"].state == "closed"
    assert engine.health().status == "healthy"
    changes = [
        (e["old"], e["new"]) for e in engine.export_logs() if e["event"] == "breaker.changed"
    ]
    assert changes == [
        ("closed", "open"),
        ("open", "half_open"),
        ("half_open", "open"),
        ("open", "half_open"),
        ("half_open", "closed"),
    ]


def test_a_paused_model_is_passed_over(make_engine) -> None:
    """While a breaker is open the next model answers, and the receipt says why."""
    engine = make_engine(
        FakeBackend(load_errors={"main": [ModelCorruptError("bad")] * 3}),
        {"conversation": ["main", "spare"]},
    )
    for _ in range(3):
        assert engine.infer("Hello?").model_id == "spare"
    handle = ended(engine.submit("Hello?"))
    assert handle.result().model_id == "spare"
    assert outcomes(handle) == [
        ("main", "primary", "circuit_open"),
        ("spare", "fallback", "answered"),
    ]
    engine.reset_breakers()
    assert engine.infer("Hello?").model_id == "main"


def test_a_paused_model_is_not_loaded(make_engine) -> None:
    """A model whose answers failed too often is not even loaded while it is paused."""
    backend = FakeBackend({"main": FakeAnswer("", error=WorkerTimeoutError("stuck"))})
    engine = make_engine(backend, {"conversation": ["main", "spare"]})
    for _ in range(3):
        engine.infer("Hello?")
    assert engine.unload("conversation")
    backend.loaded.clear()
    assert engine.infer("Hello?").model_id == "spare"
    assert backend.loaded == ["spare@q4"]


def test_breakers_can_be_switched_off(make_engine) -> None:
    """Without breakers every request tries again."""
    failing = FakeAnswer("", error=WorkerTimeoutError("stuck"))
    engine = make_engine({"main": failing}, breaker={"enabled": False})
    for _ in range(6):
        with pytest.raises(WorkerTimeoutError):
            engine.infer("Hello?")
    assert engine.stats().breakers == {}


def test_a_crash_before_the_first_token_is_replayed(make_engine) -> None:
    """A request whose worker crashed is replayed once on a fresh load, and nobody notices."""
    backend = FakeBackend({"main": [FakeAnswer("x", crash_after=0), FakeAnswer(TEXT)]})
    engine = make_engine(backend)
    handle = engine.stream("Hello?")
    reading = observed(handle)
    assert "".join(texts(reading.join())) == TEXT
    assert backend.loaded == ["main@q4", "main@q4"]
    receipt = handle.result().receipt
    assert receipt.replays == 1
    assert outcomes(handle) == [("main", "primary", "failed"), ("main", "primary", "answered")]
    assert engine.stats().requests.replays == 1
    assert engine.stats().requests.fallbacks == 0
    assert "request.replayed" in names(engine)


def test_a_second_crash_falls_back(make_engine) -> None:
    """A model that crashes again is given up for this request; the next one answers."""
    backend = FakeBackend({"main": FakeAnswer("x", crash_after=0), "spare": FakeAnswer(TEXT)})
    engine = make_engine(backend, {"conversation": ["main", "spare"]})
    handle = ended(engine.submit("Hello?"))
    assert handle.result().model_id == "spare"
    assert handle.receipt.replays == 1
    assert backend.loaded == ["main@q4", "main@q4", "spare@q4"]
    assert [outcome for _, _, outcome in outcomes(handle)] == ["failed", "failed", "answered"]
    assert engine.stats().breakers["main:generate"].failures == 2


def test_a_model_that_always_crashes_is_an_exception(make_engine) -> None:
    """When nothing else is left, the crash comes out after one replay."""
    backend = FakeBackend({"main": FakeAnswer("x", crash_after=0)})
    with pytest.raises(WorkerCrashedError, match="crashed"):
        make_engine(backend).infer("Hello?")
    assert len(backend.loaded) == 2


def test_a_crash_in_an_unseen_answer_is_silent(make_engine) -> None:
    """When nobody has looked at the text, a crash in the middle leaves no trace in it."""
    crash = FakeAnswer("This is void and more", crash_after=3)
    engine = make_engine({"main": [crash, FakeAnswer(TEXT)]})
    handle = ended(engine.stream("Hello?"))
    assert handle.result().content == TEXT
    assert "".join(texts(list(handle))) == TEXT
    assert "".join(event.text for event in handle) == TEXT


def test_a_crash_in_a_seen_answer_is_an_error(make_engine) -> None:
    """By default a reader that has text gets the error after it, and no other model is tried."""
    held = Held(FakeAnswer("one two three four", crash_after=2))
    engine = make_engine({"main": held}, {"conversation": ["main", "spare"]})
    handle = engine.stream("Hello?")
    seen: list[str] = []
    reading = Running(lambda: [seen.append(event.text) for event in handle])
    wait_until(lambda: is_observed(handle))
    held.let_go.set()
    with pytest.raises(WorkerCrashedError):
        reading.join()
    assert "".join(seen) == "one two "
    with pytest.raises(WorkerCrashedError):
        handle.result()
    assert outcomes(handle) == [("main", "primary", "failed")]


@pytest.mark.parametrize("answers", [("main",), ("main", "spare")])
def test_a_crash_in_a_seen_answer_may_restart(make_engine, answers: tuple[str, ...]) -> None:
    """With on_stream_failure="restart" the reader gets a restart event, then the answer anew."""
    crash = FakeAnswer("one two three four", crash_after=2)
    held = Held(crash, *([crash] if "spare" in answers else [FakeAnswer(TEXT)]))
    engine = make_engine(
        {"main": held, "spare": FakeAnswer(TEXT)}, {"conversation": ["main", "spare"]}
    )
    handle = engine.stream("Hello?", on_stream_failure="restart")
    reading = observed(handle)
    held.let_go.set()
    events = reading.join()
    pieces = texts(events)
    last = len(pieces) - 1 - pieces[::-1].index("<restart>")
    assert "".join(pieces[last + 1 :]) == TEXT
    assert pieces[:3] == ["one ", "two ", "<restart>"]
    assert pieces.count("<restart>") == len(answers)
    assert [event.index for event in events] == list(range(len(events)))
    result = handle.result()
    assert (result.content, handle.text) == (TEXT, TEXT)
    assert result.model_id == answers[-1]
    assert outcomes(handle)[0] == ("main", "primary", "restarted")
    assert list(handle) == events


def test_removed_characters_are_those_of_the_answer(make_engine) -> None:
    """What was removed from a voided attempt is not counted."""
    crash = FakeAnswer("a\x00b\x00 c d", crash_after=2)
    engine = make_engine({"main": [crash, FakeAnswer("fine\x00")]})
    result = engine.infer("Hello?")
    assert result.content == "fine"
    assert result.receipt.removed_characters == 1


def test_a_bug_in_a_backend_reaches_the_caller(make_engine) -> None:
    """Any exception in a backend comes out of infer; the serving thread goes on."""
    answers = iter([RuntimeError("bug"), FakeAnswer(TEXT)])

    def script(_job: GenerationJob) -> FakeAnswer:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    engine = make_engine({"main": script}, {"conversation": ["main", "spare"]}, **one_at_a_time())
    with pytest.raises(RuntimeError, match="bug"):
        engine.infer("Hello?")
    assert engine.infer("Hello?").content == TEXT
    assert engine.stats().requests.errors == {"RuntimeError": 1}


@pytest.mark.parametrize("error", [StopIteration(), SystemExit(3), asyncio.CancelledError()])
@pytest.mark.parametrize("where", ["load", "generate", "route"])
def test_an_odd_exception_hangs_nobody(make_engine, error: BaseException, where: str) -> None:
    """Also what is no ordinary error, raised by a backend or a router, ends its request, for
    synchronous and asynchronous callers."""

    def fail(*_: Any) -> Any:
        raise error

    backend = FakeBackend({"*": fail if where == "generate" else FakeAnswer(TEXT)})
    if where == "load":
        backend.load = fail
    router = None
    if where == "route":
        router = type("Router", (), {"route": fail})()
    engine = make_engine(backend, router=router, **one_at_a_time())
    for _ in range(2):
        with pytest.raises((type(error), RuntimeError)):
            engine.submit("Hello?").result(BOUND_S)

    async def main() -> None:
        await asyncio.wait_for(engine.ainfer("Hello?"), BOUND_S)

    with pytest.raises((type(error), RuntimeError)):
        asyncio.run(main())
    assert engine.stats().running == 0
    assert engine.stats().requests.failed == 3


@pytest.mark.parametrize("wrong", ["finish_reason", "usage", "nothing"])
def test_a_backend_that_returns_nonsense_does_not_hang_the_caller(make_engine, wrong: str) -> None:
    """A completion that makes no result is an exception of infer, each time."""
    backend = FakeBackend({"*": FakeAnswer(TEXT)})

    class Broken:
        def __init__(self, model: Any) -> None:
            self._model = model

        def __getattr__(self, name: str) -> Any:
            return getattr(self._model, name)

        def generate(self, *arguments: Any) -> Any:
            completion = self._model.generate(*arguments)
            if wrong == "nothing":
                return None
            object.__setattr__(completion, wrong, "nonsense")
            return completion

    class BrokenBackend:
        def load(self, *arguments: Any) -> Any:
            return Broken(backend.load(*arguments))

        def footprint(self, spec: LoadSpec) -> Footprint:
            return backend.footprint(spec)

        def kill_all(self) -> None:
            backend.kill_all()

    engine = make_engine(BrokenBackend(), **one_at_a_time())
    for _ in range(3):
        handle = engine.submit("Hello?")
        with pytest.raises(Exception, match=r"nonsense|no attribute"):
            handle.result(BOUND_S)
        assert handle.state is RequestState.ERROR
    assert engine.stats().running == 0
