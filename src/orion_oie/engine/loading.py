"""Loads and downloads, behind the circuit breakers and with their events."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from orion_oie.backends.base import LoadSpec, LocalBackend, LocalModel
from orion_oie.cancellation import CancelScope
from orion_oie.config import EngineConfig
from orion_oie.engine.breaker import BreakerBoard
from orion_oie.errors import OrionError, described
from orion_oie.models.keys import ModelKey
from orion_oie.models.naming import is_source
from orion_oie.models.registry import ModelRegistry
from orion_oie.pool.files import ModelFiles
from orion_oie.schemas.loading import LoadPhase, LoadProgress, OnProgress
from orion_oie.telemetry.event_log import EventLog
from orion_oie.telemetry.events import ModelFetched, ModelLoaded, ModelLoadFailed, ModelLoading

if TYPE_CHECKING:
    from orion_oie.models.downloads.cache import ModelCache
    from orion_oie.models.downloads.fetch import Download


def guarded_load(
    backend: LocalBackend, breakers: BreakerBoard, events: EventLog
) -> Callable[[LoadSpec, CancelScope, OnProgress], LocalModel]:
    """The backend's `load`, behind the model's breaker, with its events."""

    def load(spec: LoadSpec, scope: CancelScope, on_progress: OnProgress) -> LocalModel:
        def report(progress: LoadProgress) -> None:
            events.publish(ModelLoading(key=spec.key, progress=progress))
            on_progress(progress)

        started = time.perf_counter()
        try:
            with breakers.guard(spec.info.model_id, "load"):
                model = backend.load(spec, scope, report)
        except OrionError as error:
            events.publish(ModelLoadFailed(key=spec.key, error=described(error)))
            raise
        load_ms = round((time.perf_counter() - started) * 1e3, 1)
        events.publish(ModelLoaded(key=spec.key, pid=model.pid, load_ms=load_ms))
        return model

    return load


def pull(
    registry: ModelRegistry,
    cache: "ModelCache",
    files: ModelFiles,
    config: EngineConfig,
    events: EventLog,
    name: str,
) -> tuple[Path, ...]:
    """Fetch what a name stands for; see `OrionInferenceEngine.pull`."""
    is_known = name in registry.agents or name.partition("@")[0] in registry.models
    if not is_known and is_source(name):
        name = registry.name_source(name, cache=cache)
    model_id, variant, source = registry.find_source(name)
    key = ModelKey(model_id, variant)
    if not source.is_remote:
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
        events.publish(ModelLoading(key=key, progress=progress))

    events.publish(ModelLoading(key=key, progress=LoadProgress("initializing")))
    try:
        paths = cache.pull(source, config.download, CancelScope(), report)
    except OrionError as error:
        events.publish(ModelLoadFailed(key=key, error=described(error)))
        raise
    events.publish(ModelFetched(key=key, bytes=cache.arrived(source)[1]))
    files.of(model_id, max_age_s=0.0)  # the next request finds them
    return paths
