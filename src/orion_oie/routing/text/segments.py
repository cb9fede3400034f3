"""Segmentation of a prompt into its instruction and its payload: the text that it asks about.

Uses the shape of the text and a few words; nothing is parsed, and unclear text stays instruction.
So do a single paragraph without a label, and a list of points, which mostly describes the answer
that is wanted. The expressions and words are in `segment_patterns`.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import accumulate, groupby
from typing import Literal, NamedTuple, cast

from orion_oie.routing.text import segment_patterns as patterns
from orion_oie.routing.text.compiled import compiled
from orion_oie.routing.text.excerpt import excerpt

PayloadKind = Literal["code", "table", "log", "quote", "document", "list"]


class Segments(NamedTuple):
    """Instruction and payload. Together they hold every character of the excerpt except white
    space, each in its original order."""

    instruction: str
    payload: str
    kinds: frozenset[PayloadKind]


class _Span(NamedTuple):
    """The range `text[start:end]`: payload of a kind, or None for instruction so far ("open")."""

    start: int
    end: int
    kind: PayloadKind | None


class _Line(NamedTuple):
    start: int
    end: int
    bare: str


_Finder = Callable[[str, int, int], Iterable[_Span]]

# A shorter single line is instruction unless it holds one of the marks.
_PLAIN_CHARS = 160
_ASKING_CHARS = 300
# A greeting or a role may stand before the request.
_ASIDE_CHARS = 100
_QUOTE_CHARS = 60
_CELL_CHARS = 45
# A body that the instruction refers to may be shorter than one that merely stands next to it.
_POINTED_BODY_CHARS = 120
_BODY_CHARS = 400
_REQUEST_LETTERS = 10
_CLOSING_LINES = 12
_ROWS_NEEDED = {"|": 2, "\t": 2}


@cache
def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def split(text: str) -> Segments:
    """Split `text`, or an excerpt of a long one, into its instruction and its payload.

    1. Code (fenced or not), tables, logs and long quotations are payload.
    2. In the rest, a long body that a short request, question or label introduces or follows is
       payload as well.
    3. If nothing but payload is left: a docstring, comment or question in code, or a question in
       other payload, is the instruction; a quotation alone is the instruction as a whole; for a
       table or a log alone the instruction may be empty.
    """
    text = excerpt(text).strip()
    if len(text) <= _PLAIN_CHARS and not any(mark in text for mark in patterns.PLAIN_MARKS):
        return Segments(text, "", frozenset())
    spans = [_Span(0, len(text), None)]
    for find in (_fences, _runs, _quotes):
        spans = _refined(text, spans, find)
    bodies = _bodies(text, spans)
    spans = _refined(text, spans, lambda _, start, end: _clipped(bodies, start, end))
    instruction = _joined(text[span.start : span.end] for span in spans if span.kind is None)
    kinds = frozenset(span.kind for span in spans if span.kind is not None)
    if kinds and not any(map(str.isalpha, instruction)):
        return _of_payload_alone(text, kinds)
    payload = _joined(text[span.start : span.end] for span in spans if span.kind is not None)
    return Segments(instruction, payload, kinds)


def _refined(text: str, spans: list[_Span], find: _Finder) -> list[_Span]:
    """The spans after `find` has marked payload in the open ones; the rest of them stays open."""
    refined = []
    for span in spans:
        if span.kind is not None:
            refined.append(span)
            continue
        at = span.start
        for found in find(text, span.start, span.end):
            if found.start > at:
                refined.append(_Span(at, found.start, None))
            refined.append(found)
            at = found.end
        if at < span.end:
            refined.append(_Span(at, span.end, None))
    return refined


def _clipped(spans: Iterable[_Span], start: int, end: int) -> Iterator[_Span]:
    for span in spans:
        if span.start < end and span.end > start:
            yield _Span(max(span.start, start), min(span.end, end), span.kind)


def _joined(pieces: Iterable[str]) -> str:
    """All pieces as one text, with a space where two words would run into each other."""
    joined: list[str] = []
    for piece in pieces:
        if joined and not joined[-1][-1].isspace() and not piece[0].isspace():
            joined.append(" ")
        joined.append(piece)
    return "".join(joined).strip()


def _fences(text: str, start: int, end: int) -> Iterator[_Span]:
    for match in compiled(patterns.FENCE).finditer(text, start, end):
        yield _Span(*match.span(), "code")


def _quotes(text: str, start: int, end: int) -> Iterator[_Span]:
    # Short quotations are matched as well, so that their closing marks do not open another.
    for match in compiled(patterns.QUOTED).finditer(text, start, end):
        if match.end() - match.start() > _QUOTE_CHARS:
            yield _Span(*match.span(), "quote")


def _runs(text: str, start: int, end: int) -> Iterator[_Span]:
    """The runs of code, log lines, table rows and mail quotes, as whole lines."""
    lines = text[start:end].splitlines(keepends=True)
    starts = list(accumulate(map(len, lines), initial=start))
    for run in compiled(patterns.RUN).finditer(_marks(lines)):
        first, last = starts[run.start()], starts[run.end()]
        if run.lastgroup == "quote":
            is_sure = last - first > _QUOTE_CHARS
        else:
            is_sure = sum((mark in "tCL") * 2 + (mark in "cl") for mark in run.group()) >= 2
        if is_sure:
            yield _Span(first, last, cast(PayloadKind, run.lastgroup))


def _marks(lines: list[str]) -> str:
    """One character for each line: see `patterns.LINE` and `_mark`; t for a row of a table."""
    marks = [_mark(line) for line in lines]
    rows = [
        None if mark in "_CcL" else _row_kind(line.strip())
        for mark, line in zip(marks, lines, strict=True)
    ]
    for kind, group in groupby(range(len(lines)), key=rows.__getitem__):
        places = list(group)
        if kind is not None and len(places) >= _ROWS_NEEDED.get(kind, 3):
            marks[places[0] : places[-1] + 1] = "t" * len(places)
    return "".join(marks)


def _mark(line: str) -> str:
    """The mark of a line: see `patterns.LINE`; else _ blank, i indented, . prose, or , unclear."""
    bare = line.strip()
    if not bare:
        return "_"
    if bare.endswith(patterns.QUESTION_MARKS):
        return "."
    found = compiled(patterns.LINE).match(bare)
    if found and found.lastgroup:
        return found.lastgroup[0]
    is_prose = compiled(patterns.PROSE).match(bare) is not None
    if not is_prose and bare[-1] in ";{" and any(sign in bare for sign in "=(){}[]<>"):
        return "c"
    if line[0] == "\t" or line[:2] == "  ":
        return "i"
    return "." if is_prose else ","


def _row_kind(line: str) -> str | None:
    """A key that is equal for rows that may belong to one table; None for a line that is no row."""
    pipes = line.count("|")
    if pipes > 1:
        return "|"
    if "\t" in line:
        return "\t"
    for separator in ",;":
        count = line.count(separator)
        is_row = count > 1 or (count == 1 and f"{separator} " not in line)
        if is_row and line[-1] not in ".?!:,;" and len(line) <= _CELL_CHARS * (count + 1):
            return f"{separator}{count}"
    if pipes:
        return "one |"
    return "columns" if "   " in line else None


def _bodies(text: str, spans: list[_Span]) -> list[_Span]:
    """The long texts to which short ones in the open spans refer."""
    lines = [line for span in spans if span.kind is None for line in _lines(text, span)]
    if not lines:
        return []
    return _labelled(text, lines) or _led(text, lines, has_payload=len(spans) > 1)


def _lines(text: str, span: _Span) -> Iterator[_Line]:
    at = span.start
    for line in text[span.start : span.end].splitlines(keepends=True):
        bare = line.strip()
        if bare:
            yield _Line(at, at + len(line), bare)
        at += len(line)


def _labelled(text: str, lines: list[_Line]) -> list[_Span]:
    """The spans from each label of a text to the next label, or to a request at the end."""
    # The leading line feed lets the first label match, and shifts all positions by one.
    labels = list(compiled(patterns.LABEL).finditer(f"\n{text}"))
    if not labels:
        return []
    places = [label.start() for label in labels]
    bodies = [
        _Span(start, end, "document")
        for label, start, end in zip(labels, places, [*places[1:], len(text)], strict=True)
        if label.lastgroup == "body"
    ]
    if bodies and bodies[-1].end == len(text):
        start = bodies[-1].start
        closing = _closing(lines, start, is_led=any(line.end <= start for line in lines))
        bodies[-1] = _Span(start, len(text) if closing is None else closing, "document")
    return bodies


def _led(text: str, lines: list[_Line], has_payload: bool) -> list[_Span]:
    """The text between a request in the first lines and one in the last, if it is long."""
    start = _lead_end(text, lines)
    closing = _closing(lines, start or 0, is_led=start is not None)
    if start is None and closing is None:
        return []
    start = start or 0
    end = len(text) if closing is None else closing
    body = [line for line in lines if line.end > start and line.start < end]
    size = sum(min(line.end, end) - max(line.start, start) for line in body)
    if size < _POINTED_BODY_CHARS:
        return []
    request = f"{text[:start]} {text[end:]}"
    works_on_text = _begins(request, patterns.TEXT_VERBS, patterns.EAST_ASIAN_TEXT_WORK)
    is_pointed = works_on_text or _points(request) or text[:start].rstrip().endswith((":", "："))
    if size < _BODY_CHARS and (has_payload or not is_pointed):
        return []
    if not works_on_text:
        requirements = sum(len(line.bare) for line in body if _is_requirement(line.bare))
        is_account = not is_pointed and compiled(patterns.OWN_ACCOUNT).match(body[0].bare)
        if (
            requirements * 2 >= size
            or is_account
            or sum(map(str.isalpha, request)) < _REQUEST_LETTERS
        ):
            return []
    return [_Span(start, end, "document")]


def _lead_end(text: str, lines: list[_Line]) -> int | None:
    """The end of the request in the first lines, or in the first sentence of a long line."""
    first = lines[0]
    if len(lines) == 1 or len(first.bare) > _ASKING_CHARS:
        inline = compiled(patterns.INLINE_LEAD).match(text, first.start, first.end)
        if inline and _begins(inline.group(), patterns.TEXT_VERBS, patterns.EAST_ASIAN_TEXT_WORK):
            has_colon = inline.group(1) is not None
            return inline.end() if has_colon or _points(inline.group()) else None
    end = None
    for line in lines[:3]:
        if _asks(line.bare):
            end = line.end
        elif end is not None or len(line.bare) > _ASIDE_CHARS:
            break
    return end


def _closing(lines: list[_Line], after: int, is_led: bool) -> int | None:
    """The start of the requests in the last lines, including the options to choose from.

    If the text starts with a request, a blank line has to come before them, because a pasted letter
    may end in a question.
    """
    start = None
    lines = lines[-_CLOSING_LINES:]
    for above, line in zip(lines[-2::-1], lines[:0:-1], strict=True):
        if above.end <= after:
            break
        if _asks(line.bare):
            if not is_led or above.end < line.start:
                start = line.start
        elif not compiled(patterns.OPTION).match(line.bare):
            break
    return start


def _asks(line: str) -> bool:
    """True for a short line that is a question, ends in a colon, or contains a request."""
    if len(line) > _ASKING_CHARS:
        return False
    if line.rstrip('*_"”») ').endswith((*patterns.QUESTION_MARKS, ":", "：")):
        return True
    return _begins(line, patterns.ALL_VERBS, patterns.EAST_ASIAN_REQUEST)


def _begins(text: str, verbs: str, east_asian: str) -> bool:
    """True if a sentence of `text` begins with one of the verbs, after any courtesies."""
    for sentence in compiled(patterns.SENTENCE_END).split(text):
        words = (word for word in _plain_words(sentence) if word not in _words(patterns.COURTESIES))
        if next(words, "") in _words(verbs):
            return True
    return not text.isascii() and compiled(east_asian).search(text) is not None


def _points(text: str) -> bool:
    return compiled(patterns.POINTER).search(text) is not None


def _plain_words(text: str) -> Iterator[str]:
    for word in text.lower().split():
        yield word.strip(".,:;!?*_#\"'()")


def _is_requirement(line: str) -> bool:
    """True for an item of a list, or a line that begins to describe the answer that is wanted."""
    if compiled(patterns.POINT).match(line):
        return True
    return not _words(patterns.REQUIREMENTS).isdisjoint(_plain_words(line[:100]))


def _of_payload_alone(text: str, kinds: frozenset[PayloadKind]) -> Segments:
    """The segments of a text that is all payload: see step 3 of `split`."""
    if kinds <= {"quote", "document"}:
        return Segments(text, "", frozenset())
    for start, end in _hints(text, kinds):
        rest = _joined(part for part in (text[:start], text[end:]) if part)
        if rest and any(map(str.isalpha, text[start:end])):
            return Segments(text[start:end].strip(), rest, kinds)
    return Segments("", text, kinds)


def _hints(text: str, kinds: frozenset[PayloadKind]) -> Iterator[tuple[int, int]]:
    """The ranges of a docstring up to its examples, of comments and of questions."""
    for quotes in ('"""', "'''") if "code" in kinds else ():
        before, mark, rest = text.partition(quotes)
        start = len(before) + len(mark)
        yield start, start + len(rest.partition(quotes)[0].partition(">>>")[0])
    asked = (patterns.COMMENTS, patterns.QUESTION) if "code" in kinds else (patterns.QUESTION,)
    for pattern in asked:
        yield from (match.span() for match in compiled(pattern).finditer(text))
