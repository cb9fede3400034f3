"""A chat: its history, its turns one after the other, its file.

The backend says what its script says; trimming is tried on a real worker with a tiny model.
"""

import asyncio
import gc
import inspect
import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from engines import LONG, delivered
from helpers import BOUND_S, Running, one_model_registry, run_all, wait_until

from orion_oie import (
    Chat,
    ContextOverflowError,
    DeadlineExceededError,
    EngineClosedError,
    EngineConfig,
    InvalidRequestError,
    Message,
    OrionInferenceEngine,
    RequestCancelledError,
    ServingConfig,
    UnknownAgentError,
    WorkerTimeoutError,
)
from orion_oie.backends.base import GenerationJob
from orion_oie.backends.fake import FakeAnswer


class Echo:
    """A script that repeats the question; "long" is answered at length, "wait" when let go."""

    def __init__(self) -> None:
        self.jobs: list[GenerationJob] = []
        self.let_go = threading.Event()

    def __call__(self, job: GenerationJob) -> FakeAnswer:
        self.jobs.append(job)
        question = job.messages[-1].content
        if question.startswith("long"):
            return LONG
        if question.startswith("wait"):
            assert self.let_go.wait(BOUND_S)
        if question.startswith("fail"):
            return FakeAnswer("half an ", error=WorkerTimeoutError("stuck"))
        return FakeAnswer(f"Echo: {question}")

    def seen(self) -> list[list[str]]:
        """The texts of each job, without the system prompt."""
        return [[m.content for m in job.messages if m.role != "system"] for job in self.jobs]


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def engine(make_engine: Any, echo: Echo) -> OrionInferenceEngine:
    made: OrionInferenceEngine = make_engine(
        {"*": echo}, {"conversation": ["main"], "pirate": ["main"]}
    )
    return made


def turns(*questions: str) -> list[Message]:
    return [
        Message(role=role, content=text)
        for question in questions
        for role, text in (("user", question), ("assistant", f"Echo: {question}"))
    ]


# Turns


def test_each_question_sees_the_turns_before_it(engine, echo) -> None:
    """All four ways to ask give the answer, and keep it for the next question."""
    chat = engine.chat()

    async def main() -> None:
        assert (await chat.aask("three")).content == "Echo: three"
        stream = chat.astream("four")
        assert "".join([event.text async for event in stream]) == "Echo: four"
        assert (await stream.result()).content == "Echo: four"

    assert chat.ask("one").content == "Echo: one"
    with chat.stream("two") as handle:
        assert "".join(event.text for event in handle) == "Echo: two"
    asyncio.run(main())
    assert chat.history == turns("one", "two", "three", "four")
    assert echo.seen()[-1] == [m.content for m in turns("one", "two", "three")] + ["four"]
    assert repr(chat) == "<Chat with any agent, 4 turns>"


def test_the_agent_and_the_system_prompt_are_those_of_the_chat(engine, echo) -> None:
    """A call may bring others for its own turn."""
    chat = engine.chat("pirate", system_prompt="Be brief.")
    assert (chat.agent, chat.system_prompt) == ("pirate", "Be brief.")
    assert chat.ask("one").agent_id == "pirate"
    assert chat.ask("two", agent="conversation", system_prompt="").agent_id == "conversation"
    first, second = (job.messages[0] for job in echo.jobs)
    assert (first.role, first.content, second.role) == ("system", "Be brief.", "user")
    assert repr(chat) == "<Chat with agent 'pirate', 2 turns>"
    assert engine.chat().agent is engine.chat().system_prompt is None


def test_a_chat_has_a_session_of_its_own(engine, echo) -> None:
    """One for all of its turns, another one than any other chat."""
    chat, other = engine.chat(), engine.chat()
    for one in (chat, chat, other):
        one.ask("hi")
    sessions = [job.session_id for job in echo.jobs]
    assert sessions == [chat.session_id, chat.session_id, other.session_id]
    assert chat.session_id != other.session_id


