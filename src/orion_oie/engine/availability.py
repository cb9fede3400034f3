"""The availability of the models that requests wait for, as the queue asks for it."""

from orion_oie.models.keys import ModelKey
from orion_oie.pool.candidate import Candidate
from orion_oie.pool.pool import ModelPool
from orion_oie.schemas.availability import Availability


class WantedModels:
    """Knows the size of each model that was announced; the pool knows the rest. Thread-safe."""

    def __init__(self, pool: ModelPool) -> None:
        self._pool = pool
        self._max_bytes: dict[str, int | None] = {}

    def announce(self, candidate: Candidate) -> ModelKey:
        """Note that a request will want this model; returns its key."""
        self._max_bytes[candidate.key] = candidate.max_bytes
        return candidate.key

    def availability(self, key: str) -> Availability | None:
        """How a model stands; None if its size is unknown."""
        max_bytes = self._max_bytes.get(key)
        return None if max_bytes is None else self._pool.availability(key, max_bytes)
