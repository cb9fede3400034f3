"""The engine as its callers see it: answers, options, personas, results.

The backend says what its script says.
"""

import asyncio
from typing import Any

import pytest
from engines import (
    LONG,
    TEXT,
    MakeEngine,
    ended,
    names,
    one_at_a_time,
    outcomes,
)
from helpers import BOUND_S, Held, run_all, wait_until

from orion_oie import (
    ContextOverflowError,
    GenerationOptions,
    InvalidRequestError,
    Message,
    ModelNotFoundError,
    RequestCancelledError,
    RequestState,
    Route,
    UnknownAgentError,
)
from orion_oie.backends.base import GenerationJob
from orion_oie.backends.fake import FakeAnswer, FakeBackend

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
    wait_until(lambda: late)
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
        ({"repeat_penalty": 0}, "repeat_penalty: .*allowed: number >= 0.1 and <= 10"),
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
        def route(self, query: str, agents: Any, context: Any) -> Route:
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
        def route(self, query: str, agents: Any, context: Any) -> Route:
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
    assert "stands in for the primary model" in small.reason


def test_no_model_at_all_says_what_to_do(make_engine) -> None:
    """When no file is here, ModelNotFoundError names each model and the way out."""
    engine = make_engine(agents={"conversation": ["main", "spare"]}, missing=["main", "spare"])
    with pytest.raises(ModelNotFoundError, match=r"main \(.*main\.gguf.*spare \(.*spare\.gguf"):
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
