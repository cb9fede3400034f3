"""The text of one answer for its readers: cut into pieces, kept and replayed.

`TextStream` has one writer (the engine) and any number of readers, each of which sees every event
from the start. Splitters decide how text is cut; they never change it. The writer applies its own;
one of the application is called by each reader, on the reader's thread, and delays nobody else.
"""

import contextlib
import math
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from orion_oie.errors import InvalidRequestError, described
from orion_oie.schemas.results import (
    StreamStats,
    TokenEvent,
)
from orion_oie.threads import Condition

if TYPE_CHECKING:
    from concurrent.futures import Future

    from orion_oie.schemas.results import InferenceResult

Splitter = Callable[[str], tuple[list[str], str]]
"""Takes the text that has come and not been given out; returns the complete pieces and the rest,
whose concatenation must be that same text."""

ChunkBy = Literal["token", "word", "sentence"] | Splitter

_WORD = re.compile(r"\s*\S+\s+")
# A run of dots is tried once, from its beginning: the lookbehind keeps the time linear.
_SENTENCE = re.compile(r"""(?s:.*?)(?:(?<![.!?…])[.!?…]++["')\]]*+\s+|[。！？]+["'」』）]*|\n+)""")


def split_tokens(text: str) -> tuple[list[str], str]:
    """Every piece as it comes."""
    return ([text] if text else []), ""


def split_words(text: str) -> tuple[list[str], str]:
    """Words, each with the white space behind it."""
    return _split_by(_WORD, text)


def split_sentences(text: str) -> tuple[list[str], str]:
    """Sentences and lines, each with the white space behind it."""
    return _split_by(_SENTENCE, text)


_SPLITTERS: dict[str, Splitter] = {
    "token": split_tokens,
    "word": split_words,
    "sentence": split_sentences,
}


def splitter_of(chunk_by: ChunkBy) -> Splitter:
    """The splitter of a name, or the caller's own."""
    if callable(chunk_by):
        return chunk_by
    if not isinstance(chunk_by, str) or chunk_by not in _SPLITTERS:
        raise InvalidRequestError(
            f"chunk_by: {chunk_by!r} is not known; allowed: 'token', 'word', 'sentence' or a "
            "function from text to (pieces, rest)"
        )
    return _SPLITTERS[chunk_by]


def cut(splitter: Splitter, text: str) -> tuple[list[str], str]:
    """What a splitter makes of a text. Raises `InvalidRequestError` if it raises, or loses or
    changes text."""
    try:
        pieces, rest = splitter(text)
        pieces = list(pieces)
        is_whole = "".join(pieces) + rest == text
    except Exception as error:
        raise InvalidRequestError(f"chunk_by: the function raised {described(error)}") from error
    if not is_whole:
        raise InvalidRequestError("chunk_by: the function loses or changes text")
    return pieces, rest


class ReaderCut:
    """Cuts the events of a stream anew, for one reader, with a splitter of the application."""

    def __init__(self, splitter: Splitter) -> None:
        self._splitter = splitter
        self._held = ""
        self._count = 0
        self._elapsed_ms = 0.0

    def cut(self, event: TokenEvent) -> list[TokenEvent]:
        """The pieces that an event completes; raises like `cut`."""
        self._elapsed_ms = event.elapsed_ms
        if event.kind == "restart":
            self._held = ""
            return self._numbered([""], "restart")
        pieces, self._held = cut(self._splitter, self._held + event.text)
        return self._numbered(pieces)

    def cut_all(self, events: Sequence[TokenEvent]) -> list[TokenEvent]:
        """The pieces that these events complete."""
        return [piece for event in events for piece in self.cut(event)]

    def rest(self) -> list[TokenEvent]:
        """What the splitter still holds back."""
        held, self._held = self._held, ""
        return self._numbered([held] if held else [])

    def _numbered(
        self, pieces: list[str], kind: Literal["text", "restart"] = "text"
    ) -> list[TokenEvent]:
        first = self._count
        self._count += len(pieces)
        return [
            TokenEvent(piece, first + offset, self._elapsed_ms, kind)
            for offset, piece in enumerate(pieces)
        ]


def checked_delay(seconds: float) -> float:
    """The pause of a typewriter. Raises `InvalidRequestError` unless it is a number from 0 on."""
    if isinstance(seconds, bool) or not (
        isinstance(seconds, (int, float)) and 0 <= seconds < math.inf
    ):
        raise InvalidRequestError(
            f"typewriter_delay: allowed is a number of seconds >= 0, got {seconds!r}"
        )
    return seconds


def _split_by(pattern: re.Pattern[str], text: str) -> tuple[list[str], str]:
    pieces = []
    end = 0
    while match := pattern.match(text, end):
        pieces.append(match[0])
        end = match.end()
    return pieces, text[end:]


