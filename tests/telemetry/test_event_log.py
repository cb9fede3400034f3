"""The event log: it hands events on to all who listen, redacted, and is silent until logging is
configured."""

import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import ANY

import pytest
from helpers import BOUND_S, run_all, wait_until

from orion_oie.telemetry.event_log import EventLog
from orion_oie.telemetry.events import (
    EngineClosed,
    Event,
    Level,
    ModelLoaded,
    ModelLog,
    RequestReceived,
)

SECRET = "my secret question"


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbered(Event):
    """An event of these tests."""

    name = "numbered"

    number: int = 0
    thread: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OddNames(Event):
    """An event whose fields are called like parameters of the logging machinery."""

    name = "odd.names"

    msg: str = "a"
    args: str = "b"
    self: str = "c"
    event_name: str = "d"
    exc_info: str = "e"


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
    log.publish(ModelLoaded(request_id="r1", key="m@q8_0", pid=7, load_ms=12.5))
    log.publish(EngineClosed())
    assert log.flush(BOUND_S)
    assert seen == [
        ModelLoaded(request_id="r1", at=ANY, key="m@q8_0", pid=7, load_ms=12.5),
        EngineClosed(at=ANY),
    ]
    assert seen[0].fields == {"key": "m@q8_0", "pid": 7, "load_ms": 12.5}
    assert [event.name for event in seen] == ["model.loaded", "engine.closed"]
    assert log.export() == [
        {
            "event": "model.loaded",
            "at": seen[0].at,
            "request_id": "r1",
            "key": "m@q8_0",
            "pid": 7,
            "load_ms": 12.5,
        },
        {"event": "engine.closed", "at": seen[1].at, "request_id": None},
    ]
    assert 0 < seen[0].at <= seen[1].at
    json.dumps(log.export())


def test_fields_may_have_any_name(log: EventLog, caplog: pytest.LogCaptureFixture) -> None:
    """A field may be called like a parameter of the logging machinery."""
    log.publish(OddNames())
    assert log.flush(BOUND_S)
    fields = {"msg": "a", "args": "b", "self": "c", "event_name": "d", "exc_info": "e"}
    assert exported(log) == [{"event": "odd.names", "request_id": None, **fields}]
    (record,) = caplog.records
    assert vars(record)["orion"] == fields


# What is not shown


def test_texts_are_redacted_unless_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    """What users and models said appears as its length: in the log, the export, and for
    subscribers. With `log_content` it appears as it is."""
    for log_content in (False, True):
        caplog.clear()
        log, seen = EventLog(10, log_content=log_content), []
        log.subscribe(seen.append)
        log.publish(RequestReceived(request_id="r1", query=SECRET))
        assert log.flush(BOUND_S)
        shown = SECRET if log_content else "<18 characters>"
        fields = {"query": shown}
        assert exported(log) == [{"event": "request.received", "request_id": "r1", **fields}]
        assert seen == [RequestReceived(request_id="r1", at=ANY, query=shown)]
        (record,) = caplog.records
        assert vars(record)["orion"] == fields
        assert (SECRET in str(vars(record))) is log_content


# How many are kept


@pytest.mark.parametrize("capacity", [0, 1, 3, 10])
def test_the_last_events_are_kept(capacity: int) -> None:
    """Older ones make room; a log of capacity 0 keeps none and still hands them on."""
    log, seen = EventLog(capacity), []
    log.subscribe(seen.append)
    for number in range(5):
        log.publish(Numbered(number=number))
    assert [event["number"] for event in log.export()] == list(range(5))[max(0, 5 - capacity) :]
    assert log.flush(BOUND_S)
    assert len(seen) == 5


def test_an_export_is_a_copy(log: EventLog) -> None:
    """Changing what was exported changes nothing here."""
    log.publish(Numbered(number=1))
    log.export()[0]["number"] = 2
    log.export().clear()
    assert exported(log) == [{"event": "numbered", "request_id": None, "number": 1, "thread": 0}]


# Who listens


