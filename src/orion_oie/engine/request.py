"""The stages of a request on its way, and the record that they share.

    Request   the text, the state and the result behind the caller's handle
    Checked   question and options, found to be in order
    Routed    the agent that answers, and its models
    Queued    waits for its turn with the first of them
    Answer    the result of one model of the chain

Stages are immutable: each is made from the one before. The request's `Account` collects what the
receipt will report. Every request has one writer at a time: the caller's thread until it is queued,
then the serving thread (or the thread that takes it back out of the queue).
"""

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from orion_oie.backends.base import Completion
from orion_oie.callbacks import threads
from orion_oie.cancellation import CancelScope
from orion_oie.engine.calls import Calls, Feed
from orion_oie.engine.lifecycle import RequestLifecycle, RequestState
from orion_oie.engine.streaming import TextStream
from orion_oie.errors import WorkerError
from orion_oie.pool.candidate import Candidate
from orion_oie.schemas.requests import RequestOptions
from orion_oie.schemas.results import (
    Consideration,
    FinishReason,
    InferenceResult,
    LoadReport,
    ModelInfo,
    Outcome,
    Receipt,
    Route,
    VariantReport,
)
from orion_oie.threads import Future

_LoadingEnd = tuple[concurrent.futures.Future[ModelInfo] | None, ModelInfo | BaseException]

_making_futures = threading.Lock()


@dataclass(slots=True)
class Account:
    """The contents of a request's receipt so far. `loading` is done when no load that the request
    began goes on in the background: of its own model, or of the one that it stood in for."""

    route: Route | None = None
    considered: list[Consideration] = field(default_factory=list)
    model: ModelInfo | None = None
    seed: int = 0
    load_ms: float = 0.0
    is_cold: bool = False
    load: LoadReport | None = None
    variant: VariantReport | None = None
    evicted: list[str] = field(default_factory=list)
    replays: int = 0
    dropped_turns: int = 0
    removed_characters: int = 0
    finish_reason: FinishReason | None = None
    loading: concurrent.futures.Future[ModelInfo] | None = None

    def consider(
        self, candidate: Candidate, outcome: Outcome, reason: str, error: str = ""
    ) -> None:
        """Note the outcome of a candidate."""
        self.considered.append(
            Consideration(
                agent_id=candidate.agent_id,
                model_id=candidate.model_id,
                role=candidate.role,
                outcome=outcome,
                reason=reason,
                error=error or None,
            )
        )

    def receipt(self, request_id: str, state_ms: dict[str, float]) -> Receipt:
        """The account so far."""
        return Receipt(
            request_id=request_id,
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
            finish_reason=self.finish_reason,
            state_ms=state_ms,
        )


