"""Chooses the loaded models that make way. Pure: decides, unloads nothing.

Idle models go, never one that is in use or pinned; no more of them than needed, and among equally
large sets the one whose loss is least. The loss of a model is the time it takes to load it again,
divided by how long ago it was used. With equal load times, the longest unused goes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from orion_oie.schemas.availability import Availability, ModelState

# Above this many, a set is built step by step: comparing all of them would be 2^12 = 4,096 sets.
_COMPARED_AT_MOST = 12


@dataclass(frozen=True, slots=True)
class Resident:
    """A model in memory, or on its way there.

    `last_used` grows with time, in any unit. `size_bytes` is what it may take, `reload_s` what it
    took to load it. Only what is neither in use nor pinned can go.
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
    """What all models together may take; None is without limit."""

    models: int | None = None
    memory_bytes: int | None = None


def choose_victims(
    residents: Sequence[Resident], limits: Limits, size_bytes: int = 0
) -> list[str] | None:
    """Keys of the idle models whose removal leaves space for one more of `size_bytes`, the longest
    unused first. None when that would not be enough: see `availability_of`."""
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
    """How a model of `size_bytes` that is not among the residents could be loaded.

    1. LOADABLE: the idle models named as victims make enough space.
    2. BLOCKED: the blockers have to become idle first, and the victims have to stay idle.
    3. IMPOSSIBLE: it would not fit if everything that is not pinned went.

    While the blockers are in use the answer stays the same, whoever uses them: else none would
    ever become idle for a request that waits for all of them.
    """
    victims = choose_victims(residents, limits, size_bytes)
    if victims is not None:
        return Availability(ModelState.LOADABLE, frozenset(victims))
    newest = max((r.last_used for r in residents), default=0.0)
    # One that is in use costs more to wait for than any idle one is worth.
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
    """Keys of the idle models to unload to give back `wanted_bytes`, or as much as there is of
    them: the longest unused first."""
    idle = [resident for resident in residents if resident.can_go]
    there_bytes = sum(resident.size_bytes for resident in idle)
    return _smallest_set(idle, 0, min(wanted_bytes, there_bytes)) or []


def _smallest_set(residents: Sequence[Resident], count: int, freed_bytes: int) -> list[str] | None:
    """The fewest models that can go of which at least `count` go and `freed_bytes` come back."""
    if count <= 0 and freed_bytes <= 0:
        return []
    idle = sorted((r for r in residents if r.can_go), key=lambda r: (r.last_used, r.key))
    if len(idle) < count or sum(r.size_bytes for r in idle) < freed_bytes:
        return None
    newest = max(r.last_used for r in residents)
    many = len(idle) > _COMPARED_AT_MOST
    sets = [_built(idle, count, freed_bytes, newest)] if many else _all_sets(idle, count)
    best: tuple[int, float, int] | None = None
    chosen: Sequence[Resident] = ()
    for candidate in sets:
        if best is not None and len(candidate) > best[0]:
            break  # they come by their number
        size = sum(r.size_bytes for r in candidate)
        rank = len(candidate), sum(_loss(r, newest) for r in candidate), size
        if size >= freed_bytes and (best is None or rank < best):
            best, chosen = rank, candidate
    return [resident.key for resident in chosen]


def _all_sets(idle: Sequence[Resident], count: int) -> Iterator[Sequence[Resident]]:
    for number in range(max(1, count), len(idle) + 1):
        yield from combinations(idle, number)


def _built(
    idle: Iterable[Resident], count: int, freed_bytes: int, newest: float
) -> Sequence[Resident]:
    """A sufficient set of which none can be left out: the cheapest losses first, then without
    those that the others make unnecessary."""
    chosen: list[Resident] = []
    for resident in sorted(idle, key=lambda r: _loss(r, newest)):
        if len(chosen) >= count and sum(r.size_bytes for r in chosen) >= freed_bytes:
            break
        chosen.append(resident)
    for resident in sorted(chosen, key=lambda r: r.size_bytes):
        others = [r for r in chosen if r is not resident]
        if len(others) >= count and sum(r.size_bytes for r in others) >= freed_bytes:
            chosen = others
    return sorted(chosen, key=lambda r: r.last_used)


def _loss(resident: Resident, newest: float) -> float:
    return resident.reload_s / (1.0 + newest - resident.last_used)
