"""The configuration of an engine: typed sections by subject, checked once when they are made.

Fields are described by `Field(description=...)`: pydantic can read docstrings below the fields
too, but that takes a tenth of the library's import time.
"""

from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from orion_oie.errors import InvalidRequestError
from orion_oie.schemas.base import LONGEST_WAIT_S
from orion_oie.schemas.validation import problems_of

RouteStage = Literal["explicit", "hints", "sessions", "linear", "embeddings", "tie_break"]
"""A stage of the router.

explicit: raises the odds of an agent that is asked for outright, as in "translate into Dutch".
hints: looks for the keywords, phrases, patterns and examples of the registry.
sessions: lets a turn of a conversation stay with its agent.
linear: scores the topics of a question with trained weights. Without it, the keywords and
    examples of the registry decide.
embeddings: asks the embedding model when the weights are not sure. The model must be on this
    machine: the router never downloads it.
tie_break: asks a language model that is in memory which of two close agents suits the question.
"""

_Seconds = Annotated[float, Field(gt=0, le=LONGEST_WAIT_S)]

_is_nested = ContextVar("_is_nested", default=False)


class _Section(BaseModel):
    """Base of the configuration and its sections: immutable, strict, no unknown keys.

    Raises `InvalidRequestError` with every problem found.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    def __init__(self, **settings: Any) -> None:
        if _is_nested.get():  # the outermost model collects the problems of all sections
            super().__init__(**settings)
            return
        token = _is_nested.set(True)
        try:
            super().__init__(**settings)
        except ValidationError as error:
            problems = problems_of(error, type(self), whole=EngineConfig)
            raise InvalidRequestError(
                f"{type(self).__name__}: " + "; ".join(problems), problems=problems
            ) from error
        finally:
            _is_nested.reset(token)


_S = TypeVar("_S", bound=_Section)
_OrDict = Annotated[_S, Field(strict=False)]
"""A section that may also be given as a dictionary."""


class ServingConfig(_Section):
    """The queue of requests, and the loaded models that answer them."""

    slots: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Requests that one loaded model answers at the same time. None takes 4 for "
        "each usable core, at most 16, fewer where memory is short.",
    )

    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Most threads of one loaded model. None takes the usable cores.",
    )

    adaptive_threads: bool = Field(
        default=True,
        description="Use fewer threads while other programs use the cores. With False a model that "
        "computes alone always uses all its threads.",
    )

    nice: int = Field(
        default=0,
        ge=0,
        le=19,
        description="Added to the niceness of the processes that compute: with 19 they take what "
        "other programs leave.",
    )

    cpu_affinity: Annotated[tuple[int, ...], Field(min_length=1, strict=False)] | None = Field(
        default=None,
        description="Numbers of the logical cores on which models may compute, on Linux. None "
        "takes those of the application.",
    )

    context_length: int | None = Field(
        default=None,
        ge=64,
        lt=2**31,
        description="Tokens of context of one loaded model, shared by its slots. None takes the "
        "model's own limit, at most 4096.",
    )

    gpu_layers: Annotated[int, Field(ge=0, lt=2**31)] | Literal["auto"] = Field(
        default="auto",
        description='Layers of a model that run on GPUs, the output layer first; "auto" puts as '
        "many there as fit. What fails on a GPU runs on the CPU.",
    )

    max_queue: int = Field(
        default=256, ge=1, description="Requests that may wait. One more raises `QueueFullError`."
    )

    model_turn_s: _Seconds = Field(
        default=10.0,
        description="Longest time for which a model is served while other models, which have no "
        "space beside it, have requests waiting.",
    )

    priority_aging_s: _Seconds = Field(
        default=30.0, description="Extra waiting time that counts as one step of priority."
    )

    stuck_after_s: _Seconds = Field(
        default=60.0,
        description="Time without progress after which `engine.health()` reports a request as "
        "stuck.",
    )

    cancel_grace_s: _Seconds = Field(
        default=5.0, description="Time a worker has to confirm a cancellation before it is ended."
    )

    @property
    def slot_count(self) -> int:
        """`slots` as a number. Raises `ValueError` until an engine has resolved it."""
        if self.slots is None:
            raise ValueError("serving.slots is None: only an engine resolves it")
        return self.slots


class MemoryConfig(_Section):
    """Limits of memory and of disk space."""

    budget: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Bytes that all loaded models may take together; idle models are evicted to "
        'stay within it. "auto" is what the machine can spare, and follows it.',
    )

    max_models: int | None = Field(
        default=None,
        ge=1,
        description="Most models in memory, whatever their size. None leaves it to the budget.",
    )

    pinned: list[str] = Field(
        default=[], description="Agents whose models are never evicted once they are loaded."
    )

    host_cache_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Memory of one loaded model for the states of idle conversations and of "
        "system prompts, outside the KV cache. None takes as much as the KV cache "
        "has, 0 keeps none.",
    )

    prefix_store_bytes: int = Field(
        default=2**30,
        ge=0,
        description="Disk space for the states of agents' system prompts, in "
        "`download.cache_dir`. A worker that starts again reads them instead of "
        "computing them. 0 keeps none.",
    )


class ShardingConfig(_Section):
    """Splitting of a model that is computed while it is downloaded."""

    enabled: bool = Field(
        default=True,
        description="Compute while the model arrives, where that is possible. Otherwise it is "
        "downloaded first.",
    )

    num_shards: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="Shards of a model that is one file. The files of a split model are its "
        "shards.",
    )

    initial_shards: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="Shards that must have arrived before anything is computed.",
    )

    priority_layers: list[Annotated[int, Field(ge=0)] | Literal["embedding", "output"]] = Field(
        default=[],
        description="Layers that are downloaded before everything else: their numbers, "
        '"embedding", "output". By default each layer comes when the first forward pass needs it.',
    )


class LoadingConfig(_Section):
    """Loading of models into memory."""

    strategy: Literal["progressive", "sequential"] = Field(
        default="progressive",
        description='"progressive" answers as early as possible: a model is computed while it '
        "arrives, and the agent's lite model may stand in for it meanwhile. "
        '"sequential" downloads and loads the whole model before it answers.',
    )

    timeout_s: _Seconds = Field(
        default=600.0,
        description="Longest time of a load. A slower one raises `WorkerTimeoutError`; "
        "downloading does not count.",
    )

    keep_spare_worker: bool = Field(
        default=True,
        description="Keep one worker process started and idle while memory is plentiful, so "
        "that a load starts at once.",
    )

    lite_first: bool = Field(
        default=True,
        description="Let the lite model answer while a model arrives, with the progressive "
        "strategy.",
    )

    predictive: bool = Field(
        default=True,
        description="Load the model of the agent that is likely to be asked next, while memory "
        "is plentiful and nothing waits.",
    )

    sharding: _OrDict[ShardingConfig] = Field(
        default_factory=ShardingConfig,
        description="Splitting of a model that is computed while it is downloaded.",
    )


class DownloadConfig(_Section):
    """Downloads of model files."""

    auto: bool | None = Field(
        default=None,
        description="Download models that are not on this machine when they are needed. None "
        'does so for a model that is named by its address, as `model="hf:org/repo"` does; '
        "False never.",
    )

    cache_dir: str | Path | None = Field(
        default=None,
        description="Folder of downloaded models. None takes `ORION_CACHE_DIR` or the user's "
        "cache folder.",
    )

    connections: int = Field(default=4, ge=1, le=32, description="Connections at once.")

    bytes_per_s: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Highest speed of all connections together. None sets no limit."
    )

    retries: int = Field(
        default=5,
        ge=0,
        le=100,
        description="Retries of a byte range without progress before the download fails.",
    )

    timeout_s: _Seconds = Field(
        default=30.0, description="Silence of a connection that counts as a failed attempt."
    )


class BreakerConfig(_Section):
    """Circuit breakers, which pause operations that keep failing."""

    enabled: bool = Field(default=True, description="Pause operations that keep failing.")

    failure_threshold: int = Field(
        default=3, ge=1, description="Failures in a row after which an operation is paused."
    )

    reset_timeout_s: _Seconds = Field(
        default=30.0, description="Pause before the operation is tried again."
    )


class RouterConfig(_Section):
    """Choice of the agent that answers a question."""

    threshold: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Confidence below which the conversation agent answers.",
    )

    stages: Annotated[tuple[RouteStage, ...], Field(strict=False)] = Field(
        default=("explicit", "hints", "sessions", "linear", "embeddings"),
        description="Stages in use, see `RouteStage`. Their order does not matter.",
    )

    weights: str | Path | None = Field(
        default=None,
        description="File of `LinearModel.save` to use instead of the weights that come with "
        'the library. Needs the stage "linear".',
    )

    residency_s: float = Field(
        default=5.0,
        ge=0,
        le=LONGEST_WAIT_S,
        description="Seconds of loading from which an agent whose model is in memory may "
        "be preferred to a nearly equal one. 0 never prefers it.",
    )

    feedback: str | Path | None = Field(
        default=None,
        description="File to which `result.feedback` appends questions. None stores nothing.",
    )

    @field_validator("stages")
    @classmethod
    def _each_stage_once(cls, stages: tuple[RouteStage, ...]) -> tuple[RouteStage, ...]:
        for stage in stages:
            if stages.count(stage) > 1:
                raise ValueError(f"'{stage}' is named more than once")
        return stages

    @model_validator(mode="after")
    def _weights_are_read(self) -> "RouterConfig":
        if self.weights is not None and "linear" not in self.stages:
            raise ValueError(
                "weights names a file, and stages without 'linear' read no weights: "
                "leave out weights or add 'linear'"
            )
        return self


class EmbeddingConfig(_Section):
    """The embedding model and its cache."""

    model: str | None = Field(
        default=None,
        description='Model of `engine.embed`: one of the registry, or "sentence-transformers:" '
        "and a name or folder. None takes the registry's first one of type "
        "`embedding`.",
    )

    cache_entries: int = Field(
        default=200, ge=0, description="Texts whose embeddings are remembered."
    )


class GuardrailConfig(_Section):
    """Limits of a request's content."""

    max_query_chars: int = Field(
        default=1_000_000, ge=1, description="Longest question accepted, in characters."
    )


