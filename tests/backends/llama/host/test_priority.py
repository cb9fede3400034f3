"""How workers share the cores with other programs: spinning, niceness, affinity."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import worker_processes
from contracts import INFO, job, said
from helpers import wait_until

from orion_oie import EngineConfig, InvalidRequestError, OrionInferenceEngine
from orion_oie.backends.base import LoadSpec
from orion_oie.backends.llama.host.client import LlamaModel
from orion_oie.backends.llama.host.loader import LlamaBackend, LoaderSettings
from orion_oie.backends.llama.host.process import Priority, environment
from orion_oie.cancellation import CancelScope

linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")


@contextmanager
def loaded(path: Path, priority: Priority, *, is_spare: bool = False) -> Iterator[LlamaModel]:
    """A model that has answered, so that all threads of its worker are there."""
    settings = LoaderSettings(priority=priority)
    backend = LlamaBackend(settings, may_take=(lambda _bytes: True) if is_spare else None)
    spec = LoadSpec(INFO, (path,), context_length=512)
    try:
        if is_spare:
            backend.load(spec, CancelScope(), lambda _progress: None).close()
        model = backend.load(spec, CancelScope(), lambda _progress: None)
        said(model, job("Hello?", max_tokens=4))
        yield model
        model.close()
    finally:
        backend.kill_all()
        wait_until(lambda: worker_processes() == [])


def nice_of_threads(pid: int) -> set[int]:
    threads = [int(thread.id) for thread in psutil.Process(pid).threads()]
    return {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}


def cores_of_threads(pid: int) -> set[frozenset[int]]:
    threads = [int(thread.id) for thread in psutil.Process(pid).threads()]
    return {frozenset(os.sched_getaffinity(thread)) for thread in threads}


def test_threads_do_not_spin_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert 0 < int(environment()["GOMP_SPINCOUNT"]) <= 5000


def test_what_the_user_set_for_openmp_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    assert environment()["GOMP_SPINCOUNT"] == "77"


@linux
@pytest.mark.parametrize("is_spare", [False, True])
def test_all_threads_of_a_worker_are_nice(tiny_model: Path, is_spare: bool) -> None:
    """Also in a worker that was started before its model was known; the host stays as it is."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    with loaded(tiny_model, Priority(nice=7), is_spare=is_spare) as model:
        assert nice_of_threads(model.pid) == {own + 7}
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


@linux
def test_all_threads_of_a_worker_stay_on_the_chosen_cores(tiny_model: Path) -> None:
    """It computes with as many threads as there are cores."""
    own = os.sched_getaffinity(0)
    core = max(own)
    with loaded(tiny_model, Priority(cores=(core,))) as model:
        assert cores_of_threads(model.pid) == {frozenset({core})}
        assert model.info.threads == 1
        assert model.occupancy().threads == 1
    assert os.sched_getaffinity(0) == own


@linux
@pytest.mark.parametrize("core", [4095, -1])
def test_a_core_that_is_not_there_is_refused_before_anything_starts(core: int) -> None:
    """The error names it, and those that are there."""
    config = EngineConfig(serving={"cpu_affinity": [core]})
    with pytest.raises(InvalidRequestError, match=rf"{core}.*it may use \[") as caught:
        OrionInferenceEngine(config=config)
    assert "cpu_affinity" in str(caught.value)


@pytest.mark.parametrize("serving", [{"cpu_affinity": []}, {"nice": -1}, {"nice": 20}])
def test_settings_out_of_range_are_refused(serving: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(serving))):
        EngineConfig(serving=serving)


def test_slots_follow_the_chosen_cores() -> None:
    """Four for each."""
    serving = {"cpu_affinity": (max(os.sched_getaffinity(0)),)}
    config = EngineConfig(serving=serving, loading={"keep_spare_worker": False})
    with OrionInferenceEngine(config=config) as engine:
        assert engine.config.serving.slots == 4
