"""One suite that every backend passes. A test module subclasses it and says how to build one.

`long_job` must run for at least a second unless it is stopped.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import pytest

from orion_oie.backends.base import (
    GenerationJob,
    LoadSpec,
    LocalBackend,
    LocalModel,
    Model,
)
from orion_oie.cancellation import CancelScope
from orion_oie.errors import (
    ContextOverflowError,
    EngineClosedError,
    OrionError,
    RequestCancelledError,
    WorkerCrashedError,
)
from orion_oie.models.specs import SourceSpec
from orion_oie.schemas.loading import (
    LoadPhase,
    LoadProgress,
)
from orion_oie.schemas.requests import (
    GenerationOptions,
    Message,
)
from orion_oie.schemas.results import ModelInfo

INFO = ModelInfo(
    model_id="contract", variant="v", name="Contract", version="1.2", license="apache-2.0"
)
BOUND_S = 30.0


def job(question: str, history: tuple[Message, ...] = (), **options: object) -> GenerationJob:
    """A greedy job with a short system prompt."""
    messages = (
        Message(role="system", content="You answer briefly."),
        *history,
        Message(role="user", content=question),
    )
    return GenerationJob(messages, GenerationOptions(**{"temperature": 0.0, **options}))


class Running:
    """A generation on a thread of its own."""

    def __init__(self, model: Model, work: GenerationJob) -> None:
        self.scope = CancelScope()
        self.started = threading.Event()
        self.pieces: list[str] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(model, work), daemon=True)
        self._thread.start()

    def _run(self, model: Model, work: GenerationJob) -> None:
        def on_text(text: str, _tokens: int) -> None:
            self.pieces.append(text)
            self.started.set()

        try:
            self.completion = model.generate(work, self.scope, on_text)
        except OrionError as error:
            self.error = error
        finally:
            self.started.set()

    def join(self) -> None:
        self._thread.join(BOUND_S)
        assert not self._thread.is_alive(), "the generation does not end"


def said(model: Model, work: GenerationJob) -> str:
    """The whole answer to a job."""
    pieces: list[str] = []
    model.generate(work, CancelScope(), lambda text, _n: pieces.append(text))
    return "".join(pieces)


class ModelContract:
    """What the model of every backend does, local or remote. Its context holds 2,048 tokens."""

    @pytest.fixture
    def long_job(self) -> GenerationJob:
        raise NotImplementedError

    @pytest.fixture
    def model(self) -> Model:
        raise NotImplementedError

    def test_pieces_and_counts_agree(self, model) -> None:
        """The counted tokens of the pieces are the completion tokens; max_tokens holds."""
        pieces: list[tuple[str, int]] = []
        work = job("Say something long, please.", max_tokens=7)
        completion = model.generate(work, CancelScope(), lambda t, n: pieces.append((t, n)))
        assert sum(tokens for _, tokens in pieces) == completion.usage.completion_tokens
        assert completion.usage.completion_tokens <= 7
        assert completion.usage.prompt_tokens > 0
        assert "".join(text for text, _ in pieces)

    def test_length_is_reported(self, model, long_job) -> None:
        """An answer that max_tokens cut short has the finish reason "length"."""
        work = GenerationJob(long_job.messages, GenerationOptions(temperature=0.0, max_tokens=3))
        completion = model.generate(work, CancelScope(), lambda _t, _n: None)
        assert completion.finish_reason == "length"
        assert completion.usage.completion_tokens == 3

    def test_the_same_job_gives_the_same_answer(self, model) -> None:
        """Greedy answers are repeatable."""
        answers = [said(model, job("Hello?", max_tokens=12)) for _ in range(2)]
        assert answers[0] == answers[1]

    def test_a_stop_string_cuts_the_answer(self, model) -> None:
        """The answer ends right before the stop string, with the finish reason "stop"."""
        text = said(model, job("Hello?", max_tokens=12))
        stop = text[len(text) // 2 : len(text) // 2 + 3]
        cut: list[str] = []
        completion = model.generate(
            job("Hello?", max_tokens=12, stop=[stop]), CancelScope(), lambda t, _n: cut.append(t)
        )
        assert "".join(cut) == text[: text.index(stop)]
        assert completion.finish_reason == "stop"

    def test_overflow_names_the_numbers(self, model) -> None:
        """A prompt that cannot fit raises ContextOverflowError with counts, and nothing breaks."""
        with pytest.raises(ContextOverflowError) as caught:
            model.generate(job("word " * 3000), CancelScope(), lambda _t, _n: None)
        details = caught.value.details
        assert details["limit"] == 2048
        assert details["prompt_tokens"] > 2048
        assert details["requested_tokens"] >= 1
        model.generate(job("Hello?", max_tokens=2), CancelScope(), lambda _t, _n: None)

    def test_an_explicit_max_tokens_must_fit(self, model) -> None:
        """max_tokens that the caller asked for and that cannot fit is an error, not a cut."""
        work = job("Hello?", max_tokens=3000, max_tokens_asked=True)
        with pytest.raises(ContextOverflowError) as caught:
            model.generate(work, CancelScope(), lambda _t, _n: None)
        assert caught.value.details["requested_tokens"] == 3000

    def test_cancel_ends_a_generation(self, model, long_job) -> None:
        """A cancelled generation raises the scope's error, and the next one works."""
        running = Running(model, long_job)
        assert running.started.wait(BOUND_S)
        running.scope.cancel(RequestCancelledError("enough"))
        running.join()
        assert isinstance(running.error, RequestCancelledError)
        model.generate(job("Hello?", max_tokens=2), CancelScope(), lambda _t, _n: None)

    def test_cancel_leaves_the_neighbours_alone(self, model, long_job) -> None:
        """Neighbours of a cancelled generation answer as if they had been alone."""
        alone = said(model, job("Hello?", max_tokens=24))
        neighbour = Running(model, long_job)
        assert neighbour.started.wait(BOUND_S)
        other = Running(model, job("Hello?", max_tokens=24))
        neighbour.scope.cancel(RequestCancelledError("enough"))
        other.join()
        neighbour.join()
        assert other.error is None
        assert "".join(other.pieces) == alone

    def test_four_at_once(self, model) -> None:
        """Four generations at the same time all end, each with its own answer."""
        works = [job(f"Question number {n}?", max_tokens=10) for n in range(4)]
        alone = [said(model, work) for work in works]
        together = [Running(model, work) for work in works]
        for running in together:
            running.join()
            assert running.error is None
        assert ["".join(running.pieces) for running in together] == alone

    def test_more_than_the_slots_wait(self, model) -> None:
        """Twelve generations on four slots all end."""
        runs = [Running(model, job(f"Question {n}?", max_tokens=4)) for n in range(12)]
        for running in runs:
            running.join()
            assert running.error is None

    def test_a_raising_listener_ends_its_own_request_only(self, model) -> None:
        """What the listener raises comes out of generate, and the model goes on."""

        def on_text(_text: str, _tokens: int) -> None:
            raise RuntimeError("listener broke")

        with pytest.raises(RuntimeError, match="listener broke"):
            model.generate(job("Hello?", max_tokens=4), CancelScope(), on_text)
        model.generate(job("Hello?", max_tokens=2), CancelScope(), lambda _t, _n: None)


