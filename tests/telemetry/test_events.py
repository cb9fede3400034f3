"""Events: complete, redacted, handed on to all who listen, silent until logging is configured."""

import json
import logging
import subprocess
import sys
from functools import partial
from typing import Any
from unittest.mock import ANY

import pytest
from helpers import run_all

from orion_oie.telemetry.events import (
    Event,
    EventLog,
    redacted,
)

SECRET = "my secret question"


def exported(log: EventLog) -> list[dict[str, Any]]:
    """The events without their time, which must be there."""
    return [{key: value for key, value in event.items() if key != "at"} for event in log.export()]


@pytest.fixture
def log() -> EventLog:
    return EventLog(100)


@pytest.fixture(autouse=True)
def debug_logging(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="orion_oie")


# What an event is


def test_an_event_is_kept_and_handed_on_whole(log: EventLog) -> None:
    """Name, time, fields and request are the same for subscribers and in the export."""
    seen: list[Event] = []
    log.subscribe(seen.append)
    log.publish("model.loaded", "r1", key="m@q8_0", load_ms=12.5)
    log.publish("engine.closed")
    assert seen == [
        Event("model.loaded", ANY, {"key": "m@q8_0", "load_ms": 12.5}, "r1"),
        Event("engine.closed", ANY, {}, None),
    ]
    assert log.export() == [
        {
            "event": "model.loaded",
            "at": seen[0].at,
            "request_id": "r1",
            "key": "m@q8_0",
            "load_ms": 12.5,
        },
        {"event": "engine.closed", "at": seen[1].at, "request_id": None},
    ]
    assert 0 < seen[0].at <= seen[1].at
    json.dumps(log.export())


def test_fields_may_have_any_name(log: EventLog) -> None:
    """A field may be called like a parameter of the logging machinery."""
    fields = {"name": "a", "msg": "b", "args": "c", "self": "d", "event_name": "e", "exc_info": "f"}
    log.publish("odd.names", **fields)
    assert exported(log) == [{"event": "odd.names", "request_id": None, **fields}]


# What is not shown


def test_texts_are_redacted_unless_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    """What users and models said appears as its length: in the log, the export, and for
    subscribers. With `log_content` it appears as it is."""
    for log_content in (False, True):
        caplog.clear()
        log, seen = EventLog(10, log_content=log_content), []
        log.subscribe(seen.append)
        log.publish("request.received", "r1", query=SECRET, characters=len(SECRET))
        shown = SECRET if log_content else "<18 characters>"
        fields = {"query": shown, "characters": 18}
        assert exported(log) == [{"event": "request.received", "request_id": "r1", **fields}]
        assert seen == [Event("request.received", ANY, fields, "r1")]
        (record,) = caplog.records
        assert vars(record)["orion"] == fields
        assert (SECRET in str(vars(record))) is log_content


def test_every_field_that_holds_text_is_redacted() -> None:
    """The fields of questions, answers and prompts lose their text; numbers and ids stay."""
    texts = ["query", "content", "text", "answer", "prompt", "system_prompt"]
    assert redacted(dict.fromkeys(texts, SECRET)) == dict.fromkeys(texts, "<18 characters>")
    others = {"key": "m@q8_0", "text": 3, "tokens": 5, "error": "it died"}
    assert redacted(others) == others


def test_redacting_leaves_the_caller_s_data_alone() -> None:
    """The fields given are not changed."""
    fields = {"query": SECRET}
    redacted(fields)
    assert fields == {"query": SECRET}


# How many are kept


@pytest.mark.parametrize("capacity", [0, 1, 3, 10])
def test_the_last_events_are_kept(capacity: int) -> None:
    """Older ones make room; a log of capacity 0 keeps none and still hands them on."""
    log, seen = EventLog(capacity), []
    log.subscribe(seen.append)
    for number in range(5):
        log.publish("x", number=number)
    assert [event["number"] for event in log.export()] == list(range(5))[max(0, 5 - capacity) :]
    assert len(seen) == 5


