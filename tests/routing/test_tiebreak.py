"""A language model decides between two agents, if one is at hand."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engines import TEXT, MakeEngine, parts
from helpers import BOUND_S, Running, all_stages_but, config_with, wait_until
from hypothesis import given
from hypothesis import strategies as st

from orion_oie import ModelRegistry, OrionInferenceEngine
from orion_oie.backends.base import (
    Completion,
    GenerationJob,
    LoadSpec,
    LocalModel,
)
from orion_oie.backends.fake import FakeAnswer, FakeBackend, FakeModel
from orion_oie.cancellation import CancelScope, DeadlineTimer
from orion_oie.errors import WorkerCrashedError
from orion_oie.models.specs import AgentSpec
from orion_oie.routing.tiebreak import TieBreaker
from orion_oie.schemas.loading import (
    LoadProgress,
    OnProgress,
)
from orion_oie.schemas.results import (
    TokenAlternative,
    TokenLogprob,
    Usage,
)

AGENTS = ModelRegistry.packaged().agents
CODE, DATA = AGENTS["code"], AGENTS["data"]
DEADLINES = DeadlineTimer()


def said(letter: str, **logprobs: float) -> Completion:
    """A completion of one letter; `logprobs` are of all tokens that are listed."""
    top = [
        TokenAlternative(text=t, token=n, logprob=p) for n, (t, p) in enumerate(logprobs.items())
    ]
    own = logprobs.get(letter, -20.0)
    token = TokenLogprob(text=letter, token=0, logprob=own, top=top)
    return Completion("length", Usage(), logprobs=(token,))


class Model:
    """Answers jobs with a function."""

    def __init__(self, answer: Callable[[GenerationJob, CancelScope], Completion]) -> None:
        self.jobs: list[GenerationJob] = []
        self._answer = answer

    def generate(self, job: GenerationJob, scope: CancelScope, _on_text: Any) -> Completion:
        self.jobs.append(job)
        return self._answer(job, scope)


def breaker_over(model: Any, limit_s: float = BOUND_S) -> TieBreaker:
    @contextmanager
    def borrow() -> Iterator[LocalModel | None]:
        yield model

    return TieBreaker(borrow, DEADLINES, limit_s)


def favours(agent: AgentSpec, by: float, letter_bias: float = 0.0) -> Model:
    """A model whose log-odds for an agent are `by`, and that likes the letter A for itself."""

    def answer(job: GenerationJob, _scope: CancelScope) -> Completion:
        is_first = f"Assistant A, {agent.name}:" in job.messages[-1].content
        odds = (by if is_first else -by) + letter_bias
        return said("A" if odds > 0 else "B", A=-1.0 + odds, B=-1.0)

    return Model(answer)


@given(st.floats(-8, 8), st.floats(-8, 8))
def test_a_liking_for_a_letter_cancels_out(by: float, bias: float) -> None:
    """A model's bias for A or B cancels out; only its opinion of the agents remains."""
    expected = 1 / (1 + math.exp(-by))
    model = favours(CODE, by, bias)
    assert breaker_over(model)("Sort this", CODE, DATA) == pytest.approx(expected)
    assert breaker_over(model)("Sort this", DATA, CODE) == pytest.approx(1 - expected)


def test_what_is_asked() -> None:
    """One letter of two, twice, the agents in either order; of a long question the ends."""
    model = favours(CODE, 1.0)
    breaker_over(model)("begin " + "x" * 10_000 + " end", CODE, DATA)
    first, second = model.jobs
    assert first.options == second.options
    assert first.options.grammar == 'root ::= "A" | "B"'
    assert (first.options.max_tokens, first.options.temperature) == (1, 0.0)
    assert first.session_id is None
    assert not first.is_prefix_public
    for job, names in ((first, ("Code", "Data")), (second, ("Data", "Code"))):
        text = job.messages[-1].content
        for letter, name in zip("AB", names, strict=True):
            assert f"Assistant {letter}, {name}: {AGENTS[name.lower()].description}" in text
        assert "begin x" in text
        assert "x end" in text
        assert len(text) < 1500


def test_a_letter_that_is_not_listed_is_less_than_all_that_are() -> None:
    """The least probable one of the list stands for it."""
    model = Model(lambda _job, _scope: said("A", A=-1.0, other=-3.0))
    assert breaker_over(model)("?", CODE, DATA) == pytest.approx(0.5)  # A both times
    swapping = iter([said("A", A=-1.0, other=-3.0), said("B", B=-1.0, other=-3.0)])
    model = Model(lambda _job, _scope: next(swapping))
    assert breaker_over(model)("?", CODE, DATA) == pytest.approx(1 / (1 + math.exp(-2)))
    sure = Model(lambda _job, _scope: said("A", A=0.0, other=-1e9))
    assert breaker_over(sure)("?", CODE, DATA) == pytest.approx(0.5)


def test_nobody_to_ask() -> None:
    """No model, or one that tells no probabilities: no answer."""
    assert breaker_over(None)("?", CODE, DATA) is None
    silent = Model(lambda _job, _scope: Completion("stop", Usage()))
    assert breaker_over(silent)("?", CODE, DATA) is None


def test_a_slow_model_is_not_waited_for() -> None:
    """After the time limit there is no answer, and the model's generation is cancelled."""

    def hang(_job: GenerationJob, scope: CancelScope) -> Completion:
        ended = threading.Event()
        scope.on_cancel(ended.set)
        assert ended.wait(BOUND_S)
        scope.check()
        raise AssertionError

    model = Model(hang)
    assert breaker_over(model, 0.02)("?", CODE, DATA) is None
    assert len(model.jobs) == 1


