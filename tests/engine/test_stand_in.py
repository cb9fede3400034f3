"""A lite model answers while the full one is on its way, and the receipt says so."""

import threading
from typing import Any

import pytest
from engines import MakeEngine, ended, names, outcomes
from helpers import Held, is_running, wait_until

from orion_oie import ModelNotFoundError, OrionError, WorkerError
from orion_oie.backends.fake import FakeAnswer, FakeBackend

AGENT = {"conversation": {"models": {"primary": "full", "lite": "lite"}}}
SCRIPTS = {"full": FakeAnswer("The full answer."), "lite": FakeAnswer("A lite answer.")}


class SlowBackend(FakeBackend):
    """Loads the full model only when it is let go."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.let_go = threading.Event()
        self.asked = threading.Event()

    def load(self, spec: Any, scope: Any, on_progress: Any) -> Any:
        if spec.info.model_id == "full":
            self.asked.set()
            undo = scope.on_cancel(self.let_go.set)
            assert self.let_go.wait(10)
            undo()
            scope.check()
        return super().load(spec, scope, on_progress)


def test_the_lite_model_answers_while_the_full_one_loads(make_engine: MakeEngine) -> None:
    """The first answer is the lite model's; once the full one is in memory, it answers."""
    backend = SlowBackend(SCRIPTS)
    engine = make_engine(backend, AGENT)
    handle = engine.submit("hello")
    result = handle.result(10)
    assert (result.model_id, result.content) == ("lite", "A lite answer.")
    assert outcomes(handle) == [
        ("full", "primary", "loading"),
        ("lite", "lite", "answered"),
        ("full", "primary", "not_needed"),
    ]
    assert not handle.complete_loading.done()
    again = engine.infer("hello")
    assert again.model_id == "lite"
    backend.let_go.set()
    assert handle.complete_loading.result(10).model_id == "full"
    switched = engine.submit("hello")
    assert switched.result(10).content == "The full answer."
    assert outcomes(switched) == [
        ("full", "primary", "answered"),
        ("lite", "lite", "not_needed"),
    ]
    assert switched.complete_loading.result(0).model_id == "full"
    assert sorted(backend.loaded) == ["full@q4", "lite@q4"]


def test_a_running_answer_stays_with_its_model(make_engine: MakeEngine) -> None:
    """The full model arrives in the middle of an answer, which goes on as it began."""
    held = Held(FakeAnswer("A lite answer."))
    backend = SlowBackend({**SCRIPTS, "lite": held})
    engine = make_engine(backend, AGENT)
    handle = engine.submit("hello", session_id="s")
    held.wait_for()
    backend.let_go.set()
    wait_until(lambda: "full@q4" in engine.stats().models)
    held.let_go.set()
    assert handle.result(10).model_id == "lite"
    assert engine.infer("and now?", session_id="s").model_id == "full"


def test_no_stand_in_when_asked_to_wait(make_engine: MakeEngine) -> None:
    """With the sequential strategy, a request waits for the full model."""
    engine = make_engine(FakeBackend(SCRIPTS), AGENT, strategy="sequential")
    result = engine.infer("hello")
    assert result.model_id == "full"
    assert engine.stats().models.keys() == {"full@q4"}


def test_no_stand_in_when_switched_off(make_engine: MakeEngine) -> None:
    """Without stand-ins, a request waits for the full model."""
    engine = make_engine(FakeBackend(SCRIPTS), AGENT, lite_first=False)
    assert engine.infer("hello").model_id == "full"


def test_no_stand_in_without_room_for_both(make_engine: MakeEngine) -> None:
    """Where only one model fits, the lite one would be thrown out at once: the full one answers."""
    engine = make_engine(FakeBackend(SCRIPTS), AGENT, max_models=1)
    assert engine.infer("hello").model_id == "full"


def test_no_stand_in_that_is_not_here(make_engine: MakeEngine) -> None:
    """A lite model without files stands in for nobody."""
    engine = make_engine(FakeBackend(SCRIPTS), AGENT, missing=["lite"])
    assert engine.infer("hello").model_id == "full"