def test_options_go_through(engine, echo) -> None:
    """Each call may have its own; overflow drops the oldest unless it says otherwise."""
    chat = engine.chat()
    chat.ask("one", temperature=0.0, seed=7)
    chat.stream("two", on_overflow="error", chunk_by="word", typewriter_delay=0.0).result(BOUND_S)
    assert (echo.jobs[0].options.temperature, echo.jobs[0].options.seed) == (0.0, 7)
    assert [job.options.on_overflow for job in echo.jobs] == ["drop_oldest", "error"]


def test_on_event_reads_a_turn_to_its_end(engine) -> None:
    """Also when the handle is dropped at once."""
    chat = engine.chat()
    seen: list[str] = []
    chat.stream("one two", on_event=lambda event: seen.append(event.text))
    wait_until(lambda: chat.history == turns("one two"))
    wait_until(lambda: "".join(seen) == "Echo: one two")

    async def main() -> None:
        async for _ in chat.astream("three", on_event=lambda event: seen.append(event.text)):
            pass

    asyncio.run(main())
    wait_until(lambda: "".join(seen) == "Echo: one twoEcho: three")


def test_the_history_is_a_copy(engine, echo) -> None:
    """Whoever changes it changes only the copy; messages cannot be changed."""
    chat = engine.chat()
    chat.ask("one")
    chat.history.clear()
    chat.history.append(Message(role="user", content="never said"))
    with pytest.raises(ValueError, match="frozen"):
        chat.history[0].content = "never said"
    chat.notes.append("never noted")
    chat.ask("two")
    assert chat.history == turns("one", "two")
    assert chat.notes == []
    assert "never said" not in str(echo.jobs)


def test_a_reader_that_has_the_answer_finds_it_in_the_history(engine) -> None:
    """At once, whoever is faster: the reader or the callback of the request."""
    chat = engine.chat()
    for number in range(50):
        handle = chat.stream("one")
        if number % 2:
            handle.result(BOUND_S)
        else:
            list(handle)
            wait_until(handle.done)
        assert len(chat.history) == 2 * (number + 1)


# Turns that come to nothing


def test_a_failed_turn_leaves_no_trace(engine) -> None:
    """Neither its question nor what came of its answer; the next turn is as if it had not been."""
    chat = engine.chat()
    chat.ask("one")
    with pytest.raises(WorkerTimeoutError):
        chat.ask("fail")
    with pytest.raises(WorkerTimeoutError):
        list(chat.stream("fail"))
    with pytest.raises(WorkerTimeoutError):
        asyncio.run(chat.aask("fail"))
    engine.reset_breakers()
    with pytest.raises(DeadlineExceededError):
        chat.ask("long", deadline=0.02)
    assert chat.history == turns("one")
    assert chat.ask("two").content == "Echo: two"
    assert chat.history == turns("one", "two")


def test_a_cancelled_turn_leaves_no_trace(engine) -> None:
    """However it is cancelled: by its handle, by leaving the block, by dropping it, by a task."""
    chat = engine.chat()
    handle = chat.stream("long 1")
    next(iter(handle))
    handle.cancel()
    with pytest.raises(RequestCancelledError):
        handle.result(BOUND_S)
    with chat.stream("long 2") as handle:
        next(iter(handle))
    for _ in chat.stream("long 3"):
        break

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(chat.aask("long 4"), 0.05)
        async for _ in chat.astream("long 5"):
            break
        async with chat.astream("long 6") as stream:
            await anext(stream)
        assert (await chat.aask("one")).content == "Echo: one"

    asyncio.run(asyncio.wait_for(main(), BOUND_S))
    assert chat.ask("two").content == "Echo: two"
    assert chat.history == turns("one", "two")
    assert engine.stats().requests.cancelled == 6


