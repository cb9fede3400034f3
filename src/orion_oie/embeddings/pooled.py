"""An embedder with a model of the engine's pool, which counts in the memory budget.

The pool evicts the model when it is idle and others need its memory. Computes nothing itself.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from orion_oie.backends.base import EmbeddingModel, LoadSpec
from orion_oie.cancellation import CancelScope
from orion_oie.errors import WorkerCrashedError
from orion_oie.pool.entries import Lease
from orion_oie.pool.pool import ModelPool

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class PooledEmbedder:
    """An embedder with the model of `spec()`, which is called for each batch."""

    def __init__(self, pool: ModelPool, spec: Callable[[], LoadSpec]) -> None:
        self._pool = pool
        self._spec = spec

    def embed(self, texts: Sequence[str], scope: CancelScope) -> "NDArray[np.float32]":
        """Embed as in `EmbeddingModel.embed`. When the worker dies, a new one gets the same texts,
        once. Also raises the errors of the pool."""
        spec = self._spec()
        with self._pool.acquire(spec, scope) as lease:
            try:
                return self._embed(spec, lease, texts, scope)
            except WorkerCrashedError:  # an error of the load itself is not caught
                pass
        spec = self._spec()
        with self._pool.acquire(spec, scope) as lease:
            return self._embed(spec, lease, texts, scope)

    def _embed(
        self, spec: LoadSpec, lease: Lease, texts: Sequence[str], scope: CancelScope
    ) -> "NDArray[np.float32]":
        vectors = cast(EmbeddingModel, lease.model).embed(texts, scope)
        self._pool.note_answer(spec.key)
        return vectors

    def close(self) -> None:
        """Do nothing: the model belongs to the pool."""