class TextStream:
    """The events of one answer, in order. `clock` gives seconds."""

    def __init__(
        self,
        splitter: Splitter = split_tokens,
        *,
        typewriter_delay_s: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        is_own = any(splitter is one for one in _SPLITTERS.values())
        self._splitter = splitter if is_own else split_tokens
        self._readers_splitter = None if is_own else splitter
        self._delay_s = checked_delay(typewriter_delay_s)
        self._clock = clock
        self._started_at = clock()
        self._lock = Condition()
        self._wakers: set[Callable[[], None]] | None = None
        self._events: list[TokenEvent] = []
        self._held = ""
        self._tokens = 0
        self._first_at: float | None = None
        self._last_at: float | None = None
        self._error: BaseException | None = None
        self._is_closed = False
        self._is_observed = False

    # -- the writer

    def push(self, text: str, tokens: int) -> None:
        """Add text that consists of `tokens` tokens."""
        now = self._clock()
        self._tokens += tokens
        if not text:
            return
        if self._first_at is None:
            self._first_at = now
        self._last_at = now
        self._held += text
        pieces, self._held = self._splitter(self._held)
        self._append(pieces, now)

    def restart(self) -> None:
        """Void the text so far: the answer starts over."""
        with self._lock:
            self._held = ""
            self._tokens = 0
            self._first_at = self._last_at = None
            if not self._is_observed:
                self._events.clear()
                return
            elapsed_ms = (self._clock() - self._started_at) * 1e3
            self._events.append(TokenEvent("", len(self._events), elapsed_ms, "restart"))
        self._wake()

    def flush(self) -> None:
        """Publish the text that the splitter still holds back."""
        held, self._held = self._held, ""
        if held:
            self._append([held], self._clock())

    def close(self, error: BaseException | None = None) -> None:
        """End the stream: readers get what is left, then stop, or raise `error`."""
        self.flush()
        with self._lock:
            self._error = error
            self._is_closed = True
        self._wake()

    def _append(self, pieces: list[str], now: float) -> None:
        if not pieces:
            return
        elapsed_ms = (now - self._started_at) * 1e3
        with self._lock:
            for piece in pieces:
                self._events.append(TokenEvent(piece, len(self._events), elapsed_ms))
        self._wake()

    def close_after(self, future: "Future[InferenceResult]") -> None:
        """End the stream as a request has ended."""
        self.close(future.exception())

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify_all()
            wakers = list(self._wakers) if self._wakers else ()
        for waker in wakers:
            waker()

    # -- the readers

    @property
    def started_at(self) -> float:
        """The time at which the stream was made, by its clock; its events count from there."""
        return self._started_at

    @property
    def has_text(self) -> bool:
        """True once there is text of the current attempt."""
        return self._first_at is not None

    @property
    def is_observed(self) -> bool:
        """True once somebody has read the text: it cannot be taken back silently."""
        return self._is_observed

    @property
    def tokens(self) -> int:
        """The number of tokens of this attempt."""
        return self._tokens

    @property
    def first_text_ms(self) -> float | None:
        """Milliseconds from the start of the stream to the first text of this attempt."""
        first_at = self._first_at  # a restart on another thread may take it away
        return None if first_at is None else (first_at - self._started_at) * 1e3

    @property
    def text(self) -> str:
        """The text published so far, without text that a restart voided."""
        with self._lock:
            self._is_observed = True
            return self._joined()

    def joined(self) -> str:
        """Like `text`, for the engine: does not make the stream observed."""
        with self._lock:
            return self._joined()

    def _joined(self) -> str:
        pieces: list[str] = []
        for event in reversed(self._events):
            if event.kind == "restart":
                break
            pieces.append(event.text)
        return "".join(reversed(pieces))

    def stats(self) -> StreamStats:
        """Tokens so far, time to the first text, and tokens per second since then."""
        tokens, first_at, last_at = self._tokens, self._first_at, self._last_at
        speed = None
        if first_at is not None and last_at is not None and tokens > 1:
            span = last_at - first_at
            speed = (tokens - 1) / span if span > 0 else None
        return StreamStats(tokens, self.first_text_ms, speed)

    def check_cut(self) -> None:
        """Raise `InvalidRequestError` if a splitter of the application fails on the text so far."""
        own_cut = self._reader_cut()
        if own_cut is not None:
            with self._lock:
                events = list(self._events)
            own_cut.cut_all(events)

    def _reader_cut(self) -> "ReaderCut | None":
        return None if self._readers_splitter is None else ReaderCut(self._readers_splitter)

    def __iter__(self) -> Iterator[TokenEvent]:
        """Raises what the stream was closed with, `InvalidRequestError` for a splitter of the
        application that fails."""
        index = 0
        own_cut = self._reader_cut()
        while True:
            with self._lock:
                self._is_observed = True
                while index >= len(self._events) and not self._is_closed:
                    self._lock.wait()
                ready = self._events[index:]
                error = self._error
            is_over = not ready
            index += len(ready)
            if own_cut is not None:
                ready = own_cut.rest() if is_over else own_cut.cut_all(ready)
            for event in ready:
                yield event
                if self._delay_s:
                    time.sleep(self._delay_s)
            if is_over:
                if error is not None:
                    raise error
                return

    async def __aiter__(self) -> AsyncGenerator[TokenEvent, None]:
        import asyncio  # a tenth of the library's import time; only asynchronous callers need it

        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def waker() -> None:
            # The loop may be closed while the answer still comes: nobody listens then.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

        with self._lock:
            self._is_observed = True
            self._wakers = self._wakers or set()
            self._wakers.add(waker)
        try:
            index = 0
            own_cut = self._reader_cut()
            while True:
                with self._lock:
                    changed.clear()
                    ready = self._events[index:]
                    is_closed, error = self._is_closed, self._error
                is_over = is_closed and not ready
                is_waiting = not ready and not is_closed
                index += len(ready)
                if own_cut is not None:
                    ready = own_cut.rest() if is_over else own_cut.cut_all(ready)
                for event in ready:
                    yield event
                    if self._delay_s:
                        await asyncio.sleep(self._delay_s)
                if is_over:
                    if error is not None:
                        raise error
                    return
                if is_waiting:
                    await changed.wait()
        finally:
            with self._lock:
                if self._wakers is not None:
                    self._wakers.discard(waker)
