"""The ranks of the models that are waited for, and which of them may be served now. Pure.

The rules are those of `policy.py`: requests of one priority are a class, and of a class those for
one model are a group.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Group(Generic[W]):
    """The requests of one class for one model."""

    line: W
    oldest: Waiting
    availability: Availability
    unserved_since: float
    is_overdue: bool

    @property
    def model(self) -> str:
        return self.line.model

    @property
    def rank(self) -> tuple[int, float, int]:
        """Groups of a class are served in this order."""
        if self.is_overdue:
            return (0, self.unserved_since, self.oldest.seq)
        return (_RANKS.get(self.availability.state, _TRIED), 0.0, self.oldest.seq)


_TRIED = 2  # the rank of everything that a load is begun for
_RANKS = {ModelState.READY: 1, ModelState.BLOCKED: 3}


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
            oldest = line.oldest
            since = history.unserved_since(line.model, oldest.arrived_at)
            groups.append(Group(line, oldest, found, since, now - since >= settings.turn_s))
        if groups:
            sorted_classes.append(sorted(groups, key=lambda group: group.rank))
    return sorted(sorted_classes, key=lambda groups: class_order(groups, settings))


def class_order(groups: list[Group[W]], settings: Settings) -> tuple[float, int]:
    """The sort key of a class. `now` is left out: it would shift all of them alike."""
    oldest = min((group.oldest for group in groups), key=lambda one: one.seq)
    return (oldest.arrived_at - oldest.priority * settings.aging_s, -oldest.priority)


def runnable(
    groups: list[Group[W]],
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
        elif found.is_loadable and kept_for is not None:
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
