"""Which backend and router an engine uses by default, and how its parts report to its event log.

Functions instead of methods of the engine: what they return lives in threads of workers, and
must not keep a forgotten engine alive.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from orion_oie.backends.base import (
    Backend,
    LoadedModel,
    LoadSpec,
)
from orion_oie.cancellation import CancelScope, DeadlineTimer
from orion_oie.config import EngineConfig
from orion_oie.engine.breaker import BreakerBoard
from orion_oie.engine.lifecycle import RequestState
from orion_oie.engine.request import RequestHandle
from orion_oie.errors import OrionError
from orion_oie.models.registry import ModelRegistry
from orion_oie.pool.pool import AgentPool
from orion_oie.routing.base import Router
from orion_oie.schemas.loading import (
    LoadPhase,
    LoadProgress,
    OnProgress,
)
from orion_oie.schemas.results import Route
from orion_oie.schemas.stats import BreakerState
from orion_oie.telemetry.events import EventLog

if TYPE_CHECKING:
    from orion_oie.models.downloads.cache import ModelCache
    from orion_oie.models.downloads.fetch import Download
    from orion_oie.routing.profiles import Embedder


def model_cache(config: EngineConfig) -> "ModelCache":
    """Where fetched models lie."""
    # Hashes, locks, addresses: a mere `import orion_oie` should not pay for them.
    from orion_oie.models.downloads.cache import ModelCache

    return ModelCache(config.cache_dir)


def llama_backend(config: EngineConfig, events: EventLog, cache: "ModelCache") -> Backend:
    """The backend that is used unless the application brings one."""
    # Sockets and processes: a mere `import orion_oie` should not pay for them.
    from orion_oie.backends.llama.host.loader import (
        LlamaBackend,
        LoaderSettings,
    )
    from orion_oie.hardware import probe

    return LlamaBackend(
        LoaderSettings(
            load_timeout_s=config.load_timeout_s,
            cancel_grace_s=config.cancel_grace_s,
            is_progressive=config.loading_strategy == "progressive",
            download=config.download,
            sharding=config.sharding,
            prefix_store_bytes=config.snapshot_bytes,
        ),
        cache=cache,
        has_spare_memory=probe.is_calm if config.keep_warm else None,
        on_log=lambda level, line, model_id: events.publish(
            "model.log", level=level, line=line, model_id=model_id
        ),
        on_crash=lambda model_id, error: events.publish(
            "worker.crashed", level="error", model_id=model_id, error=error.message
        ),
    )


def pull(
    registry: ModelRegistry,
    cache: "ModelCache",
    config: EngineConfig,
    events: EventLog,
    name: str,
) -> tuple[Path, ...]:
    """Fetch what a name stands for, telling how far it is; see `OrionInferenceEngine.pull`."""
    model_id, variant, source = registry.find_source(name)
    key = f"{model_id}@{variant}"
    if source.kind not in ("url", "hub"):
        return registry.local_files(source, key)

    def report(download: "Download | None", phase: LoadPhase = "downloading") -> None:
        arrived, total = cache.arrived(source)
        speed = download.bytes_per_s if download is not None else 0.0
        progress = LoadProgress(
            phase,
            fraction=arrived / total if total else 0.0,
            bytes_total=total,
            bytes_loaded=arrived,
            bytes_per_s=speed or None,
            seconds_left=(total - arrived) / speed if speed else None,
            note="" if download is not None else "another process fetches it",
        )
        events.publish("model.loading", level="debug", key=key, **asdict(progress))

    first = LoadProgress("initializing")
    events.publish("model.loading", level="debug", key=key, **asdict(first))
    try:
        files = cache.pull(source, config.download, CancelScope(), report)
    except OrionError as error:
        described = f"{type(error).__name__}: {error.message}"
        events.publish("model.load_failed", level="warning", key=key, error=described)
        raise
    events.publish("model.fetched", key=key, bytes=cache.arrived(source)[1])
    return files


def hybrid_router(
    config: EngineConfig,
    folder: Path,
    embedder: "Embedder | None",
    pool: AgentPool,
    deadlines: DeadlineTimer,
) -> Router:
    """The router that is used unless the application brings one; it keeps vectors in `folder`.

    Raises `InvalidRequestError` for weights that are none.
    """
    # Word lists and expressions: a mere `import orion_oie` should not pay for them.
    from orion_oie.routing.hybrid import HybridRouter

    model, tie_break = None, None
    if config.enable_linear_router and config.router_weights is not None:
        from orion_oie.routing.linear.model import load_model  # with numpy

        model = load_model(Path(config.router_weights).expanduser())
    if config.enable_route_tie_break:
        from orion_oie.routing.tiebreak import TieBreaker

        tie_break = TieBreaker(pool.borrow, deadlines)
    return HybridRouter(
        config.router_threshold,
        model=model,
        embedder=embedder,
        enable_linear=config.enable_linear_router,
        enable_wishes=config.enable_route_wishes,
        enable_hints=config.enable_route_hints,
        enable_sessions=config.enable_route_sessions,
        folder=folder,
        residency_s=config.route_residency_s,
        tie_break=tie_break,
    )


def feedback_on(
    config: EngineConfig, registry: ModelRegistry
) -> Callable[[str, Route], Callable[[str], None] | None]:
    """What takes feedback on a route to a question; None where nothing is to be kept."""
    if config.router_feedback is None:
        return lambda _query, _route: None
    from orion_oie.routing.feedback import FeedbackStore, RouteFeedback

    store = FeedbackStore(config.router_feedback)
    return lambda query, route: RouteFeedback.on(store, registry.agent, query, route)


def guarded_load(
    backend: Backend, breakers: BreakerBoard, events: EventLog
) -> Callable[[LoadSpec, CancelScope, OnProgress], LoadedModel]:
    """The backend's `load`, behind the model's breaker, with its events."""

    def load(spec: LoadSpec, scope: CancelScope, on_progress: OnProgress) -> LoadedModel:
        def report(progress: LoadProgress) -> None:
            events.publish("model.loading", level="debug", key=spec.key, **asdict(progress))
            on_progress(progress)

        started = time.perf_counter()
        try:
            with breakers.guard(spec.info.model_id, "load"):
                model = backend.load(spec, scope, report)
        except OrionError as error:
            described = f"{type(error).__name__}: {error.message}"
            events.publish("model.load_failed", level="warning", key=spec.key, error=described)
            raise
        load_ms = round((time.perf_counter() - started) * 1e3, 1)
        events.publish("model.loaded", key=spec.key, pid=model.pid, load_ms=load_ms)
        return model

    return load


def state_reporter(
    events: EventLog,
) -> Callable[[RequestHandle, RequestState, RequestState], None]:
    def report(handle: RequestHandle, old: RequestState, new: RequestState) -> None:
        events.publish("request.state", handle.id, level="debug", old=old.value, new=new.value)

    return report


def degraded_reporter(events: EventLog) -> Callable[[str, OrionError], None]:
    def report(stage: str, error: OrionError) -> None:
        described = f"{type(error).__name__}: {error.message}"
        events.publish("router.degraded", level="warning", stage=stage, error=described)

    return report


def breaker_reporter(events: EventLog) -> Callable[[str, BreakerState, BreakerState], None]:
    def report(name: str, old: BreakerState, new: BreakerState) -> None:
        events.publish(
            "breaker.changed", level="warning", breaker=name, old=old.value, new=new.value
        )

    return report
