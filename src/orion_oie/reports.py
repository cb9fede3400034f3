"""Shapes in which an engine tells of itself, its models and its machine. They hold no behaviour.

Apart from the rooms that fill them in, so that a mere import of the library needs none of those.
"""

from enum import StrEnum
from typing import Literal

from orion_oie.schemas import ModelInfo, Route, Schema

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


class QuantizationLevel(StrEnum):
    """How far the weights of a variant are reduced, by bits for each weight."""

    Q4 = "q4"  # up to 6: Q4 and Q5 of every kind, and all that is smaller (Q1 to Q3, IQ, TQ)
    Q8 = "q8"  # up to 9: Q6_K and Q8_0
    F16 = "f16"  # 16: F16 and BF16
    F32 = "f32"  # as most models were computed with


class ConsideredVariant(Schema):
    """One variant that could have been chosen, and why it was or was not."""

    variant: str
    quantization: str
    level: QuantizationLevel | None
    is_chosen: bool
    reason: str


class VariantChoice(Schema):
    """The variant to use, None when none can be; and why. `reduction` is the share of the size
    that it saves against 32 bits for each weight: 0.84 is five bits instead of 32."""

    variant: str | None
    reason: str
    considered: list[ConsideredVariant] = []
    reduction: float | None = None


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


class PlannedModel(Schema):
    """One model of the chain. `needed_bytes` is the memory it may take, None where that cannot be
    known; `why_not` says why it would not be tried, empty if it would. `variant` explains the
    quantization."""

    agent_id: str
    model_id: str
    role: str
    variant: VariantChoice
    is_here: bool
    is_loaded: bool
    needed_bytes: int | None = None
    is_measured: bool = False
    why_not: str = ""


class Plan(Schema):
    """What a request would do now.

    `model` would answer; None when none could. `loads` says whether it would have to be loaded,
    `evicts` what would be unloaded for it, `waits_for` which models in use would have to become
    idle first. `fetch_bytes` would be downloaded. `load_s` estimates the load: None when it cannot
    be known, because of a download. `answer_in_s` is when the model could begin to answer if no
    other request came before: None when that depends on a download, or on others who use memory.
    `considered` is the whole chain, in its order.
    """

    route: Route
    model: PlannedModel | None
    loads: bool = False
    evicts: list[str] = []
    waits_for: list[str] = []
    fetch_bytes: int = 0
    load_s: float | None = 0.0
    answer_in_s: float | None = None
    budget_bytes: int
    reserved_bytes: int
    waiting: int = 0
    considered: list[PlannedModel] = []
