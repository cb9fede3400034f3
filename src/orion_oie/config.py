"""The engine's configuration: typed, checked once when it is made, unknown keys are errors."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from orion_oie.errors import InvalidRequestError
from orion_oie.schemas.base import LONGEST_WAIT_S
from orion_oie.schemas.validation import problems_of


def _default_slots() -> int:
    # What the machine offers is of no interest to a mere import of the library.
    from orion_oie.hardware.machine import default_slots

    return default_slots()


class BreakerConfig(BaseModel):
    """When a failing operation is paused, and for how long."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    failure_threshold: int = Field(default=3, ge=1)
    reset_timeout_s: float = Field(default=30.0, gt=0, le=LONGEST_WAIT_S)


class DownloadConfig(BaseModel):
    """How files are fetched: `connections` at once, at most `bytes_per_s` in all, each range tried
    again `retries` times without progress; a connection that is silent for `timeout_s` is one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    connections: int = Field(default=4, ge=1, le=32)
    bytes_per_s: Annotated[float, Field(gt=0)] | None = None
    retries: int = Field(default=5, ge=0, le=100)
    timeout_s: float = Field(default=30.0, gt=0, le=LONGEST_WAIT_S)


class ShardingConfig(BaseModel):
    """How a model that is fetched is taken apart.

    enabled: compute while it arrives, where that is possible; else it is fetched first.
    num_shards: parts of a model that is one file; the files of a split model are its parts.
    initial_shards: parts that must be here before anything is computed.
    priority_layers: what is fetched before everything else: numbers of layers, "embedding",
        "output"; by default each layer comes when the first forward pass needs it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    enabled: bool = True
    num_shards: int = Field(default=8, ge=1, le=1024)
    initial_shards: int = Field(default=0, ge=0, le=1024)
    priority_layers: list[Annotated[int, Field(ge=0)] | Literal["embedding", "output"]] = []