def test_a_model_that_fails_is_an_error() -> None:
    """The route writes it down."""

    def crash(_job: GenerationJob, _scope: CancelScope) -> Completion:
        raise WorkerCrashedError("it died")

    with pytest.raises(WorkerCrashedError):
        breaker_over(Model(crash))("?", CODE, DATA)


# -- in an engine

DUO = {"code": ["b"], "data": ["d"], "other": ["e"]}


def engine_of(make_engine: MakeEngine, tmp_path: Path, backend: Any, **config: Any) -> Any:
    settings = {
        "cache_dir": tmp_path / "cache",
        "stages": [*all_stages_but("linear", "embeddings"), "tie_break"],
        "residency_s": 0.0,
        **config,
    }
    return make_engine(backend, DUO, models={"e": {"type": "embedding"}}, **settings)


def test_nothing_is_loaded_for_it(make_engine: MakeEngine, tmp_path: Path) -> None:
    """Without a model in memory the route stands as it is; an embedding model cannot be asked."""
    backend = FakeBackend({"*": FakeAnswer(TEXT)})
    engine = engine_of(make_engine, tmp_path, backend)
    engine.embed(["x"])
    route = engine.plan("Hm.").route
    assert (route.stages, route.notes) == (["start"], [])
    assert backend.loaded == ["e@q4"]


def test_a_model_in_memory_is_asked(make_engine: MakeEngine, tmp_path: Path) -> None:
    """The largest that has a slot free, and only that."""
    asked: list[str] = []

    def script(name: str) -> Callable[[GenerationJob], FakeAnswer]:
        def answer(_job: GenerationJob) -> FakeAnswer:
            asked.append(name)
            return FakeAnswer("A")

        return answer

    held = threading.Event()

    def holding(_job: GenerationJob) -> FakeAnswer:
        asked.append("d")
        assert held.wait(BOUND_S)
        return FakeAnswer("A")

    sizes = {"b": 1000, "d": 2000}
    backend = FakeBackend({"b": script("b"), "d": holding}, footprints=sizes)
    engine = engine_of(make_engine, tmp_path, backend, slots=1)
    engine.preload("code")
    engine.plan("Hm.")
    assert asked == ["b", "b"]  # the fake tells no probabilities: nothing comes of it
    running = Running(lambda: engine.infer("Hm.", agent="data"))
    wait_until(lambda: "d" in asked)
    asked.clear()
    engine.plan("Hm.")
    assert asked == ["b", "b"]
    held.set()
    running.join()
    asked.clear()
    engine.plan("Hm.")
    assert asked == ["d", "d"]
    wait_until(lambda: not any(one.users for one in engine.stats().models.values()))


class Arriving(FakeBackend):
    """A backend whose models can answer before all of their bytes have arrived."""

    def load(self, spec: LoadSpec, scope: CancelScope, on_progress: OnProgress) -> FakeModel:
        model = super().load(spec, scope, on_progress)
        model.load_progress = LoadProgress("loading_shard", shards=2, shards_loaded=1)
        return model


def test_a_model_that_is_arriving_is_not_asked(make_engine: MakeEngine, tmp_path: Path) -> None:
    """A model that is still arriving is not asked: its answer would wait for a download."""
    backend = Arriving({"*": FakeAnswer(error=WorkerCrashedError("asked"))})
    engine = engine_of(make_engine, tmp_path, backend)
    engine.preload("code")
    assert engine.plan("Hm.").route.notes == []


def test_it_is_off_unless_asked_for(make_engine: MakeEngine, tmp_path: Path) -> None:
    """By default no question is shown to a model that need not answer it."""
    backend = FakeBackend({"*": FakeAnswer(error=WorkerCrashedError("asked"))})
    stages = all_stages_but("linear", "embeddings")
    engine = engine_of(make_engine, tmp_path, backend, stages=stages)
    engine.preload("code")
    assert engine.plan("Hm.").route.notes == []
    engine = engine_of(make_engine, tmp_path, backend)
    engine.preload("code")
    assert engine.plan("Hm.").route.notes == ["the tie-break failed: asked"]


def test_a_real_model_decides(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2, once it is in memory: a probability, and the opposite one for the agents swapped."""
    config = config_with(
        cache_dir=tmp_path / "cache",
        stages=[*all_stages_but("linear"), "tie_break"],
        residency_s=0.0,
        slots=1,
        threads=1,
        context_length=1024,
        keep_spare_worker=False,
        predictive=False,
    )
    with OrionInferenceEngine(config=config) as engine:
        assert "tie_break" not in engine.plan("Hm.").route.stages
        engine.infer("Hello?", agent="conversation", max_tokens=1)
        before = engine.stats().models.keys()
        route = engine.plan("Hm.").route
        assert route.stages[-1] == "tie_break"
        assert any(note.startswith("a language model was asked") for note in route.notes)
        breaker = TieBreaker(parts(engine).memory.pool.borrow, DEADLINES, BOUND_S)
        query = "Write a function that counts the vowels of a text."
        first = breaker(query, CODE, AGENTS["creative"])
        second = breaker(query, AGENTS["creative"], CODE)
        assert first is not None
        assert second is not None
        assert 0 < first < 1
        assert second == pytest.approx(1 - first, abs=0.02)
        assert engine.stats().models.keys() == before