class BackendContract(ModelContract):
    """What every backend does whose models are in this machine's memory."""

    @pytest.fixture
    def backend(self) -> LocalBackend:
        raise NotImplementedError

    @pytest.fixture
    def files(self) -> tuple[Path, ...]:
        raise NotImplementedError

    def crash(self, model: LocalModel) -> None:
        raise NotImplementedError

    @pytest.fixture
    def model(self, backend: LocalBackend, files: tuple[Path, ...]) -> Iterator[LocalModel]:
        spec = LoadSpec(INFO, files, slots=4, context_length=2048)
        model = backend.load(spec, CancelScope(), lambda _fraction: None)
        yield model
        model.close()

    def test_load_reports_progress_and_facts(self, backend, files) -> None:
        """Progress rises to 1, through all phases in order, and the info names version,
        architecture and context."""
        seen: list[LoadProgress] = []
        spec = LoadSpec(INFO, files, context_length=256)
        model = backend.load(spec, CancelScope(), seen.append)
        try:
            fractions = [progress.fraction for progress in seen]
            assert fractions == sorted(fractions)
            assert fractions[-1] == 1.0
            phases = list(dict.fromkeys(progress.phase for progress in seen))
            assert phases == [phase for phase in get_args(LoadPhase) if phase in phases]
            assert phases[0] == "initializing"
            assert phases[-2:] == ["ready", "complete"]
            assert seen[-1].shards_loaded == seen[-1].shards
            assert model.load_progress == seen[-1]
            assert model.completion.result(0) == model.info
            assert model.info.version == "1.2"
            assert model.info.architecture
            assert model.info.context_length == 256
            assert model.is_alive()
        finally:
            model.close()

    def test_what_a_model_takes_is_told_without_a_load(self, backend, files) -> None:
        """From the files alone, the same each time; no part is less than nothing."""
        spec = LoadSpec(INFO, files, context_length=256)
        footprint = backend.footprint(spec)
        assert backend.footprint(spec) == footprint
        assert not footprint.is_measured
        parts = [value for value in asdict(footprint).values() if value is not False]
        assert all(part >= 0 for part in parts)
        assert 0 < footprint.total_bytes <= footprint.max_bytes

    def test_what_is_not_here_is_guessed(self, backend, tmp_path) -> None:
        """A model whose files are elsewhere takes at least the bytes that they are said to have."""
        source = SourceSpec(url="http://localhost:9/", shards=["far.gguf"])
        spec = LoadSpec(INFO, (tmp_path / "far.gguf",), source=source, expected_bytes=10**9)
        assert backend.footprint(spec).total_bytes > 10**9

    def test_a_cancelled_scope_loads_nothing(self, backend, files) -> None:
        """A load whose scope is cancelled raises the scope's error."""
        scope = CancelScope()
        scope.cancel(RequestCancelledError("no more"))
        with pytest.raises(RequestCancelledError, match="no more"):
            backend.load(LoadSpec(INFO, files), scope, lambda _fraction: None)

    def test_a_crash_is_an_exception(self, model, long_job) -> None:
        """A crash in the middle raises WorkerCrashedError for all; the model is then dead."""
        runs = [Running(model, long_job) for _ in range(2)]
        for running in runs:
            assert running.started.wait(BOUND_S)
        self.crash(model)
        for running in runs:
            running.join()
            assert isinstance(running.error, WorkerCrashedError)
        assert not model.is_alive()
        with pytest.raises(WorkerCrashedError):
            model.generate(job("Hello?"), CancelScope(), lambda _t, _n: None)

    def test_close_ends_what_runs(self, model, long_job) -> None:
        """Closing is idempotent; what runs, and what comes after, raises EngineClosedError."""
        running = Running(model, long_job)
        assert running.started.wait(BOUND_S)
        model.close()
        running.join()
        assert isinstance(running.error, EngineClosedError)
        model.close()
        with pytest.raises(EngineClosedError):
            model.generate(job("Hello?"), CancelScope(), lambda _t, _n: None)

    def test_kill_all_ends_everything(self, backend, model) -> None:
        """kill_all leaves no model alive."""
        backend.kill_all()
        deadline = time.monotonic() + BOUND_S
        while model.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not model.is_alive()
