"""Engines over a fake backend, for the tests of the engine. Its fixtures come in by conftest."""

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import BOUND_S, Running, config_with, registry_with, wait_until
from internals import busy_of, set_idle_exit, set_other_idle_exits, set_timer_idle_exit

from orion_oie import (
    OrionInferenceEngine,
    RequestHandle,
    TokenEvent,
)
from orion_oie.backends.fake import FakeAnswer, FakeBackend
from orion_oie.engine.build import Parts

TEXT = "One fine answer."
LONG = FakeAnswer("word " * 3000, delay_s=0.005)
MakeEngine = Callable[..., OrionInferenceEngine]


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    """Makes engines over a fake backend (or scripts for one), and shuts them down.

    Unless told otherwise there is one agent, `conversation`, with one model, `main`. Fields of the
    configuration are named as for `config_with`.
    """
    engines: list[weakref.ref[OrionInferenceEngine]] = []

    def make(
        backend: Any = None,
        agents: Any = None,
        *,
        models: Any = None,
        missing: Any = (),
        router: Any = None,
        clock: Any = None,
        **config: Any,
    ) -> OrionInferenceEngine:
        if backend is None:
            backend = {"*": FakeAnswer(TEXT)}
        if isinstance(backend, dict):
            backend = FakeBackend(backend)
        engine = OrionInferenceEngine(
            registry_with(tmp_path, agents or {"conversation": ["main"]}, models, missing),
            config_with(**{"cancel_grace_s": 1.0, **config}),
            backend=backend,
            router=router,
            clock=clock or Clock(),
        )
        engines.append(weakref.ref(engine))
        return engine

    yield make
    for reference in engines:
        engine = reference()
        if engine is not None:
            engine.shutdown(0.0)


@pytest.fixture
def quick_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle threads end soon."""
    set_idle_exit(monkeypatch, 0.02)
    set_timer_idle_exit(monkeypatch, 0.02)
    set_other_idle_exits(monkeypatch, 0.02)


def parts(engine: OrionInferenceEngine) -> Parts:
    """The parts of an engine, for what no public call shows or changes."""
    return engine._parts


def is_observed(handle: RequestHandle) -> bool:
    """True once somebody has looked at the text of a request: no public call says so."""
    return handle._request.stream.is_observed


def settle(engine: OrionInferenceEngine) -> None:
    """Wait until all that follows the answers has been done: the loads in the background belong to
    no request, and no public call shows them all."""
    wait_until(lambda: busy_of(parts(engine).queue) == 0)
    loads = parts(engine).background._loads
    wait_until(lambda: all(load.done() for load in list(loads.values())))


def delivered(engine: OrionInferenceEngine) -> None:
    """Wait until subscribers and the log have everything that was published."""
    assert parts(engine).events.flush(BOUND_S)


def one_at_a_time() -> dict[str, int]:
    return {"slots": 1, "max_models": 1}


def names(engine: OrionInferenceEngine) -> list[str]:
    return [event["event"] for event in engine.export_logs()]


def outcomes(handle: RequestHandle) -> list[tuple[str, str, str]]:
    assert handle.receipt is not None
    return [(c.model_id, c.role, c.outcome) for c in handle.receipt.considered]


def ended(handle: RequestHandle) -> RequestHandle:
    wait_until(handle.done)
    return handle


def observed(handle: RequestHandle) -> Running:
    """A reader of the handle that is already waiting for text."""
    running = Running(lambda: list(handle))
    wait_until(lambda: is_observed(handle))
    return running


def texts(events: list[TokenEvent]) -> list[str]:
    return [event.text if event.kind == "text" else "<restart>" for event in events]
