"""Any text like a streamed answer: cut into pieces, each after a pause, with callbacks.

For a text that did not come from an engine, or that has come whole: `stream_text`. It needs neither
an engine nor a model, and starts no thread: who iterates, or calls `run()`, does the work.
"""

import inspect
import re
import time
from collections import deque
from collections.abc import (
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
from orion_oie.threads import Event

Text = str | Iterable[str] | AsyncIterable[str]

# As the tokenizers of many models cut before they look at their vocabulary.
_TOKEN = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")
_END = object()


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
        self._cancelled = Event()
        self._sleep = sleep or self._cancelled.wait
        self._sleep_async = sleep_async
        self._source: Iterator[object] | AsyncIterator[object] | None = None
        self._is_async = False
        self._held = ""
        self._ready: deque[str] = deque()
        self._given: list[str] = []
        self._started_at = self._last_at = 0.0
        self._is_at_end = self._is_over = False

    @property
    def text(self) -> str:
        """The text given out so far."""
        return "".join(self._given)

    @property
    def stats(self) -> TextStats:
        """The numbers so far."""
        span_s, count = self._last_at - self._started_at, len(self._given)
        return TextStats(count, span_s * 1e3, count / span_s if span_s > 0 else None)

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
        return self.text

    def __await__(self) -> Generator[Any, None, str]:
        return self._run_async().__await__()

    async def _run_async(self) -> str:
        async for _ in self:
            pass
        return self.text

    def __iter__(self) -> Iterator[TokenEvent]:
        return self

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    def __repr__(self) -> str:
        return f"<TextStreamer after {len(self._given)} pieces>"

    # -- a step, with the pause of a thread or with that of a coroutine

    def __next__(self) -> TokenEvent:
        source = self._begun(is_async=False)
        try:
            while self._needs_part:
                self._add(next(source, _END))
            if self._needs_pause:
                self._sleep(self._delay_s)
            event = self._give()
        except BaseException:
            self._is_over = True
            raise
        if event is None:
            raise StopIteration
        return event

    async def __anext__(self) -> TokenEvent:
        source = self._begun(is_async=True)
        try:
            while self._needs_part:
                is_plain = isinstance(source, Iterator)
                self._add(next(source, _END) if is_plain else await anext(source, _END))
            if self._needs_pause:
                await self._pause()
            event = self._give()
        except BaseException:  # a cancelled task too
            self._is_over = True
            raise
        if event is None:
            raise StopAsyncIteration
        return event

    def _begun(self, *, is_async: bool) -> Any:
        """The parts, from the first step on."""
        if self._source is None:
            if is_async and isinstance(self._parts, AsyncIterable):
                self._source = aiter(self._parts)
            elif isinstance(self._parts, Iterable):
                self._source = iter(self._parts)
            else:
                raise InvalidRequestError(
                    "text: an asynchronous iterable needs `async for` or `await`"
                )
            self._is_async = is_async
            self._started_at = self._last_at = self._clock()
        elif is_async is not self._is_async:
            other = "`async for`" if self._is_async else "`for`"
            raise InvalidRequestError(f"the text is streamed once, and {other} began it")
        return self._source

    @property
    def _needs_part(self) -> bool:
        is_done = self._is_at_end or self._is_over or self.is_cancelled
        return not self._ready and not is_done

    @property
    def _needs_pause(self) -> bool:
        is_next = bool(self._ready and self._given)
        return is_next and self._delay_s > 0 and not self.is_cancelled

    async def _pause(self) -> None:
        from asyncio import sleep  # only asynchronous callers need it, and it is slow to import

        await (self._sleep_async or sleep)(self._delay_s)

    def _add(self, part: object) -> None:
        """Take the next part; after the last one, what the splitter holds back."""
        if part is _END:
            self._is_at_end = True
            pieces, self._held = [self._held], ""
        elif isinstance(part, str):
            pieces, self._held = cut(self._splitter, self._held + part)
        else:
            raise InvalidRequestError(f"text: each part must be a str, got {type(part).__name__}")
        self._ready.extend(piece for piece in pieces if piece)

    def _give(self) -> TokenEvent | None:
        """The next piece; None when there is none."""
        if self._is_over or self.is_cancelled:
            return None
        if not self._ready:
            self._is_over = True
            self._call(self._on_complete, "on_complete", self.stats)
            return None
        self._last_at = self._clock()
        elapsed_ms = (self._last_at - self._started_at) * 1e3
        event = TokenEvent(self._ready.popleft(), len(self._given), elapsed_ms)
        self._given.append(event.text)
        self._call(self._on_token, "on_token", event)
        return event

    def _call(self, callback: Callable[[str, Any], Any] | None, name: str, value: object) -> None:
        if callback is None:
            return
        try:
            callback(self.text, value)
        except Exception as error:
            raise InvalidRequestError(f"{name} raised {described(error)}") from error


def _checked_callback(callback: Any, name: str) -> Any:
    if callback is not None and (not callable(callback) or inspect.iscoroutinefunction(callback)):
        raise InvalidRequestError(f"{name}: allowed is a plain function or None, got {callback!r}")
    return callback
