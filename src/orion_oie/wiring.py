"""Which backend and router an engine uses by default, and how its parts report to its event log.

Functions instead of methods of the engine: what they return lives in threads of workers, and
must not keep a forgotten engine alive.
"""

import time
from collections.abc import Callable

from orion_oie.backends.base import Backend, LoadedModel, LoadSpec, OnProgress
from orion_oie.breaker import BreakerBoard, BreakerState
from orion_oie.cancellation import CancelScope
from orion_oie.config import EngineConfig
from orion_oie.errors import OrionError
from orion_oie.lifecycle import RequestState
from orion_oie.logs import EventLog
from orion_oie.request import RequestHandle
from orion_oie.routing.base import Router


def llama_backend(config: EngineConfig, events: EventLog) -> Backend:
    # Sockets and processes: a mere `import orion_oie` should not pay for them.
    from orion_oie.backends.llama.client import LlamaBackend

    return LlamaBackend(
        load_timeout_s=config.load_timeout_s,
        cancel_grace_s=config.cancel_grace_s,
        on_log=lambda level, line, model_id: events.publish(
            "model.log", level=level, line=line, model_id=model_id
        ),
        on_crash=lambda model_id, error: events.publish(
            "worker.crashed", level="error", model_id=model_id, error=error.message
        ),
    )


def keyword_router(config: EngineConfig) -> Router:
    """The router that is used unless the application brings one."""
    # Word lists and expressions: a mere `import orion_oie` should not pay for them.
    from orion_oie.routing.keyword import KeywordRouter

    return KeywordRouter(config.router_threshold)


def guarded_load(
    backend: Backend, breakers: BreakerBoard, events: EventLog
) -> Callable[[LoadSpec, CancelScope, OnProgress], LoadedModel]:
    """The backend's `load`, behind the model's breaker, with its events."""

    def load(spec: LoadSpec, scope: CancelScope, on_progress: OnProgress) -> LoadedModel:
        def report(fraction: float) -> None:
            events.publish("model.loading", level="debug", key=spec.key, fraction=fraction)
            on_progress(fraction)

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


def breaker_reporter(events: EventLog) -> Callable[[str, BreakerState, BreakerState], None]:
    def report(name: str, old: BreakerState, new: BreakerState) -> None:
        events.publish(
            "breaker.changed", level="warning", breaker=name, old=old.value, new=new.value
        )

    return report
