"""One request: the caller's handle, and the working record behind it.

The handle only shows and asks; the engine moves the request. Synchronous and asynchronous use
are views of the same handle.
"""

import os
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from orion_oie.cancellation import CancelScope
from orion_oie.engine.lifecycle import (
    RequestLifecycle,
    RequestState,
)
from orion_oie.engine.streaming import TextStream
from orion_oie.errors import InvalidRequestError, RequestCancelledError
from orion_oie.models.registry import Choice
from orion_oie.schemas.requests import RequestOptions
from orion_oie.schemas.results import (
    Consideration,
    InferenceResult,
    LoadReport,
    ModelInfo,
    Outcome,
    Receipt,
    Route,
    StreamStats,
    TokenEvent,
    VariantReport,
)


class RequestHandle:
    """A running request: wait for it, iterate over its text, await it, cancel it.

    As a context manager it cancels on exit what has not ended by then.
    """

    def __init__(
        self,
        stream: TextStream,
        scope: CancelScope,
        on_state: Callable[["RequestHandle", RequestState, RequestState], None],
    ) -> None:
        self.id = os.urandom(6).hex()
        self._stream = stream
        self._scope = scope
        self._lifecycle = RequestLifecycle(lambda old, new: on_state(self, old, new))
        self._receipt: Receipt | None = None
        self._position: Callable[[], int | None] = lambda: None
        self._complete_loading: Future[ModelInfo] = Future()
        self._complete_loading.set_running_or_notify_cancel()  # nobody may cancel it
        self._future: Future[InferenceResult] = Future()
        self._future.set_running_or_notify_cancel()
        # The first callback: those of the application find the stream ended.
        self._future.add_done_callback(lambda future: stream.close(future.exception()))

    @property
    def state(self) -> RequestState:
        return self._lifecycle.state

    @property
    def progress(self) -> float:
        """0 to 100."""
        return self._lifecycle.progress

    @property
    def queue_position(self) -> int | None:
        """The place among the requests that wait, 1 for the next; None when it does not wait. An
        estimate: nobody knows who will come, or how long others take."""
        return self._position()

    @property
    def text(self) -> str:
        """The text received so far."""
        return self._stream.text

    @property
    def stats(self) -> StreamStats:
        """Tokens, time to first token and speed so far."""
        return self._stream.stats()

    @property
    def receipt(self) -> Receipt | None:
        """The account of the request once it has ended, well or not; None before."""
        return self._receipt

    @property
    def complete_loading(self) -> Future[ModelInfo]:
        """Done when the request has ended and nothing goes on in the background on its account:
        when the model that arrived under it waits for nothing more, or the one that a lite model
        stood in for is in memory. Gives that model, or the error that kept it away."""
        return self._complete_loading

    def done(self) -> bool:
        """True once there is a result or an error."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> InferenceResult:
        """Wait for the answer; raises the request's error, or `TimeoutError` after `timeout`
        seconds, which leaves the request running."""
        return self._future.result(timeout)

    def cancel(self) -> bool:
        """End the request wherever it is; False when it had ended before."""
        return not self.done() and self._scope.cancel(
            RequestCancelledError(f"request {self.id} was cancelled", request_id=self.id)
        )

    def add_done_callback(self, callback: Callable[["RequestHandle"], Any]) -> None:
        """Call `callback(handle)` when the request has ended, on the thread that ends it."""
        self._future.add_done_callback(lambda _future: callback(self))

    def feed(self, on_event: Callable[[TokenEvent], Any]) -> None:
        """Call `on_event` with every event, on a thread of its own; if it raises, the request
        ends with `InvalidRequestError`."""
        threading.Thread(
            target=self._feed, args=(on_event,), name="orion-events", daemon=True
        ).start()

    def _feed(self, on_event: Callable[[TokenEvent], Any]) -> None:
        events = iter(self._stream)
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
                failure = InvalidRequestError(f"on_event raised {type(error).__name__}: {error}")
                failure.__cause__ = error
                self._scope.cancel(failure)
                return

    def __iter__(self) -> Iterator[TokenEvent]:
        return iter(self._stream)

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self._stream.__aiter__()

    def __await__(self) -> Generator[Any, None, InferenceResult]:
        return self._wait().__await__()

    async def _wait(self) -> InferenceResult:
        import asyncio  # a tenth of the library's import time; only asynchronous callers need it

        try:
            return await asyncio.wrap_future(self._future)
        except asyncio.CancelledError:
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

    async def __aenter__(self) -> "RequestHandle":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __repr__(self) -> str:
        return f"<RequestHandle {self.id} {self.state.value} {self.progress:.0f}%>"


@dataclass(eq=False)
class Request:
    """What the engine knows of a request while it is on its way.

    `owner` keeps the engine alive until the request has ended.
    """

    handle: RequestHandle
    owner: object
    query: str = ""
    options: RequestOptions = field(default_factory=RequestOptions)
    queued_at: float = 0.0
    queue_ms: float = 0.0
    route_ms: float = 0.0
    load_ms: float = 0.0
    is_streamed: bool = True
    route: Route | None = None
    choices: list[Choice] = field(default_factory=list)
    target: str = ""  # the key of the model that it waits for or uses
    considered: list[Consideration] = field(default_factory=list)
    model: ModelInfo | None = None
    seed: int = 0
    is_cold: bool = False
    load: LoadReport | None = None
    loading: Future[ModelInfo] | None = None
    variant: VariantReport | None = None
    evicted: list[str] = field(default_factory=list)
    replays: int = 0
    dropped_turns: int = 0
    removed_characters: int = 0

    def __post_init__(self) -> None:
        self.id = self.handle.id
        self.stream = self.handle._stream
        self.scope = self.handle._scope
        self.lifecycle = self.handle._lifecycle
        self.stop_watching: Callable[[], None] = lambda: None

    def consider(self, choice: Choice, outcome: Outcome, reason: str, error: str = "") -> None:
        """Note what became of a choice."""
        self.considered.append(
            Consideration(
                agent_id=choice.agent_id,
                model_id=choice.model_id,
                role=choice.role,
                outcome=outcome,
                reason=reason,
                error=error or None,
            )
        )

    def receipt(self) -> Receipt:
        """The account of the request so far."""
        return Receipt(
            request_id=self.id,
            route=self.route,
            considered=self.considered,
            model=self.model,
            seed=self.seed,
            cold_load=self.is_cold,
            load=self.load,
            variant=self.variant,
            evicted=self.evicted,
            replays=self.replays,
            dropped_turns=self.dropped_turns,
            removed_characters=self.removed_characters,
            state_ms=self.lifecycle.state_ms(),
        )

    def succeed(self, result: InferenceResult) -> None:
        """Hand the result to whoever waits."""
        self.owner = None
        self.handle._position = lambda: None
        assert self.model is not None
        self.handle._receipt = result.receipt
        self.handle._future.set_result(result)
        _forward(self.loading, self.handle._complete_loading, self.model)

    def fail(self, error: BaseException) -> None:
        """Hand the error to whoever waits."""
        if isinstance(error, StopIteration):  # a coroutine that awaits it would never end
            error = RuntimeError(f"a backend or a router raised {error!r}").with_traceback(
                error.__traceback__
            )
        self.owner = None
        self.handle._position = lambda: None
        self.handle._receipt = self.receipt()
        self.handle._future.set_exception(error)
        _forward(self.loading, self.handle._complete_loading, error)


def _forward(
    source: Future[ModelInfo] | None,
    target: Future[ModelInfo],
    otherwise: ModelInfo | BaseException,
) -> None:
    """Let `target` end as `source` does; at once if there is none."""

    def copy(ended: Future[ModelInfo]) -> None:
        error = ended.exception()
        if error is not None:
            target.set_exception(error)
        else:
            target.set_result(ended.result())

    if source is not None:
        source.add_done_callback(copy)
    elif isinstance(otherwise, BaseException):
        target.set_exception(otherwise)
    else:
        target.set_result(otherwise)