def test_a_subscriber_that_raises_disturbs_nobody(
    log: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    """The others get the event and the publisher goes on; every failure is counted, and the first
    one is an event with its cause."""
    seen: list[str] = []

    def broken(_event: Event) -> None:
        raise ValueError("broken subscriber")

    log.subscribe(broken)
    log.subscribe(lambda event: seen.append(event.name))
    log.publish(Numbered())
    assert log.flush(BOUND_S)
    log.publish(EngineClosed())
    assert log.flush(BOUND_S)
    assert seen == ["numbered", "callback.failed", "engine.closed"]
    assert log.failures == 3
    (failure,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    fields = vars(failure)["orion"]
    assert (fields["kind"], fields["error"]) == ("subscriber", "ValueError")
    assert fields["callback"].endswith("broken")
    assert fields["where"].endswith("in broken")
    assert fields["text"] == "<17 characters>"


def test_unsubscribing_ends_one_subscription(log: EventLog) -> None:
    """Each subscription ends on its own, also when one callback was given twice, and after the
    events of before; ending it again does nothing."""
    seen: list[Event] = []

    def callback(event: Event) -> None:
        seen.append(event)

    both, one = Numbered(number=2), Numbered(number=1)
    first, second = log.subscribe(callback), log.subscribe(callback)
    log.publish(both)
    first()
    first()
    log.publish(one)
    second()
    assert seen == [both, both, one]
    log.publish(Numbered(number=0))
    assert log.flush(BOUND_S)
    assert seen == [both, both, one]


def test_subscribers_may_subscribe_and_publish(log: EventLog) -> None:
    """No lock is held during a callback: it may publish, export, subscribe and unsubscribe."""
    seen: list[str] = []

    def nested(event: Event) -> None:
        seen.append(event.name)
        undo()
        log.subscribe(lambda later: seen.append(f"new {later.name}"))
        log.publish(EngineClosed())
        seen.append(f"{len(log.export())} events")

    undo = log.subscribe(nested)
    log.publish(Numbered())
    wait_until(lambda: len(seen) == 3)
    assert sorted(seen) == ["2 events", "new engine.closed", "numbered"]


def test_threads_publish_at_the_same_time() -> None:
    """No event of any thread is lost, and each thread's events stay in order."""
    log, seen = EventLog(1000), []
    log.subscribe(seen.append)

    def work(thread: int) -> None:
        for number in range(50):
            log.publish(Numbered(thread=thread, number=number))

    for run in run_all([partial(work, thread) for thread in range(8)]):
        run.join()
    assert log.flush(BOUND_S)
    for events in ([event.fields for event in seen], exported(log)):
        for thread in range(8):
            assert [e["number"] for e in events if e["thread"] == thread] == list(range(50))


# The standard library's logging


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_an_event_is_a_log_record(
    log: EventLog, caplog: pytest.LogCaptureFixture, level: Level
) -> None:
    """It goes to the logger "orion_oie" at its level, with name, fields and request."""
    log.publish(ModelLog(request_id="r1", level=level, model_id="m", line="odd"))
    assert log.flush(BOUND_S)
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == (
        "orion_oie",
        level.upper(),
        "model.log model_id=m line=odd request_id=r1",
    )
    extra = {key: vars(record)[key] for key in ("event_name", "orion", "request_id")}
    assert extra == {
        "event_name": "model.log",
        "orion": {"model_id": "m", "line": "odd"},
        "request_id": "r1",
    }


def test_the_level_filters_the_log_but_not_the_events(
    log: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    """What the application does not log it can still subscribe to."""
    caplog.set_level(logging.WARNING, logger="orion_oie")
    log.publish(ModelLog(level="info", model_id="m", line="quiet"))
    log.publish(ModelLog(level="warning", model_id="m", line="loud"))
    assert log.flush(BOUND_S)
    assert [vars(record)["orion"]["line"] for record in caplog.records] == ["loud"]
    assert [event["line"] for event in log.export()] == ["quiet", "loud"]


PROGRAM = """
import logging, sys
from orion_oie.telemetry.event_log import EventLog
from orion_oie.telemetry.events import RequestStateChanged, WorkerCrashed
if "configured" in sys.argv:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s %(orion)s")
log = EventLog(10)
def broken(event): raise ValueError
if "broken" in sys.argv:
    log.subscribe(broken)
log.publish(RequestStateChanged(old="idle", new="validating"))
log.publish(WorkerCrashed(model_id="m", error="it died"))
"""


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ([], ""),
        (["broken"], ""),
        (
            ["configured"],
            "ERROR orion_oie worker.crashed model_id=m error='it died' "
            "{'model_id': 'm', 'error': 'it died'}\n",
        ),
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
