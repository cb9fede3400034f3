"""Sanitizing: every word of an answer stays, and nothing that could act on a terminal."""

import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_oie.guardrails.sanitize import clean

unsafe = st.characters(categories=["Cc", "Cs"])
any_text = st.text(st.characters(exclude_categories=()) | unsafe, max_size=40)


def is_unsafe(character: str) -> bool:
    """The rule in words: controls and surrogates, except line breaks and tabs."""
    return unicodedata.category(character) in {"Cc", "Cs"} and character not in "\t\n\r"


@given(text=any_text)
def test_only_unsafe_characters_are_removed(text: str) -> None:
    """The result is the text without unsafe characters, in order, with their number."""
    kept = "".join(character for character in text if not is_unsafe(character))
    assert clean(text) == (kept, len(text) - len(kept))


@given(text=any_text, cuts=st.lists(st.integers(0, 40)))
def test_cleaning_pieces_is_cleaning_the_whole(text: str, cuts: list[int]) -> None:
    """A stream can be cleaned piece by piece, however it was cut."""
    borders = [0, *sorted(cuts), len(text)]
    pieces = [clean(text[a:b]) for a, b in pairwise(borders)]
    assert ("".join(text for text, _ in pieces), sum(count for _, count in pieces)) == clean(text)


@given(text=any_text)
def test_clean_text_stays_clean(text: str) -> None:
    """Cleaning twice removes nothing more, and the result can be encoded."""
    once, _ = clean(text)
    assert clean(once) == (once, 0)
    once.encode()


@pytest.mark.parametrize(
    ("text", "cleaned", "removed"),
    [
        ("plain", "plain", 0),
        ("", "", 0),
        ("a\tb\r\nc", "a\tb\r\nc", 0),
        ("\x1b[31mred\x1b[0m", "[31mred[0m", 2),
        ("\x9b31m", "31m", 1),
        ("bell\x07 back\x08 null\x00 del\x7f", "bell back null del", 4),
        ("half \ud83d pair", "half  pair", 1),
        ("👩‍👩‍👧 نعم \u200f e\u0301 \ue000 \u2028", "👩‍👩‍👧 نعم \u200f e\u0301 \ue000 \u2028", 0),
    ],
)
def test_examples(text: str, cleaned: str, removed: int) -> None:
    """Escape sequences lose what makes them act; joiners, marks and scripts stay."""
    assert clean(text) == (cleaned, removed)
