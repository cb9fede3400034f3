"""From token bytes to text: nothing lost, no half characters, and no stop string shown."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orion_oie.backends.text import TextAssembler

texts = st.text(max_size=30) | st.text("aé日🦉\u0301 ", max_size=30)
# Few letters, so that stop strings are met, begun and overlapped often.
dense = st.text("abé", max_size=20)
stops = st.lists(st.text("abé", min_size=1, max_size=4), max_size=3)
cut_places = st.lists(st.integers(0, 60), max_size=20)
REPLACEMENT = "\ufffd"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The data in pieces, some of them empty."""
    borders = [0, *sorted(min(place, len(data)) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(borders)]


def assembled(pieces: list[bytes], stop: list[str]) -> tuple[list[str], bool]:
    assembler = TextAssembler(stop)
    shown = [assembler.push(piece) for piece in pieces]
    return [*shown, assembler.finish()], assembler.is_stopped


def before_stop(text: str, stop: list[str]) -> str:
    """The reference: read letter by letter, and end where the first stop string is complete."""
    for end in range(len(text) + 1):
        met = [word for word in stop if text[:end].endswith(word)]
        if met:
            return text[: end - max(map(len, met))]
    return text


@given(text=texts, places=cut_places)
def test_any_cut_gives_the_text_back(text: str, places: list[int]) -> None:
    """Without stop strings the text comes out as it went in, even cut inside characters."""
    shown, is_stopped = assembled(cut(text.encode(), places), [])
    assert "".join(shown) == text
    assert not is_stopped


@given(text=st.text(st.characters(exclude_characters=REPLACEMENT)), stop=stops)
def test_valid_text_never_shows_a_replacement(text: str, stop: list[str]) -> None:
    """Byte by byte, no half character is taken for a broken one."""
    shown, _ = assembled([bytes([byte]) for byte in text.encode()], stop)
    assert REPLACEMENT not in "".join(shown)


@given(text=texts, places=cut_places)
def test_text_is_not_held_back_without_need(text: str, places: list[int]) -> None:
    """Without stop strings every complete character is shown at once."""
    assembler, given_bytes, shown = TextAssembler(), b"", ""
    for piece in cut(text.encode(), places):
        given_bytes += piece
        shown += assembler.push(piece)
        assert shown == given_bytes.decode(errors="ignore")


@given(text=dense, stop=st.text("abé", min_size=1, max_size=4), places=cut_places)
def test_a_stop_string_is_found_across_pieces(text: str, stop: str, places: list[int]) -> None:
    """What is shown is what stands before the first occurrence, wherever the text was cut."""
    shown, is_stopped = assembled(cut(text.encode(), places), [stop])
    assert "".join(shown) == text.split(stop)[0]
    assert is_stopped == (stop in text)


@given(text=dense, stop=stops, places=cut_places)
@example(text="abéb", stop=["abéb", "é"], places=[])
@example(text="abéb", stop=["abéb", "é"], places=[1, 2, 4])
@example(text="ab", stop=["ab", "b"], places=[1])
def test_the_earliest_of_several_stops_wins(text: str, stop: list[str], places: list[int]) -> None:
    """The stop string that is complete first ends the text, however the text was cut."""
    shown, is_stopped = assembled(cut(text.encode(), places), stop)
    assert "".join(shown) == before_stop(text, stop)
    assert is_stopped == any(word in text for word in stop)


@given(text=dense, stop=stops, places=cut_places)
def test_no_part_of_a_stop_string_is_ever_shown(
    text: str, stop: list[str], places: list[int]
) -> None:
    """At any moment what was shown is a beginning of what is shown in the end."""
    assembler, shown = TextAssembler(stop), ""
    final = before_stop(text, stop)
    for piece in cut(text.encode(), places):
        shown += assembler.push(piece)
        assert final.startswith(shown)


@given(text=dense, stop=stops, places=cut_places)
def test_only_a_possible_stop_is_held_back(text: str, stop: list[str], places: list[int]) -> None:
    """What is withheld of the characters that came is the longest beginning of a stop string."""
    assembler, come, shown = TextAssembler(stop), b"", ""
    for piece in cut(text.encode(), places):
        come += piece
        shown += assembler.push(piece)
        if assembler.is_stopped:
            break
        whole = come.decode(errors="ignore")
        begun = [n for word in stop for n in range(len(word)) if whole.endswith(word[:n])]
        assert shown == whole[: len(whole) - max(begun, default=0)]


def test_after_a_stop_there_is_silence() -> None:
    """Whatever still comes is not shown, neither by the next piece nor at the end."""
    assembler = TextAssembler(["END"])
    assert assembler.push(b"one ENDing") == "one "
    assert assembler.is_stopped
    assert assembler.push(b"two") == assembler.finish() == ""


def test_a_stop_that_did_not_come_is_given_out() -> None:
    """What was held back for a stop string is text when the answer ends; only once."""
    assembler = TextAssembler(["\n\nUser:"])
    assert assembler.push(b"bye\n\nUs") == "bye"
    assert assembler.finish() == "\n\nUs"
    assert assembler.finish() == ""
    assert not assembler.is_stopped


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([b"a\xffb"], "a\ufffdb"),
        ([b"a\xe6\x97", b"b"], "a\ufffdb"),
        ([b"a\x80", b"\x80b"], "a\ufffd\ufffdb"),
        ([b"a\xe6\x97"], "a"),
        ([b"\xf0", b"\x9f", b"\xa6"], ""),
        ([], ""),
        ([b"", b""], ""),
    ],
)
def test_broken_bytes(pieces: list[bytes], text: str) -> None:
    """Bytes that are no character are shown as U+FFFD; an unfinished last one is dropped."""
    assert "".join(assembled(pieces, [])[0]) == text


@given(data=st.binary(max_size=40), places=cut_places, stop=stops)
def test_any_bytes_become_text(data: bytes, places: list[int], stop: list[str]) -> None:
    """Noise of a model never raises, and the cut makes no difference to it either."""
    once, _ = assembled([data], stop)
    shown, _ = assembled(cut(data, places), stop)
    assert "".join(shown) == "".join(once)
    "".join(shown).encode()
