"""The ranks of the models that are waited for, and which of them may be served now. Pure.

The rules are those of `policy.py`: requests of one priority are a class, and of a class those for
one model are a group.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

from orion_oie.engine.scheduling.history import History, Settings
from orion_oie.engine.scheduling.lines import Waiting
from orion_oie.schemas.availability import UNKNOWN, Availability, ModelState


class Wanted(Protocol):
    """The requests of one class for one model, as far as the choice of a model goes."""

    @property
    def model(self) -> str: ...

    @property
    def oldest(self) -> Waiting: ...


W = TypeVar("W", bound=Wanted)


@dataclass(slots=True, eq=False)  # not frozen: that would take longer to make than all else here
class Group(Generic[W]):
    """The requests of one class for one model. Groups of a class are served in the order of
    `rank`: of one rank, the one with the oldest request is first."""

    line: W
    model: str
    oldest: Waiting
    availability: Availability
    is_loadable: bool
    unserved_since: float
    is_overdue: bool
    rank: tuple[int, float]


_READY, _TRIED, _BLOCKED = (1, 0.0), (2, 0.0), (3, 0.0)  # a load is begun for all that are tried
_seq = attrgetter("seq")
_group_order = attrgetter("rank", "oldest.seq")


def classes_of(
    lines: Iterable[Iterable[W]],
    availability: Mapping[str, Availability],
    history: History,
    now: float,
    settings: Settings,
) -> list[list[Group[W]]]:
    """The classes in order, each with its groups in order, without full models."""
    sorted_classes = []
    for its_lines in lines:
        groups = []
        for line in its_lines:
            found = availability.get(line.model, UNKNOWN)
            if found.state is ModelState.FULL:
                continue
            model, oldest = line.model, line.oldest
            since = history.unserved_since(model, oldest.arrived_at)
            is_overdue = now - since >= settings.turn_s
            if found.state is ModelState.READY:
                is_loadable, rank = False, _READY
            else:
                is_loadable = found.is_loadable
                rank = _TRIED if is_loadable else _BLOCKED
            if is_overdue:
                rank = (0, since)
            groups.append(Group(line, model, oldest, found, is_loadable, since, is_overdue, rank))
        if groups:
            groups.sort(key=_group_order)
            sorted_classes.append(groups)
    return sorted(sorted_classes, key=lambda groups: class_order(groups, settings))


def class_order(groups: Sequence[Group[W]], settings: Settings) -> tuple[float, int]:
    """The sort key of a class. `now` is left out: it would shift all of them alike."""
    oldest = min([group.oldest for group in groups], key=_seq)
    return (oldest.arrived_at - oldest.priority * settings.aging_s, -oldest.priority)


def runnable(
    groups: Sequence[Group[W]],
    holds: dict[str, str],
    history: History,
    now: float,
    settings: Settings,
) -> list[Group[W]]:
    """The groups of a class that could be served now, in order. Adds to `holds` what they hold
    back.

    1. BLOCKED: cannot be served. Memory is kept for the first of these as it becomes free, and the
       models to evict for it are held back, unless one of those is in its turn.
    2. To be loaded while memory is kept for another model: held back.
    3. To be loaded at the cost of a model in its turn: waits, and memory is kept for it.
    4. Anything else that is not held back: can be served.
    5. In the end, all models to evict for blocked ones are held back in lower classes.
    """
    in_turn = {
        group.model
        for group in groups
        if group.availability.state is ModelState.READY
        and history.is_in_turn(group.model, now, settings.turn_s)
    }
    kept_for = next(iter(holds.values()), None)
    may_run: list[Group[W]] = []
    for group in groups:
        model, found = group.model, group.availability
        if found.state is ModelState.BLOCKED:
            if found.blockers:
                kept_for = kept_for or model
                if not found.displaced & in_turn:
                    _hold(group, holds)
        elif group.is_loadable and kept_for is not None:
            holds.setdefault(model, kept_for)
        elif found.victims & in_turn:
            kept_for = model
        elif model not in holds:
            may_run.append(group)
    for group in groups:
        _hold(group, holds)
    return may_run


def _hold(group: Group[W], holds: dict[str, str]) -> None:
    """Keep the models to evict for a blocked one from being used again, also the idle ones."""
    if group.availability.blockers:
        for key in group.availability.displaced:
            holds.setdefault(key, group.model)
