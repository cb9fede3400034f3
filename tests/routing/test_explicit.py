"""Explicit requests: a few patterns that are nearly always right."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routes import ANY_TEXT, HOSTILE, REPEATED

from orion_oie.routing.explicit import explicit_request
from orion_oie.routing.linear.fitting import read_examples
from orion_oie.routing.linear.model import TOPICS
from orion_oie.routing.text.prompt import read

SETS = Path(__file__).parents[2] / "benchmarks" / "routing"


@pytest.mark.parametrize(
    ("text", "topic", "words"),
    [
        ("Translate this into Polish: good night", "multilingual", "Translate this into Polish"),
        ("could you translate my note to plain German?", "multilingual", None),
        ("Here is my question. Please answer in French.", "multilingual", "answer in French"),
        ("Reply only in Japanese, please", "multilingual", "Reply only in Japanese"),
        ("How do you say 'see you soon' in Korean?", "multilingual", None),
        ("how to pronounce 'ghoti' in Welsh", "multilingual", None),
        ("Top ten customers by revenue, in SQL", "data", "in SQL"),
        ("I need an SQL statement that drops old rows", "data", "SQL statement"),
        ("Write a function that parses dates in Rust", "code", None),
        ("implement a tiny http server in C++", "code", None),
        ("Port this script to something modern, a class in C# maybe", "code", None),
    ],
)
def test_what_is_asked_for(text: str, topic: str, words: str | None) -> None:
    """The topic, and the words that say so as they were written."""
    found = explicit_request(text)
    assert found is not None
    assert found[0] == topic
    assert found[0] in TOPICS
    assert found[1] == words if words else found[1] in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What does the word translate come from?",
        "How do I say no to my boss?",
        "The answer in the book was wrong",
        "Is NoSQL better than MySQL?",
        "What is SQL-injection in sql-lite terms?",
        "Why is the Spanish flag red?",
        "Write a story about a function in Paris",
        "the class in room 12 was written about in the paper",
        "a program in Cobolish",
        "write a parser in C++++",
    ],
)
def test_what_is_not_asked_for(text: str) -> None:
    """The words alone are no request for a topic."""
    assert explicit_request(text) is None


def test_two_wishes_that_disagree() -> None:
    """Neither is taken; two for one topic are one."""
    assert explicit_request("Write a function in Python and answer in German") is None
    assert explicit_request("Translate it to German and answer in German") is not None


def test_only_the_start_is_looked_at() -> None:
    """A request far behind, or over more than a few words, is for the weights to find."""
    assert explicit_request("answer in German") == ("multilingual", "answer in German")
    assert explicit_request(f"{'so ' * 200} answer in German") is None
    assert explicit_request(f"translate {'it and ' * 20} to German") is None


def test_the_words_can_be_shown() -> None:
    """Whatever stands between them: no control characters, no lone surrogates."""
    found = explicit_request("translate \x1b[31m\ud800\u202e this into French")
    assert found == ("multilingual", "translate [31m this into French")


@given(st.lists(st.one_of(ANY_TEXT, st.sampled_from([*HOSTILE, *REPEATED]))).map("".join))
@settings(deadline=None)
def test_any_text(text: str) -> None:
    """Nothing raises, and what is found is a topic with words of the text."""
    found = explicit_request(text)
    assert found is None or (found[0] in TOPICS and found[1].isprintable() and found[1])


@pytest.mark.skipif(not SETS.exists(), reason="needs the labelled prompts of the repository")
@pytest.mark.parametrize(("file", "precision"), [("own.jsonl", 0.99), ("train.jsonl", 0.95)])
def test_wishes_are_nearly_always_right(file: str, precision: float) -> None:
    """On our own prompts: of those that ask outright, nearly all are for that topic."""
    examples = read_examples(SETS / file)
    found = [
        (explicit_request(read(example.text).parts.instruction), example) for example in examples
    ]
    right = [one[0] in example.accepted for one, example in found if one is not None]
    assert len(right) >= 5
    assert sum(right) / len(right) >= precision, json.dumps(
        [[one, example.label] for one, example in found if one and one[0] not in example.accepted]
    )
