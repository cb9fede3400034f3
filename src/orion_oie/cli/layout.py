"""Texts in the columns of a terminal: how wide they are, and how they are made to fit.

Pure: knows no terminal, and prints nothing.
"""

import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence

_GAP = "  "
_LEAST = 16
"""Columns to which a column of a table may be narrowed."""

_LEAST_LAST = 12
"""The same for an optional one: a narrower one is left out."""


def width_of(text: str) -> int:
    """The columns that a text takes on a terminal: two for a wide character of East Asia, none for
    one that combines with the one before."""
    if text.isascii():
        return len(text)
    return sum(_char_width(char) for char in text)


def _char_width(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def padded(text: str, width: int, *, is_number: bool = False) -> str:
    """A text filled up with spaces: on the left if it is a number."""
    spaces = " " * (width - width_of(text))
    return spaces + text if is_number else text + spaces


def middle_shortened(text: str, most: int) -> str:
    """A text of at most `most` columns; what does not fit is missing in its middle."""
    if width_of(text) <= most:
        return text
    kept = max(0, most - 3)
    head = _head(text, (kept + 1) // 2)
    tail = _head(text[::-1], kept - width_of(head))[::-1]
    return f"{head}...{tail}"[: max(most, 1)]


def _head(text: str, most: int) -> str:
    """The beginning of a text that fits into `most` columns."""
    used = 0
    for index, char in enumerate(text):
        used += _char_width(char)
        if used > most:
            return text[:index]
    return text


def wrapped(text: str, width: int, *, first: str = "", hang: int = 0) -> list[str]:
    """A text in lines of at most `width` columns, broken at spaces, between wide characters, and
    within a word only where it is longer than a line. `first` precedes the first line; the others
    are indented by `hang`."""
    lines: list[str] = []
    line, is_fresh = first, True
    for gap, piece in _pieces(text):
        rest = piece
        while rest:
            room = width - width_of(line)
            before = "" if is_fresh else gap
            if width_of(before + rest) <= room:
                line, rest, is_fresh = line + before + rest, "", False
                continue
            if is_fresh:  # longer than a whole line
                part = _head(rest, max(room, 1)) or rest[0]
                line, rest = line + part, rest[len(part) :]
            lines.append(line.rstrip(" "))
            line, is_fresh = " " * hang, True
    return lines if is_fresh and lines else [*lines, line.rstrip(" ")]


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """What a line may be broken between: the space before each piece, and the piece."""
    for word in re.split(r"[ \t\n\r\f\v]+", text.strip(" \t\n\r\f\v")):
        gap, start = " ", 0
        for index, char in enumerate(word):
            if not char.isascii() and _char_width(char) == 2:
                if index > start:
                    yield gap, word[start:index]
                    gap = ""
                yield gap, char
                gap, start = "", index + 1
        if start < len(word):
            yield gap, word[start:]


def table_lines(
    rows: Sequence[Sequence[str]],
    most: int | None = None,
    *,
    numbers: Collection[int] = (),
    elastic: Sequence[int] = (),
    optional: Sequence[int] = (),
) -> list[str]:
    """The lines of a table, the first row of which is its head.

    most: the columns of the terminal; None for whole cells, one line a row, whatever their width.
    numbers: the columns on the right of their place. elastic: the columns that give way first when
    there is too little room, then all that are no numbers do; their cells are wrapped at spaces,
    and words that are too long lose their middle. optional: the columns that are left out where
    even that does not help, in order.
    """
    widths = [max(map(width_of, column)) for column in zip(*rows, strict=True)]
    shown = list(range(len(widths)))
    if most is not None:
        shown = _columns_with_room(widths, most, elastic, optional)
        texts = [column for column in shown if column not in numbers]
        heads = [width_of(cell) for cell in rows[0]]
        for group in ([c for c in elastic if c in shown], texts):
            _narrow(widths, shown, most, {c: max(_LEAST, heads[c]) for c in group})
    lines = []
    for row in rows:
        cells = [_cell_lines(row[column], widths[column], most is None) for column in shown]
        for number in range(max(map(len, cells))):
            parts = (
                padded(
                    cell[number] if number < len(cell) else "",
                    widths[column],
                    is_number=column in numbers,
                )
                for column, cell in zip(shown, cells, strict=True)
            )
            lines.append(_GAP.join(parts).rstrip())
    return lines


def _columns_with_room(
    widths: Sequence[int], most: int, elastic: Sequence[int], optional: Sequence[int]
) -> list[int]:
    """The columns of a table that are shown: without the optional ones that have no room."""
    shown = list(range(len(widths)))
    for column in optional:
        least = [min(widths[c], _LEAST_LAST) if c in elastic else widths[c] for c in shown]
        if sum(least) + len(_GAP) * (len(shown) - 1) <= most:
            break
        shown.remove(column)
    return shown


def _narrow(widths: list[int], shown: Sequence[int], most: int, least: dict[int, int]) -> None:
    """Take columns of width from the widest of the columns in `least`, until all fit or none can
    give any more."""
    excess = sum(widths[c] for c in shown) + len(_GAP) * (len(shown) - 1) - most
    while excess > 0:
        giving = [column for column, bound in least.items() if widths[column] > bound]
        if not giving:
            return
        widths[max(giving, key=lambda column: widths[column])] -= 1
        excess -= 1


def _cell_lines(text: str, width: int, is_whole: bool) -> list[str]:
    if is_whole or width_of(text) <= width:
        return [text]
    words = [
        middle_shortened(word, width) if width_of(word) == len(word) else word
        for word in text.split(" ")
    ]
    return wrapped(" ".join(words), width)
