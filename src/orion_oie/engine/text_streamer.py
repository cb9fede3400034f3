"""Any text like a streamed answer: cut into pieces, each after a pause, with callbacks.

For a text that did not come from an engine, or that has come whole: `stream_text`. It needs neither
an engine nor a model, and starts no thread: who iterates, or calls `run()`, does the work.
"""

import inspect
import re
import threading
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
)
from dataclasses import dataclass
from typing import Any

from orion_oie.engine.streaming import ChunkBy, Splitter, checked_delay, cut, splitter_of
from orion_oie.errors import InvalidRequestError, described
from orion_oie.schemas.results import TokenEvent

Text = str | Iterable[str] | AsyncIterable[str]

# As the tokenizers of many models cut before they look at their vocabulary.
_TOKEN = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")


@dataclass(frozen=True, slots=True)
class TextStats:
    """The pace of a streamed text: `tokens` counts the pieces given out, `total_ms` runs from the
    first step to the last piece, pauses included."""

    tokens: int
    total_ms: float
    tokens_per_second: float | None


OnToken = Callable[[str, TokenEvent], Any]
OnComplete = Callable[[str, TextStats], Any]


def stream_text(
    text: Text,
    chunk_by: ChunkBy = "word",
    typewriter_delay: float = 0.03,
    on_token: OnToken | None = None,
    on_complete: OnComplete | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Any] | None = None,
    sleep_async: Callable[[float], Awaitable[Any]] | None = None,
) -> "TextStreamer":
    """Give out a text piece by piece: iterate over the result with `for` or `async for`, or call
    `run()`, or await it.

    text: a str, or an iterable or asynchronous iterable of parts.
    chunk_by: "token" for the parts as they come (of a str: words and punctuation marks), "word",
        "sentence" or a `orion_oie.engine.streaming.Splitter`.
    typewriter_delay: pause in seconds between two pieces.
    on_token: called with the whole text so far and the `TokenEvent` of each piece.
    on_complete: called once, with the text and its `TextStats`, unless the stream is cancelled.
    clock, sleep, sleep_async: the time in seconds, and pauses.

    Raises `InvalidRequestError` for a text, a chunk_by or a delay that cannot be used; the steps
    raise it for a part that is no str, and for a callback that raises.
    """
    if isinstance(text, (bytes, bytearray)) or not isinstance(text, (Iterable, AsyncIterable)):
        raise InvalidRequestError(
            "text: allowed is a str, an iterable of str or an asynchronous one, got "
            f"{type(text).__name__}"
        )
    if isinstance(text, str):
        text = _TOKEN.findall(text) if chunk_by == "token" else [text]
    return TextStreamer(
        text,
        splitter_of(chunk_by),
        checked_delay(typewriter_delay),
        _checked_callback(on_token, "on_token"),
        _checked_callback(on_complete, "on_complete"),
        clock,
        sleep,
        sleep_async,
    )


