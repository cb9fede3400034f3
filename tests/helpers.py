"""What several test modules need: bounded waits, small registries, threads that report."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orion_oie import EngineConfig, RouterConfig
from orion_oie.backends.base import GenerationJob
from orion_oie.backends.fake import FakeAnswer
from orion_oie.models.registry import ModelRegistry
from orion_oie.models.specs import RegistryFile

BOUND_S = 10.0
SECTIONS = {
    name: field.annotation
    for name, field in EngineConfig.model_fields.items()
    if hasattr(field.annotation, "model_fields")
}


def wait_until(condition: Callable[[], object], timeout: float = BOUND_S) -> None:
    """Return once `condition()` is true; fail after `timeout` seconds."""
    ends_at = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < ends_at, "the awaited condition did not come"
        time.sleep(0.002)


class Clock:
    """A clock that stands still until it is told how much time has passed."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += seconds


class Running:
    """A call on a thread of its own."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, *args), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            self.value = function(*args)
        except BaseException as error:  # noqa: BLE001 (kept for the test to look at)
            self.error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def ends_within(self, seconds: float) -> bool:
        """Wait for its end, `seconds` at most; False if it still runs then."""
        self._thread.join(seconds)
        return not self.is_running

    def join(self) -> Any:
        """The value of the call; raises what the call raised, fails when it does not end."""
        self._thread.join(BOUND_S)
        assert not self.is_running, "the call does not end"
        if self.error is not None:
            raise self.error
        return self.value


def run_all(calls: Sequence[Callable[[], Any]]) -> list[Running]:
    """Run all calls at once, each on its thread, and wait until all have ended."""
    barrier = threading.Barrier(len(calls))

    def started_together(call: Callable[[], Any]) -> Any:
        barrier.wait(BOUND_S)
        return call()

    runs = [Running(started_together, call) for call in calls]
    wait_until(lambda: not any(run.is_running for run in runs), 3 * BOUND_S)
    return runs


def is_running(name: str) -> bool:
    """True while a thread whose name begins so runs. One whose start was interrupted, in the
    standard library, is listed for ever and never runs."""
    return any(one.name.startswith(name) and one.is_alive() for one in threading.enumerate())


@contextmanager
def no_more_threads() -> Iterator[None]:
    """Inside, the system refuses to start threads."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("no more threads")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


class Held:
    """A script of the fake backend that is asked, waits, and answers when it is let go.

    It gives the answers in turn; the last one stays.
    """

    def __init__(self, *answers: FakeAnswer) -> None:
        self.jobs: list[GenerationJob] = []
        self.let_go = threading.Event()
        self._answers = answers or (FakeAnswer(),)

    def __call__(self, job: GenerationJob) -> FakeAnswer:
        self.jobs.append(job)
        answer = self._answers[min(len(self.jobs), len(self._answers)) - 1]
        assert self.let_go.wait(BOUND_S)
        return answer

    def wait_for(self, count: int = 1) -> None:
        """Wait until `count` jobs have come."""
        wait_until(lambda: len(self.jobs) >= count)


def config_with(**fields: Any) -> EngineConfig:
    """A configuration of fields by their names alone: each goes to the section that has it.

    A section may be given as well; a name that several sections have needs that.
    """
    sections: dict[str, Any] = {}
    for name, value in fields.items():
        homes = [one for one, section in SECTIONS.items() if name in section.model_fields]
        if len(homes) == 1 and name not in SECTIONS:
            sections.setdefault(homes[0], {})[name] = value
        elif isinstance(value, Mapping):
            sections.setdefault(name, {}).update(value)
        else:
            sections[name] = value
    return EngineConfig(**sections)


def all_stages_but(*left_out: str) -> list[str]:
    """The stages that the router uses by default, without these."""
    return [stage for stage in RouterConfig().stages if stage not in left_out]


def registry_with(
    folder: Path,
    agents: Mapping[str, Sequence[str] | Mapping[str, Any]],
    models: Mapping[str, Mapping[str, Any]] | None = None,
    missing: Sequence[str] = (),
) -> ModelRegistry:
    """A registry whose models are empty files in `folder`; those in `missing` have none.

    An agent is the list of its models (the primary one, then fallbacks), or the fields of its
    specification. `models` adds fields to the specifications of some models.
    """
    specs = {agent_id: _agent(agent_id, given) for agent_id, given in agents.items()}
    ids = {model_id: None for spec in specs.values() for model_id in _models_of(spec)}
    for model_id in ids:
        if model_id not in missing:
            (folder / f"{model_id}.gguf").touch()
    return ModelRegistry(
        RegistryFile.model_validate(
            {
                "version": "1",
                "agents": specs,
                "models": {i: {**_model(i), **(models or {}).get(i, {})} for i in ids},
            }
        ),
        folder,
    )


def _agent(agent_id: str, given: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        given = {"models": {"primary": given[0], "fallback": list(given[1:])}}
    return {
        "name": agent_id,
        "description": "",
        "system_prompt": f"You are the {agent_id}.",
        **given,
    }


def _models_of(spec: Mapping[str, Any]) -> list[str]:
    models = spec["models"]
    named = [models["primary"], models.get("lite"), *models.get("fallback", [])]
    return [model_id for model_id in named if model_id is not None]


def _model(model_id: str) -> dict[str, Any]:
    return {
        "name": model_id.upper(),
        "version": "1.5",
        "license": "apache-2.0",
        "context_length": 4096,
        "variants": {
            "q4": {
                "quantization": "q4",
                "size_mb": 1,
                "min_ram_gb": 0.1,
                "source": {"path": f"{model_id}.gguf"},
            }
        },
    }


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 3 * BOUND_S
    while not condition():
        assert time.monotonic() < deadline, f"still not so: {what}"
        time.sleep(0.01)


def one_model_registry(path: Path) -> ModelRegistry:
    """A registry with one agent on one file."""
    source = {"path": str(path)}
    text = {
        "version": "1",
        "models": {"tiny": {"name": "Tiny", "variants": {"f16": {"source": source}}}},
        "agents": {
            "conversation": {
                "name": "C",
                "description": "talks",
                "system_prompt": "Be brief.",
                "models": {"primary": "tiny"},
            }
        },
    }
    return ModelRegistry.parse(json.dumps(text), base=path.parent)
