"""Texts in columns: nothing is wider than the terminal, and nothing is lost without a sign."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from terminals import seen

from orion_oie.cli.layout import (
    middle_shortened,
    padded,
    table_lines,
    width_of,
    wrapped,
)

TEXTS = st.text(st.sampled_from("ab 日本語é\u0301-"), max_size=60)


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("abc", 3),
        ("", 0),
        ("日本", 4),
        ("한글", 4),
        ("ｆｕｌｌ", 8),
        ("e\u0301", 1),
        ("a\u200bb", 2),
    ],
)
def test_widths_are_those_of_a_terminal(text: str, columns: int) -> None:
    """Wide characters take two columns, combining and invisible ones none."""
    assert width_of(text) == columns


@given(TEXTS, st.integers(1, 40))
def test_a_shortened_text_fits(text: str, most: int) -> None:
    """It fits, is as it was if it fitted, and else has dots in its middle."""
    short = middle_shortened(text, most)
    assert width_of(short) <= most
    assert (short == text) == (width_of(text) <= most)


def test_both_ends_of_a_shortened_text_are_kept() -> None:
    """The beginning and the end tell the most."""
    assert middle_shortened("hub:Qwen/Qwen2.5-0.5B-Instruct-GGUF", 20) == "hub:Qwen/...uct-GGUF"
    assert middle_shortened("日本語日本語", 9) == "日...本語"


@given(TEXTS, st.integers(10, 40), st.integers(0, 5))
def test_wrapped_lines_fit_and_lose_nothing(text: str, width: int, hang: int) -> None:
    """No line is too wide, all but the first are indented, and all characters are there."""
    lines = wrapped(text, width, first="> ", hang=hang)
    assert all(width_of(line) <= width for line in lines)
    assert all(not line or line.startswith(" " * hang) for line in lines[1:])
    assert "".join("".join(lines).split()) == "".join(f"> {text}".split())


def test_words_stay_whole_and_wide_characters_need_no_spaces() -> None:
    """Lines break at spaces, and between any two characters of East Asia."""
    assert wrapped("one two three", 9) == ["one two", "three"]
    assert wrapped("日本語日本語", 8) == ["日本語日", "本語"]
    assert wrapped("go to 日本語", 9, hang=2) == ["go to 日", "  本語"]
    assert wrapped("abcdefghij", 4) == ["abcd", "efgh", "ij"]


ROWS = [
    ["model", "size", "where"],
    ["a-model-of-some-name", "1.0 GB", "/a/very/long/path/to/a/file/of/some/model.gguf"],
    ["b", "20.0 GB", "hub:b"],
]


def test_a_table_is_whole_where_there_is_no_terminal() -> None:
    """A line a row, whatever its width; numbers stand on the right."""
    assert table_lines(ROWS, numbers=(1,)) == [
        "model                    size  where",
        "a-model-of-some-name   1.0 GB  /a/very/long/path/to/a/file/of/some/model.gguf",
        "b                     20.0 GB  hub:b",
    ]


def test_elastic_columns_give_way_first() -> None:
    """Then the others do; a word without spaces loses its middle."""
    assert table_lines(ROWS, 50, numbers=(1,), elastic=(2,))[1] == (
        "a-model-of-some-name   1.0 GB  /a/very/...del.gguf"
    )
    narrow = table_lines(ROWS, 45, numbers=(1,), elastic=(2,))
    assert narrow[1] == "a-model-...me-name   1.0 GB  /a/very...l.gguf"
    assert max(map(width_of, narrow)) <= 47


def test_optional_columns_are_left_out_where_they_have_no_room() -> None:
    """In order, and only if narrowing them does not help."""
    assert table_lines(ROWS, 60, numbers=(1,), elastic=(2,), optional=(2,))[0].endswith("where")
    assert table_lines(ROWS, 40, numbers=(1,), elastic=(2,), optional=(2,)) == [
        "model                    size",
        "a-model-of-some-name   1.0 GB",
        "b                     20.0 GB",
    ]


def test_cells_with_spaces_are_wrapped() -> None:
    """Below each other, beside an empty place."""
    rows = [["agent", "what it is for"], ["data", "Tables, spreadsheets and statistics"]]
    assert table_lines(rows, 24) == [
        "agent  what it is for",
        "data   Tables,",
        "       spreadsheets and",
        "       statistics",
    ]


@given(st.lists(st.lists(TEXTS, min_size=3, max_size=3), min_size=1, max_size=4))
def test_any_table_fits(rows: list[list[str]]) -> None:
    """With room for the least width of its columns, no line is wider than the terminal."""
    head = ["one", "two", "three"]
    assert all(width_of(line) <= 54 for line in table_lines([head, *rows], 54))


def test_numbers_are_padded_on_the_left() -> None:
    """By columns, not by characters."""
    assert padded("日", 4) == "日  "
    assert padded("7", 3, is_number=True) == "  7"


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", ["models", "agents", "hardware"])
def test_lists_fit_the_terminal(command: str, columns: int) -> None:
    """No line is broken by the terminal; whole names of models are shown from 80 columns on."""
    lines = [line for line in seen(command, columns=columns) if "pip install" not in line]
    assert max(map(width_of, lines)) <= columns
    if columns >= 80 and command == "models":
        assert any(line.startswith("qwen2.5-coder-1.5b-instruct@q4_k_m ") for line in lines)


def test_columns_overrides_the_width_of_the_terminal() -> None:
    """As with other programs."""
    assert max(map(len, seen("agents", columns=120, env={"COLUMNS": "70"}))) <= 70