class LogConfig(_Section):
    """Content and length of the event log."""

    include_content: bool = Field(
        default=False, description="Put prompts and answers into events instead of redacting them."
    )

    max_events: int = Field(
        default=1000, ge=0, description="Recent events kept for `engine.export_logs()`."
    )


class EngineConfig(_Section):
    """The configuration of one engine. A section may be given as a dictionary:
    `EngineConfig(serving={"slots": 2})`.

    Raises `InvalidRequestError` with every problem found.
    """

    stand_in: Literal["warn", "allow", "error"] = Field(
        default="warn",
        description="Answers of another model than the one that an agent or a caller names. "
        '"warn" gives them, with an `OrionWarning` once for each agent and process, and '
        '`engine.health()` names them; "allow" is silent; "error" raises why the wanted model '
        "cannot answer. `result.is_stand_in` tells in any case.",
    )

    shutdown_timeout_s: Annotated[float, Field(ge=0, le=LONGEST_WAIT_S)] = Field(
        default=10.0,
        description="Time that requests under way have to end by themselves when the engine is "
        "shut down.",
    )

    serving: _OrDict[ServingConfig] = Field(
        default_factory=ServingConfig,
        description="The queue of requests, and the loaded models that answer them.",
    )

    memory: _OrDict[MemoryConfig] = Field(
        default_factory=MemoryConfig, description="Limits of memory and of disk space."
    )

    loading: _OrDict[LoadingConfig] = Field(
        default_factory=LoadingConfig, description="Loading of models into memory."
    )

    download: _OrDict[DownloadConfig] = Field(
        default_factory=DownloadConfig, description="Downloads of model files."
    )

    breaker: _OrDict[BreakerConfig] = Field(
        default_factory=BreakerConfig,
        description="Circuit breakers, which pause operations that keep failing.",
    )

    router: _OrDict[RouterConfig] = Field(
        default_factory=RouterConfig, description="Choice of the agent that answers a question."
    )

    embeddings: _OrDict[EmbeddingConfig] = Field(
        default_factory=EmbeddingConfig, description="The embedding model and its cache."
    )

    guardrails: _OrDict[GuardrailConfig] = Field(
        default_factory=GuardrailConfig, description="Limits of a request's content."
    )

    logs: _OrDict[LogConfig] = Field(
        default_factory=LogConfig, description="Content and length of the event log."
    )
