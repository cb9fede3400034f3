"""What an engine says of itself: statistics and health. Changes nothing."""

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Literal

from orion_oie import hardware
from orion_oie.breaker import BreakerBoard, BreakerState, BreakerStats
from orion_oie.config import EngineConfig
from orion_oie.hardware import Hardware
from orion_oie.housekeeping import Housekeeper
from orion_oie.memory import probe
from orion_oie.memory.pressure import PressureLevel
from orion_oie.pool import ResidentModel
from orion_oie.prediction import PredictionStats
from orion_oie.request import Request
from orion_oie.scheduling import RequestQueue
from orion_oie.schemas import Schema
from orion_oie.standings import Standings
from orion_oie.telemetry import RequestCounts
from orion_oie.watchdog import Activity, stuck

if TYPE_CHECKING:  # with numpy, for who embeds something
    from orion_oie.embeddings.stats import EmbeddingStats


class ModelStats(ResidentModel):
    """One model in memory. `memory_bytes` is the resident size of its process: its own memory and
    the pages of files that it looks at. `private_bytes` would come back if it ended."""

    memory_bytes: int | None
    private_bytes: int | None = None


class MemoryStats(Schema):
    """Memory in bytes. `budget_bytes` is what models may take, `reserved_bytes` what those that are
    loaded may take of it, `workers_bytes` what their processes have now. `cache_bytes` is the size
    of the cache on the disk, once it was looked at. `recommendations` say what to do, if anything.
    """

    pressure: PressureLevel
    budget_bytes: int
    is_budget_automatic: bool
    reserved_bytes: int
    workers_bytes: int
    total_bytes: int
    available_bytes: int
    limited_by: Literal["system", "cgroup"]
    cache_bytes: int | None = None
    recommendations: list[str] = []


class EngineStats(Schema):
    """What an engine did and what it holds. `embeddings` is None, or an `EmbeddingStats` once
    something was embedded."""

    requests: RequestCounts
    waiting: int
    running: int
    models: dict[str, ModelStats]
    memory: MemoryStats
    prediction: PredictionStats
    breakers: dict[str, BreakerStats]
    hardware: Hardware
    embeddings: object | None = None


class Health(Schema):
    """Whether an engine can answer, and what is wrong if not fully."""

    status: Literal["healthy", "degraded", "down"]
    reasons: list[str] = []


class Observer:
    """Looks at the parts of an engine. `live` gives the requests that have not ended."""

    def __init__(
        self,
        config: EngineConfig,
        keeper: Housekeeper,
        standings: Standings,
        queue: RequestQueue[Request],
        breakers: BreakerBoard,
        live: Callable[[], Collection[Request]],
    ) -> None:
        self._config = config
        self._keeper = keeper
        self._standings = standings
        self._queue = queue
        self._breakers = breakers
        self._live = live

    def stats(
        self,
        requests: RequestCounts,
        prediction: PredictionStats,
        embeddings: "EmbeddingStats | None",
    ) -> EngineStats:
        """All of it, now."""
        models = {key: _model_stats(one) for key, one in self._keeper.pool.residents().items()}
        waiting = len(self._queue)
        return EngineStats(
            requests=requests,
            waiting=waiting,
            running=max(0, len(self._live()) - waiting),
            models=models,
            memory=self._memory(models),
            prediction=prediction,
            breakers=self._breakers.stats(),
            hardware=hardware.detect([stats.model.device for stats in models.values()]),
            embeddings=embeddings,
        )

    def reasons(self) -> list[str]:
        """What is not as it should be."""
        reasons = [
            f"{name} is {stats.state.value} after {stats.consecutive_failures} failures"
            for name, stats in self._breakers.stats().items()
            if stats.state is not BreakerState.CLOSED
        ]
        if len(self._queue) >= self._config.max_queue:
            reasons.append(f"the queue is full ({self._config.max_queue} requests)")
        if self._keeper.monitor.level >= PressureLevel.HIGH:
            reasons += self._keeper.monitor.recommendations()
        return reasons + stuck(self._activities(), self._config.stuck_after_s)

    def _memory(self, models: Mapping[str, ModelStats]) -> MemoryStats:
        system = probe.system_memory()
        latest = self._keeper.monitor.latest
        self._keeper.budget.refresh()
        return MemoryStats(
            pressure=self._keeper.monitor.level,
            budget_bytes=self._keeper.budget.bytes(),
            is_budget_automatic=self._keeper.budget.is_automatic,
            reserved_bytes=self._keeper.pool.reserved_bytes,
            workers_bytes=sum(one.memory_bytes or 0 for one in models.values()),
            total_bytes=system.total_bytes,
            available_bytes=system.available_bytes,
            limited_by=system.limited_by,
            cache_bytes=None if latest is None else latest.cache_bytes,
            recommendations=self._keeper.monitor.recommendations(),
        )

    def _activities(self) -> list[Activity]:
        residents = self._keeper.pool.residents()
        waiting = {one.item: one for one in self._queue.waiting()}
        activities = []
        for request in self._live():
            queued = waiting.get(request)
            key = queued.model if queued is not None else request.target
            standing = None if queued is None else self._standings.standing(queued.model)
            resident = residents.get(key)
            activities.append(
                Activity(
                    request_id=request.id,
                    state="the queue" if queued is not None else request.lifecycle.state.value,
                    quiet_s=request.lifecycle.quiet_s(),
                    model=key or None,
                    pid=None if resident is None else resident.pid,
                    why="" if queued is None else queued.reason,
                    blockers=frozenset() if standing is None else standing.blockers,
                )
            )
        return activities


def _model_stats(resident: ResidentModel) -> ModelStats:
    memory = None if resident.pid is None else probe.process_memory(resident.pid)
    return ModelStats(
        **dict(resident),
        memory_bytes=None if memory is None else memory.resident_bytes,
        private_bytes=None if memory is None else memory.private_bytes,
    )
