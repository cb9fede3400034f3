"""Opaque pieces: addresses of all forms become placeholders, and names of code stay."""

import pytest
from hypothesis import given, settings
from routes import ANY_TEXT, HOSTILE, REPEATED

from orion_oie.routing.text.opaque import BLOB, MAIL, PLACE, without_opaque


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org/python/sql?poem=1#top",
        "http://127.0.0.1:8000/x",
        "HTTPS://example.org",
        "ftp://mirror.example.edu/pub",
        "www.example.org",
        "www.museum.example/visit",
        "example.com",
        "news.example.co.uk/story",
        "blog.runners.co/shin-splints",
        "my-shop.de",
        "file:///home/a/b.txt",
    ],
)
def test_web_addresses(address: str) -> None:
    """With a scheme, with www, and as a bare name of a host; the signs around them stay."""
    for text, expected in (
        (f"summarise {address}", f"summarise {PLACE}"),
        (f"is {address}, by the way, safe?", f"is {PLACE}, by the way, safe?"),
        (f"({address})", f"({PLACE})"),
    ):
        found = without_opaque(text.replace("HTTPS", "https"))
        assert found.text == expected
        assert found.addresses == (address.replace("HTTPS", "https"),)


@pytest.mark.parametrize("address", ["ada@example.org", "a.b+c@mail.example.co.uk", "x_y@z.io"])
def test_mail_addresses(address: str) -> None:
    found = without_opaque(f"who is {address}?")
    assert (found.text, found.addresses) == (f"who is {MAIL}?", (address,))


@pytest.mark.parametrize(
    "text",
    [
        "java.net.UnknownHostException: db",
        "logger.info('done')",
        "main.py and index.html and data.csv",
        "import numpy.random",
        "src/main.rs/../lib.rs",
        "e.g. this one, i.e. that one.",
        "The end.Then it rained.",
        "node.js/express",
        "v1.2/notes",
        "3.14 and 2.71",
        "self.model.save(path)",
        "What is 10/4.5?",
    ],
)
def test_names_that_are_no_addresses(text: str) -> None:
    """Files, modules, calls, numbers and abbreviations."""
    assert without_opaque(text) == (text, ())


@pytest.mark.parametrize(
    "blob",
    [
        "d41d8cd98f00b204e9800998ecf8427e",
        "550e8400-e29b-41d4-a716-446655440000",
        "aGVsbG8gd29ybGQsIHRoaXMgaXMgYmFzZTY0",
        "0123456789abcdef0123456789ABCDEF01234567",
    ],
)
def test_digests(blob: str) -> None:
    assert without_opaque(f"what is {blob}").text == f"what is {BLOB}"
    assert without_opaque(blob).text == BLOB


@pytest.mark.parametrize(
    "text",
    [
        "incomprehensibilities and internationalization",
        "1234567890123456",
        "a-rather-long-hyphenated",
    ],
)
def test_long_words_are_no_digests(text: str) -> None:
    assert without_opaque(text).text == text


def test_signs_that_no_screen_shows() -> None:
    """They separate nothing and mean nothing."""
    assert without_opaque("w\u200br\u200bi\u00adte").text == "write"
    assert without_opaque("\x1b[31mred\x1b[0m").text == "red"
    assert without_opaque("a&nbsp;b \\x00\\u200b ^@").text == "ab  "
    assert without_opaque("\u200b" * 9).text == ""


@given(ANY_TEXT)
@settings(deadline=None)
def test_any_text(text: str) -> None:
    """A placeholder for each address, and nothing left to replace but by chance."""
    found = without_opaque(text)
    assert found.text.count(PLACE) + found.text.count(MAIL) >= len(found.addresses)


@pytest.mark.parametrize("piece", [*HOSTILE, *REPEATED, "a.", "a.a", "@a.", "http://", "a/", "Aa1"])
def test_bounded_time(piece: str) -> None:
    """The time grows with the length at most, whatever is repeated."""
    without_opaque((piece * 3000)[:3000])