@pytest.mark.parametrize("wrong", [None, 3, b"bytes", "", "  ", "\ud800"])
def test_a_wrong_question_is_refused(engine, wrong: Any) -> None:
    """By all four ways, before a model sees it; the chat goes on."""
    chat = engine.chat()

    async def first_step() -> None:
        async for _ in chat.astream(wrong):
            pass

    ways = [
        lambda: chat.ask(wrong),
        lambda: chat.stream(wrong),
        lambda: asyncio.run(chat.aask(wrong)),
        lambda: asyncio.run(first_step()),
    ]
    for ask in ways:
        with pytest.raises(InvalidRequestError, match="the question"):
            ask()
    assert chat.history == []
    assert chat.ask("one").content == "Echo: one"


@pytest.mark.parametrize("name", ["conversation_history", "session_id"])
def test_the_chats_own_options_are_refused(engine, name: str) -> None:
    """The history and the session are the chat's; other wrong options are named as ever."""
    chat = engine.chat()
    for ask in (
        chat.ask,
        chat.stream,
        chat.astream,
        lambda *a, **k: asyncio.run(chat.aask(*a, **k)),
    ):
        with pytest.raises(InvalidRequestError, match=f"{name}: a chat has its own"):
            ask("one", **{name: None})
    with pytest.raises(InvalidRequestError, match="temprature: unknown key"):
        chat.ask("one", temprature=1)
    with pytest.raises(InvalidRequestError, match="chunk_by"):
        chat.stream("one", chunk_by="letter")
    with pytest.raises(UnknownAgentError):
        chat.stream("one", agent="nobody")
    assert chat.ask("one").content == "Echo: one"


