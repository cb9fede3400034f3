"""What is special to the fake backend: scripts, load errors, crashes on demand."""

import threading
import time
from collections.abc import Sequence

import pytest
from helpers import BOUND_S, Running, run_all, wait_until
from internals import callbacks_of

from orion_oie.backends.base import Completion, GenerationJob, LoadSpec
from orion_oie.backends.fake import FakeAnswer, FakeBackend, FakeModel, Script
from orion_oie.cancellation import CancelScope
from orion_oie.errors import (
    EngineClosedError,
    ModelCorruptError,
    RequestCancelledError,
    WorkerCrashedError,
    WorkerTimeoutError,
)
from orion_oie.schemas.requests import (
    GenerationOptions,
    Message,
)
from orion_oie.schemas.results import ModelInfo


def spec(name: str, slots: int = 4) -> LoadSpec:
    info = ModelInfo(model_id=name, variant="v", name=name, version="1", license="mit")
    return LoadSpec(info, files=(), slots=slots)


def load(backend: FakeBackend, name: str = "a", slots: int = 4) -> FakeModel:
    return backend.load(spec(name, slots), CancelScope(), lambda _fraction: None)


def job(question: str = "Hello?", **options: object) -> GenerationJob:
    return GenerationJob((Message(role="user", content=question),), GenerationOptions(**options))


def said(model: FakeModel, work: GenerationJob | None = None) -> str:
    pieces: list[str] = []
    model.generate(work or job(), CancelScope(), lambda text, _tokens: pieces.append(text))
    return "".join(pieces)


def model_of(script: "FakeAnswer | Sequence[FakeAnswer] | Script") -> FakeModel:
    return load(FakeBackend({"*": script}))


# Scripts


def test_without_a_script_it_says_something() -> None:
    """A backend made with no arguments answers every question."""
    assert said(load(FakeBackend())) == "This is a fake answer."


def test_scripts_are_by_model() -> None:
    """Each model has its own script; "*" is for the others."""
    backend = FakeBackend({"a": FakeAnswer("I am a."), "*": FakeAnswer("I am another.")})
    assert said(load(backend, "a")) == "I am a."
    assert said(load(backend, "b")) == "I am another."


def test_answers_come_in_turn_and_the_last_stays() -> None:
    """A list gives its answers one after the other, also over several loads of the model."""
    backend = FakeBackend({"a": [FakeAnswer("1"), FakeAnswer("2"), FakeAnswer("3")]})
    first = load(backend)
    assert [said(first), said(first)] == ["1", "2"]
    second = load(backend)
    assert [said(second), said(second), said(first)] == ["3", "3", "3"]


def test_answers_in_turn_are_given_once_each() -> None:
    """Jobs at the same time get different answers of the list."""
    model = model_of([FakeAnswer(str(n)) for n in range(9)])
    runs = run_all([lambda: said(model) for _ in range(8)])
    assert sorted(run.join() for run in runs) == [str(n) for n in range(8)]


def test_a_function_sees_the_job() -> None:
    """A function is asked with the whole job for every answer."""

    def script(work: GenerationJob) -> FakeAnswer:
        return FakeAnswer(f"{work.messages[-1].content} at {work.options.temperature}")

    assert said(model_of(script), job("Warm?", temperature=0.5)) == "Warm? at 0.5"


def test_an_error_comes_after_the_text() -> None:
    """An answer with an error says its text, then raises; the model lives on."""
    model = model_of([FakeAnswer("Half", error=WorkerTimeoutError("stuck")), FakeAnswer("Whole")])
    pieces: list[str] = []
    with pytest.raises(WorkerTimeoutError, match="stuck"):
        model.generate(job(), CancelScope(), lambda text, _tokens: pieces.append(text))
    assert pieces == ["Half"]
    assert model.is_alive()
    assert said(model) == "Whole"