class EngineConfig(BaseModel):
    """Settings of one engine.

    slots: requests that one loaded model answers at the same time; by default 4 for each usable
        core, at most 16, fewer where memory is short.
    memory_budget: bytes that all loaded models may take together; idle ones make room for others.
        "auto" is what the machine can spare, and follows it.
    max_models: most models kept in memory, whatever their size; None leaves it to the budget.
    pinned: agents whose models are never unloaded to make room, once they are loaded.
    max_queue: requests that may wait; one more raises `QueueFullError`.
    model_turn_s: while requests for other models wait that have no room beside it, a model is
        served for at most so long.
    priority_aging_s: a request that waited so much longer than another counts as one priority
        higher.
    stuck_after_s: `engine.health()` names a request that made no progress for so long.
    enable_predictive_loading: load the model of the agent that is likely to be asked next, while
        memory is plentiful and nothing waits.
    context_length: tokens of context per loaded model, shared by its slots; None takes the
        model's own limit, at most 4096.
    threads: threads of one loaded model; None takes the usable cores.
    gpu_layers: layers of a model that go to GPUs, the output layer first; "auto" puts as many there
        as fit. What fails on the GPU goes on on the CPU.
    parked_bytes: memory per loaded model for the state of silent conversations and of system
        prompts, outside the KV cache; None takes as much as the cache has, 0 keeps none.
    embedding_model: what `engine.embed` embeds with: a model of the registry, or
        "sentence-transformers:" and a name or folder; None takes the registry's first one of type
        `embedding`.
    embedding_cache_entries: texts whose embeddings are remembered.
    max_query_chars: longest question accepted, in characters.
    loading_strategy: "progressive" answers as early as it can: a model that is not in memory is
        computed while it arrives, and the agent's lite model may stand in for it meanwhile;
        "sequential" fetches and loads the whole model first, and waits for it.
    enable_stand_in: with the progressive strategy, let the lite model answer meanwhile.
    auto_download: fetch models that are not on this machine when they are needed.
    cache_dir: where fetched models lie; None takes `ORION_CACHE_DIR` or the user's cache folder.
    download, sharding: how models are fetched, and how they are taken apart.
    snapshot_bytes: disk space for the states of agents' system prompts, in `cache_dir`; a worker
        that starts again reads them instead of computing them. 0 keeps none.
    keep_warm: have one worker process started and idle while memory is plentiful, so that a load
        starts at once.
    load_timeout_s: a load that takes longer raises `WorkerTimeoutError`; fetching does not count.
    cancel_grace_s: a worker that has not confirmed a cancel by then is ended.
    router_threshold: confidence under which the conversation agent answers.
    enable_linear_router: let the trained weights say which topic a question is of; without them,
        the keywords and examples of the registry decide.
    enable_neural_router: let the embedding model look at questions of which the weights are not
        sure, when it is on this machine. It is never fetched for that.
    enable_route_wishes: raise the odds of what is asked for outright, as in "translate into Dutch".
    enable_route_hints: look for the keywords, phrases, patterns and examples of the registry.
    enable_route_sessions: let a turn of a conversation stay with its agent.
    router_weights: a file of `LinearModel.save`, instead of the weights that come with the library;
        not with `enable_linear_router=False`, which reads none.
    route_residency_s: seconds of loading from which on an agent whose model is in memory may be
        taken instead of a near-equal one, 0 never.
    enable_route_tie_break: ask a language model that is in memory which of two close agents it is.
    router_feedback: the file that `result.feedback` appends questions to; None stores nothing.
    log_content: put prompts and answers into log events instead of redacting them.
    log_events: number of recent events kept for `engine.export_logs()`.

    Raises `InvalidRequestError` with every problem found.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    enable_circuit_breaker: bool = True
    breaker: BreakerConfig = Field(default_factory=BreakerConfig, strict=False)
    slots: int = Field(default_factory=_default_slots, ge=1, le=64)
    memory_budget: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    max_models: int | None = Field(default=None, ge=1)
    pinned: list[str] = []
    max_queue: int = Field(default=256, ge=1)
    model_turn_s: float = Field(default=10.0, gt=0, le=LONGEST_WAIT_S)
    priority_aging_s: float = Field(default=30.0, gt=0, le=LONGEST_WAIT_S)
    stuck_after_s: float = Field(default=60.0, gt=0, le=LONGEST_WAIT_S)
    enable_predictive_loading: bool = True
    context_length: int | None = Field(default=None, ge=64, lt=2**31)
    threads: int | None = Field(default=None, ge=1, le=1024)
    gpu_layers: Annotated[int, Field(ge=0, lt=2**31)] | Literal["auto"] = "auto"
    parked_bytes: int | None = Field(default=None, ge=0)
    loading_strategy: Literal["progressive", "sequential"] = "progressive"
    enable_stand_in: bool = True
    auto_download: bool = False
    cache_dir: str | Path | None = None
    download: DownloadConfig = Field(default_factory=DownloadConfig, strict=False)
    sharding: ShardingConfig = Field(default_factory=ShardingConfig, strict=False)
    snapshot_bytes: int = Field(default=2**30, ge=0)
    keep_warm: bool = True
    embedding_model: str | None = None
    embedding_cache_entries: int = Field(default=200, ge=0)
    max_query_chars: int = Field(default=1_000_000, ge=1)
    load_timeout_s: float = Field(default=600.0, gt=0, le=LONGEST_WAIT_S)
    cancel_grace_s: float = Field(default=5.0, gt=0, le=LONGEST_WAIT_S)
    router_threshold: float = Field(default=0.25, ge=0, le=1)
    enable_linear_router: bool = True
    enable_neural_router: bool = True
    enable_route_wishes: bool = True
    enable_route_hints: bool = True
    enable_route_sessions: bool = True
    router_weights: str | Path | None = None
    route_residency_s: float = Field(default=5.0, ge=0, le=LONGEST_WAIT_S)
    enable_route_tie_break: bool = False
    router_feedback: str | Path | None = None
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

    @model_validator(mode="after")
    def _weights_are_read(self) -> "EngineConfig":
        if self.router_weights is not None and not self.enable_linear_router:
            raise ValueError(
                "router_weights names a file, and enable_linear_router=False reads no weights: "
                "leave out one of them"
            )
        return self
