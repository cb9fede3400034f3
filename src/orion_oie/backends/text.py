"""From the bytes of single tokens to text that may be shown: whole characters, no stop string.

Knows nothing of models. Special tokens never reach it.
"""

import codecs
from collections.abc import Sequence


class TextAssembler:
    """Collects token bytes and gives out text as soon as it is certain.

    Held back are bytes of an unfinished UTF-8 character and text that may be the beginning of
    a stop string. Invalid bytes become U+FFFD; an unfinished character at the end is dropped.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.is_stopped = False

    def push(self, piece: bytes) -> str:
        """The text that became certain; empty after a stop string was met."""
        if self.is_stopped:
            return ""
        text = self._held + self._decoder.decode(piece)
        if not self._stop or not text:
            self._held = ""
            return text
        # The stop string that is complete first, so that the cuts between tokens do not matter.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text that was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
