"""Reads the statistics and the health of an engine from its parts. Changes nothing."""

from collections.abc import Mapping, Sequence, Set
from heapq import nlargest
from operator import itemgetter

from orion_oie.config import EngineConfig
from orion_oie.engine.breaker import BreakerBoard
from orion_oie.engine.lifecycle import RequestState
from orion_oie.engine.request import Queued, Request
from orion_oie.engine.scheduling.queue import RequestQueue
from orion_oie.engine.stand_ins import StandIns
from orion_oie.engine.watchdog import IDLE_S, Activity, idle, stuck
from orion_oie.errors import EngineClosedError
from orion_oie.hardware import machine, probe
from orion_oie.hardware.pressure import PressureLevel
from orion_oie.pool.memory_manager import MemoryManager
from orion_oie.schemas.stats import (
    BreakerState,
    EmbeddingStats,
    EngineStats,
    Health,
    MemoryStats,
    ModelStats,
    PredictionStats,
    RequestCounts,
    ResidentModel,
)
from orion_oie.telemetry.event_log import EventLog

_NAMED = 20  # at most that many requests are named one by one


class Observer:
    """Reads the state of an engine's parts. `live` are the requests that have not ended."""

    def __init__(
        self,
        config: EngineConfig,
        memory: MemoryManager,
        queue: RequestQueue[Queued],
        breakers: BreakerBoard,
        stand_ins: StandIns,
    ) -> None:
        self._config = config
        self._memory = memory
        self._queue = queue
        self._breakers = breakers
        self._stand_ins = stand_ins

    def stats(
        self,
        live: Sequence[Request],
        requests: RequestCounts,
        prediction: PredictionStats,
        embeddings: EmbeddingStats | None,
        events: EventLog,
    ) -> EngineStats:
        """The statistics of all parts."""
        models = {key: _model_stats(one) for key, one in self._memory.pool.residents().items()}
        waiting = len(self._queue)
        return EngineStats(
            requests=requests,
            stand_ins=self._stand_ins.count,
            waiting=waiting,
            running=max(0, len(live) - waiting),
            models=models,
            memory=self._memory_stats(models),
            prediction=prediction,
            breakers=self._breakers.stats(),
            hardware=machine.detect([stats.model.device for stats in models.values()]),
            embeddings=embeddings,
            callback_errors=events.failures,
            lost_events=events.lost,
        )

    def health(self, live: Sequence[Request]) -> Health:
        """The health: `degraded` if there is any reason."""
        reasons = self._reasons(live)
        return Health(status="degraded" if reasons else "healthy", reasons=reasons)

    def down(self, error: EngineClosedError) -> Health:
        """The health of an engine that cannot be used."""
        return Health(status="down", reasons=[error.message])

    def _reasons(self, live: Sequence[Request]) -> list[str]:
        """The reasons for which an engine is degraded, a sentence each."""
        reasons = [
            f"{name} is {stats.state.value} after {stats.consecutive_failures} failures"
            for name, stats in self._breakers.stats().items()
            if stats.state is not BreakerState.CLOSED
        ]
        if len(self._queue) >= self._config.serving.max_queue:
            reasons.append(f"the queue is full ({self._config.serving.max_queue} requests)")
        if self._memory.monitor.level >= PressureLevel.HIGH:
            reasons += self._memory.monitor.recommendations()
        reasons += self._stand_ins.reasons()
        return reasons + self._standstill(live)

    def _standstill(self, live: Sequence[Request]) -> list[str]:
        """The reasons that requests make no progress, if any makes none."""
        stuck_after_s = self._config.serving.stuck_after_s
        quiet = [(one.lifecycle.quiet_s(), one) for one in live]
        of_note = [pair for pair in quiet if pair[0] >= min(stuck_after_s, IDLE_S)]
        idle_s = self._idle_s()
        number = sum(quiet_s >= stuck_after_s for quiet_s, _ in of_note)
        if not of_note or (not number and idle_s < IDLE_S):
            return []
        named = nlargest(_NAMED, of_note, key=itemgetter(0))
        activities = self._activities(live, {one for _, one in named})
        more = max(0, number - _NAMED)
        return idle(activities, idle_s) + stuck(activities, stuck_after_s, more)

    def _idle_s(self) -> float:
        """Seconds for which nothing was run or loaded, and nothing left the queue."""
        idle_s = self._memory.pool.idle_s()
        return min(idle_s, self._queue.quiet_s()) if len(self._queue) else idle_s

    def _memory_stats(self, models: Mapping[str, ModelStats]) -> MemoryStats:
        system = probe.system_memory()
        latest = self._memory.monitor.latest
        self._memory.budget.refresh()
        return MemoryStats(
            pressure=self._memory.monitor.level.value,
            budget_bytes=self._memory.budget.bytes(),
            is_budget_automatic=self._memory.budget.is_automatic,
            reserved_bytes=self._memory.pool.reserved_bytes,
            workers_bytes=sum(one.memory_bytes or 0 for one in models.values()),
            total_bytes=system.total_bytes,
            available_bytes=system.available_bytes,
            limited_by=system.limited_by,
            cache_bytes=None if latest is None else latest.cache_bytes,
            recommendations=self._memory.monitor.recommendations(),
        )

    def _activities(self, live: Sequence[Request], named: Set[Request]) -> list[Activity]:
        """What some requests do, and those that do not wait in the queue."""
        residents = self._memory.pool.residents()
        delays = {queued.request: delay for queued, delay in self._queue.delays().items()}
        activities = []
        for request in live:
            delay, state = delays.get(request), request.lifecycle.state
            if delay is not None and request not in named:
                continue
            key = delay.model if delay is not None else request.target
            resident = residents.get(key)
            is_in_pool = state is RequestState.LOADING_AGENT and resident is None
            activities.append(
                Activity(
                    request_id=request.id,
                    state="the queue" if delay is not None else state.value,
                    quiet_s=request.lifecycle.quiet_s(),
                    model=key or None,
                    pid=None if resident is None else resident.pid,
                    why="" if delay is None else delay.reason,
                    blockers=frozenset() if delay is None else delay.blockers,
                    is_waiting=delay is not None or is_in_pool,
                )
            )
        return activities


def _model_stats(resident: ResidentModel) -> ModelStats:
    memory = None if resident.pid is None else probe.process_memory(resident.pid)
    if memory is None:
        return ModelStats(**dict(resident), memory_bytes=None)
    return ModelStats(
        **dict(resident),
        memory_bytes=memory.resident_bytes,
        private_bytes=memory.private_bytes,
        shared_bytes=memory.shared_bytes,
        file_bytes=memory.file_bytes,
    )
