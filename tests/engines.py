"""Engines over a fake backend, for the tests of the engine. Its fixtures come in by conftest."""

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Running, config_with, registry_with, wait_until

from orion_oie import (
    OrionInferenceEngine,
    RequestHandle,
    TokenEvent,
    cancellation,
)
from orion_oie.backends.fake import FakeAnswer, FakeBackend
from orion_oie.engine.scheduling import queue as queue_module

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
    monkeypatch.setattr(queue_module, "_IDLE_EXIT_S", 0.02)
    monkeypatch.setattr(cancellation, "_IDLE_EXIT_S", 0.02)


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
    wait_until(lambda: handle._stream.is_observed)
    return running


def texts(events: list[TokenEvent]) -> list[str]:
    return [event.text if event.kind == "text" else "<restart>" for event in events]
