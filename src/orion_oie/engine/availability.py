"""The availability of the models that requests wait for, for the queue."""

from orion_oie.models.keys import ModelKey
from orion_oie.pool.candidate import Candidate
from orion_oie.pool.pool import ModelPool
from orion_oie.schemas.availability import Availability


class WantedModels:
    """Combines the sizes of the announced models with the state of the pool. Thread-safe."""

    def __init__(self, pool: ModelPool) -> None:
        self._pool = pool
        self._max_bytes: dict[str, int | None] = {}

    def announce(self, candidate: Candidate) -> ModelKey:
        """Note that a request is going to wait for this model; returns its key."""
        self._max_bytes[candidate.key] = candidate.max_bytes
        return candidate.key

    def availability(self, key: str) -> Availability | None:
        """The availability of a model; None if its size is unknown."""
        max_bytes = self._max_bytes.get(key)
        return None if max_bytes is None else self._pool.availability(key, max_bytes)
