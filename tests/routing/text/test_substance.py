"""Substance: how much there is to read, in all scripts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routes import ANY_TEXT, HOSTILE, REPEATED

from orion_oie.routing.text.prompt import read
from orion_oie.routing.text.substance import is_word, substance

NOTHING = [
    *("", " ", "???", "...", "(){}", '""', "🫠", "👁️👄👁️", "—", "。。。", "؟", "░▒▓", "~~~~", "#"),
    *("7", "-3", "0.0", "88 88", "1234567890", "t", "Ø", "aaaaaaa", "ZZZZZ", "ыыыыы", "ののの"),
    *("asdfghjkl", "qwertyuiop", "sdlkfjwoei", "asdasdasdasd", "hjgfrtyu uyhjk", "фывапролдж"),
    *("\u200b\u200b", "\ufeff", "\u3000", "\\x00\\x1b", "\x1b[31m", "&nbsp;", "\x07\x08"),
]
LITTLE = ["florpwick", "zanthuble", "gribbet gribbet", "/etc/nginx/nginx.conf", "some_long_name"]
ENOUGH = [
    *("How are you?", "please fix this function", "what is inflation", "Wie geht es dir?"),
    *("Помоги мне с этим текстом", "请帮我写一首诗", "ما هو الطقس اليوم", "오늘 날씨 어때요"),
    *("आज मौसम कैसा है", "วันนี้อากาศเป็นอย่างไร", "τι καιρό κάνει σήμερα"),
]


@pytest.mark.parametrize("text", NOTHING)
def test_nothing_to_read(text: str) -> None:
    """Signs, numbers, repeated letters, and keys in the order of a keyboard."""
    assert read(text).substance == 0


@pytest.mark.parametrize("text", LITTLE)
def test_a_word_alone(text: str) -> None:
    """A word that nobody knows, a path, a name."""
    assert 0 < read(text).substance <= 0.5


@pytest.mark.parametrize("text", ENOUGH)
def test_a_question(text: str) -> None:
    assert substance(text) == 1


@pytest.mark.parametrize("text", ["2+2=", "x^2 - 4 = 0", "print('a')", "|a|b|\n|-|-|\n|1|2|"])
def test_code_formulas_and_tables_need_no_words(text: str) -> None:
    assert read(text).substance == 1


@pytest.mark.parametrize("text", ["Hola!", "привет", "你好", "Guten Morgen"])
def test_greetings_say_all_that_they_mean(text: str) -> None:
    assert substance(text) == 1


@pytest.mark.parametrize("word", ["hello", "Straße", "привет", "kubernetes", "zanthuble", "NGINX"])
def test_words(word: str) -> None:
    assert is_word(word)


@given(ANY_TEXT)
@settings(deadline=None)
def test_any_text(text: str) -> None:
    assert 0 <= substance(text) <= 1


@given(st.text(alphabet="!?.,;:-_()[]{}<>/\\|*+=~^°§$%&#@'\"` \t\n0123456789"))
@settings(deadline=None)
def test_signs_and_digits_are_no_words(text: str) -> None:
    assert substance(text) == 0


@pytest.mark.parametrize("piece", [*HOSTILE, *REPEATED])
def test_bounded_time(piece: str) -> None:
    substance((piece * 3000)[:3000])
