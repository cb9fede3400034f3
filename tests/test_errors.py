"""The error tree: documented as it is, explained by its numbers, unchanged by the wire."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from orion_oie import errors
from orion_oie.backends.llama.protocol import WireError, error_from_wire, error_to_wire
from orion_oie.errors import OrionError, ProviderAuthError, RegistryError, WorkerError

RETRYABLE = {
    "CircuitOpenError",
    "DeadlineExceededError",
    "DownloadError",
    "InsufficientMemoryError",
    "ProviderError",
    "ProviderRateLimitError",
    "QueueFullError",
    "WorkerCrashedError",
    "WorkerError",
    "WorkerTimeoutError",
}


def classes(root: type[OrionError] = OrionError) -> Iterator[type[OrionError]]:
    """The classes of errors.py, parents first. Tests may have added some of their own."""
    if root.__module__ == errors.__name__:
        yield root
        for child in root.__subclasses__():
            yield from classes(child)


def documented_parents() -> dict[str, str | None]:
    """Each name of the module docstring's tree, with the name it hangs under."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    ((?:[│ ]   )*(?:[├└]── )?)(\w+Error)\b", line)
        if found is not None:
            depth = len(found[1]) // 4
            path[depth:] = [found[2]]
            parents[found[2]] = path[depth - 1] if depth else None
    return parents


def test_the_documented_tree_is_the_real_one() -> None:
    """Every class is in the module docstring, under its base class, and nothing else is."""
    real = {
        cls.__name__: None if cls is OrionError else cls.__bases__[0].__name__ for cls in classes()
    }
    assert documented_parents() == real


def test_the_classes_come_in_the_order_of_the_tree() -> None:
    """The tree in the docstring lists the classes in the order of the module."""
    in_file = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert [name for name in in_file if name.endswith("Error")] == list(documented_parents())


def test_what_may_be_tried_again() -> None:
    """`retryable` holds for the errors that time may cure, and for no other."""
    assert {cls.__name__ for cls in classes() if cls.retryable} == RETRYABLE


@pytest.mark.parametrize("cls", list(classes()), ids=lambda cls: cls.__name__)
def test_an_error_carries_its_message_and_details(cls: type[OrionError]) -> None:
    """`str()`, `message` and `details` say what was said, whatever the class."""
    error = cls("it is 3 of 2; use fewer", count=3, limit=2)
    assert str(error) == error.message == "it is 3 of 2; use fewer"
    assert {**error.details, "problems": None} == {"count": 3, "limit": 2, "problems": None}
    assert cls.__doc__


def over_the_wire(wire: WireError) -> WireError:
    """The same after JSON."""
    return WireError(**json.loads(json.dumps(asdict(wire))))


@pytest.mark.parametrize("cls", list(classes()), ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    "details",
    [{}, {"limit": 2, "path": "/tmp/é.gguf", "signal": None, "output": ["a", "b"]}],
    ids=["bare", "detailed"],
)
def test_every_error_survives_the_wire(cls: type[OrionError], details: dict[str, Any]) -> None:
    """An error of a worker arrives with its class, its message and its details."""
    sent = cls("what happened: 日本", **details)
    received = error_from_wire(over_the_wire(error_to_wire(sent)))
    assert type(received) is cls
    assert (received.message, received.details) == (sent.message, sent.details)
    assert str(received) == str(sent)


def test_a_registry_error_keeps_its_problems_on_the_wire() -> None:
    """The list of problems is both an attribute and a detail, also after the wire."""
    sent = RegistryError("two problems", ["a", "b"])
    received = error_from_wire(over_the_wire(error_to_wire(sent)))
    assert isinstance(received, RegistryError)
    assert received.problems == received.details["problems"] == ["a", "b"]


@pytest.mark.parametrize("name", ["NoSuchError", "ClassVar", "Any", "__doc__", "Exception", ""])
def test_an_unknown_error_becomes_a_worker_error(name: str) -> None:
    """A name that is no error of this library is never looked up elsewhere, and loses nothing."""
    received = error_from_wire(WireError(name, "m", {"pid": 7}))
    assert type(received) is WorkerError
    assert (received.message, received.details) == ("m", {"pid": 7})


def test_refused_credentials_are_not_worth_another_try() -> None:
    """The one error that is less hopeful than its base class says so."""
    assert not ProviderAuthError("no").retryable
    assert errors.ProviderError("no").retryable
