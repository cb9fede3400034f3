"""The engine's configuration: typed, checked once when it is made, unknown keys are errors."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orion_oie.errors import InvalidRequestError
from orion_oie.hardware import default_slots
from orion_oie.schemas import LONGEST_WAIT_S
from orion_oie.validation import problems_of


class BreakerConfig(BaseModel):
    """When a failing operation is paused, and for how long."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    failure_threshold: int = Field(default=3, ge=1)
    reset_timeout_s: float = Field(default=30.0, gt=0, le=LONGEST_WAIT_S)


class EngineConfig(BaseModel):
    """Settings of one engine.

    slots: requests that one loaded model answers at the same time; by default 4 for each usable
        core, at most 16, fewer where memory is short.
    max_models: models kept in memory; the least recently used idle one makes room.
    max_queue: requests that may wait; one more raises `QueueFullError`.
    context_length: tokens of context per loaded model, shared by its slots; None takes the
        model's own limit, at most 4096.
    threads: threads of one loaded model; None takes the usable cores.
    parked_bytes: memory per loaded model for the state of silent conversations and of system
        prompts, outside the KV cache; None takes as much as the cache has, 0 keeps none.
    max_query_chars: longest question accepted, in characters.
    load_timeout_s: a load that takes longer raises `WorkerTimeoutError`.
    cancel_grace_s: a worker that has not confirmed a cancel by then is ended.
    router_threshold: confidence under which the conversation agent answers.
    log_content: put prompts and answers into log events instead of redacting them.
    log_events: number of recent events kept for `engine.export_logs()`.

    Raises `InvalidRequestError` with every problem found.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    enable_circuit_breaker: bool = True
    breaker: BreakerConfig = Field(default_factory=BreakerConfig, strict=False)
    slots: int = Field(default_factory=default_slots, ge=1, le=64)
    max_models: int = Field(default=2, ge=1)
    max_queue: int = Field(default=256, ge=1)
    context_length: int | None = Field(default=None, ge=64, lt=2**31)
    threads: int | None = Field(default=None, ge=1, le=1024)
    parked_bytes: int | None = Field(default=None, ge=0)
    max_query_chars: int = Field(default=1_000_000, ge=1)
    load_timeout_s: float = Field(default=600.0, gt=0, le=LONGEST_WAIT_S)
    cancel_grace_s: float = Field(default=5.0, gt=0, le=LONGEST_WAIT_S)
    router_threshold: float = Field(default=0.35, ge=0, le=1)
    log_content: bool = False
    log_events: int = Field(default=1000, ge=0)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            problems = problems_of(error, type(self))
            raise InvalidRequestError(
                "EngineConfig: " + "; ".join(problems), problems=problems
            ) from error
