"""The pipeline of a request, from the call to the result.

    on the caller's thread     check -> route -> enqueue
    on a serving thread        the chain of models -> finish

Text is sanitized piece by piece as it comes. Each decision is made elsewhere: in the guardrails,
the router, the queue and the pool.
"""

import logging
import random
import time
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

from orion_oie.callbacks import host_log
from orion_oie.callbacks.delivery import Delivery
from orion_oie.cancellation import DeadlineTimer
from orion_oie.config import EngineConfig
from orion_oie.engine.availability import WantedModels
from orion_oie.engine.calls import Calls
from orion_oie.engine.chain import ModelChain
from orion_oie.engine.costs import cost_of
from orion_oie.engine.handle import RequestHandle
from orion_oie.engine.lifecycle import RequestState
from orion_oie.engine.planner import Planner
from orion_oie.engine.request import Answer, Checked, Queued, Request, Routed
from orion_oie.engine.request_book import Outcome, RequestBook
from orion_oie.engine.scheduling.queue import RequestQueue
from orion_oie.engine.stand_ins import StandIns
from orion_oie.engine.streaming import ChunkBy, TextStream, splitter_of
from orion_oie.errors import (
    EngineClosedError,
    InvalidRequestError,
    OrionError,
    OrionWarning,
    RequestCancelledError,
    described,
    message_of,
)
from orion_oie.guardrails import requests
from orion_oie.models.choices import NamedModel
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.models.naming import Source
from orion_oie.models.registry import ModelRegistry
from orion_oie.pool.candidate import Candidate
from orion_oie.pool.preloader import Preloader
from orion_oie.pool.variants import VariantSelector
from orion_oie.routing.base import RouteContext, Router, SessionRouter
from orion_oie.schemas.plans import Plan
from orion_oie.schemas.requests import RequestOptions
from orion_oie.schemas.results import InferenceResult, Route, Timings
from orion_oie.telemetry.counters import Counters
from orion_oie.telemetry.event_log import EventLog
from orion_oie.telemetry.events import (
    EngineClosed,
    Level,
    RequestCancelled,
    RequestFailed,
    RequestReceived,
    RequestRouted,
    RequestStateChanged,
    RequestSucceeded,
)
from orion_oie.threads import unbroken

_KNOWN_AGENTS = 256
_NOTES_S = 1.0  # how long a route waits for the router to take note of the answers before

FeedbackOn = Callable[[str, Route], Callable[[str], None] | None]
"""Makes the function that takes feedback on the route of a question; None if none is kept."""


