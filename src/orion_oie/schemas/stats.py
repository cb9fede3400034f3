"""Statistics and health of an engine, its models and its machine."""

from enum import StrEnum
from typing import Literal

from orion_oie.schemas.base import Schema
from orion_oie.schemas.results import ModelInfo

DeviceKind = Literal["cpu", "cuda", "rocm", "metal", "vulkan", "other"]


class Device(Schema):
    """Something that llama.cpp can compute with. A size is None where the device does not say.

    `free_bytes` is as of when it was asked, and of a CPU as llama.cpp sees it, without the limits
    of a container.
    """

    name: str
    kind: DeviceKind
    description: str = ""
    total_bytes: int | None = None
    free_bytes: int | None = None


class Hardware(Schema):
    """The machine as the engine sees it.

    `usable_cores` honours affinity and the quota of a container (`core_quota`, in cores);
    `usable_physical_cores` counts two threads of one core once. Where the system does not tell
    physical cores, they are the logical ones. `cpu_features` are those that llama.cpp has kernels
    for, by its names. `memory_total_bytes` is the machine's memory, or the container's limit
    (`memory_limit_bytes`) if that is less; so much of it as `memory_available_bytes` could be had
    now.
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
    """One model in memory, for statistics. `users` counts requests that hold or await it;
    `reserved_bytes` is what it may take, out of the budget."""

    model: ModelInfo
    pid: int | None
    users: int
    is_loading: bool
    is_pinned: bool = False
    reserved_bytes: int = 0


class ModelStats(ResidentModel):
    """One model in memory. `memory_bytes` is the resident size of its process: its own memory and
    the pages of files that it looks at (`file_bytes`). `private_bytes` would come back if it ended;
    `shared_bytes` may be others', too."""

    memory_bytes: int | None
    private_bytes: int | None = None
    shared_bytes: int | None = None
    file_bytes: int | None = None


class MemoryStats(Schema):
    """Memory in bytes. `budget_bytes` is what models may take, `reserved_bytes` what those that are
    loaded may take of it, `workers_bytes` what their processes have now. `cache_bytes` is the size
    of the cache on the disk, once it was looked at. `recommendations` say what to do, if anything.
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
    """What came of loading ahead.

    Of all `predictions` (loads that nobody had asked for yet), `hits` were used, `wasted` were
    gone before that, and the others are still waiting for their user. `misses` are requests that
    had to load. `hit_rate` is hits of hits and misses; None before either.
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
    """What a breaker lets through."""

    CLOSED = "closed"  # everything
    OPEN = "open"  # nothing, until the reset timeout has passed
    HALF_OPEN = "half_open"  # one trial, whose outcome decides


class BreakerStats(Schema):
    """Counts since the start (or the last reset) and the present state of one breaker."""

    state: BreakerState
    successes: int
    failures: int
    consecutive_failures: int
    rejected: int
    opened: int
    retry_after_s: float


class EmbeddingStats(Schema):
    """What an embedding service was asked since it was made, and what sharing it saves.

    Of all `texts` in all `requests`, `hits` were in the cache, `coalesced` were being computed for
    somebody already (or stood twice in a request), and `misses` had to be computed; `hit_rate` is
    hits / texts, 0 before the first. They went to the embedder in `batches`, the largest of
    `largest_batch` texts.

    The cache holds `entries` vectors in 16 bits, which take `cache_bytes` with their keys. `users`
    have given their names. `model_bytes` is what one loaded model takes, 0 if nobody says so.
    `saved_bytes` is what is not taken because the users share: (users - 1) * model_bytes, never
    below 0, and the two bytes by which each number in the cache is shorter than a float32.
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
    """What an engine did and what it holds. `embeddings` is None until something was
    embedded."""

    requests: RequestCounts
    waiting: int
    running: int
    models: dict[str, ModelStats]
    memory: MemoryStats
    prediction: PredictionStats
    breakers: dict[str, BreakerStats]
    hardware: Hardware
    embeddings: EmbeddingStats | None = None


class Health(Schema):
    """Whether an engine can answer, and what is wrong if not fully."""

    status: Literal["healthy", "degraded", "down"]
    reasons: list[str] = []
