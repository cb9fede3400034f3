"""Statistics and health of an engine, its models and its machine."""

from enum import StrEnum
from typing import Literal

from orion_oie.schemas.base import Schema
from orion_oie.schemas.results import ModelInfo

DeviceKind = Literal["cpu", "cuda", "rocm", "metal", "vulkan", "other"]


class Device(Schema):
    """A device that llama.cpp can compute with. A size is None if the device does not report it.

    free_bytes: as of the query; for a CPU, llama.cpp ignores the limits of a container.
    """

    name: str
    kind: DeviceKind
    description: str = ""
    total_bytes: int | None = None
    free_bytes: int | None = None


class Hardware(Schema):
    """The machine as the engine sees it.

    cpu_features: those that llama.cpp has kernels for, by its names. physical_cores: the logical
    ones if the system does not report physical cores. usable_cores: respects affinity and the quota
    of a container (`core_quota`, in cores). usable_physical_cores: counts two threads of one core
    once. memory_total_bytes: the machine's memory, or the container's limit (`memory_limit_bytes`)
    if that is less. memory_available_bytes: can be allocated now.
    """

    machine: str
    system: str
    cpu: str
    cpu_features: list[str]
    logical_cores: int
    physical_cores: int
    usable_cores: int
    usable_physical_cores: int
    core_quota: float | None = None
    memory_total_bytes: int
    memory_available_bytes: int
    memory_limit_bytes: int | None = None
    devices: list[Device]


class ResidentModel(Schema):
    """A model in memory. users: number of requests that hold it or wait for it. reserved_bytes: the
    part of the memory budget that it may use."""

    model: ModelInfo
    pid: int | None
    users: int
    is_loading: bool
    is_pinned: bool = False
    reserved_bytes: int = 0


class ModelStats(ResidentModel):
    """A model in memory, with measurements of its process. memory_bytes: resident size, including
    the file pages that it maps (`file_bytes`). private_bytes: would be freed if it ended.
    shared_bytes: memory that other processes may share."""

    memory_bytes: int | None
    private_bytes: int | None = None
    shared_bytes: int | None = None
    file_bytes: int | None = None


class MemoryStats(Schema):
    """Memory in bytes. budget_bytes: limit for all models. reserved_bytes: part of it reserved by
    loaded models. workers_bytes: resident size of their processes now. cache_bytes: size of the
    cache on the disk, None before it was measured. recommendations: advice in words, if any.
    """

    pressure: Literal["low", "medium", "high", "critical"]
    budget_bytes: int
    is_budget_automatic: bool
    reserved_bytes: int
    workers_bytes: int
    total_bytes: int
    available_bytes: int
    limited_by: Literal["system", "cgroup"]
    cache_bytes: int | None = None
    recommendations: list[str] = []


class PredictionStats(Schema):
    """Results of predictive loading.

    predictions: loads ahead of any request. hits: those that a request used. wasted: those that
    were unloaded unused; the rest are loaded and unused so far. misses: requests that had to load.
    hit_rate: hits / (hits + misses); None before either.
    """

    predictions: int = 0
    hits: int = 0
    misses: int = 0
    wasted: int = 0
    hit_rate: float | None = None
    enabled: bool = True


class RequestCounts(Schema):
    """Requests by outcome, and the tokens of those that were answered."""

    received: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    fallbacks: int = 0
    replays: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    errors: dict[str, int] = {}
    by_agent: dict[str, int] = {}


class BreakerState(StrEnum):
    """States of a circuit breaker, by the calls that it admits."""

    CLOSED = "closed"  # all
    OPEN = "open"  # none, until the reset timeout has passed
    HALF_OPEN = "half_open"  # one trial, whose outcome decides


class BreakerStats(Schema):
    """Counts of one breaker since the start or the last reset, and its current state."""

    state: BreakerState
    successes: int
    failures: int
    consecutive_failures: int
    rejected: int
    opened: int
    retry_after_s: float


class EmbeddingStats(Schema):
    """Statistics of an embedding service since its start, and the memory saved by sharing it.

    texts: number of texts in all `requests`. hits: texts found in the cache. coalesced: texts being
    computed for another request already, or repeated in one request. misses: texts that had to be
    computed. hit_rate: hits / texts, 0 before the first. batches: calls of the embedder;
    largest_batch: number of texts in the largest. entries: 16-bit vectors in the cache;
    cache_bytes: their size with their keys. users: users that have registered a name. model_bytes:
    memory of one loaded model, 0 if unknown. saved_bytes: (users - 1) * model_bytes, at least 0,
    plus the two bytes by which each number in the cache is shorter than a float32.
    """

    requests: int
    texts: int
    hits: int
    misses: int
    hit_rate: float
    coalesced: int
    batches: int
    largest_batch: int
    entries: int
    cache_bytes: int
    users: int
    model_bytes: int
    saved_bytes: int


class EngineStats(Schema):
    """Statistics of an engine. stand_ins: answers that another model than the wanted one gave.
    embeddings: None before the first embedding. callback_errors: calls to code of the application
    (subscribers, done callbacks, `on_event`, logging) that raised. lost_events: events that were
    not handed to a subscriber because thousands waited for it."""

    requests: RequestCounts
    stand_ins: int = 0
    waiting: int
    running: int
    models: dict[str, ModelStats]
    memory: MemoryStats
    prediction: PredictionStats
    breakers: dict[str, BreakerStats]
    hardware: Hardware
    embeddings: EmbeddingStats | None = None
    callback_errors: int = 0
    lost_events: int = 0


class Health(Schema):
    """The health of an engine: its ability to answer, with the reasons for any problem."""

    status: Literal["healthy", "degraded", "down"]
    reasons: list[str] = []