class Pipeline:
    """Processes requests. Thread-safe, as its parts are.

    Requests refer to it until they have ended, and so keep the models alive; its idle threads do
    not.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        config: EngineConfig,
        *,
        router: Router,
        variants: VariantSelector,
        wanted: WantedModels,
        queue: RequestQueue[Queued],
        chain: ModelChain,
        planner: Planner,
        preloader: Preloader,
        stand_ins: StandIns,
        cache: ModelCache,
        deadlines: DeadlineTimer,
        counters: Counters,
        events: EventLog,
        calls: Calls,
        feedback_on: FeedbackOn,
    ) -> None:
        self._registry = registry
        self._max_query_chars = config.guardrails.max_query_chars
        self._router = router
        self._session_router = router if isinstance(router, SessionRouter) else None
        self._variants = variants
        self._wanted = wanted
        self._queue = queue
        self._chain = chain
        self._planner = planner
        self._preloader = preloader
        self._stand_ins = stand_ins
        self._cache = cache
        self._deadlines = deadlines
        self._counters = counters
        self._events = events
        self._calls = calls
        self._feedback_on = feedback_on
        self._notes = _notes_to(router, events)
        # The handle of a request that has ended must not keep the pipeline.
        self._report_state = partial(_report_state, events)
        self._random = random.Random()  # seeded by the system
        self._book: RequestBook[Request] = RequestBook()

    @property
    def router(self) -> Router:
        """The router that chooses agents."""
        return self._router

    def live(self) -> list[Request]:
        """The requests that have not ended."""
        return self._book.live()

    def counts(self) -> dict[str, int]:
        """The numbers of requests that were received, and by outcome."""
        return self._book.counts()

    def submit(
        self,
        query: str,
        options: Mapping[str, Any],
        *,
        is_streamed: bool = True,
        is_read: bool = False,
        chunk_by: ChunkBy = "token",
        typewriter_delay_s: float = 0.0,
    ) -> RequestHandle:
        """Check, route and enqueue a request. The handle raises what is wrong with it.

        With `is_read` the caller reads the text: what is wrong is raised here. Unless `is_streamed`
        alone, the request ends when nobody has the handle any more.

        Raises `EngineClosedError`, and `InvalidRequestError` for a stream that cannot be made.
        """
        stream = TextStream(splitter_of(chunk_by), typewriter_delay_s=typewriter_delay_s)
        request_id = f"{self._random.getrandbits(48):012x}"
        request = Request(
            request_id, stream, self._report_state, self._calls, is_streamed=is_streamed
        )
        try:
            self._book.add(request)
            try:
                shown = query if isinstance(query, str) else f"<{type(query).__name__}>"
                self._events.publish(RequestReceived(request_id=request_id, query=shown))
                checked = self._check(request, query, options)
                routed = self._route(request, checked)
                agent_id = routed.route.agent_id
                self._announce(agent_id, routed.candidates)
                self._enqueue(request, routed)
            except Exception as error:  # also a bug in a router
                self._withdraw(request, error)
                if is_read:
                    raise
            return RequestHandle(request, is_owner=is_read or not is_streamed)
        except BaseException as error:
            if not request.future.done():  # Ctrl-C, which may come once more
                interruption = error
                unbroken(lambda: self._withdraw(request, interruption), "orion-withdrawn").result()
            raise

    def plan(self, query: str, options: Mapping[str, Any]) -> Plan:
        """The plan of a request. Raises what is wrong with it."""
        checked = requests.checked_options(dict(options))
        question = requests.checked_query(query, checked, self._max_query_chars)
        route = self._route_of(question, checked, is_trial=True)
        candidates = self._candidates(route.agent_id, checked, is_fresh=True)
        return self._planner.plan(
            route,
            candidates,
            self._chain.order(candidates),
            waiting=len(self._queue),
            images=len(checked.images),
        )

    def hurry(self, timeout_s: float) -> None:
        """Have `close` give running requests `timeout_s` seconds from now at most. Takes no
        lock."""
        self._book.hurry(timeout_s)

    def close(self) -> None:
        """Refuse new requests, fail the waiting ones, give running ones the time that `hurry`
        allows, then cancel them."""
        closed = EngineClosedError("the engine was shut down")
        self._book.close()
        for queued in self._queue.close():
            self._withdraw(queued.request, closed)
        self._book.drain()
        for request in self._book.live():
            request.scope.cancel(closed)

    def end_all(self, timeout_s: float) -> None:
        """Wait until all requests have ended, for `timeout_s` seconds at most, and fail the others:
        a backend does not let go of them, or signals interrupted the calls that would end them."""
        self._book.wait_for_none(timeout_s)
        for request in self._book.live():
            self._end(request, EngineClosedError("the engine was shut down"))

    def report_closed(self) -> None:
        """Publish that the engine was closed."""
        self._events.publish(EngineClosed())

    # -- on the caller's thread: check -> route -> enqueue

    def _check(self, request: Request, query: str, options: Mapping[str, Any]) -> Checked:
        request.lifecycle.move("validate")
        checked = requests.checked_options(dict(options))
        if checked.deadline is not None:
            request.has_deadline = True
            self._deadlines.watch(request.scope, checked.deadline)
        request.session_id = checked.session_id
        question = requests.checked_query(query, checked, self._max_query_chars)
        seed = self._random.getrandbits(31) if checked.seed is None else checked.seed
        request.account.seed = seed
        return Checked(question, checked, seed)

    def _route(self, request: Request, checked: Checked) -> Routed:
        request.lifecycle.move("route")
        started = time.perf_counter()
        route = self._route_of(checked.query, checked.options)
        request.account.route = route
        self._preloader.note_request(route.agent_id, checked.options.session_id)
        candidates = self._candidates(route.agent_id, checked.options)
        route_ms = (time.perf_counter() - started) * 1e3
        self._events.publish(
            RequestRouted(
                request_id=request.id,
                agent_id=route.agent_id,
                confidence=route.confidence,
                stages=route.stages,
                text=route.reason,
            )
        )
        return Routed(checked, route, candidates, route_ms)

    def _route_of(self, query: str, options: RequestOptions, *, is_trial: bool = False) -> Route:
        if options.agent is not None:
            self._registry.agent(options.agent)
            return _route_by_name(options.agent)
        context = RouteContext(
            images=len(options.images),
            session_id=options.session_id,
            history=options.conversation_history,
            wait_s=self.wait_s,
            # A router that notes each answer must not note each route as well.
            is_trial=is_trial or self._session_router is not None,
            may_load=not is_trial,
            # Half of the request's time at most: the rest is for its answer.
            limit_s=None if options.deadline is None else options.deadline / 2,
        )
        if options.session_id is not None:
            self._notes.flush(_NOTES_S)  # of the turns before
        return self._router.route(query, self._registry.agents, context)

    def _announce(self, agent_id: str, candidates: tuple[Candidate, ...]) -> None:
        """Warn of a stand-in. Warnings that are errors end the request; a hook that fails does
        not."""
        try:
            self._stand_ins.announce(agent_id, candidates)
        except OrionWarning:
            raise
        except Exception as error:  # noqa: BLE001 (code of the application)
            self._events.note_failure("warning hook", warnings.showwarning, error)

    def _candidates(
        self, agent_id: str, options: RequestOptions, *, is_fresh: bool = False
    ) -> tuple[Candidate, ...]:
        """The models of an agent, or the one that the caller named."""
        named = None if options.model is None else self.look_up(options.model)
        return self._variants.candidates(agent_id, named, is_fresh=is_fresh)

    def look_up(self, name: Source) -> NamedModel:
        """The model that a caller names; raises like `ModelRegistry.model_named`."""
        return self._registry.model_named(name, self._cache)

    def wait_s(self, agent_id: str) -> float | None:
        """Seconds until an agent's model could begin to answer; None if that is unknown."""
        try:
            target = self._chain.target(self._variants.candidates(agent_id))
        except OrionError:  # an agent that the registry has no more
            return None
        return None if target is None else self._planner.wait_s(target)

    def _enqueue(self, request: Request, routed: Routed) -> None:
        request.lifecycle.move("load")
        queued = Queued(request, routed, time.perf_counter(), self._serve)
        target = self._chain.target(routed.candidates)
        if target is not None:
            request.target = self._wanted.announce(target)
        queue = self._queue
        request.enqueue(lambda: queue.position(queued), lambda: self._end_if_waiting(queued))
        queue.put(
            queued,
            model=request.target,
            agent=routed.route.agent_id,
            session=routed.checked.options.session_id,
            priority=routed.checked.options.priority,
        )
        if request.scope.error is not None:
            self._end_if_waiting(queued)  # the cancel came before the callback was registered

    def _end_if_waiting(self, queued: Queued) -> None:
        error = queued.request.scope.error
        if error is not None and self._queue.remove(queued):
            self._withdraw(queued.request, error)

    # -- on a serving thread: the chain of models -> finish

    def _serve(self, queued: Queued) -> None:
        request, routed = queued.request, queued.routed
        if not request.claim("serving"):
            return  # whoever began it was interrupted
        queue_ms = (time.perf_counter() - queued.queued_at) * 1e3
        try:
            request.scope.check()
            answer = self._chain.run(request, routed)
            self._finish(request, routed, answer, queue_ms)
        except BaseException as error:  # noqa: BLE001 (it must reach the caller, not this thread)
            try:
                self._end(request, error)
            except BaseException as bug:  # noqa: BLE001 (the request has ended, others are to come)
                text = "the end of request %s was not complete"
                host_log.log(logging.ERROR, text, request.id, error=bug)

    def _finish(self, request: Request, routed: Routed, answer: Answer, queue_ms: float) -> None:
        stream, completion, candidate = request.stream, answer.completion, answer.candidate
        options, wanted = routed.checked.options, routed.candidates[0]
        stream.flush()
        request.account.dropped_turns = completion.dropped_turns
        request.account.finish_reason = completion.finish_reason
        result = InferenceResult(
            content=stream.joined(),
            agent_id=candidate.agent_id,
            model_id=candidate.model_id,
            model_version=answer.model.version,
            variant=candidate.key.variant,
            confidence=routed.route.confidence,
            finish_reason=completion.finish_reason,
            usage=completion.usage,
            timings=Timings(
                queue_ms=queue_ms + completion.wait_ms,
                route_ms=routed.route_ms,
                load_ms=request.account.load_ms,
                ttft_ms=stream.first_text_ms,
                total_ms=(time.perf_counter() - stream.started_at) * 1e3,
                tokens_per_second=completion.tokens_per_second,
            ),
            receipt=request.account.receipt(request.id, request.lifecycle.state_ms()),
            cost=cost_of(completion.usage, candidate.price),
            logprobs=None if options.logprobs is None else list(completion.logprobs),
            wanted_model_id=wanted.model_id,
            is_stand_in=self._stand_ins.note(
                routed.route.agent_id, candidate, wanted, request.account.considered
            ),
        )
        result.take_feedback(self._feedback_on(routed.checked.query, routed.route))
        self._note_turn(request, candidate.agent_id)
        try:
            request.lifecycle.move("succeed")
            self._counters.answered(candidate.agent_id, completion.usage)
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
        finally:
            self._let_go(request, "succeeded", lambda: request.succeed(result, answer.model))
        self._preloader.consider(routed.route.agent_id, options.session_id)

    # -- the end of a request without an answer

    def _withdraw(self, request: Request, error: BaseException) -> None:
        """End a request that is not served. One that is served is cancelled."""
        if request.claim("withdrawn"):
            self._end(request, error)
            return
        if not isinstance(error, OrionError):  # Ctrl-C
            text = f"request {request.id} was interrupted: {described(error)}"
            error = RequestCancelledError(text, request_id=request.id)
        request.scope.cancel(error)

    def _end(self, request: Request, error: BaseException) -> None:
        """End a request without an answer, unless it has ended. If a signal came in between, do the
        rest."""
        if request.future.done() and request.ending is None:
            # What follows an answer has failed: the answer is given.
            self._report_end(request.id, error, is_cancelled=False)
            return
        error = request.ending = request.ending or error
        is_cancelled = isinstance(error, RequestCancelledError)
        outcome: Outcome = "cancelled" if is_cancelled else "failed"
        try:
            route = request.account.route
            if not request.lifecycle.state.is_final:
                if route is not None and request.stream.has_text and request.stream.is_observed:
                    self._note_turn(request, route.agent_id)  # the beginning of it was read
                request.lifecycle.move("cancel" if is_cancelled else "fail")
            if self._book.end(request, outcome):
                if not is_cancelled:
                    self._counters.failed(error)
                self._report_end(request.id, error, is_cancelled=is_cancelled)
        finally:
            self._let_go(request, outcome, lambda: request.fail(error))

    def _report_end(self, request_id: str, error: BaseException, *, is_cancelled: bool) -> None:
        if is_cancelled:
            self._events.publish(RequestCancelled(request_id=request_id, error=described(error)))
            return
        level: Level = "info" if isinstance(error, OrionError) else "error"
        text, shown = None, described(error)
        if type(error) is InvalidRequestError or not isinstance(error, OrionError):
            text, shown = message_of(error), type(error).__name__  # it may quote the caller
        self._events.publish(
            RequestFailed(request_id=request_id, error=shown, text=text, level=level)
        )

    def _note_turn(self, request: Request, agent_id: str) -> None:
        """Report the agent of a conversation to the router."""
        if request.session_id is not None and self._session_router is not None:
            self._notes.put((request.session_id, agent_id))

    def _let_go(self, request: Request, outcome: Outcome, end: Callable[[], None]) -> None:
        """Give back the place of a request, and end it, whatever fails on the way."""
        try:
            request.leave()
            if request.has_deadline:
                self._deadlines.forget(request.scope)
        finally:
            self._book.end(request, outcome)
            end()


@lru_cache(_KNOWN_AGENTS)
def _route_by_name(agent_id: str) -> Route:
    return Route(agent_id=agent_id, confidence=1.0, reason="asked for by name")


def serve(queued: Queued) -> None:
    """Answer a request by its own pipeline. The threads of a queue refer to nothing else."""
    queued.serve(queued)


def _notes_to(router: Router, events: EventLog) -> Delivery[tuple[str, str]]:
    """Takes a session and its agent, for a router that notes them: code of the application, which
    must keep no request from its end."""

    def note(turn: tuple[str, str]) -> None:
        if isinstance(router, SessionRouter):
            router.note(*turn)

    return Delivery(note, lambda error: events.note_failure("router note", router, error))


def _report_state(events: EventLog, request_id: str, old: RequestState, new: RequestState) -> None:
    events.publish(RequestStateChanged(request_id=request_id, old=old, new=new))