class Request:
    """One request from its call to its end.

    `is_streamed` is False when nobody reads the answer before it is complete. `target` is the key
    of the model that it waits for or uses, empty before it is known. `ending` is the error with
    which it began to end. `on_state(request_id, old, new)` is called after each change of its
    state; the handle keeps it, and `calls`, as long as the application keeps the handle. `readers`
    are those who take the text or wait for the end, `feeds` those of them on threads of their own.
    """

    def __init__(
        self,
        request_id: str,
        stream: TextStream,
        on_state: Callable[[str, RequestState, RequestState], None],
        calls: Calls,
        *,
        is_streamed: bool,
    ) -> None:
        self.id = request_id
        self.stream = stream
        self.calls = calls
        self.readers: set[object] = set()
        self.feeds: tuple[Feed, ...] = ()
        self.is_streamed = is_streamed
        self.scope = CancelScope()
        self.lifecycle = RequestLifecycle(partial(on_state, request_id))
        self.account = Account()
        self.target = ""
        self.has_deadline = False
        self.ending: BaseException | None = None
        self.session_id: str | None = None
        self.receipt: Receipt | None = None
        self.future: Future[InferenceResult] = Future()
        # The first callback: those of the application find the stream ended.
        self.future.add_done_callback(stream.close_after)
        self._complete_loading: Future[ModelInfo] | None = None
        self._loading_end: _LoadingEnd | None = None
        self._position: Callable[[], int | None] | None = None
        self._stop_watching: Callable[[], None] | None = None
        self._writers: dict[str, str] = {}

    def claim(self, writer: str) -> bool:
        """Become the one that moves the request on from the queue and ends it: a serving thread, or
        whoever takes it away from them. True for the first, as often as it asks."""
        return self._writers.setdefault("writer", writer) == writer  # one step

    def enqueue(self, position: Callable[[], int | None], on_cancel: Callable[[], None]) -> None:
        """Note that it waits, at `position()` in the queue. `on_cancel` is called when its scope is
        cancelled."""
        self._position = position
        self._stop_watching = self.scope.on_cancel(on_cancel)

    @property
    def queue_position(self) -> int | None:
        """The place among the requests that wait, 1 for the next; None when it does not wait."""
        position = self._position
        return None if position is None else position()

    def leave(self) -> None:
        """Note that it waits no more, and drop what keeps the engine alive."""
        self._position = None
        if self._stop_watching is not None:
            self._stop_watching()
            self._stop_watching = None

    def succeed(self, result: InferenceResult, model: ModelInfo) -> None:
        """Hand the result to those who wait."""
        self.receipt = result.receipt
        self.future.set_result(result)
        self._end_loading(model)

    def fail(self, error: BaseException) -> None:
        """Hand the error to those who wait; once more if a signal came in between."""
        if isinstance(error, StopIteration):  # a coroutine that awaits it would never end
            error = RuntimeError(f"a backend or a router raised {error!r}").with_traceback(
                error.__traceback__
            )
        self.account.finish_reason = None  # there is no answer, whatever the backend said of it
        try:
            self.receipt = self.account.receipt(self.id, self.lifecycle.state_ms())
        finally:
            if self.future.done():
                self.stream.close_after(self.future)
            else:
                self.future.set_exception(error)
            self._end_loading(error)

    def complete_loading(self) -> Future[ModelInfo]:
        """A future that is done when the request has ended, and with it all loads that it began."""
        with _making_futures:
            future = self._complete_loading
            if future is not None:
                return future
            future = self._complete_loading = Future()
            end = self._loading_end
        if end is None:
            return future
        if end[0] is None or end[0].done():
            _complete(future, _ended(end))  # nobody had it before, so it has no callbacks
        else:
            _complete_after(future, end)
        return future

    def _end_loading(self, otherwise: ModelInfo | BaseException) -> None:
        with _making_futures:  # made on demand: few callers ask for it
            end = self._loading_end = self.account.loading, otherwise
            future = self._complete_loading
        if future is not None:
            _complete_after(future, end)


@dataclass(frozen=True, slots=True)
class Checked:
    """A valid question, ready to be routed. `seed` is the caller's, or a random one."""

    query: str
    options: RequestOptions
    seed: int


@dataclass(frozen=True, slots=True)
class Routed:
    """A question with the agent that answers it. `candidates` are the models of the agent's chain,
    best first, those that are not available included."""

    checked: Checked
    route: Route
    candidates: tuple[Candidate, ...]
    route_ms: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Queued:
    """A request in the queue. `serve` answers it, and keeps the engine's parts alive until then.
    `queued_at` is in seconds of `time.perf_counter`."""

    request: Request
    routed: Routed
    queued_at: float
    serve: Callable[["Queued"], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of one model."""

    candidate: Candidate
    model: ModelInfo
    completion: Completion


def _ended(end: _LoadingEnd) -> ModelInfo | BaseException:
    """The model whose load has ended, or the error; without a load, the rest of `end`."""
    loading, otherwise = end
    return otherwise if loading is None else loading.exception() or loading.result()


def _complete(target: Future[ModelInfo], ended: ModelInfo | BaseException) -> None:
    with contextlib.suppress(BaseException):  # of a callback, which comes after the result
        if isinstance(ended, BaseException):
            target.set_exception(ended)
        else:
            target.set_result(ended)


def _complete_after(target: Future[ModelInfo], end: _LoadingEnd) -> None:
    """Complete `target` when the load ends. Its callbacks are code of the application, so nothing
    else runs on the thread that completes it."""

    def complete() -> None:
        _complete(target, _ended(end))

    def complete_aside() -> None:
        try:
            threads.run(complete)
        except WorkerError:  # the system gives no thread: better here than never
            complete()

    loading, _otherwise = end
    if loading is None:
        complete_aside()
    else:
        loading.add_done_callback(lambda _loading: complete_aside())