def test_an_export_is_a_copy(log: EventLog) -> None:
    """Changing what was exported changes nothing here."""
    log.publish("x", number=1)
    log.export()[0]["number"] = 2
    log.export().clear()
    assert exported(log) == [{"event": "x", "request_id": None, "number": 1}]


# Who listens


def test_a_subscriber_that_raises_disturbs_nobody(
    log: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    """The others get the event, the publisher goes on, and the failure is logged with its cause."""
    seen: list[str] = []

    def broken(_event: Event) -> None:
        raise ValueError("broken subscriber")

    log.subscribe(lambda event: seen.append(f"before {event.name}"))
    log.subscribe(broken)
    log.subscribe(lambda event: seen.append(f"after {event.name}"))
    log.publish("x")
    log.publish("y")
    assert seen == ["before x", "after x", "before y", "after y"]
    failures = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.getMessage() for record in failures] == [
        "a subscriber failed on x",
        "a subscriber failed on y",
    ]
    assert all("broken subscriber" in str(record.exc_info) for record in failures)


def test_unsubscribing_ends_one_subscription(log: EventLog) -> None:
    """Each subscription ends on its own, also when one callback was given twice; ending it
    again does nothing."""
    seen: list[str] = []

    def callback(event: Event) -> None:
        seen.append(event.name)

    first, second = log.subscribe(callback), log.subscribe(callback)
    log.publish("both")
    first()
    first()
    log.publish("one")
    second()
    log.publish("none")
    assert seen == ["both", "both", "one"]


def test_subscribers_may_subscribe_and_publish(log: EventLog) -> None:
    """No lock is held during a callback: it may publish, export, subscribe and unsubscribe."""
    seen: list[str] = []

    def nested(event: Event) -> None:
        seen.append(event.name)
        undo()
        log.subscribe(lambda later: seen.append(f"new {later.name}"))
        log.publish("inner")
        seen.append(f"{len(log.export())} events")

    undo = log.subscribe(nested)
    log.publish("outer")
    assert seen == ["outer", "new inner", "2 events"]


def test_threads_publish_at_the_same_time() -> None:
    """No event of any thread is lost, and each thread's events stay in order."""
    log, seen = EventLog(1000), []
    log.subscribe(seen.append)

    def work(thread: int) -> None:
        for number in range(50):
            log.publish("x", thread=thread, number=number)

    for run in run_all([partial(work, thread) for thread in range(8)]):
        run.join()
    for events in ([event.fields for event in seen], exported(log)):
        for thread in range(8):
            assert [e["number"] for e in events if e["thread"] == thread] == list(range(50))


# The standard library's logging


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_an_event_is_a_log_record(
    log: EventLog, caplog: pytest.LogCaptureFixture, level: str
) -> None:
    """It goes to the logger "orion_oie" at its level, with name, fields and request."""
    log.publish("worker.crashed", "r1", level=level, model_id="m")
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == (
        "orion_oie",
        level.upper(),
        "worker.crashed",
    )
    extra = {key: vars(record)[key] for key in ("orion", "request_id")}
    assert extra == {"orion": {"model_id": "m"}, "request_id": "r1"}


def test_the_level_filters_the_log_but_not_the_events(
    log: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    """What the application does not log it can still subscribe to."""
    caplog.set_level(logging.WARNING, logger="orion_oie")
    log.publish("quiet", level="info")
    log.publish("loud", level="warning")
    assert [record.getMessage() for record in caplog.records] == ["loud"]
    assert [event["event"] for event in log.export()] == ["quiet", "loud"]


PROGRAM = """
import logging, sys
from orion_oie.logs import EventLog
if "configured" in sys.argv:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s %(orion)s")
log = EventLog(10)
def broken(event): raise ValueError
if "broken" in sys.argv:
    log.subscribe(broken)
log.publish("a.debug", level="debug")
log.publish("an.error", level="error", key="k")
"""


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ([], ""),
        (["broken"], ""),
        (["configured"], "ERROR orion_oie an.error {'key': 'k'}\n"),
    ],
)
def test_nothing_is_printed_before_logging_is_configured(
    arguments: list[str], printed: str
) -> None:
    """A fresh program sees no output, not even of errors; after `basicConfig` it sees events."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", printed)
