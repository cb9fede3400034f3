"""Lists of keywords around a question are set apart; what a request is about is not."""

import pytest
from hypothesis import given, settings
from routes import ANY_TEXT, HOSTILE, REPEATED

from orion_oie.routing.text.keyword_lists import without_keyword_lists
from orion_oie.routing.text.topic_words import topic_words

QUESTION = "how long should I boil an egg?"


@pytest.mark.parametrize(
    "listed",
    [
        "python sql docker poem.",
        "python, sql, docker, poem.",
        "python; sql; docker; poem;",
        "SELECT JOIN WHERE TABLE -",
        "poem sonnet haiku ballad rhyme —",
        "translate translate translate.",
        "integral matrix theorem:",
        "python/sql/poem |",
        "python\nsql\npoem\n",
        "python poem sql, ok so:",
        "python sql poem riddle translate",
        "python|sql|poem|translate",
        "(python, sql, poem, riddle)",
        "python, sql, poem and riddle and more:",
        "Keywords: python, regex, poem.",
    ],
)
def test_a_list_before_a_question(listed: str) -> None:
    found = without_keyword_lists(f"{listed} {QUESTION}")
    assert found.text == QUESTION
    assert found.lists.split()[0].startswith(listed.split()[0].rstrip(".;"))


@pytest.mark.parametrize(
    "listed",
    [
        "python sql docker poem",
        "tags: python, sql, poem",
        "#python #sql #poem",
        "(python, sql, poem)",
        "(python, sql, poem)?",
        "[sonnet, haiku, sql, integral and derivative are my hobbies]",
        "python sql poem riddle",
    ],
)
def test_a_list_after_a_question(listed: str) -> None:
    found = without_keyword_lists(f"{QUESTION} {listed}")
    assert found.text.startswith(QUESTION)
    assert "sql" not in found.text
    assert "sql" in found.lists


@pytest.mark.parametrize(
    "text",
    [
        QUESTION,
        "python sql docker poem",  # nothing else is asked
        "Translate into Spanish: dog, cat, house, tree",
        "Django admin: inline formset loses ordering after a validation error",
        "Write Python code. What does it print?",
        "I like red, green and blue. Which one suits me?",
        "Sort these words: pear, apple, fig",
        "What is the next letter? O T T F F S S",
        "Write a Python function that translates poems to SQL",
        "Translate Python code to a SQL query. Keep the names.",
        "Night : Day :: Right : Left, what is the relation?",
        "Which would float? cork, ice cube, brick, apple, steel nail, candle",
        "Python and numpy: do threads help at all?",
        "Which of these is no primitive in Java? int, String, boolean, char",
        "",
    ],
)
def test_what_a_request_is_about(text: str) -> None:
    assert without_keyword_lists(text) == (text, "")


def test_the_words_of_topics() -> None:
    """One topic for each, in lower case."""
    words = topic_words()
    assert words["sql"] == "data"
    assert all(word == word.casefold() for word in words)


@given(ANY_TEXT)
@settings(deadline=None)
def test_any_text(text: str) -> None:
    """Nothing is invented, and something to ask stays."""
    found = without_keyword_lists(text)
    assert bool(found.text) == bool(text)
    if not found.lists:
        assert found.text == text


@pytest.mark.parametrize("piece", [*HOSTILE, *REPEATED, "sql, ", "sql ", "#sql ", "(sql "])
def test_bounded_time(piece: str) -> None:
    without_keyword_lists((piece * 3000)[:600])
