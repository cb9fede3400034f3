"""One worker is started ahead, so that a load starts at the file."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import worker_processes
from helpers import config_with, wait_until

from orion_oie import ModelRegistry, OrionInferenceEngine
from orion_oie.backends.base import LoadSpec
from orion_oie.backends.llama.host.loader import LlamaBackend
from orion_oie.cancellation import CancelScope
from orion_oie.schemas.results import ModelInfo

INFO = ModelInfo(model_id="tiny", variant="v", name="T", version="1", license="x")


@pytest.fixture
def backend() -> Iterator[LlamaBackend]:
    backend = LlamaBackend(may_take=lambda _size_bytes: True)
    yield backend
    backend.kill_all()
    wait_until(lambda: worker_processes() == [])


def spare_of(backend: LlamaBackend) -> int:
    """The process that waits: no public call names one that no load has taken."""
    wait_until(lambda: backend._spare._spare is not None)
    assert backend._spare._spare is not None
    return backend._spare._spare[0].pid


def pid_of_a_load(backend: LlamaBackend, path: Path) -> int:
    model = backend.load(LoadSpec(INFO, (path,), slots=1), CancelScope(), lambda _progress: None)
    try:
        return model.pid
    finally:
        model.close()


def test_a_load_takes_the_worker_that_waits(backend: LlamaBackend, tiny_model: Path) -> None:
    """The load runs in the process that was there, and another is started for the next."""
    backend.warm_up()
    waiting = spare_of(backend)
    assert pid_of_a_load(backend, tiny_model) == waiting
    assert spare_of(backend) != waiting


def test_only_one_waits(backend: LlamaBackend) -> None:
    """However often it is asked for."""
    for _ in range(5):
        backend.warm_up()
    spare_of(backend)
    wait_until(lambda: len(worker_processes()) == 1)
    backend.warm_up()
    assert len(worker_processes()) == 1


def test_none_waits_while_memory_is_short(tiny_model: Path) -> None:
    """Then a load starts a process of its own."""
    asked: list[int] = []

    def may_take(size_bytes: int) -> bool:
        asked.append(size_bytes)
        return False

    backend = LlamaBackend(may_take=may_take)
    backend.warm_up()
    wait_until(lambda: asked)
    assert asked[0] > 2**20
    assert worker_processes() == []
    assert pid_of_a_load(backend, tiny_model)
    backend.kill_all()


def test_a_worker_that_died_waiting_is_replaced(backend: LlamaBackend, tiny_model: Path) -> None:
    """A load does not fail because the process that waited for it is gone."""
    backend.warm_up()
    waiting = spare_of(backend)
    psutil.Process(waiting).kill()
    wait_until(lambda: psutil.Process(waiting).status() == psutil.STATUS_ZOMBIE)
    assert pid_of_a_load(backend, tiny_model) != waiting


def test_a_worker_from_another_time_is_not_used(
    backend: LlamaBackend, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a worker inherits may have changed since it was started: then it is ended."""
    backend.warm_up()
    waiting = spare_of(backend)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert pid_of_a_load(backend, tiny_model) != waiting
    wait_until(lambda: not psutil.pid_exists(waiting))


def registry_of(path: Path) -> ModelRegistry:
    variant = {
        "quantization": "f16", "size_mb": 1, "min_ram_gb": 0.1, "source": {"path": str(path)},
    }  # fmt: skip
    models = {
        "tiny": {"name": "T", "license": "x", "context_length": 512, "variants": {"v": variant}}
    }
    agent = {
        "name": "C", "description": "", "system_prompt": "Be brief.",
        "models": {"primary": "tiny"},
    }  # fmt: skip
    text = {"version": "1", "models": models, "agents": {"conversation": agent}}
    return ModelRegistry.parse(json.dumps(text), base=path.parent)


def test_an_engine_prepares_and_cleans_up(tiny_model: Path) -> None:
    """Inside `with`, a worker waits before anything is asked; afterwards there is none."""
    with OrionInferenceEngine(registry_of(tiny_model)) as engine:
        wait_until(lambda: len(worker_processes()) == 1)
        (waiting,) = worker_processes()
        engine.infer("Hi", max_tokens=2)
        assert [m.pid for m in engine.stats().models.values()] == [waiting.pid]
    assert worker_processes() == []


def test_an_engine_need_not(tiny_model: Path) -> None:
    """`keep_spare_worker=False` starts nothing that is not needed."""
    config = config_with(keep_spare_worker=False)
    with OrionInferenceEngine(registry_of(tiny_model), config) as engine:
        assert worker_processes() == []
        engine.infer("Hi", max_tokens=2)
        assert len(worker_processes()) == 1


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_host(end: signal.Signals) -> None:
    """A host that is killed leaves no worker that waits for ever."""
    script = textwrap.dedent(
        """
        import sys, time
        from orion_oie.backends.llama.host.loader import LlamaBackend
        backend = LlamaBackend(may_take=lambda _size_bytes: True)
        backend.warm_up()
        while backend._spare._spare is None:
            time.sleep(0.01)
        print(backend._spare._spare[0].pid, flush=True)
        time.sleep(60)
        """
    )
    host = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert host.stdout is not None
        waiting = int(host.stdout.readline())
        os.kill(host.pid, end)
        host.wait(10)
        wait_until(lambda: not psutil.pid_exists(waiting))
    finally:
        host.kill()
        host.wait()
        assert host.stdout is not None
        host.stdout.close()
