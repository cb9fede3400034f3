"""OrionInferenceEngine: the public calls, and the way of a request.

    submit:  validate -> route -> queue
    serve:   acquire -> generate (falling back along the chain) -> result

Text is sanitized on its way out, piece by piece. What each step decides is decided elsewhere.
"""

import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

from orion_oie.backends.base import Backend, Completion
from orion_oie.cancellation import CancelScope, DeadlineTimer
from orion_oie.config import EngineConfig
from orion_oie.engine import reporting
from orion_oie.engine.breaker import BreakerBoard
from orion_oie.engine.costs import cost_of
from orion_oie.engine.request import (
    Request,
    RequestHandle,
)
from orion_oie.engine.streaming import (
    ChunkBy,
    TextStream,
    splitter_of,
)
from orion_oie.errors import (
    EngineClosedError,
    InsufficientMemoryError,
    InvalidRequestError,
    OrionError,
    RequestCancelledError,
)
from orion_oie.guardrails import requests
from orion_oie.models.registry import (
    Choice,
    ModelRegistry,
    registry_of,
)
from orion_oie.routing.base import RouteContext, Router, SessionRouter
from orion_oie.schemas.plans import Plan
from orion_oie.schemas.requests import RequestOptions, RequestOptionsDict
from orion_oie.schemas.results import (
    InferenceResult,
    ModelInfo,
    Route,
    Timings,
    TokenEvent,
)
from orion_oie.schemas.stats import (
    EngineStats,
    Health,
)
from orion_oie.telemetry.counters import Counters
from orion_oie.telemetry.event_log import EventLog, Subscriber
from orion_oie.telemetry.events import (
    EngineClosed,
    EngineStarted,
    Level,
    PoolUnloaded,
    RequestCancelled,
    RequestFailed,
    RequestReceived,
    RequestRouted,
    RequestSucceeded,
)
from orion_oie.version import __version__

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from orion_oie.hardware.sample import MemorySample


