"""A streamed answer for asynchronous callers: its events, then its result.

`OrionInferenceEngine.astream` and `Chat.astream` return one. Other than a `RequestHandle`, it has
one reader, and its request ends with it.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType

from orion_oie.engine.handle import RequestHandle
from orion_oie.errors import InvalidRequestError
from orion_oie.schemas.results import InferenceResult, TokenEvent

Start = Callable[[], Awaitable[RequestHandle]]


class AnswerStream(AsyncIterator[TokenEvent]):
    """The events of an answer: `async for event in stream`, and `await stream.result()` after it.

    The request ends when the stream is closed, when the loop over it is left, when nobody has it
    any more, and when a task is cancelled that waits for it. In a block `async with stream:` a loop
    may be left and another one goes on; the end of the block closes the stream.
    """

    def __init__(self, handle: RequestHandle | Start) -> None:
        """Of a request under way, or of one that `handle()` begins with the first step."""
        self._begin = None if isinstance(handle, RequestHandle) else handle
        self._handle = handle if isinstance(handle, RequestHandle) else None
        self._beginning = asyncio.Lock()
        self._events: AsyncIterator[TokenEvent] | None = None
        self._is_closed = self._is_in_block = False

    @property
    def handle(self) -> RequestHandle:
        """The handle of the request. Raises `InvalidRequestError` for one that has not begun: a
        turn of a chat that waits for the one before."""
        if self._handle is None:
            raise InvalidRequestError("the request has not begun; await stream.started() first")
        return self._handle

    async def started(self) -> RequestHandle:
        """Wait until the request is under way; returns its handle. Raises what is wrong with the
        request."""
        async with self._beginning:
            if self._handle is None and self._begin is not None:
                if self._is_closed:
                    raise InvalidRequestError("the stream was closed before its request began")
                self._handle = await self._begin()
                if self._is_closed:  # meanwhile
                    self._handle.cancel()
        return self.handle

    async def result(self) -> InferenceResult:
        """Wait for the complete answer; raises the request's error. May be called at any time."""
        return await (await self.started())

    async def aclose(self) -> None:
        """End the request if it has not ended, and wait for that, ten seconds at most."""
        self._is_closed = True
        if self._handle is not None:
            async with self._handle:
                pass

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return _Loop(self)

    async def __anext__(self) -> TokenEvent:
        if self._is_closed:
            raise StopAsyncIteration
        if self._events is None:
            self._events = (await self.started()).events()
        try:
            return await anext(self._events)
        except StopAsyncIteration:
            raise
        except BaseException as error:  # a cancelled task too
            if self._handle is not None:
                self._handle.give_up(error)
            raise

    def leave(self) -> None:
        """A loop was left: the request ends soon, unless a block has the stream."""
        if self._events is not None and self._handle is not None and not self._is_in_block:
            self._handle.abandon()  # `on_event` may have the handle too

    async def __aenter__(self) -> "AnswerStream":
        self._is_in_block = True
        return self

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._is_in_block = False
        await self.aclose()

    def __del__(self) -> None:
        self._is_in_block = False
        self.leave()

    def __repr__(self) -> str:
        return f"<AnswerStream of {self._handle or 'a request that has not begun'}>"


class _Loop(AsyncIterator[TokenEvent]):
    """One loop over a stream. Python tells nobody that a loop was left, but drops this then."""

    def __init__(self, stream: AnswerStream) -> None:
        self._stream = stream

    async def __anext__(self) -> TokenEvent:
        return await anext(self._stream)

    def __del__(self) -> None:
        self._stream.leave()
