"""The caller's view of a request: wait for it, iterate over its text, await it, cancel it.

It reads the request's state and may cancel it; the pipeline does the rest. Synchronous and
asynchronous use are views of the same handle.
"""

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from orion_oie.engine.lifecycle import RequestState
from orion_oie.engine.request import Request
from orion_oie.errors import InvalidRequestError, RequestCancelledError, WorkerError, described
from orion_oie.schemas.results import InferenceResult, ModelInfo, Receipt, StreamStats, TokenEvent
from orion_oie.threads import is_main, is_nested, start_thread, unbroken

_LEAVING_S = 10.0  # longer than a worker has to confirm a cancellation, if nobody changed that


class RequestHandle:
    """A running request: wait for it, iterate over its text, await it, cancel it.

    As a context manager it cancels on exit what has not ended by then, and waits for that end, ten
    seconds at most.

    A request that `stream` began ends when nobody has its handle, or an iterator of it, any more.
    Whoever waits for its result, and callbacks, have the handle.
    """

    _owner_pid: int | None = None  # for the destructor of one that was not made to the end

    def __init__(self, request: Request, *, is_owner: bool = False) -> None:
        self._request = request
        self._owner_pid = os.getpid() if is_owner else None

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
        """Wait for the answer; raises the request's error, or `TimeoutError` after `timeout`
        seconds, which leaves the request running."""
        return self._request.future.result(timeout)

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
        """Call `callback(handle)` when the request has ended, on the thread that ends it."""
        self._request.future.add_done_callback(lambda _future: callback(self))

    def feed(self, on_event: Callable[[TokenEvent], Any]) -> None:
        """Call `on_event` with every event, on a thread of its own; if it raises, the request
        ends with `InvalidRequestError`. Raises `WorkerError` when the system gives no thread."""
        start_thread(lambda: self._feed(on_event), "orion-events")

    def _feed(self, on_event: Callable[[TokenEvent], Any]) -> None:
        events = iter(self._request.stream)
        while True:
            try:
                event = next(events)
            except StopIteration:
                return
            except Exception:  # noqa: BLE001 (the request's own error: result() raises it)
                return
            try:
                on_event(event)
            except Exception as error:  # noqa: BLE001 (the caller's code may raise anything)
                failure = InvalidRequestError(f"on_event raised {described(error)}")
                failure.__cause__ = error
                self._request.scope.cancel(failure)
                return

    # The frames of both iterators have the handle: see __del__.

    def __iter__(self) -> Iterator[TokenEvent]:
        yield from self._request.stream

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        async with contextlib.aclosing(self._request.stream.__aiter__()) as events:
            async for event in events:
                yield event

    def __await__(self) -> Generator[Any, None, InferenceResult]:
        return self._wait().__await__()

    async def _wait(self) -> InferenceResult:
        # With asyncio, a tenth of the library's import time; only asynchronous callers need it.
        from asyncio import CancelledError

        from orion_oie.engine.loop import wait_for

        try:
            return await wait_for(self._request.future)
        except CancelledError:
            self.cancel()
            raise

    def __enter__(self) -> "RequestHandle":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.cancel()
        with contextlib.suppress(TimeoutError):
            self._request.future.exception(_LEAVING_S)

    async def __aenter__(self) -> "RequestHandle":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()
        if self.done():
            return
        from asyncio import timeout

        from orion_oie.engine.loop import until_done

        with contextlib.suppress(TimeoutError):
            async with timeout(_LEAVING_S):
                await until_done(self._request.future)

    def __del__(self) -> None:
        self.abandon()

    def abandon(self) -> None:
        """Cancel a request that `stream` began, soon and without waiting: for destructors, which
        run anywhere, also under a lock of the engine."""
        if self._owner_pid is None or sys.is_finalizing():
            return
        if self.state.is_final or self._request.scope.error is not None:
            return
        if self._owner_pid != os.getpid():
            return  # a fork has copies of the handles, and the requests belong to its parent
        request = self._request
        with contextlib.suppress(WorkerError):  # no thread, no cancel: it ends by itself then
            start_thread(
                lambda: _cancel(request, "was cancelled: nobody reads it any more"),
                "orion-abandoned",
            )

    def __repr__(self) -> str:
        return f"<RequestHandle {self.id} {self.state.value} {self.progress:.0f}%>"


def _cancel(request: Request, what: str) -> bool:
    return request.scope.cancel(
        RequestCancelledError(f"request {request.id} {what}", request_id=request.id)
    )
