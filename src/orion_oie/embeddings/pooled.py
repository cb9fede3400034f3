"""An embedder whose model lies in the engine's pool: it counts in the budget, and goes when it is
idle and others need its room. Computes nothing itself.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from orion_oie.backends.base import EmbeddingModel, LoadSpec
from orion_oie.cancellation import CancelScope
from orion_oie.errors import WorkerCrashedError
from orion_oie.pool.pool import ModelPool

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class PooledEmbedder:
    """Embeds with the model of `spec()`, which is asked for each batch."""

    def __init__(self, pool: ModelPool, spec: Callable[[], LoadSpec]) -> None:
        self._pool = pool
        self._spec = spec

    def embed(self, texts: Sequence[str], scope: CancelScope) -> "NDArray[np.float32]":
        """See `EmbeddingModel.embed`. When the worker dies, a new one gets the same texts, once.
        Raises what `ModelPool.acquire` raises, too."""
        for is_last in (False, True):
            spec = self._spec()
            with self._pool.acquire(spec, scope) as lease:
                try:
                    vectors = cast(EmbeddingModel, lease.model).embed(texts, scope)
                except WorkerCrashedError:
                    if is_last:
                        raise
                else:
                    self._pool.note_answer(spec.key)
                    return vectors
        raise AssertionError("the second attempt returns or raises")

    def close(self) -> None:
        """Nothing: the model is the pool's."""
