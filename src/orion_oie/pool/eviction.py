"""The choice of the models to evict. Pure: decides, unloads nothing.

Only idle models are evicted, never one that is in use or pinned; as few as possible, and among sets
of equal size the one whose loss is least. The loss of a model is the time it takes to load it
again, divided by how long ago it was used. With equal load times, the least recently used one is
evicted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from orion_oie.schemas.availability import Availability, ModelState

# Above this many, a set is built step by step: of 12, at most 924 sets of one size are compared.
_COMPARED_AT_MOST = 12


@dataclass(frozen=True, slots=True)
class Resident:
    """A model in memory, or being loaded.

    `last_used` grows with time, in any unit. `size_bytes` is the memory that it may take,
    `reload_s` the time to load it. It can be evicted if it is neither in use nor pinned.
    """

    key: str
    last_used: float
    is_in_use: bool
    size_bytes: int = 0
    reload_s: float = 1.0
    is_pinned: bool = False

    @property
    def can_go(self) -> bool:
        return not (self.is_in_use or self.is_pinned)


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of all models together; None is no limit."""

    models: int | None = None
    memory_bytes: int | None = None


def choose_victims(
    residents: Sequence[Resident], limits: Limits, size_bytes: int = 0
) -> list[str] | None:
    """Keys of the idle models to evict for one more of `size_bytes`, the least recently used first.
    None when that would not be enough: see `availability_of`."""
    excess, shortage_bytes = 0, 0
    if limits.models is not None:
        excess = len(residents) + 1 - limits.models
    if limits.memory_bytes is not None:
        held_bytes = sum(resident.size_bytes for resident in residents)
        shortage_bytes = held_bytes + size_bytes - limits.memory_bytes
    return _smallest_set(residents, excess, shortage_bytes)


def availability_of(
    residents: Sequence[Resident], limits: Limits, size_bytes: int = 0
) -> Availability:
    """The availability of a model of `size_bytes` that is not among the residents.

    1. LOADABLE: evicting the idle models named as victims frees enough memory.
    2. BLOCKED: the blockers have to become idle first, and the victims have to stay idle.
    3. IMPOSSIBLE: it would not fit even if everything that is not pinned were evicted.

    While the blockers are in use the answer stays the same, whoever uses them: otherwise they would
    never all be idle for a request that waits for all of them.
    """
    victims = choose_victims(residents, limits, size_bytes)
    if victims is not None:
        return Availability(ModelState.LOADABLE, frozenset(victims))
    newest = max((r.last_used for r in residents), default=0.0)
    # Waiting for a model in use costs more than evicting any idle one.
    imagined = [
        replace(r, is_in_use=False, reload_s=1e6, last_used=newest) if r.is_in_use else r
        for r in residents
    ]
    going = choose_victims(imagined, limits, size_bytes)
    if going is None:
        return Availability(ModelState.IMPOSSIBLE)
    in_use = frozenset(resident.key for resident in residents if resident.is_in_use)
    return Availability(ModelState.BLOCKED, frozenset(going) - in_use, in_use & frozenset(going))


def choose_relief(residents: Sequence[Resident], wanted_bytes: int) -> list[str]:
    """Keys of the idle models to unload to free `wanted_bytes`, or as much as possible, the least
    recently used first."""
    idle = [resident for resident in residents if resident.can_go]
    there_bytes = sum(resident.size_bytes for resident in idle)
    return _smallest_set(idle, 0, min(wanted_bytes, there_bytes)) or []


def _smallest_set(residents: Sequence[Resident], count: int, freed_bytes: int) -> list[str] | None:
    """The smallest set of evictable models with at least `count` models and `freed_bytes`."""
    if count <= 0 and freed_bytes <= 0:
        return []
    idle = sorted((r for r in residents if r.can_go), key=lambda r: (r.last_used, r.key))
    if len(idle) < count or sum(r.size_bytes for r in idle) < freed_bytes:
        return None
    newest = max(r.last_used for r in residents)
    if len(idle) > _COMPARED_AT_MOST:
        chosen = _built(idle, count, freed_bytes, newest)
    else:
        chosen = _best(idle, _fewest(idle, count, freed_bytes), freed_bytes, newest)
    return [resident.key for resident in chosen]


def _fewest(idle: Sequence[Resident], count: int, freed_bytes: int) -> int:
    """The size of the smallest sufficient set: that of the largest models."""
    number = left_bytes = 0
    for number, size_bytes in enumerate(sorted((r.size_bytes for r in idle), reverse=True), 1):
        left_bytes += size_bytes
        if number >= count and left_bytes >= freed_bytes:
            break
    return number


def _best(
    idle: Sequence[Resident], number: int, freed_bytes: int, newest: float
) -> Sequence[Resident]:
    """Of the sufficient sets of that size, the one of the least loss, then of the least size."""
    best: tuple[float, int] | None = None
    chosen: Sequence[tuple[Resident, float]] = ()
    for candidate in combinations([(r, _loss(r, newest)) for r in idle], number):
        size_bytes = sum(r.size_bytes for r, _ in candidate)
        if size_bytes >= freed_bytes:
            rank = sum(loss for _, loss in candidate), size_bytes
            if best is None or rank < best:
                best, chosen = rank, candidate
    return [resident for resident, _ in chosen]


def _built(
    idle: Iterable[Resident], count: int, freed_bytes: int, newest: float
) -> Sequence[Resident]:
    """A sufficient set without a superfluous member: the models of the least loss, less those that
    the others make unnecessary."""
    chosen: list[Resident] = []
    held_bytes = 0
    for resident in sorted(idle, key=lambda r: _loss(r, newest)):
        if len(chosen) >= count and held_bytes >= freed_bytes:
            break
        chosen.append(resident)
        held_bytes += resident.size_bytes
    number, unneeded = len(chosen), set()
    for resident in sorted(chosen, key=lambda r: r.size_bytes):
        if number <= count or held_bytes - resident.size_bytes < freed_bytes:
            continue
        number, held_bytes = number - 1, held_bytes - resident.size_bytes
        unneeded.add(resident.key)
    return sorted((r for r in chosen if r.key not in unneeded), key=lambda r: r.last_used)


def _loss(resident: Resident, newest: float) -> float:
    return resident.reload_s / (1.0 + newest - resident.last_used)