class TextStreamer:
    """One pass over a text; `stream_text` makes it. A loop that was left may be continued.

    `cancel()` may be called by any thread; everything else belongs to one.
    """

    def __init__(
        self,
        parts: Iterable[str] | AsyncIterable[str],
        splitter: Splitter,
        delay_s: float,
        on_token: OnToken | None,
        on_complete: OnComplete | None,
        clock: Callable[[], float],
        sleep: Callable[[float], Any] | None,
        sleep_async: Callable[[float], Awaitable[Any]] | None,
    ) -> None:
        self._parts = parts
        self._splitter = splitter
        self._delay_s = delay_s
        self._on_token = on_token
        self._on_complete = on_complete
        self._clock = clock
        self._cancelled = threading.Event()
        self._sleep = sleep or self._cancelled.wait
        self._sleep_async = sleep_async
        self._events: (
            Generator[TokenEvent, None, None] | AsyncGenerator[TokenEvent, None] | None
        ) = None
        self._text = ""
        self._held = ""
        self._count = 0
        self._started_at = self._last_at = 0.0
        self._is_over = False

    @property
    def text(self) -> str:
        """The text given out so far."""
        return self._text

    @property
    def stats(self) -> TextStats:
        """The numbers so far."""
        span_s = self._last_at - self._started_at
        return TextStats(self._count, span_s * 1e3, self._count / span_s if span_s > 0 else None)

    @property
    def is_cancelled(self) -> bool:
        """True if `cancel` ended the stream."""
        return self._cancelled.is_set()

    def cancel(self) -> bool:
        """Give out nothing more: the loop ends, without an error and without `on_complete`. False
        if the stream was over or cancelled before."""
        if self._is_over or self.is_cancelled:
            return False
        self._cancelled.set()
        return True

    def run(self) -> str:
        """Take all pieces, for the callbacks; returns the text."""
        for _ in self:
            pass
        return self._text

    def __await__(self) -> Generator[Any, None, str]:
        return self._run_async().__await__()

    async def _run_async(self) -> str:
        async for _ in self:
            pass
        return self._text

    def __iter__(self) -> Iterator[TokenEvent]:
        if self._events is None:
            self._events = self._steps()
        if not isinstance(self._events, Generator):
            raise InvalidRequestError("the text is streamed once, and `async for` began it")
        return self._events

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        if self._events is None:
            self._events = self._async_steps()
        if not isinstance(self._events, AsyncGenerator):
            raise InvalidRequestError("the text is streamed once, and `for` began it")
        return self._events

    def __repr__(self) -> str:
        return f"<TextStreamer after {self._count} pieces>"

    # -- the steps, with pauses of a thread and with pauses of a coroutine

    def _steps(self) -> Generator[TokenEvent, None, None]:
        if not isinstance(self._parts, Iterable):
            raise InvalidRequestError("text: an asynchronous iterable needs `async for` or `await`")
        self._started_at = self._last_at = self._clock()
        try:
            for part in _with_end(self._parts):
                for piece in self._cut(part):
                    if self._needs_pause:
                        self._sleep(self._delay_s)
                    if self.is_cancelled:
                        return
                    yield self._give(piece)
            self._complete()
        finally:
            self._is_over = True

    async def _async_steps(self) -> AsyncGenerator[TokenEvent, None]:
        import asyncio  # a tenth of the library's import time; only asynchronous callers need it

        pause = self._sleep_async or asyncio.sleep
        self._started_at = self._last_at = self._clock()
        try:
            async for part in _with_end_async(self._parts):
                for piece in self._cut(part):
                    if self._needs_pause:
                        await pause(self._delay_s)
                    if self.is_cancelled:
                        return
                    yield self._give(piece)
            self._complete()
        finally:
            self._is_over = True

    @property
    def _needs_pause(self) -> bool:
        return self._count > 0 and self._delay_s > 0 and not self.is_cancelled

    def _cut(self, part: str | None) -> list[str]:
        """The pieces that are complete with the next part, or at the end of all."""
        if part is None:
            rest, self._held = self._held, ""
            return [rest] if rest else []
        if not isinstance(part, str):
            raise InvalidRequestError(f"text: each part must be a str, got {type(part).__name__}")
        pieces, self._held = cut(self._splitter, self._held + part)
        return [piece for piece in pieces if piece]

    def _give(self, piece: str) -> TokenEvent:
        self._last_at = self._clock()
        event = TokenEvent(piece, self._count, (self._last_at - self._started_at) * 1e3)
        self._text += piece
        self._count += 1
        if self._on_token is not None:
            try:
                self._on_token(self._text, event)
            except Exception as error:
                raise InvalidRequestError(f"on_token raised {described(error)}") from error
        return event

    def _complete(self) -> None:
        if self.is_cancelled:
            return
        self._is_over = True
        if self._on_complete is not None:
            try:
                self._on_complete(self._text, self.stats)
            except Exception as error:
                raise InvalidRequestError(f"on_complete raised {described(error)}") from error


def _with_end(parts: Iterable[str]) -> Iterator[str | None]:
    yield from parts
    yield None


async def _with_end_async(
    parts: Iterable[str] | AsyncIterable[str],
) -> AsyncGenerator[str | None, None]:
    if isinstance(parts, AsyncIterable):
        async for part in parts:
            yield part
    else:
        for part in parts:
            yield part
    yield None


def _checked_callback(callback: Any, name: str) -> Any:
    if callback is not None and (not callable(callback) or inspect.iscoroutinefunction(callback)):
        raise InvalidRequestError(f"{name}: allowed is a plain function or None, got {callback!r}")
    return callback
