"""Shapes of a text: found where they are, absent where only their words are, bounded work."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_oie.routing.text.features import (
    code_shape,
    math_shape,
    measure,
    non_english,
    table_shape,
)

any_text = st.text(alphabet=st.characters(exclude_categories=()), max_size=400)
STRONG, WEAK = 0.5, 0.3

CODE = [
    "```\nsomething\n```",
    "def area(r):\n    return 3.14 * r * r",
    "class Stack:\n    pass",
    "function greet(name) { alert(name); }",
    "fn main() {",
    "public static void main(String[] args) {",
    "#include <vector>",
    "from os import path",
    "const total = prices.reduce((a, b) => a + b);",
    "if (x > 3) {\n  y++;\n}",
    "Traceback (most recent call last):\n  ...",
    "    at com.shop.Cart.add(Cart.java:31)",
    "KeyError: 'user'",
    "$ sudo systemctl restart nginx",
    "what does chmod 644 notes do",
    "open settings.yaml",
    "call user.save() twice",
    "rename old_user_name everywhere",
    "<div class='card'>hi</div>",
    "\\begin{document} hello \\end{document}",
    '{"name": "Ida", "age": 7}',
]
MATH = [
    "x^2 + 3x = 10",
    "12 * 7",
    "what is 48 / 6",
    "$\\frac{1}{2} + \\frac{1}{3}$",
    "√49",
    "f(x) = 2x + 1",
    "3x - 7 = 11",
    "17 + 25 =",
    "log(100)",
    "15% of 240",
    "78 times 81",
    "Mia has 14 shells and gives 5 away. How many does she keep?",
    "A tank holds 90 litres and loses 4 litres per hour. How long until it is half empty?",
]
TABLE = [
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "name,age,city\nIda,31,Oslo\nBo,27,Rome",
    "day\tsales\nmon\t3\ntue\t5",
    "SELECT name FROM users",
    "INSERT INTO orders VALUES (1, 2)",
    "Create a chart from visits.csv",
    "Team | Won | Lost\nRed | 3 | 1",
]
PROSE = [
    "Tell me about the history of the printing press, and who invented it.",
    "I went to the market, bought bread, cheese and apples, and walked home.",
    "Is it true that cats sleep most of the day? Mine does; she also snores.",
    "My flight leaves on 2024-05-17 at 10:30, gate B12. Call me on 555-0142.",
    "What's the best way to thank a teacher?",
    "The function of the heart is to pump blood. The class of mammals is large.",
    'He said: "I will return" - and then he left (again).',
]


@pytest.mark.parametrize("text", CODE)
def test_code_is_seen(text: str) -> None:
    """Definitions, calls, traces, shell lines, markup and file names look like code."""
    assert code_shape(text) >= 0.35


@pytest.mark.parametrize("text", MATH)
def test_mathematics_is_seen(text: str) -> None:
    """Formulas, arithmetic and word problems look like mathematics."""
    assert math_shape(text) >= STRONG


@pytest.mark.parametrize("text", TABLE)
def test_tables_are_seen(text: str) -> None:
    """Rows of pipes, commas or tabs, SQL and data files look like tables."""
    assert table_shape(text) >= STRONG


@pytest.mark.parametrize("text", PROSE)
def test_prose_has_no_shape(text: str) -> None:
    """Ordinary sentences have none of the shapes, whatever their words."""
    assert code_shape(text) < WEAK
    assert math_shape(text) < WEAK
    assert table_shape(text) < WEAK


def test_more_cues_are_stronger() -> None:
    """Weak cues add up, and the sum stays in [0, 1]."""
    one = code_shape("rename old_user_name")
    two = code_shape("rename old_user_name in settings.yaml")
    assert 0 < one < two <= 1


def test_numbers_of_a_table_are_not_a_word_problem() -> None:
    """A question about the numbers of a table has the shape of a table only."""
    text = "How many goals did Red score in total?\n\nTeam | Goals\nRed | 3\nBlue | 5\nGreen | 4"
    assert table_shape(text) >= STRONG
    assert math_shape(text) == 0


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("Warum bellt der Hund?", 0.6, 1.0),
        ("水はなぜ透明ですか", 0.9, 1.0),
        ("ሰላም እንደምን ነህ", 0.9, 0.9),
        ("Găsește-mi ceva bun și cald", 0.6, 1.0),
        ("Where is the nearest harbour?", 0.0, 0.0),
        ("ls -la", 0.0, 0.0),
        ("What does the sign 出口 mean?", 0.3, 0.3),
        ("", 0.0, 0.0),
    ],
)
def test_non_english(text: str, low: float, high: float) -> None:
    """Another language is strong even without a name; a quoted script is weak; code is nothing."""
    assert low <= non_english(text) <= high


def test_measure_lists_what_is_there() -> None:
    """Only features with some strength are listed."""
    assert measure("Good evening, how was your day?") == {}
    assert set(measure("SELECT a FROM b")) == {"table_shape"}
    assert set(measure("Wie lautet das Ergebnis von 12 * 7, bitte?")) == {
        "non_english",
        "math_shape",
    }


@settings(deadline=None)
@given(any_text)
def test_strengths_are_fractions(text: str) -> None:
    """Whatever the text, every strength lies in (0, 1], always the same."""
    found = measure(text)
    assert all(0 < strength <= 1 for strength in found.values())
    assert measure(text) == found


@settings(deadline=None, max_examples=20)
@given(any_text, any_text)
def test_only_the_ends_of_a_long_text_are_read(one: str, other: str) -> None:
    """The middle of a long text changes nothing, so the work is bounded."""
    head, tail, fill = "lorem ipsum " * 400, " dolor sit" * 400, 1_000
    assert measure(head + one.ljust(fill) + tail) == measure(head + other.ljust(fill) + tail)


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        " ",
        "\n",
        "\t",
        "|",
        ",",
        "1",
        "-",
        "$",
        "`",
        "_a",
        "a.",
        "a,",
        "1 + ",
        "[a, ",
        "((",
        "<div ",
        '{"a":',
        "select ",
        "class A",
        "x^",
        "how many ",
        "ErrorError",
        "a\n",
        "a|a|\n",
        "'",
        "\\",
        "é",
        "\ud800",
    ],
)
def test_a_million_characters(piece: str) -> None:
    """No repeated piece, however hostile to regular expressions, keeps a feature busy."""
    measure(piece * (1_000_000 // len(piece)))
