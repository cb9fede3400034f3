"""The shared embedding model as the router uses it: a route must not wait for it for long.

Fetches nothing, and takes no room for it that the models in memory need for themselves. What cannot
be had in time is an error, upon which the question is routed without; then the model is left alone
for a while. A load that takes longer than a route may wait goes on for the questions to come.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from orion_oie.backends.base import LoadSpec
from orion_oie.cancellation import CancelScope, DeadlineTimer
from orion_oie.embeddings.shared import SharedEmbeddings
from orion_oie.errors import (
    CircuitOpenError,
    DeadlineExceededError,
    EngineClosedError,
    InsufficientMemoryError,
    InvalidRequestError,
    OrionError,
    WorkerError,
)
from orion_oie.pool.pool import ModelPool
from orion_oie.pool.sizes import ModelSizes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LIMIT_S = 5.0
PAUSE_S = 30.0

_USER = "router"
_LOOK_AGAIN_S = 5.0


class RouterEmbedder:
    """See `routing.profiles.Embedder`. Thread-safe.

    `on_degraded(stage, error)` is called when it begins to fail, and not again before it works.
    A route waits `limit_s` for the model at most; after a failure it is not asked for `PAUSE_S`.
    """

    def __init__(
        self,
        embeddings: SharedEmbeddings,
        pool: ModelPool,
        sizes: ModelSizes,
        deadlines: DeadlineTimer,
        on_degraded: Callable[[str, OrionError], None],
        clock: Callable[[], float] = time.monotonic,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._embeddings = embeddings
        self._pool = pool
        self._sizes = sizes
        self._deadlines = deadlines
        self._on_degraded = on_degraded
        self._clock = clock
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._looked_at: float | None = None
        self._is_here = False
        self._is_degraded = False
        self._failure: tuple[float, OrionError] | None = None  # when, and of what
        self._loading: Future[None] | None = None

    @property
    def name(self) -> str:
        """The model, as weights that were trained for it are named."""
        return self._embeddings.name

    def is_ready(self) -> bool:
        """Whether the model's files are here; looks at them every few seconds only."""
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
        """Whether it could embed at once."""
        try:
            return self._is_loaded(self._embeddings.spec())
        except OrionError:
            return False

    def embed(self, texts: Sequence[str], limit_s: float | None = None) -> "NDArray[np.float32]":
        """Unit vectors, shape (texts, dimensions).

        Raises what the model raises, `DeadlineExceededError` when it takes longer than the limit
        of the embedder or than `limit_s` (which says nothing about the model),
        `InsufficientMemoryError` when its room is needed for others, `CircuitOpenError` for a while
        after a failure. With a `limit_s` of infinity it takes as long as it takes, also after a
        failure.
        """
        if limit_s != math.inf:
            self._check_pause()
            limit_s = self._limit_s if limit_s is None else min(limit_s, self._limit_s)
        is_hurried = limit_s < self._limit_s
        until = time.monotonic() + limit_s
        try:
            spec = self._embeddings.spec()
            if not self._is_loaded(spec):
                self._check_room(spec)
                self._load(limit_s)
            vectors = self._embed(texts, until - time.monotonic(), limit_s)
        except OrionError as error:
            if not (is_hurried and isinstance(error, DeadlineExceededError)):
                self._note_failure(error)
            raise
        self._note_success()
        return vectors

    # -- loading it

    def _is_loaded(self, spec: LoadSpec | None) -> bool:
        if spec is not None:
            return self._pool.is_ready(spec.key)
        loading = self._loading  # of a model in this process, the pool knows nothing
        return loading is not None and loading.done() and loading.exception() is None

    def _check_room(self, spec: LoadSpec | None) -> None:
        """Raise where it could be in memory only in turns with another model that is there."""
        if spec is None:
            return
        room = self._pool.room_for(spec.key, self._sizes.max_bytes(spec))
        others = [self._pool.spec(key) for key in self._pool.residents()]
        if room.victims is None or (
            room.victims and not all(self._pool.can_hold([spec, one]) for one in others if one)
        ):
            raise InsufficientMemoryError(
                f"there is no room for {spec.key} beside the models in memory", model=spec.key
            )

    def _load(self, limit_s: float) -> None:
        """Have it loaded, and wait for that; only once however many ask."""
        with self._lock:
            loading = self._loading
            if loading is None or loading.done():
                loading = self._loading = Future()
                thread = threading.Thread(
                    target=self._run_load, args=(loading,), name="orion-router", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError as error:  # no more threads
                    loading.set_exception(WorkerError(f"nothing can be loaded now: {error}"))
        try:
            loading.result(None if limit_s == math.inf else limit_s)
        except TimeoutError:
            raise self._too_late(limit_s) from None

    def _run_load(self, loading: "Future[None]") -> None:
        try:
            self._embeddings.service().embed(["load"], user=_USER)
        except BaseException as error:  # noqa: BLE001 (handed to those who wait for the load)
            loading.set_exception(error)
        else:
            loading.set_result(None)
            self._failure = None  # it took too long for somebody, and now it is here

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
        failure = self._failure
        if failure is None:
            return
        left_s = failure[0] + PAUSE_S - self._clock()
        if left_s > 0:
            raise CircuitOpenError(
                f"{failure[1].message}; it is tried again in {left_s:.0f} s", retry_after_s=left_s
            )

    def _note_failure(self, error: OrionError) -> None:
        if isinstance(error, (InvalidRequestError, EngineClosedError)):
            return  # of this text alone, or nothing is routed any more
        self._looked_at = None
        with self._lock:
            self._failure = (self._clock(), error)
            is_new, self._is_degraded = not self._is_degraded, True
        if is_new:
            self._on_degraded("embedding", error)

    def _note_success(self) -> None:
        with self._lock:
            self._failure, self._is_degraded = None, False
