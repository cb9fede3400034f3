"""Changes of a registry by many threads: none is lost, and nobody sees half of one."""

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import Running, registry_with, run_all, wait_until
from tiny import write_tiny_llama

from orion_oie import ModelRegistry, RegistryError, UnknownAgentError
from orion_oie.models.registry_check import broken_references

THREADS, EACH = 8, 4


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return registry_with(tmp_path, {"conversation": ["m"], "other": ["n"]})


def agent(model_id: str = "m") -> dict[str, object]:
    return {
        "name": "A", "description": "", "system_prompt": "x", "models": {"primary": model_id},
    }  # fmt: skip


@contextlib.contextmanager
def always_sound(registry: ModelRegistry) -> Iterator[None]:
    """Inside, another thread reads the registry again and again: it never sees half of a change."""
    over = threading.Event()

    def read() -> int:
        rounds = 0
        while not over.is_set():
            assert broken_references(registry.data) == []
            for agent_id in registry.data.agents:
                with contextlib.suppress(UnknownAgentError):  # removed since
                    assert registry.chain(agent_id)
            pickle.loads(pickle.dumps(registry))
            copy.deepcopy(registry)
            registry.copy().save(registry_file)
            ModelRegistry.load(registry_file)
            rounds += 1
        return rounds

    registry_file = Path(next(iter(registry.models["m"].variants.values())).source.path or "")
    registry_file = registry_file.absolute().with_name("saved.json")
    reader = Running(read)
    try:
        yield
    finally:
        over.set()
    assert reader.join() >= 1


def test_changes_of_every_kind_lose_nothing(registry: ModelRegistry, tmp_path: Path) -> None:
    """Agents and models are added, changed and removed at once."""
    files = [write_tiny_llama(tmp_path / f"file{number}.gguf") for number in range(2)]
    registry = ModelRegistry(registry.data, tmp_path)

    def work(thread: int) -> None:
        for number in range(EACH):
            name = f"{thread}-{number}"
            registry.add_agent(f"kept{name}", agent())
            registry.add_agent(f"gone{name}", agent())
            registry.add_model(f"model{name}", registry.models["m"])
            registry.update_agent(f"kept{name}", models={"primary": f"model{name}"})
            registry.update_agent("other", defaults={"max_tokens": 10 + number})
            registry.remove_agent(f"gone{name}")
        registry.add_gguf(files[thread % 2], agent=f"kept{thread}-0")

    with contextlib.chdir(tmp_path), always_sound(registry):
        runs = run_all([lambda thread=thread: work(thread) for thread in range(THREADS)])
    assert [run.error for run in runs] == [None] * THREADS
    names = {f"{thread}-{number}" for thread in range(THREADS) for number in range(EACH)}
    assert set(registry.agents) == {"conversation", "other", *(f"kept{name}" for name in names)}
    assert {f"model{name}" for name in names} <= set(registry.models)
    assert len(registry.models) == 2 + len(names) + len(files)


def test_updates_of_one_agent_are_all_kept(registry: ModelRegistry) -> None:
    """Each thread changes another field of it."""
    fields: list[dict[str, object]] = [
        {"name": "N"},
        {"description": "D"},
        {"system_prompt": "S"},
        {"defaults": {"temperature": 0.5}},
        {"defaults": {"max_tokens": 7}},
        {"defaults": {"top_p": 0.25}},
        {"routing": {"keywords": {"k": 1.0}}},
        {"routing": {"examples": ["e"]}},
    ]
    calls: list[Callable[[], None]] = [
        lambda one=one: registry.update_agent("other", **one) for one in fields
    ]
    assert [run.error for run in run_all(calls)] == [None] * len(fields)
    other = registry.agent("other")
    assert (other.name, other.description, other.system_prompt) == ("N", "D", "S")
    assert (other.defaults.temperature, other.defaults.max_tokens) == (0.5, 7)
    assert other.defaults.top_p == 0.25
    assert (list(other.routing.keywords), list(other.routing.examples)) == (["k"], ["e"])


def test_one_file_named_by_many_is_one_model(registry: ModelRegistry, tmp_path: Path) -> None:
    """They all get the id of the one that was first."""
    path = write_tiny_llama(tmp_path / "new.gguf")
    runs = run_all([lambda: registry.name_source(path)] * THREADS)
    assert {run.value for run in runs} == {"new"}
    assert len(registry.models) == 3


def test_the_last_agent_stays(registry: ModelRegistry) -> None:
    """Of two that are removed at once, one is refused."""
    runs = run_all(
        [lambda: registry.remove_agent("conversation"), lambda: registry.remove_agent("other")]
    )
    errors = [run.error for run in runs if run.error is not None]
    assert len(errors) == len(registry.agents) == 1
    assert isinstance(errors[0], RegistryError)


def test_half_a_change_is_none(
    registry: ModelRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent is removed while the file is read that it shall answer with: no model is added, and
    nobody waits for the file meanwhile."""
    from orion_oie.models import registry as module

    reading, go_on = threading.Event(), threading.Event()
    named_source = module.named_source

    def slowly(*args: object) -> object:
        reading.set()
        assert go_on.wait(10)
        return named_source(*args)

    monkeypatch.setattr(module, "named_source", slowly)
    path = write_tiny_llama(tmp_path / "new.gguf")
    adding = Running(lambda: registry.add_gguf(path, agent="other"))
    wait_until(reading.is_set)
    Running(registry.remove_agent, "other").join()
    go_on.set()
    with pytest.raises(UnknownAgentError):
        adding.join()
    assert "new" not in registry.models
