"""Every backend passes the suite of contracts.py."""

import os
import signal
from pathlib import Path

import pytest
from contracts import BackendContract, job

from orion_oie.backends.base import GenerationJob, LocalBackend, LocalModel
from orion_oie.backends.fake import FakeAnswer, FakeBackend
from orion_oie.backends.llama.host.loader import LlamaBackend

LONG = "Tell me everything, at length."


class TestFakeBackend(BackendContract):
    """The fake that ships with the library."""

    @pytest.fixture
    def backend(self) -> LocalBackend:
        def script(work: GenerationJob) -> FakeAnswer:
            question = work.messages[-1].content
            if question == LONG:
                return FakeAnswer("word " * 200, delay_s=0.02)
            return FakeAnswer(f"You asked: {question} and so this is a rather long answer.")

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
