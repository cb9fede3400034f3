"""How models stand with the memory, in the words of the queue. Decides nothing."""

from orion_oie.backends.base import LoadSpec
from orion_oie.engine.scheduling.policy import (
    ModelState,
    Standing,
)
from orion_oie.errors import OrionError
from orion_oie.pool.pool import AgentPool
from orion_oie.pool.sizes import ModelSizes


class Standings:
    """Answers for the models that were announced; the others are unknown to it."""

    def __init__(self, pool: AgentPool, sizes: ModelSizes) -> None:
        self._pool = pool
        self._sizes = sizes
        self._size_bytes: dict[str, int] = {}

    def announce(self, spec: LoadSpec) -> str:
        """A request will want this model; returns the key to ask for it by."""
        if spec.key not in self._size_bytes or not self._pool.is_here(spec.key):
            try:
                self._size_bytes[spec.key] = self._sizes.most_bytes(spec)
            except OrionError:  # whoever loads it hears what is wrong with its files
                self._size_bytes.pop(spec.key, None)
        return spec.key

    def standing(self, key: str) -> Standing | None:
        """How a model stands; None for one that nobody knows the size of."""
        size_bytes = self._size_bytes.get(key)
        if size_bytes is None:
            return None
        room = self._pool.room_for(key, size_bytes)
        if room.is_here:
            return Standing(ModelState.READY)
        if room.blockers:
            blockers, idle = frozenset(room.blockers), frozenset(room.idle)
            return Standing(ModelState.BLOCKED, evicts=idle, blockers=blockers)
        # Also what can never have room, and any while memory is short: who tries hears of it.
        return Standing(ModelState.LOADABLE, evicts=frozenset(room.victims or ()))
