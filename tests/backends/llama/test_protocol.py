"""The words between a worker and its client: what goes in comes out, whatever it is."""

import json
from multiprocessing import Pipe

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_oie import errors
from orion_oie.backends.llama.protocol import error_from_wire, error_to_wire, receive, send
from orion_oie.errors import ContextOverflowError, OrionError, WorkerError

KINDS = sorted(
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, OrionError)
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(message=st.dictionaries(texts, st.none() | st.integers() | texts | st.lists(texts)))
def test_a_message_arrives_as_it_was_sent(message: dict[str, object]) -> None:
    """Any JSON object, with any characters in it, comes through."""
    ours, theirs = Pipe()
    with ours, theirs:
        send(ours, message)
        assert receive(theirs) == message


def test_the_other_side_is_gone() -> None:
    """Reading from a closed side is EOFError, writing to it OSError."""
    ours, theirs = Pipe()
    theirs.close()
    with ours:
        with pytest.raises(OSError, match="pipe"):
            send(ours, {"op": "close"})
        with pytest.raises((EOFError, OSError)):
            receive(ours)


@pytest.mark.parametrize("name", KINDS)
def test_every_error_survives_the_way(name: str) -> None:
    """Each type of the error tree comes back as itself, with its message and its numbers."""
    error = getattr(errors, name)("it broke: 3 of 4", limit=4, log=["a", "b"])
    back = error_from_wire(json.loads(json.dumps(error_to_wire(error))))
    assert type(back) is type(error)
    assert (back.message, back.details) == (error.message, error.details)


@pytest.mark.parametrize("name", ["NoSuchError", "annotations", "Any", ""])
def test_an_unknown_error_is_a_worker_error(name: str) -> None:
    """A name that is no error of this library comes back as WorkerError."""
    back = error_from_wire({"name": name, "message": "hm", "details": {"limit": 1}})
    assert type(back) is WorkerError
    assert back.details["limit"] == 1


def test_counts_are_numbers_again() -> None:
    """What upper rooms read from an error's details is still there after the way."""
    error = ContextOverflowError("no", prompt_tokens=5, requested_tokens=1, limit=4)
    assert error_from_wire(error_to_wire(error)).details["prompt_tokens"] == 5
