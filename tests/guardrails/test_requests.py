"""Request checks: questions and turns of the right shape and size pass, whatever they say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_oie.errors import InvalidRequestError
from orion_oie.guardrails.requests import (
    check_history,
    check_query,
)
from orion_oie.schemas.requests import Message

LIMIT = 20


def refusal(query: object) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        check_query(query, LIMIT)
    return caught.value


def history_refusal(*turns: tuple[str, str]) -> InvalidRequestError:
    # model_construct: what a caller could smuggle in must be refused here too
    history = [Message.model_construct(role=role, content=content) for role, content in turns]
    with pytest.raises(InvalidRequestError) as caught:
        check_history(history, LIMIT)
    return caught.value


@given(query=st.text(min_size=1, max_size=LIMIT).filter(str.strip))
def test_a_question_passes_unchanged(query: str) -> None:
    """Any valid text with something in it is given on as it is, also its outer white space."""
    assert check_query(query, LIMIT) == query


@pytest.mark.parametrize(
    ("query", "kind"), [(None, "NoneType"), (b"hi", "bytes"), (["hi"], "list")]
)
def test_a_question_is_a_text(query: object, kind: str) -> None:
    """Other things are refused by their type, before anything looks into them."""
    assert refusal(query).message == f"the question must be a str, got {kind}"


@pytest.mark.parametrize(
    ("query", "what"),
    [
        ("", "is empty"),
        (" \n\t", "is 3 characters of white space"),
        ("\u3000\u2003", "is 2 characters of white space"),
    ],
)
def test_a_question_says_something(query: str, what: str) -> None:
    """Nothing, and white space of any script, is no question."""
    assert refusal(query).message == f"the question {what}; ask something"


def test_a_question_has_a_limit() -> None:
    """The longest question allowed passes; one character more is refused with the numbers."""
    assert check_query("x" * LIMIT, LIMIT) == "x" * LIMIT
    error = refusal("x" * (LIMIT + 1))
    assert error.message == (
        "the question has 21 characters, the limit is 20; shorten it or raise "
        "EngineConfig.guardrails.max_query_chars"
    )
    assert error.details == {"characters": 21, "limit": 20}


def test_a_broken_text_is_refused_by_place() -> None:
    """An unpaired surrogate could not be sent to a model: the error names where it is."""
    assert refusal("ab\ud800c").message == (
        "the question is not valid Unicode: unpaired surrogate at index 2"
    )


@pytest.mark.parametrize(
    "query", ["\x00", "\x1b[2J", "<|im_start|>system", "{{ 7 * 7 }}", "\ue000"]
)
def test_intent_is_not_judged(query: str) -> None:
    """Control characters and the syntax of templates are only text here."""
    assert check_query(query, LIMIT) == query


def test_a_history_passes() -> None:
    """Turns of both sides pass in any order, empty answers too."""
    turns = [("user", "a"), ("assistant", ""), ("assistant", "x" * LIMIT), ("user", "b")]
    check_history([Message(role=role, content=content) for role, content in turns], LIMIT)
    check_history([], LIMIT)


def test_a_system_turn_has_another_place() -> None:
    """A system message inside the history is refused, and the error says where it belongs."""
    assert history_refusal(("user", "a"), ("system", "b")).message == (
        "conversation_history[1] has the role 'system'; pass its text as system_prompt= instead"
    )


def test_a_turn_that_is_wrong_is_named() -> None:
    """Size and validity hold for every turn, and the error says which one it is."""
    error = history_refusal(("user", "a"), ("assistant", "x" * 21))
    assert error.message.startswith("conversation_history[1] has 21 characters, the limit is 20")
    assert error.details == {"characters": 21, "limit": 20}
    assert history_refusal(("user", "\udfff")).message == (
        "conversation_history[0] is not valid Unicode: unpaired surrogate at index 0"
    )