def test_a_preloaded_model_needs_no_stand_in(make_engine: MakeEngine) -> None:
    """After `preload`, the full model answers the first request."""
    engine = make_engine(FakeBackend(SCRIPTS), AGENT)
    assert engine.preload("conversation").model_id == "full"
    assert engine.infer("hello").model_id == "full"


def test_a_full_model_that_cannot_be_loaded(make_engine: MakeEngine) -> None:
    """The lite model goes on answering; who waits for the full one gets its error, until that is
    not tried any more for a while: then nothing is loaded, and nothing makes room for it."""
    broken = [WorkerError("no luck") for _ in range(9)]
    backend = FakeBackend(SCRIPTS, load_errors={"full": broken})
    # A load for a request that is only expected would fail as well, and count.
    engine = make_engine(backend, AGENT, predictive=False)
    for _ in range(3):
        handle = engine.submit("hello")
        assert handle.result(10).model_id == "lite"
        with pytest.raises(WorkerError, match="no luck"):
            handle.complete_loading.result(10)
    assert names(engine).count("model.load_failed") == 3
    handle = engine.submit("hello")
    assert handle.result(10).model_id == "lite"
    assert outcomes(handle)[0] == ("full", "primary", "circuit_open")
    assert handle.complete_loading.result(10).model_id == "lite"
    assert names(engine).count("model.load_failed") == 3
    assert "pool.evicted" not in names(engine)


def test_nobody_cancels_what_others_wait_for(make_engine: MakeEngine) -> None:
    """`complete_loading` cannot be cancelled, so that a request always ends."""
    engine = make_engine(None, {"conversation": ["main"]}, missing=["main"])
    handle = engine.submit("hello")
    assert not handle.complete_loading.cancel()
    with pytest.raises(ModelNotFoundError):
        handle.result(10)


def test_who_waits_for_the_model_finds_the_answer(make_engine: MakeEngine) -> None:
    """When `complete_loading` is done, the request has ended."""
    engine = make_engine()
    handle = engine.submit("hello")
    found: list[bool] = []
    handle.complete_loading.add_done_callback(lambda _model: found.append(handle.done()))
    handle.result(10)
    wait_until(lambda: found)
    assert found == [True]


def test_the_full_model_helps_when_the_lite_one_fails(make_engine: MakeEngine) -> None:
    """A lite model that fails is followed by the full one, as soon as that is there."""
    failing = FakeAnswer("no", error=WorkerError("the lite one is ill"))
    backend = SlowBackend({**SCRIPTS, "lite": failing})
    engine = make_engine(backend, AGENT)
    handle = engine.submit("hello")
    assert backend.asked.wait(10)
    backend.let_go.set()
    assert handle.result(10).model_id == "full"
    assert [outcome for _, _, outcome in outcomes(handle)] == ["loading", "failed", "answered"]


def test_a_shutdown_ends_a_load_in_the_background(make_engine: MakeEngine) -> None:
    """Nothing goes on after a shutdown, and who waits for the model is told."""
    backend = SlowBackend(SCRIPTS)
    engine = make_engine(backend, AGENT)
    handle = engine.submit("hello")
    handle.result(10)
    assert backend.asked.wait(10)
    engine.shutdown(1.0)
    with pytest.raises(OrionError):
        handle.complete_loading.result(10)
    wait_until(lambda: not is_running("orion-background"))


def test_complete_loading_of_a_request_that_fails(make_engine: MakeEngine) -> None:
    """A request without any model gives its own error there, too."""
    engine = make_engine(None, {"conversation": ["main"]}, missing=["main"])
    handle = ended(engine.submit("hello"))
    with pytest.raises(ModelNotFoundError, match=r"main\.gguf: there is no such file"):
        handle.complete_loading.result(0)


def test_the_receipt_says_how_the_model_was_loaded(make_engine: MakeEngine) -> None:
    """Mode and shards are on the receipt of every answer."""
    report = make_engine().infer("hello").receipt.load
    assert report is not None
    assert (report.mode, report.shards, report.shards_loaded) == ("sequential", 1, 1)