def test_a_delay_comes_before_each_token() -> None:
    """delay_s passes before every token, and the reported times agree."""
    started = time.perf_counter()
    completion: Completion = model_of(FakeAnswer("a b c d", delay_s=0.01)).generate(
        job(), CancelScope(), lambda _text, _tokens: None
    )
    assert time.perf_counter() - started >= 0.04
    assert completion.prompt_ms >= 10
    assert completion.decode_ms >= 30


# Crashes


@pytest.mark.parametrize(("after", "seen"), [(0, ""), (2, "a b "), (3, "a b c"), (99, "a b c")])
def test_a_crash_comes_after_that_many_tokens(after: int, seen: str) -> None:
    """crash_after kills the model after so many tokens, at the end if there are fewer."""
    model = model_of(FakeAnswer("a b c", crash_after=after))
    pieces: list[str] = []
    with pytest.raises(WorkerCrashedError) as caught:
        model.generate(job(), CancelScope(), lambda text, _tokens: pieces.append(text))
    assert "".join(pieces) == seen
    assert caught.value.details["signal"] == "SIGSEGV"
    assert not model.is_alive()
    with pytest.raises(WorkerCrashedError):
        said(model)


def test_a_crash_takes_the_neighbours_along() -> None:
    """A crash on demand ends everything that runs, also what waits for a slot."""
    backend = FakeBackend({"*": FakeAnswer("word " * 1000, delay_s=0.05)})
    model = load(backend, slots=1)
    running = [Running(said, model) for _ in range(3)]
    model.crash()
    for one in running:
        with pytest.raises(WorkerCrashedError):
            one.join()


def test_a_crashed_model_can_be_loaded_again() -> None:
    """The next load of a crashed model is alive."""
    backend = FakeBackend()
    load(backend).crash()
    assert said(load(backend)) == "This is a fake answer."
    assert backend.loaded == ["a@v", "a@v"]


def test_closing_does_not_hide_a_crash() -> None:
    """A model that crashed goes on saying so after close; a closed one was unloaded."""
    crashed, closed = load(FakeBackend()), load(FakeBackend())
    crashed.crash()
    crashed.close()
    closed.close()
    closed.crash()
    with pytest.raises(WorkerCrashedError):
        said(crashed)
    with pytest.raises(EngineClosedError):
        said(closed)


# Loads


def test_load_errors_come_in_turn() -> None:
    """Each load of a model takes the next error; after the last it succeeds."""
    backend = FakeBackend(load_errors={"a": [ModelCorruptError("1"), ModelCorruptError("2")]})
    for expected in ("1", "2"):
        with pytest.raises(ModelCorruptError, match=expected):
            load(backend)
    load(backend, "b")
    load(backend)
    assert backend.loaded == ["b@v", "a@v"]


def test_a_slow_load_can_be_cancelled() -> None:
    """load_delay_s is waited for, and a cancel ends the wait."""
    backend = FakeBackend(load_delay_s=BOUND_S)
    scope = CancelScope()
    loading = Running(backend.load, spec("a"), scope, lambda _fraction: None)
    wait_until(lambda: callbacks_of(scope))
    scope.cancel(RequestCancelledError("enough"))
    with pytest.raises(RequestCancelledError, match="enough"):
        loading.join()
    assert backend.loaded == []


# Slots


def test_no_more_run_than_slots() -> None:
    """As many generations as slots run at once; the others wait."""
    most = running = 0
    lock = threading.Lock()
    let_go = threading.Event()

    def script(_job: GenerationJob) -> FakeAnswer:
        nonlocal most, running
        with lock:
            running += 1
            most = max(most, running)
        assert let_go.wait(BOUND_S)
        with lock:
            running -= 1
        return FakeAnswer("done")

    model = load(FakeBackend({"*": script}), slots=2)
    runs = [Running(said, model) for _ in range(5)]
    wait_until(lambda: running == 2)
    let_go.set()
    assert [run.join() for run in runs] == ["done"] * 5
    assert most == 2
