"""The shared embedding model as the router uses it: a route must not wait for it for long.

It fetches nothing, and takes no memory from the models that are loaded. If the model does not
answer in time, an error is raised, and the question is routed without it; a circuit breaker then
pauses the model for a while. A load that takes longer than a route may wait goes on for later
questions.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from orion_oie.backends.base import LoadSpec
from orion_oie.cancellation import CancelScope, DeadlineTimer
from orion_oie.config import BreakerConfig
from orion_oie.embeddings.shared import SharedEmbeddings
from orion_oie.engine.breaker import CircuitBreaker
from orion_oie.errors import (
    CircuitOpenError,
    DeadlineExceededError,
    EngineClosedError,
    InsufficientMemoryError,
    InvalidRequestError,
    OrionError,
    described,
)
from orion_oie.pool.memory_manager import MemoryManager
from orion_oie.schemas.availability import ModelState
from orion_oie.telemetry.event_log import EventLog
from orion_oie.telemetry.events import RouterDegraded
from orion_oie.threads import run_in_background

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LIMIT_S = 5.0
PAUSE_S = 30.0

_USER = "router"
_LOOK_AGAIN_S = 5.0


class RouterEmbedder:
    """See `routing.profiles.Embedder`. Thread-safe.

    It publishes `router.degraded` when it begins to fail, and again only after it has worked. A
    route waits for the model for `limit_s` at most; after a failure it is paused for `PAUSE_S`.
    """

    def __init__(
        self,
        embeddings: SharedEmbeddings,
        memory: MemoryManager,
        deadlines: DeadlineTimer,
        events: EventLog,
        clock: Callable[[], float] = time.monotonic,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._embeddings = embeddings
        self._pool = memory.pool
        self._sizes = memory.sizes
        self._deadlines = deadlines
        self._events = events
        self._clock = clock
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._looked_at: float | None = None
        self._is_here = False
        config = BreakerConfig(failure_threshold=1, reset_timeout_s=PAUSE_S)
        self._breaker = CircuitBreaker("embedding", config, clock)
        self._failure: OrionError | None = None  # the last one
        self._is_degraded = False
        self._loading: Future[None] | None = None

    @property
    def name(self) -> str:
        """The model, as notes and caches name it."""
        return self._embeddings.name

    def is_ready(self) -> bool:
        """True when the model's files are on this machine; it checks every few seconds only."""
        now = self._clock()
        if self._looked_at is None or now - self._looked_at >= _LOOK_AGAIN_S:
            try:
                self._embeddings.spec()
            except OrionError:
                self._is_here = False
            else:
                self._is_here = True
            self._looked_at = now
        return self._is_here

    def is_loaded(self) -> bool:
        """True when it could embed at once."""
        try:
            return self._is_loaded(self._embeddings.spec())
        except OrionError:
            return False

    def embed(self, texts: Sequence[str], limit_s: float | None = None) -> "NDArray[np.float32]":
        """Unit vectors, shape (texts, dimensions).

        Raises the errors of the model, `DeadlineExceededError` when it takes longer than the limit
        of the embedder or than `limit_s` (which says nothing about the model),
        `InsufficientMemoryError` when its memory is needed for others, `CircuitOpenError` for a
        while after a failure. With a `limit_s` of infinity there is no limit, even after a failure.
        """
        if limit_s != math.inf:
            self._check_pause()
            limit_s = self._limit_s if limit_s is None else min(limit_s, self._limit_s)
        is_hurried = limit_s < self._limit_s
        until = time.monotonic() + limit_s
        try:
            spec = self._embeddings.spec()
            if not self._is_loaded(spec):
                self._check_memory(spec)
                self._load(limit_s)
            vectors = self._embed(texts, until - time.monotonic(), limit_s)
        except OrionError as error:
            if not (is_hurried and isinstance(error, DeadlineExceededError)):
                self._note_failure(error)
            raise
        self._breaker.note_success()
        with self._lock:
            self._is_degraded = False
        return vectors

    # -- loading it

    def _is_loaded(self, spec: LoadSpec | None) -> bool:
        if spec is not None:
            return self._pool.is_ready(spec.key)
        loading = self._loading  # of a model in this process, the pool knows nothing
        return loading is not None and loading.done() and loading.exception() is None

    def _check_memory(self, spec: LoadSpec | None) -> None:
        """Raise if it would have to take turns in memory with a loaded model."""
        if spec is None:
            return
        max_bytes = self._sizes.max_bytes(spec)
        found = self._pool.availability(spec.key, max_bytes)
        is_free = found.state is ModelState.READY or (
            found.state is ModelState.LOADABLE
            and (
                not found.victims
                or all(
                    self._pool.can_hold({spec.key: max_bytes, key: one.reserved_bytes})
                    for key, one in self._pool.residents().items()
                )
            )
        )
        if not is_free:
            raise InsufficientMemoryError(
                f"there is no memory for {spec.key} beside the models in memory", model=spec.key
            )

    def _load(self, limit_s: float) -> None:
        """Load it and wait for that; concurrent callers share one load."""
        with self._lock:
            loading = self._loading
            if loading is None or loading.done():
                loading = self._loading = run_in_background(self._run_load, "orion-router")
        try:
            loading.result(None if limit_s == math.inf else limit_s)
        except TimeoutError:
            raise self._too_late(limit_s) from None

    def _run_load(self) -> None:
        self._embeddings.service().embed(["load"], user=_USER)
        self._breaker.note_success()  # it was too slow for a route, and is in memory now

    # -- using it

    def _embed(self, texts: Sequence[str], left_s: float, limit_s: float) -> "NDArray[np.float32]":
        scope = CancelScope()
        if left_s != math.inf:
            self._deadlines.watch(scope, left_s)
        try:
            return self._embeddings.service().embed(texts, scope, user=_USER)
        except DeadlineExceededError:
            raise self._too_late(limit_s) from None
        finally:
            self._deadlines.forget(scope)

    def _too_late(self, limit_s: float) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"the embedding model {self.name} did not answer within {limit_s:.3g} s",
            deadline_s=limit_s,
        )

    # -- failures

    def _check_pause(self) -> None:
        try:
            self._breaker.check()
        except CircuitOpenError as error:
            wait_s = error.details["retry_after_s"]
            reason = "it failed" if self._failure is None else self._failure.message
            raise CircuitOpenError(
                f"{reason}; it is tried again in {wait_s:.0f} s", retry_after_s=wait_s
            ) from None

    def _note_failure(self, error: OrionError) -> None:
        if isinstance(error, (InvalidRequestError, EngineClosedError)):
            return  # of this text alone, or nothing is routed any more
        self._looked_at = None
        self._failure = error
        self._breaker.note_failure()
        with self._lock:
            is_new, self._is_degraded = not self._is_degraded, True
        if is_new:
            self._events.publish(RouterDegraded(stage="embedding", error=described(error)))
