"""Every backend passes the suite of contracts.py."""

import os
import signal
from pathlib import Path

import pytest
from contracts import INFO, BackendContract, ModelContract, job

from orion_oie.backends.base import GenerationJob, LocalBackend, LocalModel, Model
from orion_oie.backends.fake import FakeAnswer, FakeBackend, FakeRemoteModel
from orion_oie.backends.llama.host.loader import LlamaBackend

LONG = "Tell me everything, at length."


def script(work: GenerationJob) -> FakeAnswer:
    """A long answer to `LONG`, a short one to everything else."""
    question = work.messages[-1].content
    if question == LONG:
        return FakeAnswer("word " * 200, delay_s=0.02)
    return FakeAnswer(f"You asked: {question} and so this is a rather long answer.")


class TestFakeRemoteModel(ModelContract):
    """A model that is somewhere else: it passes the part of the contract that needs no load."""

    @pytest.fixture
    def model(self) -> Model:
        return FakeRemoteModel(INFO.model_copy(update={"context_length": 2048}), script)

    @pytest.fixture
    def long_job(self) -> GenerationJob:
        return job(LONG, max_tokens=400)

    def test_it_has_nothing_of_a_local_model(self, model) -> None:
        """What needs no load must not ask for one."""
        local = {"pid", "load_progress", "completion", "is_alive", "close"}
        assert not local & set(dir(model))


class TestFakeBackend(BackendContract):
    """The fake that ships with the library."""

    @pytest.fixture
    def backend(self) -> LocalBackend:
        return FakeBackend({"*": script})

    @pytest.fixture
    def files(self) -> tuple[Path, ...]:
        return ()

    @pytest.fixture
    def long_job(self) -> GenerationJob:
        return job(LONG, max_tokens=400)

    def crash(self, model: LocalModel) -> None:
        model.crash()


class TestLlamaBackend(BackendContract):
    """llama.cpp in a worker process, with a tiny model of random weights."""

    @pytest.fixture
    def backend(self) -> LocalBackend:
        return LlamaBackend()

    @pytest.fixture
    def files(self, tiny_model: Path) -> tuple[Path, ...]:
        return (tiny_model,)

    @pytest.fixture
    def long_job(self) -> GenerationJob:
        return job(LONG, max_tokens=900)

    def crash(self, model: LocalModel) -> None:
        os.kill(model.pid, signal.SIGKILL)
