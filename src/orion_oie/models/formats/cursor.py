"""A bounded, forward-only reader over ranged reads, for headers from untrusted files.

Every step is checked against the size of the file first; a fault is a `ModelCorruptError` with
the offset. No byte is read twice. It knows numbers and counted strings, not their meaning.
"""

import re
from collections.abc import Callable
from functools import cache
from struct import Struct
from typing import Any, NoReturn

from orion_oie.errors import ModelCorruptError

ReadAt = Callable[[int, int], bytes]
"""`read_at(offset, length)` returns exactly `length` bytes."""

U32 = Struct("<I")
U64 = Struct("<Q")

_GROUP = 64
_SHORT_BYTES = 64

MAX_HEADER_BYTES = 128 << 20
_FIRST_READ_BYTES = 256 << 10
_LARGEST_READ_BYTES = 4 << 20


@cache
def _short_strings() -> re.Pattern[bytes]:
    """A group of counted strings below `_SHORT_BYTES`: a length in eight bytes, then the string.

    Made when it is needed, which takes some milliseconds. It steps over strings nearly twice as
    fast as a loop that reads the lengths.
    """
    zeros = rb"\0{7}"
    each = (re.escape(bytes([n])) + zeros + rb".{%d}" % n for n in range(_SHORT_BYTES))
    return re.compile(rb"(?s:%s){%d}+" % (b"|".join(each), _GROUP))


def quoted(value: object) -> str:
    """`repr`, shortened: names in a damaged file may be megabytes of noise."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}...'"


class Cursor:
    """A place in the file with a window of bytes around it, and the faults that can occur there.

    The header must end before `MAX_HEADER_BYTES`: real ones take some 15 MB at most, and without
    a bound a crafted sparse file could keep the reader busy for hours.
    """

    def __init__(self, read_at: ReadAt, size: int, name: str) -> None:
        self.size = size
        self.pos = 0
        self._name = name
        self._end = min(size, MAX_HEADER_BYTES)
        self._read_at = read_at
        self._read_bytes = _FIRST_READ_BYTES
        self._window = b""
        self._window_start = 0

    def fail(
        self, what: str, advice: str = "the file is damaged, download it again", **details: Any
    ) -> NoReturn:
        raise ModelCorruptError(f"{self._name}: {what}: {advice}", path=self._name, **details)

    def number(self, layout: Struct, what: str) -> Any:
        at = self._reach(layout.size, what)
        self.pos += layout.size
        return layout.unpack_from(self._window, at)[0]

    def take(self, n_bytes: int, what: str) -> bytes:
        at = self._reach(n_bytes, what)
        self.pos += n_bytes
        return self._window[at : at + n_bytes]

    def string(self, what: str, limit: int = MAX_HEADER_BYTES) -> str:
        length = self.number(U64, f"the length of {what}")
        if length > limit:
            self.fail(f"{what} has {length} bytes; {limit} is the most", offset=self.pos)
        start = self.pos
        raw = self.take(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            place = start + error.start
            self.fail(
                f"{what} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {place}",
                offset=place,
            )

    def count(self, what: str, item_bytes: int) -> int:
        """Read a count and refuse one that the rest of the header cannot hold."""
        count: int = self.number(U64, f"the number of {what}")
        left = self._end - self.pos
        if count * item_bytes > left:
            self.fail(
                f"it declares {count} {what}, at least {count * item_bytes} bytes, but {left} "
                f"are left at offset {self.pos}",
                offset=self.pos,
                count=count,
            )
        return count

    def skip(self, n_bytes: int, what: str) -> None:
        self._check(n_bytes, what)
        self.pos += n_bytes

    def skip_strings(self, count: int, what: str) -> None:
        """Step over `count` counted strings; only their lengths are read."""
        unpack, match, left = U64.unpack_from, _short_strings().match, count
        while left:
            at = self._reach(8, f"string {count - left} of {what}")
            window, last = self._window, len(self._window) - 8
            # The one hot loop: a vocabulary has some 150000 strings, and as many merges.
            while left >= _GROUP and (group := match(window, at)) is not None:
                at = group.end()
                left -= _GROUP
            length = 0
            for _ in range(min(left, _GROUP)):
                if at > last:
                    break
                length = unpack(window, at)[0]
                at += length + 8
                left -= 1
            self.pos = self._window_start + at - length
            self.skip(length, f"string {count - left - 1} of {what}")

    def _check(self, n_bytes: int, what: str) -> None:
        if n_bytes <= self._end - self.pos:
            return
        place = f"{what} needs {n_bytes} bytes at offset {self.pos}"
        if self._end < self.size:
            self.fail(f"{place}, but no header may exceed {self._end} bytes", offset=self.pos)
        self.fail(f"{place}, but the file ends at {self.size}", offset=self.pos)

    def _reach(self, n_bytes: int, what: str) -> int:
        """Bring the next `n_bytes` into the window; return their start in it."""
        at = self.pos - self._window_start
        if n_bytes == 0 or at + n_bytes <= len(self._window):
            return at
        self._check(n_bytes, what)
        kept = self._window[at:]
        start = self.pos + len(kept)
        wanted = min(max(n_bytes - len(kept), self._read_bytes), self._end - start)
        fresh = self._read_at(start, wanted)
        if len(fresh) != wanted:
            self.fail(
                f"reading {wanted} bytes at offset {start} gave {len(fresh)}, though the file "
                f"should have {self.size}",
                offset=start,
            )
        self._window, self._window_start = kept + fresh, self.pos
        self._read_bytes = min(2 * self._read_bytes, _LARGEST_READ_BYTES)
        return 0
