"""The caller's view of a request: wait for it, iterate over its text, await it, cancel it.

It reads the request's state and may cancel it; the pipeline does the rest. Synchronous and
asynchronous use are views of the same handle.
"""

import contextlib
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any

from orion_oie.engine.abandoned import streams
from orion_oie.engine.lifecycle import RequestState
from orion_oie.engine.request import Request
from orion_oie.errors import InvalidRequestError, OrionError, RequestCancelledError, described
from orion_oie.schemas.results import InferenceResult, ModelInfo, Receipt, StreamStats, TokenEvent
from orion_oie.threads import is_main, is_nested, unbroken, wait_for_all

_LEAVING_S = 10.0  # longer than a worker has to confirm a cancellation, if nobody changed that


class RequestHandle:
    """A running request: wait for it, iterate over its text, await it, cancel it.

    As a context manager it cancels on exit what has not ended by then, and waits for that end, ten
    seconds at most.

    A request that `stream` began ends when nobody reads it any more: when a loop over it is left
    early, by `break`, an exception or `close()` of its iterator, and when nobody has its handle.
    Others may still read it: another loop, `on_event`, whoever waits for its result; and a `with`
    block over the handle lasts to its own end. Then it goes on. To leave a loop and have the result
    later, ask with `submit`.
    """

    _owner_pid: int | None = None  # for the destructor of one that was not made to the end

    def __init__(self, request: Request, *, is_owner: bool = False) -> None:
        self._request = request
        self._owner_pid = os.getpid() if is_owner else None
        self._block = object()  # a `with` block, among the readers
        if is_owner:
            streams.expect(self)

    @property
    def id(self) -> str:
        """The name of the request in events and receipts."""
        return self._request.id

    @property
    def state(self) -> RequestState:
        return self._request.lifecycle.state

    @property
    def progress(self) -> float:
        """The progress in percent."""
        return self._request.lifecycle.progress

    @property
    def queue_position(self) -> int | None:
        """The place among the requests that wait, 1 for the next; None when it does not wait. An
        estimate: later arrivals and the durations of others are unknown."""
        return self._request.queue_position

    @property
    def text(self) -> str:
        """The text received so far."""
        return self._request.stream.text

    @property
    def stats(self) -> StreamStats:
        """Tokens, time to first token and speed so far."""
        return self._request.stream.stats()

    @property
    def receipt(self) -> Receipt | None:
        """The receipt of the request once it has ended, with success or not; None before."""
        return self._request.receipt

    @property
    def complete_loading(self) -> Future[ModelInfo]:
        """Done when the request has ended and nothing goes on in the background on its account:
        when the model that arrived under it waits for nothing more, or the one that a lite model
        stood in for is in memory. Gives that model, or the error that kept it away."""
        return self._request.complete_loading()

    def done(self) -> bool:
        """True once there is a result or an error."""
        return self._request.future.done()

    def result(self, timeout: float | None = None) -> InferenceResult:
        """Wait for the answer, and until `on_event` has got all of it; raises the request's error,
        or `TimeoutError` after `timeout` seconds, which leaves the request running."""
        if self._is_plain:
            return self._request.future.result(timeout)
        with self._reading():
            if not wait_for_all(self._ends(), timeout):
                raise TimeoutError
            return self._result()

    def cancel(self) -> bool:
        """End the request wherever it is; False when it had ended before.

        In the handler of a signal it begins that, and returns."""
        if self.done():
            return False
        if not is_main():
            return _cancel(self._request, "was cancelled")
        cancelling = unbroken(lambda: _cancel(self._request, "was cancelled"), "orion-cancel")
        return is_nested() or cancelling.result()

    def view(self) -> "RequestHandle":
        """A handle of the same request that does not keep it going when nobody has this one."""
        return RequestHandle(self._request)

    def add_done_callback(self, callback: Callable[["RequestHandle"], Any]) -> None:
        """Call `callback(handle)` when the request has ended, on a thread that nothing else needs:
        it may ask the engine, and wait. Callbacks begin in their order, none waits for another, and
        256 run at the same time at most. What one raises is published as `callback.failed`."""
        request = self._request
        request.future.add_done_callback(
            lambda _future: request.calls.call(callback, self, request_id=request.id)
        )

    def at_end(self, act: Callable[[], None]) -> None:
        """Call `act` when the request has ended, on the thread that ends it, which has other things
        to do: for code of the library that returns at once and raises nothing."""
        self._request.future.add_done_callback(lambda _future: act())

    def feed(self, on_event: Callable[[TokenEvent], Any]) -> None:
        """Call `on_event` with every event, on a thread of its own; if it raises, the request
        ends with `InvalidRequestError`. Raises `WorkerError` when the system gives no thread."""
        request = self._request
        feed = request.calls.feed(lambda: self._feed(on_event))
        request.feeds = (*request.feeds, feed)
        request.readers.add(feed)
        feed.ended.add_done_callback(lambda _ended: request.readers.discard(feed))

    def _feed(self, on_event: Callable[[TokenEvent], Any]) -> None:
        request = self._request
        events = iter(self)
        while True:
            try:
                event = next(events, None)
            except BaseException:  # noqa: BLE001 (the request's own error: result() raises it)
                return
            if event is None:
                return
            try:
                on_event(event)
            except BaseException as error:  # noqa: BLE001 (code of the application)
                failure = InvalidRequestError(f"on_event raised {described(error)}")
                failure.__cause__ = error
                request.scope.cancel(failure)
                request.calls.note_failure("on_event", on_event, error, request_id=request.id)
                return

    # -- who reads. The frames of iterators have the handle: see __del__.

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Count as a reader of the request while the block runs."""
        reader = object()
        self._request.readers.add(reader)
        try:
            yield
        finally:
            self._request.readers.discard(reader)

    def _leave(self, error: BaseException) -> None:
        """End the request if its last reader leaves it before the end of the text."""
        if isinstance(error, OrionError):
            self.give_up(error)
        elif self._request.readers or self._owner_pid is None:
            return
        elif isinstance(error, GeneratorExit):
            self.abandon()
        else:
            self.cancel()

    def give_up(self, error: BaseException) -> None:
        """End the request for what a reader of its text has met: a splitter that fails, or an
        interruption. Nothing happens if it has ended."""
        if self.done():
            return
        if isinstance(error, OrionError):
            self._request.scope.cancel(error)
        else:
            self.cancel()

    def __iter__(self) -> Iterator[TokenEvent]:
        try:
            with self._reading():
                yield from self._request.stream
        except BaseException as error:
            self._leave(error)
            raise

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        try:
            with self._reading():
                async with contextlib.aclosing(self.events()) as events:
                    async for event in events:
                        yield event
        except BaseException as error:
            self._leave(error)
            raise

    def events(self) -> AsyncGenerator[TokenEvent, None]:
        """The events for a reader that ends the request itself when it leaves: `AnswerStream`."""
        return self._request.stream.__aiter__()

    @property
    def answer(self) -> InferenceResult | None:
        """The answer if it is there; None before, and if there is none. Waits for nothing."""
        future = self._request.future
        return future.result() if future.done() and future.exception() is None else None

    # -- the end

    @property
    def _is_plain(self) -> bool:
        """True for a request that nobody reads piece by piece, the most frequent case."""
        return self._owner_pid is None and not self._request.feeds

    def _ends(self) -> list[Future[Any]]:
        """The ends of the request and of its feeds, but of one on this thread."""
        feeds = [feed.ended for feed in self._request.feeds if not feed.is_own]
        return [self._request.future, *feeds]

    def _result(self) -> InferenceResult:
        """The result of a request that has ended. Raises its error, or that of a splitter."""
        result = self._request.future.result()
        self._request.stream.check_cut()
        return result

    def __await__(self) -> Generator[Any, None, InferenceResult]:
        return self._wait().__await__()

    async def _wait(self) -> InferenceResult:
        # With asyncio, a tenth of the library's import time; only asynchronous callers need it.
        from asyncio import CancelledError

        from orion_oie.engine.loop import until_done

        try:
            if self._is_plain:
                await until_done(self._request.future)
                return self._request.future.result()
            with self._reading():
                for end in self._ends():
                    await until_done(end)
                return self._result()
        except CancelledError:
            self.cancel()
            raise

    def __enter__(self) -> "RequestHandle":
        self._request.readers.add(self._block)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._request.readers.discard(self._block)
        self.cancel()
        wait_for_all(self._ends(), _LEAVING_S)

    async def __aenter__(self) -> "RequestHandle":
        return self.__enter__()

    async def __aexit__(self, *_: object) -> None:
        self._request.readers.discard(self._block)
        self.cancel()
        ends = self._ends()
        if all(end.done() for end in ends):
            return
        from asyncio import timeout

        from orion_oie.engine.loop import until_done

        with contextlib.suppress(TimeoutError):
            async with timeout(_LEAVING_S):
                for end in ends:
                    await until_done(end)

    def __del__(self) -> None:
        if self._owner_pid is not None and not self._request.readers:
            self.abandon()

    def abandon(self) -> None:
        """Cancel a request that `stream` began, soon and without waiting: for destructors, which
        run anywhere, also under a lock of the engine."""
        is_ending = self.state.is_final or self._request.scope.error is not None
        if self._owner_pid is None or is_ending or sys.is_finalizing():
            return
        if self._owner_pid == os.getpid():  # a fork has copies of the handles of its parent
            streams.note(partial(_cancel, self._request, "was cancelled: nobody reads it any more"))

    def __repr__(self) -> str:
        return f"<RequestHandle {self.id} {self.state.value} {self.progress:.0f}%>"


def _cancel(request: Request, what: str) -> bool:
    return request.scope.cancel(
        RequestCancelledError(f"request {request.id} {what}", request_id=request.id)
    )
