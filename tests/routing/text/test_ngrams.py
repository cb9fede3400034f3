"""Words and pieces of words as numbered buckets: each once, bounded, the same on every machine."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routes import ANY_TEXT, HOSTILE, REPEATED

from orion_oie.routing.text.excerpt import (
    HEAD_CHARS,
    TAIL_CHARS,
)
from orion_oie.routing.text.ngrams import (
    BITS,
    BUCKETS,
    Grams,
    grams,
)
from orion_oie.routing.text.prompt import read
from orion_oie.routing.text.signals import SIGNALS


def assert_sound(found: Grams, *, has_payload: bool) -> None:
    """Buckets are in range, each once, with positive values whose lengths are bounded."""
    assert found.buckets.shape == found.values.shape
    assert found.values.dtype == np.float32
    assert len(np.unique(found.buckets)) == len(found.buckets)
    assert len(found.buckets) == 0 or (found.buckets.min() >= 0 and found.buckets.max() < BUCKETS)
    assert (found.values > 0).all()
    assert np.isfinite(found.values).all()
    words = found.values[found.buckets < 1 << BITS]
    pieces = found.values[found.buckets >= 1 << BITS]
    assert len(pieces) == 0 or np.linalg.norm(pieces) == pytest.approx(1, abs=1e-4)
    if len(words) and not has_payload:
        assert np.linalg.norm(words) == pytest.approx(1, abs=1e-4)
    assert np.linalg.norm(words) <= 1.5 + 1e-4
    assert len(found.names) == len(found.name_buckets) == len(found.name_values)
    assert set(found.name_buckets.tolist()) <= set(found.buckets.tolist())


def assert_same(first: Grams, second: Grams) -> None:
    assert first.names == second.names
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one, other)


@given(ANY_TEXT, ANY_TEXT)
@settings(deadline=None)
def test_any_text(instruction: str, payload: str) -> None:
    found = grams(instruction, payload)
    assert_sound(found, has_payload=bool(payload))
    assert_same(found, grams(instruction, payload))


@given(st.text("abc ", max_size=200), st.text("abc ", max_size=400))
@settings(deadline=None)
def test_words_of_the_payload_may_stand_in_the_instruction(instruction: str, payload: str) -> None:
    """The payload shares the table of the words, also where both fall into one bucket."""
    assert_sound(grams(f"in {instruction}", payload), has_payload=True)


def test_a_bucket_of_both_counts_once_with_both_values() -> None:
    """The words `in a` of an instruction are what the word `a` of a payload is called."""
    alone, both = grams("look in a jar"), grams("look in a jar", "a")
    bucket = alone.name_buckets[alone.names.index("in a")]
    value = dict(zip(alone.buckets.tolist(), alone.values.tolist(), strict=True))
    sums = dict(zip(both.buckets.tolist(), both.values.tolist(), strict=True))
    assert sums.pop(bucket) == pytest.approx(value.pop(bucket) + 0.5)
    assert sums == pytest.approx(value)


def test_the_names_of_words() -> None:
    """Words, neighbours, openings, endings; lower case, numbers are 0, signs are words."""
    assert grams("Write 12 poems!").names == [
        *("write", "0", "poems", "!"),
        *("write 0", "0 poems", "poems !"),
        *("write ...", "write 0 ...", "write 0 poems ...", "... !", "... poems !"),
    ]
    assert grams("don't naïve_name x²").names[:4] == ["don't", "naïve", "name", "x²"]


def test_the_buckets_are_those_that_the_weights_were_fitted_to() -> None:
    """Another hash would make the weights of the package worthless without any error."""
    assert BUCKETS == 65536
    assert grams("write a poem").name_buckets[:3].tolist() == [31327, 15939, 29082]
    tea, owl = grams("tea").buckets, grams("żółw 🙂").buckets
    pieces = [35884, 50265, 57392, 57849, 57917, 62463]
    assert np.sort(tea[tea >= 1 << BITS]).tolist() == pieces
    assert np.sort(owl)[-3:].tolist() == [51000, 58165, 65124]


def test_case_and_numbers_do_not_count() -> None:
    for one, other in (("Write A POEM", "write a poem"), ("born in 1987", "born in 2024")):
        assert_same(grams(one), grams(other))


def test_pieces_find_words_that_were_never_seen() -> None:
    """Two forms of a word share buckets although they share no word."""
    one, other = grams("translating"), grams("translator")
    shared = set(one.buckets.tolist()) & set(other.buckets.tolist())
    assert all(bucket >= 1 << BITS for bucket in shared)
    assert len(shared) >= 10


def test_the_payload_counts_less_and_by_its_words_alone() -> None:
    """Its length is half that of an instruction, and none of its pieces are looked at."""
    found = grams("", "harbour light harbour")
    assert np.linalg.norm(found.values) == pytest.approx(0.5)
    assert (found.buckets < 1 << BITS).all()
    assert found.names == []
    assert grams("").buckets.shape == (0,)


def test_repeating_a_word_adds_less_and_less() -> None:
    """The value of a word grows with the logarithm of its count."""

    def share(count: int) -> float:
        found = grams("", " ".join(["a"] * count + ["b"]))
        values = np.sort(found.values)
        return float(values[1] / values[0])

    assert share(1) == pytest.approx(1)
    assert share(20) == pytest.approx(1 + np.log(20), rel=1e-5)


# What a prompt is read as


@pytest.mark.parametrize("text", HOSTILE)
def test_any_prompt_is_read(text: str) -> None:
    found = read(text)
    assert found.signals.shape == (len(SIGNALS),)
    assert found.signals.dtype == np.float32
    assert ((found.signals >= 0) & (found.signals <= 1)).all()
    assert_sound(found.grams, has_payload=bool(found.parts.payload))


@given(st.lists(st.one_of(ANY_TEXT, st.sampled_from(REPEATED)), max_size=20).map("".join))
@settings(deadline=None)
def test_signals_are_shares(text: str) -> None:
    """Each is in [0, 1] for any text, and the same again."""
    found = read(text)
    assert ((found.signals >= 0) & (found.signals <= 1)).all()
    assert np.array_equal(found.signals, read(text).signals)


@pytest.mark.parametrize("piece", REPEATED)
def test_a_prompt_has_a_bound(piece: str) -> None:
    """Of a million characters an excerpt is read, and from it a bounded number of buckets."""
    found = read((piece * 1_000_000)[:1_000_000])
    assert len(found.text) <= HEAD_CHARS + TAIL_CHARS + 1
    assert len(found.grams.buckets) < 4 * (HEAD_CHARS + TAIL_CHARS)


def test_signals_by_name() -> None:
    """A few shapes that are easy to say."""

    def seen(text: str) -> set[str]:
        values = dict(zip(SIGNALS, read(text).signals.tolist(), strict=True))
        return {name for name, value in values.items() if value and "length" not in name}

    assert seen("How do crabs breathe out of water?") == {"question", "substance"}
    assert "non_english" in seen("Wie spät ist es jetzt in Lissabon?")
    assert {"options", "lines"} <= seen("Which one is it?\nA) tea\nB) coffee")
    assert {"code_shape", "code_payload", "backticks"} <= seen("Fix it:\n```\ndef f(x):\n  y\n```")
    assert "blanks" in seen("The capital of France is ___.")
    assert {"digits", "math_shape"} <= seen("3 * 12 + 7 = ?")
    assert "quotation_marks" in seen('What does "to weigh anchor" mean?')
    assert "language_unknown" in seen("zzz qqq")


def test_signals_of_what_is_left_out() -> None:
    """An address and a list are no words, but that they were there is known."""
    values = dict(zip(SIGNALS, read("Is www.example.org any good?").signals.tolist(), strict=True))
    assert values["address"] == 1
    prompt = read("python sql poem css. How long do I boil an egg?")
    values = dict(zip(SIGNALS, prompt.signals.tolist(), strict=True))
    assert (values["list_payload"], values["code_shape"]) == (1, 0)
    assert prompt.parts.instruction == "How long do I boil an egg?"


@given(st.sampled_from(["naïve café", "Größe", "ñandú"]))
@settings(deadline=None)
def test_composed_letters(text: str) -> None:
    """Words with accents are words, however they are written, though not the same ones."""
    for form in ("NFC", "NFD"):
        assert_sound(grams(unicodedata.normalize(form, text)), has_payload=False)
