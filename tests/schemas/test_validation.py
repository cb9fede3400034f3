"""Messages for invalid data: the option, the allowed values, the given value, a suggestion."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, ValidationError

from orion_oie.schemas.requests import (
    Message,
    RequestOptions,
    SamplingDefaults,
)
from orion_oie.schemas.validation import (
    did_you_mean,
    problems_of,
)

HUGE = 10**5000
INFINITE = [math.nan, math.inf, -math.inf]
# option: (what is allowed, values at the borders, values beyond them)
NUMBERS: dict[str, tuple[str, list[Any], list[Any]]] = {
    "temperature": ("number >= 0 and <= 5", [0, 0.0, 5], [-1, -1e-9, 5.1]),
    "top_p": ("number > 0 and <= 1", [1e-9, 1], [0, -0.5, 1.01]),
    "top_k": ("integer >= 0 and <= 2147483647", [0, 2**31 - 1], [-1, 2**31, 2**32 + 1]),
    "min_p": ("number >= 0 and < 1", [0, 0.999], [-0.1, 1]),
    "repeat_penalty": ("number >= 0.1 and <= 10", [0.1, 10], [0, 0.05, 10.5]),
    "max_tokens": ("integer >= 1 and <= 2147483647", [1, 2**31 - 1], [0, -5, 2**31]),
    "seed": ("integer >= 0 and < 4294967295", [0, 2**32 - 2], [-1, 2**32 - 1, HUGE]),
    "deadline": ("number > 0 and <= 1000000", [0.001, 1e6], [0, -1, 1e308]),
    "priority": ("integer >= -100 and <= 100", [-100, 0, 100], [-101, 101]),
}
BORDERS = [(name, value) for name, (_, good, _) in NUMBERS.items() for value in good]
BEYOND = [(name, value) for name, (_, _, bad) in NUMBERS.items() for value in bad]
NO_NUMBERS = [True, False, "1", "", b"1", [1], {}, 1j, *INFINITE]
TURN = {"role": "user", "content": "hello"}


def problems(**options: Any) -> list[str]:
    try:
        RequestOptions.model_validate(options)
    except ValidationError as error:
        return problems_of(error, RequestOptions)
    return []


def shown(value: object) -> str:
    return "a huge int" if value == HUGE else repr(value)


# Suggestions


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("temprature", " (did you mean 'temperature'?)"),
        ("max_token", " (did you mean 'max_tokens'?)"),
        ("n_predict", ""),
        ("", ""),
    ],
)
def test_a_close_name_is_suggested(word: str, hint: str) -> None:
    """A word near a known one gets it as a suggestion; a distant one gets none."""
    assert did_you_mean(word, RequestOptions.model_fields) == hint


def test_no_known_words_is_no_error() -> None:
    """Without known names there is no suggestion."""
    assert did_you_mean("anything", iter(())) == ""


def test_an_unknown_key_is_named_with_its_place() -> None:
    """A misspelt key is found at any depth, and compared with the keys of that place."""
    assert problems(temprature=1) == ["temprature: unknown key (did you mean 'temperature'?)"]
    assert problems(conversation_history=[TURN, {**TURN, "contents": "x"}]) == [
        "conversation_history.1.contents: unknown key (did you mean 'content'?)"
    ]


def test_an_unknown_key_without_a_close_one_lists_the_known() -> None:
    """A key that resembles no known one gets the list of all."""
    assert problems(conversation_history=[{**TURN, "zzz": 1}]) == [
        "conversation_history.0.zzz: unknown key; known are content, role"
    ]


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    depth: int = 0


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    plain: Inner | None = None
    listed: list[Inner] = []
    mapped: dict[str, list[Inner]] = {}


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"plain": {"dept": 1}}, "plain.dept: unknown key (did you mean 'depth'?)"),
        ({"listed": [{}, {"dept": 1}]}, "listed.1.dept: unknown key (did you mean 'depth'?)"),
        ({"mapped": {"a.b": [{"dept": 1}]}}, "mapped.a.b.0.dept: unknown key (did you mean 'de"),
        ({"plian": {}}, "plian: unknown key (did you mean 'plain'?)"),
    ],
)
def test_suggestions_follow_the_shape_of_the_data(data: dict[str, Any], line: str) -> None:
    """Through optional values, lists and dictionaries the right owner of the key is found."""
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(data)
    (problem,) = problems_of(caught.value, Outer)
    assert problem.startswith(line)


# Ranges


@pytest.mark.parametrize(("name", "value"), BEYOND, ids=lambda v: shown(v) if v == HUGE else None)
def test_a_number_out_of_range_is_explained(name: str, value: Any) -> None:
    """The line names the option, the allowed range and the value given."""
    (line,) = problems(**{name: value})
    assert line.startswith(f"{name}: ")
    assert line.endswith(f"; allowed: {NUMBERS[name][0]}, got {shown(value)}")


@pytest.mark.parametrize(("name", "value"), BORDERS)
def test_the_borders_of_a_range_are_allowed(name: str, value: Any) -> None:
    """The message and the check speak of the same range."""
    assert problems(**{name: value}) == []


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused(name: str, value: Any) -> None:
    """Texts, truth values, NaN and the infinities are clear errors, never converted."""
    (line,) = problems(**{name: value})
    assert line.startswith(f"{name}: ")
    assert line.endswith(f"; allowed: {NUMBERS[name][0]}, got {value!r}")


@pytest.mark.parametrize("name", ["temperature", "max_tokens", "session_id"])
def test_a_number_too_long_to_print_is_still_an_error_line(name: str) -> None:
    """Python refuses to print an int of 5000 digits; the problem is reported all the same."""
    (line,) = problems(**{name: HUGE})
    assert line.startswith(f"{name}: ")
    assert line.endswith("got a huge int")


def test_a_fraction_is_no_count() -> None:
    """An option that counts takes no number with a fraction."""
    (line,) = problems(max_tokens=2.5)
    assert line.startswith("max_tokens: Input should be a valid integer")


@given(value=st.floats() | st.integers(), name=st.sampled_from(sorted(NUMBERS)))
def test_every_number_is_taken_unchanged_or_explained(name: str, value: float) -> None:
    """No number is silently altered on its way in, and none makes the check itself fail."""
    lines = problems(**{name: value})
    if lines:
        assert lines == [line for line in lines if line.startswith(f"{name}: ")]
        assert f"allowed: {NUMBERS[name][0]}, got " in lines[0]
    else:
        assert getattr(RequestOptions.model_validate({name: value}), name) == value


def test_a_long_value_is_shortened() -> None:
    """A message stays readable whatever was passed."""
    (line,) = problems(session_id="x" * 300)
    assert line.startswith("session_id: String should have at most 256 characters")
    assert line.endswith(f"got '{'x' * 59}... (302 characters)")


def test_a_choice_lists_what_may_be_chosen() -> None:
    """A wrong word is answered with the right ones."""
    (line,) = problems(on_overflow="drop")
    assert line.endswith("; allowed: 'error' or 'drop_oldest', got 'drop'")


def test_all_problems_come_at_once() -> None:
    """Nobody has to repair a request one error at a time."""
    lines = problems(temperature=-1, top_p=2, agnet="code", stop=[""])
    assert [line.partition(":")[0] for line in lines] == ["temperature", "top_p", "stop.0", "agnet"]


def test_a_missing_value_and_a_wrong_whole_are_named() -> None:
    """An absent key is `missing`; a wrong top level has a name as well."""
    assert problems(conversation_history=[{"role": "user"}]) == [
        "conversation_history.0.content: missing"
    ]
    with pytest.raises(ValidationError) as caught:
        SamplingDefaults.model_validate([])
    (line,) = problems_of(caught.value, SamplingDefaults)
    assert line.startswith("(top level): ")


# Stop strings and history


@pytest.mark.parametrize(
    ("given_stop", "stop"),
    [
        ("END", ["END"]),
        (["a", "b"], ["a", "b"]),
        (("a", "b"), ["a", "b"]),
        ([], []),
        (None, None),
        (["x"] * 16, ["x"] * 16),
    ],
)
def test_stop_strings_come_alone_or_together(given_stop: object, stop: object) -> None:
    """One string, a list and a tuple of strings mean the same."""
    assert RequestOptions.model_validate({"stop": given_stop}).stop == stop


@pytest.mark.parametrize("stop", ["", ["a", ""], ["x"] * 17, [1], b"x", {"a": 1}, 3, True, [None]])
def test_other_stops_are_refused(stop: object) -> None:
    """An empty string would stop everything; too many, or no strings, are errors."""
    (line,) = problems(stop=stop)
    assert line.startswith("stop")


def test_a_history_may_be_dictionaries_or_messages() -> None:
    """Turns may come as the schema or as plain dictionaries, and mixed."""
    message = Message(role="assistant", content="hi")
    options = RequestOptions.model_validate({"conversation_history": [TURN, message]})
    assert options.conversation_history == [Message(role="user", content="hello"), message]


@pytest.mark.parametrize(
    ("history", "where"),
    [
        ([{**TURN, "role": "usr"}], "conversation_history.0.role"),
        ([TURN, {"content": "x"}], "conversation_history.1.role"),
        ([{**TURN, "content": None}], "conversation_history.0.content"),
        ([{**TURN, "content": ["x"]}], "conversation_history.0.content"),
        ([("user", "x")], "conversation_history.0"),
        (["x"], "conversation_history.0"),
        ("x", "conversation_history"),
        (TURN, "conversation_history"),
    ],
)
def test_a_wrong_turn_is_named_by_its_place(history: object, where: str) -> None:
    """The line points at the turn and the part of it that is wrong."""
    (line,) = problems(conversation_history=history)
    assert line.startswith(f"{where}: ")
