"""The rooms of one engine, made and wired to each other.

Imported with the first engine instead of with the library: a mere `import orion_oie` should not pay
for all of them. None of the rooms knows the engine, so a forgotten one can be collected.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orion_oie.backends.base import Backend
from orion_oie.cancellation import DeadlineTimer
from orion_oie.config import EngineConfig
from orion_oie.embeddings.shared import SharedEmbeddings
from orion_oie.engine import reporting
from orion_oie.engine.availability import Standings
from orion_oie.engine.breaker import BreakerBoard
from orion_oie.engine.chain import Answerer
from orion_oie.engine.observer import Observer
from orion_oie.engine.planner import Planner
from orion_oie.engine.request import Request
from orion_oie.engine.router_embedder import RouterEmbedder
from orion_oie.engine.scheduling.queue import RequestQueue
from orion_oie.hardware.machine import default_slots
from orion_oie.models.registry import ModelRegistry
from orion_oie.pool.memory_manager import Housekeeper
from orion_oie.pool.pool import AgentPool
from orion_oie.pool.preloader import Preloader
from orion_oie.pool.variants import Placement
from orion_oie.routing.base import Router
from orion_oie.telemetry.counters import Counters
from orion_oie.telemetry.event_log import EventLog

if TYPE_CHECKING:
    from orion_oie.models.downloads.cache import ModelCache

_MODELS_AT_ONCE = 8


@dataclass(frozen=True)
class Rooms:
    """What an engine works with."""

    cache: "ModelCache"
    backend: Backend
    keeper: Housekeeper
    pool: AgentPool
    placement: Placement
    answerer: Answerer
    standings: Standings
    queue: RequestQueue[Request]
    preloader: Preloader
    embeddings: SharedEmbeddings
    planner: Planner
    observer: Observer
    router: Router


def resolved(config: EngineConfig) -> EngineConfig:
    """The configuration with the settings filled in that depend on the machine."""
    if config.serving.slots is not None:
        return config
    serving = config.serving.model_copy(update={"slots": default_slots()})
    return config.model_copy(update={"serving": serving})


def rooms_of(
    registry: ModelRegistry,
    config: EngineConfig,
    backend: Backend | None,
    router: Router | None,
    *,
    deadlines: DeadlineTimer,
    events: EventLog,
    counters: Counters,
    breakers: BreakerBoard,
    serve: Callable[[Request], None],
    live: Callable[[], Collection[Request]],
    clock: Callable[[], float],
) -> Rooms:
    """All rooms of one engine. `serve` answers a request, on threads of the queue; `live` gives the
    requests that have not ended. Neither may hold the engine. `config` is `resolved`."""
    cache = reporting.model_cache(config)
    backend = backend or reporting.llama_backend(config, events, cache)
    load = reporting.guarded_load(backend, breakers, events)
    keeper = Housekeeper(config, backend, load, events, cache.root)
    pool, sizes, budget = keeper.pool, keeper.sizes, keeper.budget
    placement = Placement(registry, config, cache, sizes, budget.bytes, pool.is_here)
    answerer = Answerer(registry, config, placement, pool, breakers, events, counters)
    standings = Standings(pool, sizes)
    # A few more than it has slots for, so that one that is free has its next request at once.
    slots = config.serving.slot_count
    per_model = slots + slots // 4
    queue: RequestQueue[Request] = RequestQueue(
        serve,
        limit=config.serving.max_queue,
        state_of=standings.standing,
        per_model=per_model,
        max_threads=per_model * (config.memory.max_models or _MODELS_AT_ONCE),
        turn_s=config.serving.model_turn_s,
        aging_s=config.serving.priority_aging_s,
    )
    pool.on_changed = queue.notify
    preloader = Preloader(
        config,
        placement,
        pool,
        sizes,
        budget,
        events,
        is_calm=keeper.is_calm,
        is_anything_waiting=lambda: len(queue) > 0,
        is_paused=lambda model_id: breakers.paused_s(model_id) > 0,
        load_ahead=answerer.load_ahead,
        clock=clock,
    )
    embeddings = SharedEmbeddings(registry, config, placement, pool)
    if router is None:
        embedder = None
        if "embeddings" in config.router.stages and embeddings.name:
            degraded = reporting.degraded_reporter(events)
            embedder = RouterEmbedder(embeddings, pool, sizes, deadlines, degraded, clock)
        router = reporting.hybrid_router(config, cache.root / "router", embedder, pool, deadlines)
    keeper.on_gone = preloader.note_gone
    answerer.on_use = lambda key, is_cold: preloader.note_use(key, is_cold=is_cold)
    return Rooms(
        cache=cache,
        backend=backend,
        keeper=keeper,
        pool=pool,
        placement=placement,
        answerer=answerer,
        standings=standings,
        queue=queue,
        preloader=preloader,
        embeddings=embeddings,
        planner=Planner(placement, pool, sizes, budget, breakers),
        observer=Observer(config, keeper, standings, queue, breakers, live),
        router=router,
    )
