"""Whether a model could be used now, and what stands in its way.

One answer for all who ask: the pool works it out, the queue decides by it, a plan shows it.
"""

from dataclasses import dataclass
from enum import Enum


class ModelState(Enum):
    """How a request for a model would fare now."""

    READY = "ready"  # in memory or being loaded, and takes one more request
    FULL = "full"  # in memory or being loaded, and has its fill of running requests
    LOADABLE = "loadable"  # not in memory, could be loaded now: at most idle models have to go
    BLOCKED = "blocked"  # not in memory, and something in use must end before it can be loaded
    SHORT = "short"  # not in memory, and the machine has none to spare: a load waits for it
    IMPOSSIBLE = "impossible"  # too large beside what is pinned: a load says so
    UNKNOWN = "unknown"  # its size cannot be worked out: a load says why


@dataclass(frozen=True, slots=True)
class Availability:
    """How a model stands with the memory.

    `victims` are the idle models that have to be unloaded for it; empty if there is enough memory.
    `blockers` of a BLOCKED model are those in use that have to go as well, once they are idle. As
    long as these are in use, the same ones must be named each time: else none of them is awaited to
    the end. `is_arriving`: a READY model is not all in memory yet, and its requests wait for it.
    """

    state: ModelState
    victims: frozenset[str] = frozenset()
    blockers: frozenset[str] = frozenset()
    is_arriving: bool = False

    @property
    def displaced(self) -> frozenset[str]:
        """All models that have to go for it."""
        return self.victims | self.blockers

    @property
    def is_loadable(self) -> bool:
        """True when a request would be tried at once although the model is not in memory. What is
        wrong with it, if anything, is then the error of its load."""
        return self.state in _TRIED


_TRIED = frozenset(
    {ModelState.LOADABLE, ModelState.SHORT, ModelState.IMPOSSIBLE, ModelState.UNKNOWN}
)

READY = Availability(ModelState.READY)
ARRIVING = Availability(ModelState.READY, is_arriving=True)
UNKNOWN = Availability(ModelState.UNKNOWN)
