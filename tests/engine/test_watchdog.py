"""Requests that do not get on are named, each with what stands in its way."""

from typing import Any

import pytest
from engines import TEXT, MakeEngine
from helpers import Held, Running, config_with, registry_with, wait_until
from hypothesis import given
from hypothesis import strategies as st
from internals import models_of

from orion_oie import OrionInferenceEngine
from orion_oie.backends.fake import FakeAnswer, FakeBackend
from orion_oie.engine.lifecycle import (
    RequestLifecycle,
    RequestState,
)
from orion_oie.engine.watchdog import (
    Activity,
    stuck,
)

MIB = 2**20


# -- the sentences


def test_who_gets_on_is_not_named() -> None:
    """Only requests that were quiet for the whole time are, the longest first."""
    activities = [
        Activity("young", "inferencing", quiet_s=9.9, model="m@v"),
        Activity("old", "inferencing", quiet_s=10.0, model="m@v", pid=7),
        Activity("oldest", "routing", quiet_s=30.0),
    ]
    assert stuck(activities, 10.0) == [
        "request oldest has made no progress for 30 s in routing",
        "request old has made no progress for 10 s in inferencing: it waits for worker 7 of m@v",
    ]


def test_without_a_worker_the_model_is_named() -> None:
    """A load has no process yet."""
    (line,) = stuck([Activity("r", "loading_agent", 5.0, model="m@v")], 5.0)
    assert line.endswith("in loading_agent: it waits for m@v")


def test_who_waits_is_named_with_who_holds_it_up() -> None:
    """The models in the way and the requests that use them; not those that wait themselves."""
    activities = [
        Activity("user", "inferencing", 1.0, model="a@v", pid=7),
        Activity("other", "inferencing", 1.0, model="c@v", pid=8),
        Activity("next", "the queue", 2.0, model="a@v", why="others come before it"),
        Activity(
            "last",
            "the queue",
            6.0,
            model="b@v",
            why="'b@v' is not in memory",
            blockers=frozenset({"a@v"}),
        ),
    ]
    assert stuck(activities, 5.0) == [
        "request last has made no progress for 6 s in the queue: it waits for b@v, because 'b@v' "
        "is not in memory; in use by user"
    ]


def test_who_waits_for_a_slot_is_held_up_by_its_neighbours() -> None:
    """Without blockers it is the model itself that is in use."""
    activities = [
        Activity("user", "inferencing", 1.0, model="a@v", pid=7),
        Activity("next", "the queue", 6.0, model="a@v", why="it is full"),
    ]
    assert stuck(activities, 5.0)[0].endswith("because it is full; in use by user")


ACTIVITIES = st.builds(
    Activity,
    request_id=st.uuids().map(str),
    state=st.sampled_from(["the queue", "routing", "inferencing"]),
    quiet_s=st.floats(0, 100),
    model=st.none() | st.sampled_from(["a@v", "b@v"]),
    pid=st.none() | st.integers(1, 9),
    why=st.sampled_from(["", "it waits"]),
    blockers=st.frozensets(st.sampled_from(["a@v", "b@v"])),
)


@given(st.lists(ACTIVITIES, unique_by=lambda a: a.request_id), st.floats(0.1, 100))
def test_everybody_who_is_stuck_is_named_once(activities: list[Activity], after_s: float) -> None:
    """As many sentences as quiet requests, in the order of their silence."""
    lines = stuck(iter(activities), after_s)
    quiet = sorted((a for a in activities if a.quiet_s >= after_s), key=lambda a: -a.quiet_s)
    assert len(lines) == len(quiet)
    for line, activity in zip(lines, quiet, strict=True):
        assert line.startswith(f"request {activity.request_id} ")


def test_a_request_is_quiet_since_its_last_step() -> None:
    """Moves and reports of progress count, whatever they report."""
    now = [100.0]
    lifecycle = RequestLifecycle(lambda _old, _new: None, lambda: now[0])
    now[0] = 103.0
    assert lifecycle.quiet_s() == 3.0
    lifecycle.move("validate")
    assert lifecycle.quiet_s() == 0.0
    for step in ("route", "load", "generate"):
        lifecycle.move(step)
    now[0] = 110.0
    assert lifecycle.state is RequestState.INFERENCING
    assert lifecycle.quiet_s() == 7.0
    lifecycle.advance(0.0)
    assert lifecycle.quiet_s() == 0.0


# -- an engine's health


def engine_of(make_engine: MakeEngine, backend: FakeBackend, **config: Any) -> OrionInferenceEngine:
    settings = {"stuck_after_s": 0.05, "predictive": False, **config}
    return make_engine(backend, {"conversation": ["a"], "second": ["b"]}, **settings)