class OrionInferenceEngine:
    """Answers questions with local models, each in a process of its own.

    registry: a path to a models.json, a `ModelRegistry`, or None for the packaged one.
    config: see `EngineConfig`. backend, router and clock (seconds, for the breakers) may be
    replaced, e.g. by `orion_oie.backends.fake.FakeBackend` in tests of an application.

    Raises `RegistryError` with every problem of the registry, `UnknownAgentError` for a pinned
    agent that it does not know.
    """

    def __init__(
        self,
        registry: "str | os.PathLike[str] | ModelRegistry | None" = None,
        config: EngineConfig | None = None,
        *,
        backend: Backend | None = None,
        router: Router | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # All that answers questions: a mere `import orion_oie` should not pay for it.
        from orion_oie.engine.build import resolved, rooms_of

        self.config = config = resolved(config or EngineConfig())
        self.registry = registry_of(registry)
        for agent_id in config.memory.pinned:
            self.registry.agent(agent_id)
        self._pid = os.getpid()
        logs = config.logs
        self._events = events = EventLog(logs.max_events, log_content=logs.include_content)
        self._counters = Counters()
        self._breakers = BreakerBoard(config.breaker, clock, reporting.breaker_reporter(events))
        self._deadlines = DeadlineTimer()
        self._live: set[Request] = set()
        self._live_changed = threading.Condition()
        live = self._live
        # Idle threads must not keep a forgotten engine alive: they know it weakly.
        serve: weakref.ReferenceType[Callable[[Request], None]] = weakref.WeakMethod(self._serve)
        rooms = rooms_of(
            self.registry,
            config,
            backend,
            router,
            deadlines=self._deadlines,
            events=events,
            counters=self._counters,
            breakers=self._breakers,
            serve=lambda request: _call(serve, request),
            live=lambda: list(live),
            clock=clock,
        )
        self._cache = rooms.cache
        self._backend = rooms.backend
        self._keeper = rooms.keeper
        self._pool = rooms.pool
        self._placement = rooms.placement
        self._answerer = rooms.answerer
        self._standings = rooms.standings
        self._queue = rooms.queue
        self._preloader = rooms.preloader
        self._embeddings = rooms.embeddings
        self._planner = rooms.planner
        self._observer = rooms.observer
        self._router = rooms.router
        self._told_router = rooms.router if isinstance(rooms.router, SessionRouter) else None
        self._feedback_on = reporting.feedback_on(config, self.registry)
        self._is_closed = False
        self._finalizer = weakref.finalize(self, self._backend.kill_all)
        events.publish(EngineStarted(version=__version__, pid=self._pid))

    @property
    def router(self) -> Router:
        """What chooses agents: a `HybridRouter` unless the application brought another."""
        return self._router

    # -- the public calls: all of them are views of submit()

    def infer(self, query: str, **options: Unpack[RequestOptionsDict]) -> InferenceResult:
        """Ask and wait for the answer. `RequestOptions` describes each option.

        Raises `InvalidRequestError` and its kin for a request that must be changed, `ModelError`
        and `WorkerError` when no model could answer, `CircuitOpenError`, `QueueFullError`,
        `DeadlineExceededError`, `EngineClosedError`.
        """
        handle = self._submit(query, options, TextStream(), is_streamed=False)
        try:
            return handle.result()
        except BaseException:
            handle.cancel()  # Ctrl-C while waiting: nobody wants the answer any more
            raise

    def submit(self, query: str, **options: Unpack[RequestOptionsDict]) -> RequestHandle:
        """Ask and go on. What is wrong with the request is raised by the handle.

        Raises `EngineClosedError`.
        """
        return self._submit(query, options, TextStream())

    def stream(
        self,
        query: str,
        *,
        chunk_by: ChunkBy = "token",
        typewriter_delay: float = 0.0,
        on_event: Callable[[TokenEvent], None] | None = None,
        **options: Unpack[RequestOptionsDict],
    ) -> RequestHandle:
        """Ask and iterate over the answer while it is written.

        chunk_by: "token", "word", "sentence" or a `orion_oie.engine.streaming.Splitter`.
        typewriter_delay: pause in seconds after each piece that a reader takes.
        on_event: called with every `TokenEvent`, on a thread of its own; if it raises, the
        request ends.
        """
        stream = TextStream(splitter_of(chunk_by), typewriter_delay_s=typewriter_delay)
        handle = self._submit(query, options, stream)
        if on_event is not None:
            handle.feed(on_event)
        return handle

    async def ainfer(self, query: str, **options: Unpack[RequestOptionsDict]) -> InferenceResult:
        """`infer` for asynchronous callers; cancelling the task cancels the request."""
        return await self._submit(query, options, TextStream(), is_streamed=False)

    async def astream(
        self,
        query: str,
        *,
        chunk_by: ChunkBy = "token",
        typewriter_delay: float = 0.0,
        on_event: Callable[[TokenEvent], None] | None = None,
        **options: Unpack[RequestOptionsDict],
    ) -> AsyncIterator[TokenEvent]:
        """`stream` for asynchronous callers; leaving the loop cancels the request."""
        handle = self.stream(
            query,
            chunk_by=chunk_by,
            typewriter_delay=typewriter_delay,
            on_event=on_event,
            **options,
        )
        async with handle:
            async for event in handle:
                yield event

    def initialize(self) -> "OrionInferenceEngine":
        """Check that the engine can be used, and prepare for its first load. Optional."""
        self._check_usable()
        self._backend.warm_up()
        return self

    def shutdown(self, timeout: float = 10.0) -> None:
        """Refuse new requests, fail the waiting ones, give running ones `timeout` seconds, then
        end them, and end all workers. Idempotent."""
        if os.getpid() != self._pid:
            return
        with self._live_changed:
            if self._is_closed:
                return
            self._is_closed = True
        closed = EngineClosedError("the engine was shut down")
        for request in self._queue.close():
            self._end(request, closed)
        with self._live_changed:
            self._live_changed.wait_for(lambda: not self._live, timeout)
            live = list(self._live)
        for request in live:
            request.scope.cancel(closed)
        self._embeddings.close()
        self._keeper.close()
        self._pool.close(timeout)
        self._backend.kill_all()
        with self._live_changed:
            self._live_changed.wait_for(lambda: not self._live, self.config.serving.cancel_grace_s)
        self._finalizer.detach()
        self._events.publish(EngineClosed())

    def plan(self, query: str, **options: Unpack[RequestOptionsDict]) -> Plan:
        """What `infer` would do with the same arguments now: the route, the model and its variant,
        what would be loaded and evicted for it. Does none of it.

        Raises what is wrong with the request, like `infer`.
        """
        self._check_usable()
        checked = requests.checked_options(options)
        max_chars = self.config.guardrails.max_query_chars
        question = requests.checked_query(query, checked, max_chars)
        route = self._route_of(question, checked, is_trial=True)
        choices = self._choices(route.agent_id)
        order = self._answerer.order(choices)
        return self._planner.plan(
            route, choices, order, waiting=len(self._queue), images=len(checked.images)
        )

    def preload(self, agent_id: str, *, pin: bool = False) -> ModelInfo:
        """Load the model that would answer for an agent now; returns what was loaded. With `pin` it
        is never unloaded to make room, until `unload`."""
        self._check_usable()
        choice = self._answerer.available(self._choices(agent_id), agent_id)[0]
        spec = self._placement.load_spec(choice)
        try:
            with self._pool.acquire(spec, CancelScope()) as lease:
                if pin:
                    self._pool.pin(spec.key)
                return lease.model.info
        except InsufficientMemoryError as error:
            raise self._placement.explained(error, choice) from error

    def embed(self, texts: Sequence[str], *, user: str = "application") -> "NDArray[np.float32]":
        """Unit vectors of texts, shape (texts, dimensions), by the one embedding model that all
        parts of the program share. `user` names the part that asks, for statistics.

        Raises `ModelNotFoundError` when there is none; else see `EmbeddingService.embed`.
        """
        self._check_usable()
        return self._embeddings.service().embed(texts, user=user)

    def pull(self, name: str) -> tuple[Path, ...]:
        """Fetch the files of an agent's primary model, of a model, or of `MODEL@VARIANT`, if they
        are not here; returns where they lie. Events `model.loading` tell how far it is.

        Raises `ModelNotFoundError` for an unknown name, `DownloadError`, `DigestMismatchError`.
        """
        self._check_usable()
        return reporting.pull(self.registry, self._cache, self.config, self._events, name)

    def unload(self, agent_id: str) -> bool:
        """Free the idle models that an agent itself names, in whatever variant, also if others
        share them or they are pinned.

        False when none was loaded, or all were in use.
        """
        own = {c.model_id for c in self._choices(agent_id) if c.agent_id == agent_id}
        keys = [
            f"{m}@{variant}" for m in sorted(own) for variant in self.registry.model(m).variants
        ]
        for key in keys:
            self._pool.unpin(key)
        unloaded = [key for key in keys if self._pool.unload(key)]
        for key in unloaded:
            self._preloader.note_gone(key)
            self._events.publish(PoolUnloaded(key=key))
        return bool(unloaded)

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Call `callback(event)` for every event, on the thread where it happens: keep it
        short. Returns the function that ends the subscription."""
        return self._events.subscribe(callback)

    def export_logs(self) -> list[dict[str, Any]]:
        """The recent events, oldest first, as JSON-compatible dictionaries."""
        return self._events.export()

    def reset_breakers(self) -> None:
        """Close every circuit breaker and forget its counts."""
        self._breakers.reset()

    def stats(self) -> EngineStats:
        """Counts, models and memory, loads ahead, breakers, hardware."""
        return self._observer.stats(
            self._counters.snapshot(), self._preloader.stats(), self._embeddings.stats()
        )

    def memory_history(self) -> "list[MemorySample]":
        """What was seen of memory, oldest first: the machine, this process, each worker. A sample
        every two seconds while there are workers, for the last twenty minutes."""
        return self._keeper.monitor.history()

    def health(self) -> Health:
        """`down` when it cannot be used; `degraded` while a breaker is not closed, the queue is
        full, memory is short, or a request makes no progress: the reasons name it and what stands
        in its way."""
        try:
            self._check_usable()
        except EngineClosedError as error:
            return Health(status="down", reasons=[error.message])
        reasons = self._observer.reasons()
        return Health(status="degraded" if reasons else "healthy", reasons=reasons)

    def __enter__(self) -> "OrionInferenceEngine":
        return self.initialize()

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.shutdown(timeout=10.0 if error is None else 0.0)

    async def __aenter__(self) -> "OrionInferenceEngine":
        return self.initialize()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        import asyncio  # a tenth of the library's import time; only asynchronous callers need it

        await asyncio.to_thread(self.__exit__, kind, error, traceback)

    # -- the way of a request, on the caller's thread: validate -> route -> queue

    def _submit(
        self,
        query: str,
        options: Mapping[str, object],
        stream: TextStream,
        *,
        is_streamed: bool = True,
    ) -> RequestHandle:
        self._check_usable()
        handle = RequestHandle(stream, CancelScope(), reporting.state_reporter(self._events))
        request = Request(handle, owner=self, is_streamed=is_streamed)
        self._counters.count("received")
        shown = query if isinstance(query, str) else f"<{type(query).__name__}>"
        self._events.publish(RequestReceived(request_id=request.id, query=shown))
        with self._live_changed:
            self._live.add(request)
        try:
            self._validate(request, query, options)
            self._route(request)
            self._enqueue(request)
        except Exception as error:  # noqa: BLE001 (also a bug in a router: the handle raises it)
            self._end(request, error)
        except BaseException as error:  # Ctrl-C
            if request.queued_at:
                handle.cancel()
            else:
                self._end(request, error)
            raise
        return handle

    def _validate(self, request: Request, query: str, options: Mapping[str, object]) -> None:
        request.lifecycle.move("validate")
        request.options = requests.checked_options(options)
        if request.options.deadline is not None:
            self._deadlines.watch(request.scope, request.options.deadline)
        max_chars = self.config.guardrails.max_query_chars
        request.query = requests.checked_query(query, request.options, max_chars)
        seed = request.options.seed
        request.seed = int.from_bytes(os.urandom(4)) // 2 if seed is None else seed

    def _route(self, request: Request) -> None:
        request.lifecycle.move("route")
        started = time.perf_counter()
        request.route = self._route_of(request.query, request.options)
        self._preloader.note_request(request.route.agent_id, request.options.session_id)
        request.choices = self._choices(request.route.agent_id)
        request.route_ms = (time.perf_counter() - started) * 1e3
        self._events.publish(
            RequestRouted(
                request_id=request.id,
                agent_id=request.route.agent_id,
                confidence=request.route.confidence,
                stages=request.route.stages,
                text=request.route.reason,
            )
        )

    def _route_of(self, query: str, options: RequestOptions, *, is_trial: bool = False) -> Route:
        if options.agent is not None:
            self.registry.agent(options.agent)
            return Route(agent_id=options.agent, confidence=1.0, reason="asked for by name")
        context = RouteContext(
            images=len(options.images),
            session_id=options.session_id,
            history=options.conversation_history,
            wait_s=self._wait_s,
            # Of a router that is told who answered, nothing else is to be remembered.
            is_trial=is_trial or self._told_router is not None,
            may_load=not is_trial,
            # Half of the request's time at most: the rest is for its answer.
            limit_s=None if options.deadline is None else options.deadline / 2,
        )
        return self._router.route(query, self.registry.agents, context)

    def _wait_s(self, agent_id: str) -> float | None:
        """Seconds until an agent's model could begin to answer, None where nobody knows."""
        try:
            target = self._answerer.target(self._choices(agent_id))
            return None if target is None else self._planner.wait_s(target)
        except OrionError:  # whoever loads it hears what is wrong with its files
            return None

    def _enqueue(self, request: Request) -> None:
        request.lifecycle.move("load")
        request.queued_at = time.perf_counter()
        request.stop_watching = request.scope.on_cancel(lambda: self._end_if_waiting(request))
        assert request.route is not None
        target = self._answerer.target(request.choices)
        request.target = "" if target is None else self._standings.announce(target)
        queue = self._queue
        request.handle._position = lambda: queue.position(request)
        self._queue.put(
            request,
            model=request.target,
            agent=request.route.agent_id,
            session=request.options.session_id,
            priority=request.options.priority,
        )
        if request.scope.error is not None:
            self._end_if_waiting(request)  # it came before there was anything to take back

    def _end_if_waiting(self, request: Request) -> None:
        if self._queue.remove(request) and request.scope.error is not None:
            self._end(request, request.scope.error)

    # -- the way of a request, on a serving thread: acquire -> generate -> result

    def _serve(self, request: Request) -> None:
        request.queue_ms = (time.perf_counter() - request.queued_at) * 1e3
        try:
            request.scope.check()
            choice, completion = self._answerer.answer(request)
            self._succeed(request, choice, completion)
        except BaseException as error:  # noqa: BLE001 (it must reach the caller, not this thread)
            self._end(request, error)

    def _succeed(self, request: Request, choice: Choice, completion: Completion) -> None:
        assert request.route is not None
        assert request.model is not None
        request.stream.flush()
        request.dropped_turns = completion.dropped_turns
        spec = self.registry.model(choice.model_id)
        result = InferenceResult(
            content=request.stream.joined(),
            agent_id=choice.agent_id,
            model_id=choice.model_id,
            model_version=request.model.version,
            variant=choice.variant,
            confidence=request.route.confidence,
            finish_reason=completion.finish_reason,
            usage=completion.usage,
            timings=Timings(
                queue_ms=request.queue_ms + completion.wait_ms,
                route_ms=request.route_ms,
                load_ms=request.load_ms,
                ttft_ms=request.stream.first_text_ms,
                total_ms=(time.perf_counter() - request.stream.started_at) * 1e3,
                tokens_per_second=completion.tokens_per_second,
            ),
            receipt=request.receipt(),
            cost=cost_of(completion.usage, spec.price),
            logprobs=None if request.options.logprobs is None else list(completion.logprobs),
        )
        result._feedback = self._feedback_on(request.query, request.route)
        self._note_turn(request, choice.agent_id)
        request.lifecycle.move("succeed")
        self._counters.answered(choice.agent_id, completion.usage)
        self._forget(request)
        self._events.publish(
            RequestSucceeded(
                request_id=request.id,
                agent_id=result.agent_id,
                model_id=result.model_id,
                completion_tokens=result.usage.completion_tokens,
                total_ms=round(result.timings.total_ms, 1),
                content=result.content,
            )
        )
        request.succeed(result)
        self._preloader.consider(request.route.agent_id, request.options.session_id)

    def _end(self, request: Request, error: BaseException) -> None:
        """End a request without an answer."""
        is_cancelled = isinstance(error, RequestCancelledError)
        if request.stream.has_text and request.stream.is_observed:  # somebody read the beginning
            assert request.route is not None
            self._note_turn(request, request.route.agent_id)
        request.lifecycle.move("cancel" if is_cancelled else "fail")
        if is_cancelled:
            self._counters.count("cancelled")
        else:
            self._counters.failed(error)
        self._forget(request)
        described, text = _described(error)
        if is_cancelled:
            self._events.publish(RequestCancelled(request_id=request.id, error=described))
        else:
            level: Level = "info" if isinstance(error, OrionError) else "error"
            self._events.publish(
                RequestFailed(request_id=request.id, level=level, error=described, text=text)
            )
        request.fail(error)

    def _note_turn(self, request: Request, agent_id: str) -> None:
        """Tell the router with whom a conversation is."""
        session_id = request.options.session_id
        if session_id is not None and self._told_router is not None:
            self._told_router.note(session_id, agent_id)

    def _forget(self, request: Request) -> None:
        request.stop_watching()
        if request.options.deadline is not None:
            self._deadlines.forget(request.scope)
        with self._live_changed:
            self._live.discard(request)
            self._live_changed.notify_all()

    # -- small helpers

    def _choices(self, agent_id: str) -> list[Choice]:
        return self._placement.choices(agent_id)

    def _check_usable(self) -> None:
        if self._is_closed:
            raise EngineClosedError("the engine was shut down; make a new one")
        if os.getpid() != self._pid:
            raise EngineClosedError(
                f"the engine belongs to process {self._pid}, and this is its fork {os.getpid()}; "
                "make an engine after forking"
            )


def _described(error: BaseException) -> tuple[str, str | None]:
    """`error` and `text` of a `RequestFailed`: a message that may quote the caller is content."""
    name = type(error).__name__
    if type(error) is InvalidRequestError or not isinstance(error, OrionError):
        return name, str(error)
    return f"{name}: {error}", None


def _call(method: "weakref.ReferenceType[Callable[[Request], None]]", request: Request) -> None:
    function = method()
    assert function is not None, "a request keeps its engine alive"
    function(request)
