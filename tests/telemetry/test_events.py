"""The catalogue of events: complete, documented, redacted, and ready for JSON."""

import ast
import json
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from helpers import BOUND_S
from hypothesis import given, settings
from hypothesis import strategies as st

import orion_oie
from orion_oie.schemas.loading import LoadProgress
from orion_oie.telemetry import event_docs
from orion_oie.telemetry.event_log import EventLog
from orion_oie.telemetry.events import (
    CATALOGUE,
    Content,
    Event,
    Level,
    ModelLoading,
    RequestFailed,
    RequestReceived,
    names_of,
    redacted,
)

TOP = Path(__file__).parents[2]
SOURCES = Path(orion_oie.__file__).parent
SECRET = "my secret question"
FINITE = st.floats(allow_nan=False, allow_infinity=False)
PROGRESS = st.builds(
    LoadProgress,
    fraction=FINITE,
    shards=st.integers(),
    bytes_total=st.integers(),
    bytes_per_s=st.none() | FINITE,
    seconds_left=st.none() | FINITE,
    mode=st.sampled_from(["progressive", "sequential"]),
    note=st.text(),
)
every_event = pytest.mark.parametrize("kind", CATALOGUE.values(), ids=CATALOGUE)


def events_of(kind: type[Event]) -> st.SearchStrategy[Event]:
    """Events of a class, with any values that its types allow."""
    special = {float: FINITE, LoadProgress: PROGRESS}
    hints = get_type_hints(kind)
    own = {name: special.get(hints[name], st.from_type(hints[name])) for name in names_of(kind).own}
    return st.builds(kind, request_id=st.none() | st.text(), **own)


def example_of(kind: type[Event]) -> Event:
    """An event whose texts are all the secret."""
    values = {str: SECRET, str | None: SECRET, LoadProgress: LoadProgress("ready")}
    hints = get_type_hints(kind)
    return kind(**{name: values.get(hints[name], 0) for name in names_of(kind).own})


def published() -> Iterator[tuple[str, ast.expr | None]]:
    """Every call of a method `publish` in the library: its place and its argument."""
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(attr="publish"), args=[argument], keywords=[]):
                    yield f"{path.name}:{node.lineno}", argument
                case ast.Call(func=ast.Attribute(attr="publish")):
                    yield f"{path.name}:{node.lineno}", None


# Completeness


def test_what_is_published_is_the_catalogue() -> None:
    """Every call of `publish` makes an event of the catalogue, and each of those is published."""
    classes = {kind.__name__ for kind in CATALOGUE.values()}
    used = set()
    for place, argument in published():
        assert isinstance(argument, ast.Call), place
        assert isinstance(argument.func, ast.Name), place
        assert argument.func.id in classes, place
        used.add(argument.func.id)
    assert used == classes


def test_names_are_unique_and_dotted() -> None:
    """No two classes share a name, and every name is a thing and what happened to it."""
    assert len({kind.name for kind in CATALOGUE.values()}) == len(CATALOGUE)
    assert all(kind.name == name for name, kind in CATALOGUE.items())
    assert all(name.replace("_", "").split(".")[1].isalpha() for name in CATALOGUE)
    assert Event not in CATALOGUE.values()


def test_the_document_is_in_step() -> None:
    """docs/events.md is what the library generates: `python -m orion_oie events`."""
    written = (TOP / "docs" / "events.md").read_text(encoding="utf-8")
    assert written == event_docs.document()


@every_event
def test_an_event_is_documented(kind: type[Event]) -> None:
    """The document has a section for it, that says when it is published, and its fields."""
    section = event_docs.document().split(f"\n## {kind.name}\n")[1].split("\n## ")[0]
    assert section.strip().startswith("Published ")
    for name in names_of(kind).own:
        assert f"\n| `{name}` | `" in section


# Shape


@every_event
def test_an_event_is_frozen_and_small(kind: type[Event]) -> None:
    """A subscriber cannot change what others see, and an event has no dictionary."""
    event = example_of(kind)
    with pytest.raises(FrozenInstanceError):
        event.at = 0.0  # type: ignore[misc]
    assert not hasattr(event, "__dict__")
    assert event.level in get_args(Level)
    assert event.at > 0
    assert event.request_id is None


@every_event
@settings(deadline=None, max_examples=30)  # the first log imports structlog
@given(data=st.data())
def test_an_export_is_json(kind: type[Event], data: st.DataObject) -> None:
    """Whatever an event's fields hold, JSON gives the same back."""
    event = data.draw(events_of(kind))
    log = EventLog(1, log_content=True)
    log.publish(event)
    (exported,) = log.export()
    assert json.loads(json.dumps(exported)) == exported
    assert exported == {
        "event": kind.name,
        "at": event.at,
        "request_id": event.request_id,
        **event.fields,
    }


@every_event
def test_no_field_hides_a_common_one(kind: type[Event]) -> None:
    """In an export, an event's own fields stand beside its name, time and request."""
    assert not {"event", "at", "request_id"} & set(example_of(kind).fields)


def test_a_step_of_a_load_has_the_fields_of_its_progress() -> None:
    """The fields of `LoadProgress` are flat in exports, and one object for subscribers."""
    progress = LoadProgress("downloading", fraction=0.5, bytes_total=10, bytes_loaded=5)
    event = ModelLoading(key="m@q4", progress=progress)
    assert list(event.fields) == ["key", *(one.name for one in fields(LoadProgress))]
    assert (event.fields["phase"], event.fields["bytes_loaded"]) == ("downloading", 5)
    assert event.progress is progress


# Redaction


@every_event
def test_content_is_redacted(kind: type[Event]) -> None:
    """Every text of a user or a model is replaced by its length; everything else stays."""
    event = example_of(kind)
    shown = redacted(event)
    content = names_of(kind).content
    for name in names_of(kind).all:
        if name in content:
            assert getattr(event, name) == SECRET
            assert getattr(shown, name) == "<18 characters>"
        else:
            assert getattr(shown, name) == getattr(event, name)
    assert type(shown) is kind
    assert (shown == event) is (not content)


@every_event
@pytest.mark.parametrize("log_content", [False, True])
def test_subscribers_see_content_only_when_asked_for(kind: type[Event], log_content: bool) -> None:
    """A log hands on and exports what it may show, for every class."""
    event, seen = example_of(kind), []
    log = EventLog(1, log_content=log_content)
    log.subscribe(seen.append)
    log.publish(event)
    assert log.flush(BOUND_S)
    expected = event if log_content else redacted(event)
    assert seen == [expected]
    assert log.export()[0].items() >= expected.fields.items()


def test_texts_are_content() -> None:
    """Fields of questions, answers and prompts are declared as content, and nothing else is."""
    texts = {"query", "content", "text", "answer", "prompt", "system_prompt"}
    for kind in CATALOGUE.values():
        declared = {
            one.name for one in fields(kind) if one.type is Content or Content in get_args(one.type)
        }
        assert declared == set(names_of(kind).content) == texts & set(names_of(kind).all)
    redacted_names = {name for kind in CATALOGUE.values() for name in names_of(kind).content}
    assert redacted_names == {"query", "text", "content"}


def test_a_missing_text_stays_missing() -> None:
    """An optional text that is not there has no length."""
    event = RequestFailed(error="UnknownAgentError: no agent is called x")
    assert redacted(event) == event


def test_redacting_leaves_the_publisher_s_event_alone() -> None:
    """The event given is not changed, and the other one has its time and request."""
    event = RequestReceived(request_id="r1", query=SECRET)
    shown = redacted(event)
    assert event.query == SECRET
    assert (shown.at, shown.request_id) == (event.at, "r1")