def test_a_wrong_chat_is_refused(engine) -> None:
    """At once, not with the first question."""
    with pytest.raises(UnknownAgentError, match="did you mean 'pirate'"):
        engine.chat("pirat")
    for wrong, message in (
        ({"agent": 3}, "agent: "),
        ({"system_prompt": 3}, "system_prompt: "),
        ({"system_prompt": "\ud800"}, "system_prompt is not valid"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            engine.chat(**wrong)


def test_a_chat_outlives_its_engine_but_cannot_ask(engine, tmp_path: Path) -> None:
    """After the shutdown all four ways raise EngineClosedError; the history can be saved."""
    chat = engine.chat()
    chat.ask("one")
    engine.close()

    async def first_step() -> None:
        async for _ in chat.astream("two"):
            pass

    ways = [
        lambda: chat.ask("two"),
        lambda: chat.stream("two"),
        lambda: asyncio.run(chat.aask("two")),
        lambda: asyncio.run(first_step()),
    ]
    for ask in ways:
        with pytest.raises(EngineClosedError):
            ask()
    assert chat.history == turns("one")
    chat.save(tmp_path / "chat.json")


# One after the other


def test_questions_of_many_threads_are_answered_in_turn(engine, echo) -> None:
    """Each sees all turns before it, whole; none is lost."""
    chat = engine.chat()

    def ask(number: int) -> None:
        for turn in range(5):
            question = f"{number}-{turn}"
            if (number + turn) % 2:
                assert chat.ask(question).content == f"Echo: {question}"
            else:
                assert chat.stream(question).result(BOUND_S).content == f"Echo: {question}"

    for run in run_all([lambda n=n: ask(n) for n in range(6)]):
        run.join()
    asked = [message.content for message in chat.history[::2]]
    assert len(asked) == 30
    assert sorted(asked) == sorted(f"{n}-{t}" for n in range(6) for t in range(5))
    assert chat.history == turns(*asked)
    assert [len(texts) for texts in echo.seen()] == list(range(1, 60, 2))


def test_a_question_waits_for_the_stream_before_it(engine, echo) -> None:
    """Also from within the loop over that stream, which goes on by itself meanwhile."""
    chat = engine.chat()
    for _ in chat.stream("one two three"):
        chat.ask("and?")
        break
    assert chat.history == turns("one two three", "and?")
    first = chat.stream("wait")
    second = Running(chat.ask, "next")
    assert not second.ends_within(0.05)
    echo.let_go.set()
    assert second.join().content == "Echo: next"
    assert first.result(BOUND_S).content == "Echo: wait"
    assert chat.history[4:] == turns("wait", "next")


def test_tasks_of_one_loop_take_turns(engine, echo) -> None:
    """They do not block the loop; one that is cancelled while it waits is passed over."""
    chat = engine.chat()

    async def main() -> list[str]:
        first = asyncio.create_task(chat.aask("wait"))
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        waiting = [asyncio.create_task(chat.aask(f"{n}")) for n in range(2)]
        stream = chat.astream("2")
        later = asyncio.create_task(stream.result())
        gone_stream = chat.astream("never")
        gone = [asyncio.create_task(gone_stream.started()), asyncio.create_task(chat.aask("never"))]
        await asyncio.sleep(0.01)
        with pytest.raises(InvalidRequestError, match="has not begun"):
            stream.handle  # noqa: B018 (the access is the test)
        assert "has not begun" in repr(stream)
        for task in gone:
            task.cancel()
        await asyncio.wait(gone)
        assert not first.done()
        echo.let_go.set()
        results = [await first, *[await task for task in waiting], await later]
        assert stream.handle.done()
        return [result.content for result in results]

    contents = asyncio.run(asyncio.wait_for(main(), BOUND_S))
    assert contents == ["Echo: wait", "Echo: 0", "Echo: 1", "Echo: 2"]
    assert chat.history == turns("wait", "0", "1", "2")


def test_undo_and_clear(engine, echo) -> None:
    """undo takes back the last turn and returns it; clear forgets all."""
    chat = engine.chat()
    assert chat.undo() == []
    for question in ("one", "two", "three"):
        chat.ask(question)
    assert chat.undo() == turns("three")
    chat.ask("four")
    assert echo.seen()[-1] == [m.content for m in turns("one", "two")] + ["four"]
    chat.clear()
    assert chat.history == chat.undo() == []
    chat.ask("five")
    assert echo.seen()[-1] == ["five"]


def test_undo_and_clear_do_not_wait(engine, echo) -> None:
    """While a question is open they say so, and nothing changes."""
    chat = engine.chat()
    chat.ask("one")
    handle = chat.stream("wait")
    for change in (chat.undo, chat.clear):
        with pytest.raises(InvalidRequestError, match="is not answered yet"):
            change()
    assert chat.history == turns("one")
    echo.let_go.set()
    handle.result(BOUND_S)
    assert chat.undo() == turns("wait")


def test_a_subscriber_may_use_the_chat(engine) -> None:
    """No lock is held while the engine works: what hears its events may read the chat."""
    chat = engine.chat()
    lengths: list[int] = []
    engine.subscribe(lambda _event: lengths.append(len(chat.history)))
    Running(chat.ask, "one").join()
    Running(lambda: list(chat.stream("two"))).join()
    delivered(engine)
    assert {0, 2} <= set(lengths)


def test_a_forgotten_chat_is_collected(engine) -> None:
    """The engine keeps neither a chat nor its turns."""
    chat = engine.chat()
    chat.ask("one")
    list(chat.stream("two"))
    del chat

    def left() -> bool:
        gc.collect()
        return any(isinstance(thing, Chat) for thing in gc.get_objects())

    wait_until(lambda: not left())


# Files


def test_a_chat_is_saved_and_continued(engine, echo, tmp_path: Path) -> None:
    """The agent, the system prompt and the turns come back, with another session."""
    path = tmp_path / "chat.json"
    chat = engine.chat("pirate", "Be brief.")
    chat.ask("one")
    handle = chat.stream("wait")
    chat.save(path)  # the open turn is not in it
    loaded = Chat.load(path, engine)
    assert (loaded.agent, loaded.system_prompt) == ("pirate", "Be brief.")
    assert loaded.history == turns("one")
    assert loaded.session_id != chat.session_id
    echo.let_go.set()
    handle.result(BOUND_S)
    loaded.ask("two")
    assert echo.seen()[-1] == ["one", "Echo: one", "two"]
    loaded.save(str(path))
    assert Chat.load(str(path), engine).history == turns("one", "two")
    assert chat.history == turns("one", "wait")


def test_an_agent_that_is_gone_is_named_with_the_file(engine, tmp_path: Path) -> None:
    """A chat of another registry does not load; one that is no chat says so."""
    path = tmp_path / "chat.json"
    engine.chat("pirate").save(path)
    content = json.loads(path.read_text()) | {"agent": "parrot"}
    path.write_text(json.dumps(content))
    with pytest.raises(UnknownAgentError, match=f"{path}: .*parrot") as caught:
        Chat.load(path, engine)
    assert caught.value.details["agent_id"] == "parrot"
    path.write_text("{}")
    with pytest.raises(InvalidRequestError, match="is no chat"):
        Chat.load(path, engine)


def test_a_path_comes_first(engine, tmp_path: Path) -> None:
    """The arguments in the other order are a mistake in the program."""
    with pytest.raises(TypeError, match="OrionInferenceEngine"):
        Chat.load(engine, tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ask", "aask", "stream", "astream"])
def test_editors_see_the_options(name: str) -> None:
    """Of each way to ask."""
    parameters = inspect.signature(getattr(Chat, name)).parameters
    (options,) = (one for one in parameters.values() if one.kind is one.VAR_KEYWORD)
    assert "RequestOptionsDict" in str(options.annotation)


def test_an_engine_with_a_lower_limit_refuses(make_engine, tmp_path: Path) -> None:
    """The limits are those of the engine that continues."""
    path = tmp_path / "chat.json"
    chat = make_engine().chat()
    chat.ask("x" * 30)
    chat.save(path)
    with pytest.raises(InvalidRequestError, match="has 30 characters, the limit is 20"):
        Chat.load(path, make_engine(max_query_chars=20))


# When the context is full


def test_a_long_conversation_is_trimmed(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The model is not shown the oldest messages, by whole turns. The receipt, the chat and the
    log tell of it; the history is whole."""
    config = EngineConfig(serving=ServingConfig(context_length=256, slots=1))
    with OrionInferenceEngine(one_model_registry(tiny_model), config) as engine:
        chat = engine.chat("conversation")
        results = []
        with caplog.at_level(logging.WARNING, logger="orion_oie"):
            for number in range(4):
                question = f"{number} " + "and so on " * 6
                results.append(chat.ask(question, max_tokens=24, seed=1))
        dropped = [result.receipt.dropped_turns for result in results]
        assert dropped[0] == 0
        assert dropped[-1] in (2, 4, 6)
        assert dropped == sorted(dropped)
        assert chat.dropped_turns == dropped[-1]
        assert len(chat.history) == 8
        assert len(chat.notes) == len({*dropped} - {0})
        note = f"was not shown the oldest {dropped[-1]} messages"
        assert note in chat.notes[-1]
        delivered(engine)
        assert note in caplog.text
        assert "and so on" not in caplog.text
        with pytest.raises(ContextOverflowError):
            chat.ask("and so on " * 6, max_tokens=24, on_overflow="error")
        assert len(chat.history) == 8
        chat.clear()
        assert (chat.notes, chat.dropped_turns) == ([], 0)


def test_the_state_of_the_last_turn_is_found_again(tiny_model: Path) -> None:
    """Only what is new is computed for the next turn."""
    with OrionInferenceEngine(one_model_registry(tiny_model)) as engine:
        chat = engine.chat("conversation")
        first = chat.ask("Hello there, how are you?", max_tokens=8, seed=1)
        second = chat.ask("And now?", max_tokens=8, seed=1)
        assert second.usage.cached_tokens >= first.usage.prompt_tokens - 1
