"""Loads in the background, for later requests."""

import threading
from collections.abc import Collection
from concurrent.futures import Future

from orion_oie.backends.base import LoadSpec
from orion_oie.cancellation import CancelScope
from orion_oie.models.keys import ModelKey
from orion_oie.pool.pool import ModelPool
from orion_oie.schemas.results import ModelInfo
from orion_oie.threads import run_in_background


class BackgroundLoader:
    """Loads models into the pool without holding them. Thread-safe."""

    def __init__(self, pool: ModelPool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._loads: dict[ModelKey, Future[ModelInfo]] = {}

    def load(self, spec: LoadSpec, may_evict: Collection[str] | None = None) -> "Future[ModelInfo]":
        """Load a model; concurrent calls share one load. The future is done when all of the model
        is in memory. `may_evict`: see `ModelPool.acquire`."""
        with self._lock:
            known = self._loads.get(spec.key)
            if known is None or known.done():
                known = run_in_background(lambda: self._load(spec, may_evict), "orion-background")
                self._loads[spec.key] = known
            return known

    def _load(self, spec: LoadSpec, may_evict: Collection[str] | None) -> ModelInfo:
        with self._pool.acquire(spec, CancelScope(), is_patient=True, may_evict=may_evict) as lease:
            completion = lease.model.completion
        return completion.result()
