"""States and events of a request; cancelling, deadlines and the queue.

The backend says what its script says.
"""

import asyncio
import json
import os
import signal
import threading

import pytest
from engines import LONG, TEXT, delivered, ended, names, one_at_a_time, outcomes, parts
from helpers import BOUND_S, Held, Running, no_more_threads, wait_until
from internals import deadlines_of

from orion_oie import (
    ContextOverflowError,
    DeadlineExceededError,
    Event,
    ModelCorruptError,
    OrionInferenceEngine,
    QueueFullError,
    RequestCancelledError,
    RequestState,
    TokenEvent,
    WorkerError,
    WorkerTimeoutError,
    __version__,
)
from orion_oie.backends.base import GenerationJob
from orion_oie.backends.fake import FakeAnswer, FakeBackend

# States, events, logs


def test_one_request_as_events(make_engine) -> None:
    """A first request is told in this order; all of its events carry its id."""
    engine = make_engine()
    events: list[Event] = []
    engine.subscribe(events.append)
    handle = engine.submit("Hello?")
    handle.result()
    delivered(engine)
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
    assert names(engine) == ["engine.started", *(event.name for event in events)]


def test_an_engine_reports_its_start_once(make_engine) -> None:
    """The first event names the version of the library and the process."""
    engine = make_engine()
    engine.infer("Hello?")
    first = engine.export_logs()[0]
    assert (first["event"], first["version"], first["pid"]) == (
        "engine.started",
        __version__,
        os.getpid(),
    )
    assert names(engine).count("engine.started") == 1


def test_a_failed_request_as_events(make_engine) -> None:
    """A refused request is told with its error."""
    engine = make_engine()
    ended(engine.submit("Hello?", agent="nobody"))
    assert names(engine) == [
        "engine.started",
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
    for count, query in enumerate(("Hello?", "And now?"), 1):
        held.let_go.clear()
        handle = engine.submit(query)
        handle.add_done_callback(lambda _handle: last.append(names(engine)[-1]))
        held.let_go.set()
        wait_until(lambda count=count: len(last) == count)
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
    delivered(engine)
    assert len(first) == heard > 0
    assert len(second) > heard


def test_a_failing_subscriber_harms_nobody(make_engine) -> None:
    """What a subscriber raises reaches neither the request nor the other subscribers."""
    engine = make_engine()
    heard: list[str] = []
    engine.subscribe(lambda event: 1 / 0)
    engine.subscribe(lambda event: heard.append(event.name))
    assert engine.infer("Hello?").content == TEXT
    delivered(engine)
    assert "request.succeeded" in heard
    assert heard.count("callback.failed") == 1
    wait_until(lambda: engine.stats().callback_errors == len(heard))


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
    wait_until(lambda: answers)
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
    delivered(engine)
    # A splitter is asked by those who read, and nobody reads; `fail` may come too late.
    assert sum(handle.state is RequestState.SUCCESS for handle in handles) in (1, 2)


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
    """With include_content=True questions, answers and errors are exported as they are."""
    engine = make_engine({"*": secretive}, include_content=True)
    ask_secretly(engine)
    exported = json.dumps(engine.export_logs())
    assert f"You said {SECRET}" in exported
    assert f"cannot answer 'bug {SECRET}'" in exported


def test_the_export_is_bounded(make_engine) -> None:
    """Only the last max_events events are kept; 0 keeps none."""
    engine = make_engine(max_events=3)
    engine.infer("Hello?")
    assert len(engine.export_logs()) == 3
    silent = make_engine(max_events=0)
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
        parts(engine).deadlines,
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
    assert not deadlines_of(parts(engine).deadlines)


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
    with pytest.raises(WorkerError, match="no more threads"):
        handle.result(BOUND_S)
    assert engine.stats().running == engine.stats().waiting == 0
    assert engine.submit("Hello?").result(BOUND_S).content == TEXT
