"""What a prompt excludes: taken out, and the topic named, unless the rest names it again."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routes import ANY_TEXT, HOSTILE, REPEATED

from orion_oie.routing.text.exclusions import without_exclusions


@pytest.mark.parametrize(
    ("text", "rest", "topics"),
    [
        ("not a translation: what does hygge mean", "what does hygge mean", {"multilingual"}),
        ("Without code, explain recursion to me", "explain recursion to me", {"code"}),
        ("explain recursion to me without any code", "explain recursion to me", {"code"}),
        ("What is inflation? No formulas please.", "What is inflation?", {"math"}),
        ("no SQL please, what is an index for", "what is an index for", {"data"}),
        ("I don't want a poem, just tell me a fact", "just tell me a fact", {"creative"}),
        ("I do not need a riddle. Name a good cheese", "Name a good cheese", {"logic"}),
        ("rather than a story give me three facts", "give me three facts", {"creative"}),
        ("describe it in words rather than code", "describe it in words", {"code"}),
        ("Skip the spreadsheet. Who should pay?", "Who should pay?", {"data"}),
        ("not a poem but a story about rain", "but a story about rain", set()),
        ("don't fix my bike, praise it like a pirate", "praise it like a pirate", set()),
    ],
)
def test_what_is_excluded(text: str, rest: str, topics: set[str]) -> None:
    found = without_exclusions(text)
    assert found.text.split() == rest.split()
    assert found.topics == topics


@pytest.mark.parametrize(
    "text",
    [
        "Why does my code not compile?",
        "No poet is a dreamer. Is Eva one?",
        "Not all cats are grey, are they?",
        "I don't know how to write a poem",
        "There is nothing in my table",
        "Is it normal that I cannot sleep?",
        "No problem, thanks for your help",
        "not a translation",  # nothing is asked instead
        "no code",
        "",
    ],
)
def test_what_is_part_of_the_question(text: str) -> None:
    assert without_exclusions(text) == (text, frozenset())


@given(ANY_TEXT)
@settings(deadline=None)
def test_any_text(text: str) -> None:
    """Something is left of every text, and it is no longer."""
    found = without_exclusions(text)
    assert len(found.text) <= len(text)
    assert bool(found.text) == bool(text)


@given(st.lists(st.sampled_from(["no ", "code ", "not a ", "poem, ", "without ", "; ", "word "])))
@settings(deadline=None)
def test_any_mixture(pieces: list[str]) -> None:
    text = "".join(pieces)
    found = without_exclusions(text)
    assert set(found.text.split()) <= set(text.split()) | set(found.text.split())
    assert bool(found.text.split()) == bool(text.split())


@pytest.mark.parametrize("piece", [*HOSTILE, *REPEATED, "no ", "not a ", "without ", "don't "])
def test_bounded_time(piece: str) -> None:
    without_exclusions((piece * 3000)[:3000])
