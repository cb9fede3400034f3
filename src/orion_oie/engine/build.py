"""Builds the parts of one engine, from the bottom to the top.

Imported with the first engine instead of with the library, so that a mere `import orion_oie` does
not pay for all of it. The only module that names a concrete backend.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from orion_oie.backends.base import LocalBackend
from orion_oie.cancellation import DeadlineTimer
from orion_oie.config import EngineConfig
from orion_oie.embeddings.shared import SharedEmbeddings
from orion_oie.engine.availability import WantedModels
from orion_oie.engine.breaker import BreakerBoard
from orion_oie.engine.calls import Calls
from orion_oie.engine.chain import ModelChain
from orion_oie.engine.loading import guarded_load, pull
from orion_oie.engine.observer import Observer
from orion_oie.engine.pipeline import FeedbackOn, Pipeline, serve
from orion_oie.engine.planner import Planner
from orion_oie.engine.request import Queued
from orion_oie.engine.residents import Residents
from orion_oie.engine.router_embedder import RouterEmbedder
from orion_oie.engine.scheduling.queue import RequestQueue
from orion_oie.engine.signal import Signal
from orion_oie.engine.stand_ins import StandIns
from orion_oie.hardware import probe
from orion_oie.hardware.machine import default_slots
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.models.registry import ModelRegistry
from orion_oie.pool.background import BackgroundLoader
from orion_oie.pool.files import ModelFiles
from orion_oie.pool.memory_manager import MemoryManager
from orion_oie.pool.pool import ModelPool
from orion_oie.pool.preloader import Preloader
from orion_oie.pool.variants import VariantSelector
from orion_oie.routing.base import Router
from orion_oie.schemas.stats import BreakerState
from orion_oie.schemas.version import __version__
from orion_oie.telemetry.counters import Counters
from orion_oie.telemetry.event_log import EventLog
from orion_oie.telemetry.events import BreakerChanged, EngineStarted, ModelLog, WorkerCrashed

_MODELS_AT_ONCE = 8


@dataclass(frozen=True)
class Parts:
    """The parts of an engine. None of them refers to it, so an engine that is forgotten is
    collected."""

    events: EventLog
    calls: Calls
    counters: Counters
    breakers: BreakerBoard
    deadlines: DeadlineTimer
    backend: LocalBackend
    files: ModelFiles
    memory: MemoryManager
    variants: VariantSelector
    background: BackgroundLoader
    queue: RequestQueue[Queued]
    chain: ModelChain
    preloader: Preloader
    embeddings: SharedEmbeddings
    residents: Residents
    observer: Observer
    pipeline: Pipeline


def resolved(config: EngineConfig) -> EngineConfig:
    """The configuration with the settings filled in that depend on the machine."""
    if config.serving.slots is not None:
        return config
    serving = config.serving.model_copy(
        update={"slots": default_slots(config.serving.cpu_affinity)}
    )
    return config.model_copy(update={"serving": serving})


def build(
    registry: ModelRegistry,
    config: EngineConfig,
    backend: LocalBackend | None,
    router: Router | None,
    clock: Callable[[], float],
) -> Parts:
    """All parts of one engine, by a `resolved` configuration."""
    # Events, counts and breakers
    events = EventLog(config.logs.max_events, log_content=config.logs.include_content)
    calls = Calls(events)
    counters = Counters()
    breakers = BreakerBoard(config.breaker, clock, partial(_report_breaker, events))
    deadlines = DeadlineTimer()
    # Models in memory
    cache = ModelCache(config.download.cache_dir)

    def may_take(size_bytes: int) -> bool:
        return probe.has_spare_memory() and memory.may_take(size_bytes)

    backend = backend or _llama_backend(config, events, cache, may_take)
    files = ModelFiles(registry, config, cache, backend.footprint)
    evicted: Signal[[str]] = Signal()
    changed: Signal[[]] = Signal()
    memory = MemoryManager(
        config,
        backend,
        guarded_load(backend, breakers, events),
        events,
        cache.root,
        files=files,
        on_evicted=evicted,
        on_changed=changed,
    )
    pool, sizes, budget = memory.pool, memory.sizes, memory.budget
    variants = VariantSelector(registry, config, files, sizes, budget.bytes, pool.is_resident)
    background = BackgroundLoader(pool)
    # Requests
    wanted = WantedModels(pool)
    queue = _queue(config, wanted)
    changed.connect(queue.notify)
    preloader = Preloader(
        config,
        variants,
        pool,
        budget,
        events,
        is_calm=memory.is_calm,
        is_anything_waiting=lambda: len(queue) > 0,
        is_paused=lambda model_id: breakers.paused_s(model_id) > 0,
        load_ahead=background.load,
        clock=clock,
    )
    evicted.connect(preloader.note_gone)
    stand_ins = StandIns(config.stand_in)
    chain = ModelChain(
        registry,
        config,
        variants,
        memory,
        background,
        breakers,
        events,
        counters,
        stand_ins,
        on_use=preloader.note_use,
    )
    embeddings = SharedEmbeddings(registry, config, variants, pool)
    if router is None:
        embedder = None
        if "embeddings" in config.router.stages and embeddings.name:
            embedder = RouterEmbedder(embeddings, memory, deadlines, events, clock)
        router = _hybrid_router(config, cache.root / "router", embedder, pool, deadlines)
    pipeline = Pipeline(
        registry,
        config,
        router=router,
        variants=variants,
        wanted=wanted,
        queue=queue,
        chain=chain,
        planner=Planner(pool, budget, breakers),
        preloader=preloader,
        stand_ins=stand_ins,
        cache=cache,
        deadlines=deadlines,
        counters=counters,
        events=events,
        calls=calls,
        feedback_on=_feedback_on(config, registry),
    )
    events.publish(EngineStarted(version=__version__, pid=os.getpid()))
    return Parts(
        events=events,
        calls=calls,
        counters=counters,
        breakers=breakers,
        deadlines=deadlines,
        backend=backend,
        files=files,
        memory=memory,
        variants=variants,
        background=background,
        queue=queue,
        chain=chain,
        preloader=preloader,
        embeddings=embeddings,
        residents=Residents(
            registry,
            variants,
            pool,
            chain,
            preloader,
            stand_ins,
            events,
            partial(pull, registry, cache, files, config, events),
        ),
        observer=Observer(config, memory, queue, breakers, stand_ins),
        pipeline=pipeline,
    )


def _queue(config: EngineConfig, wanted: WantedModels) -> RequestQueue[Queued]:
    # A few more than there are slots, so that a free slot has its next request at once.
    slots = config.serving.slot_count
    per_model = slots + slots // 4
    return RequestQueue(
        serve,
        limit=config.serving.max_queue,
        availability_of=wanted.availability,
        per_model=per_model,
        max_threads=per_model * (config.memory.max_models or _MODELS_AT_ONCE),
        turn_s=config.serving.model_turn_s,
        aging_s=config.serving.priority_aging_s,
    )


def _llama_backend(
    config: EngineConfig,
    events: EventLog,
    cache: ModelCache,
    may_take: Callable[[int], bool],
) -> LocalBackend:
    """The backend that is used unless the application brings one."""
    # Sockets and processes: an engine with another backend should not pay for them.
    from orion_oie.backends.llama.host.loader import LlamaBackend, LoaderSettings
    from orion_oie.backends.llama.host.process import Priority

    return LlamaBackend(
        LoaderSettings(
            load_timeout_s=config.loading.timeout_s,
            cancel_grace_s=config.serving.cancel_grace_s,
            is_progressive=config.loading.strategy == "progressive",
            download=config.download,
            sharding=config.loading.sharding,
            prefix_store_bytes=config.memory.prefix_store_bytes,
            is_adaptive=config.serving.adaptive_threads,
            priority=Priority(config.serving.nice, config.serving.cpu_affinity),
        ),
        cache=cache,
        may_take=may_take if config.loading.keep_spare_worker else None,
        on_log=lambda level, line, model_id: events.publish(
            ModelLog(model_id=model_id, line=line, level="error" if level == "error" else "warning")
        ),
        on_crash=lambda model_id, error: events.publish(
            WorkerCrashed(model_id=model_id, error=error.message)
        ),
    )


def _hybrid_router(
    config: EngineConfig,
    folder: Path,
    embedder: RouterEmbedder | None,
    pool: ModelPool,
    deadlines: DeadlineTimer,
) -> Router:
    """The default router; it keeps vectors in `folder`.

    Raises `InvalidRequestError` for a file of weights that cannot be used.
    """
    from orion_oie.routing.hybrid import HybridRouter

    model, tie_break = None, None
    settings, stages = config.router, config.router.stages
    if settings.weights is not None:
        from orion_oie.routing.linear.model import load_model  # with numpy

        model = load_model(Path(settings.weights).expanduser())
    if "tie_break" in stages:
        from orion_oie.routing.tiebreak import TieBreaker

        tie_break = TieBreaker(pool.borrow, deadlines)
    return HybridRouter(
        settings.threshold,
        model=model,
        embedder=embedder,
        enable_linear="linear" in stages,
        enable_explicit="explicit" in stages,
        enable_hints="hints" in stages,
        enable_sessions="sessions" in stages,
        folder=folder,
        residency_s=settings.residency_s,
        tie_break=tie_break,
    )


def _feedback_on(config: EngineConfig, registry: ModelRegistry) -> FeedbackOn:
    if config.router.feedback is None:
        return lambda _query, _route: None
    from orion_oie.routing.feedback import FeedbackStore, RouteFeedback

    store = FeedbackStore(config.router.feedback)
    return lambda query, route: RouteFeedback.on(store, registry.agent, query, route)


def _report_breaker(events: EventLog, name: str, old: BreakerState, new: BreakerState) -> None:
    events.publish(BreakerChanged(breaker=name, old=old.value, new=new.value))