def stuck_in(engine: OrionInferenceEngine, count: int) -> list[str]:
    """The reasons, once there are so many."""
    wait_until(lambda: len(engine.health().reasons) == count)
    health = engine.health()
    assert health.status == "degraded"
    return health.reasons


def test_a_healthy_engine_names_nobody(make_engine: MakeEngine) -> None:
    """Neither before nor after an answer, nor while one grows."""
    backend = FakeBackend({"*": FakeAnswer("word " * 400, delay_s=0.002)})
    engine = engine_of(make_engine, backend, stuck_after_s=5.0)
    assert engine.health().reasons == []
    handle = engine.submit("Hello?")
    wait_until(lambda: handle.text)
    assert engine.health().status == "healthy"
    handle.result(10)
    assert engine.health().reasons == []


def test_a_stuck_worker_is_named(make_engine: MakeEngine) -> None:
    """An answer that does not grow: the request, its worker and its model are named; when it has
    ended, all is well."""
    backend = FakeBackend({"a": FakeAnswer("one two", delay_s=60.0)})
    engine = engine_of(make_engine, backend)
    handle = engine.submit("Hello?")
    wait_until(lambda: models_of(backend))
    models_of(backend)[0].pid = 4711  # type: ignore[misc]
    (line,) = stuck_in(engine, 1)
    assert line.startswith(f"request {handle.id} has made no progress for")
    assert line.endswith("s in inferencing: it waits for worker 4711 of a@q4")
    handle.cancel()
    wait_until(lambda: engine.health().status == "healthy")


def test_a_stuck_load_is_named(make_engine: MakeEngine) -> None:
    """A load that reports nothing."""
    engine = engine_of(make_engine, FakeBackend(load_delay_s=60.0))
    handle = engine.submit("Hello?")
    (line,) = stuck_in(engine, 1)
    assert line.startswith(f"request {handle.id} ")
    assert line.endswith("s in loading_agent: it waits for a@q4")
    handle.cancel()


def test_who_waits_is_named_with_its_blocker(make_engine: MakeEngine) -> None:
    """With memory for one model: the request that does not end, and the one that waits for the
    model of the first one to become idle."""
    held = Held(FakeAnswer(TEXT))
    backend = FakeBackend({"a": held}, footprints={"a": 60 * MIB, "b": 60 * MIB})
    engine = engine_of(make_engine, backend, budget=100 * MIB)
    running = engine.submit("Hello?")
    held.wait_for()
    waiting = engine.submit("Hello?", agent="second")
    lines = stuck_in(engine, 2)
    assert lines[0].startswith(f"request {running.id} ")
    assert lines[0].endswith("in inferencing: it waits for a@q4")
    assert lines[1].startswith(f"request {waiting.id} ")
    assert lines[1].endswith(
        "s in the queue: it waits for b@q4, because 'b@q4' is not in memory, and waits until "
        f"'a@q4' can be evicted; in use by {running.id}"
    )
    held.let_go.set()
    assert running.result(10).model_id == "a"
    assert waiting.result(10).model_id == "b"
    assert engine.health().reasons == []


def test_who_waits_for_a_slot_is_named(make_engine: MakeEngine) -> None:
    """A full model: the request that has its only place is named as the one in the way."""
    held = Held(FakeAnswer(TEXT))
    engine = engine_of(make_engine, FakeBackend({"a": held}), slots=1)
    running = engine.submit("Hello?")
    held.wait_for()
    waiting = engine.submit("Hello?")
    lines = stuck_in(engine, 2)
    assert lines[1].startswith(f"request {waiting.id} ")
    assert "answers as many requests as it may at once" in lines[1]
    assert lines[1].endswith(f"in use by {running.id}")
    held.let_go.set()
    waiting.result(10)


def test_a_request_that_nobody_can_answer_is_not_in_the_way(
    make_engine: MakeEngine, tmp_path: Any
) -> None:
    """Health looks at requests without any model, too: one that is validated has none."""
    held = Held(FakeAnswer(TEXT))

    class Router:
        def route(self, query: str, agents: Any, context: Any) -> Any:
            held(None)  # type: ignore[arg-type]
            raise ZeroDivisionError("a bug in a router")

    engine = OrionInferenceEngine(
        registry_with(tmp_path, {"conversation": ["a"]}),
        config_with(stuck_after_s=0.05),
        backend=FakeBackend(),
        router=Router(),
    )
    with engine:
        asking = Running(engine.submit, "Hello?")
        (line,) = stuck_in(engine, 1)
        assert line.endswith("s in routing")
        held.let_go.set()
        handle = asking.join()
        with pytest.raises(ZeroDivisionError):
            handle.result(10)
        assert engine.health().status == "healthy"
