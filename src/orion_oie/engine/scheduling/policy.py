"""The choice of the request to serve next, and of those to hold back. Pure.

1. Requests of one priority are a class. First comes the class whose oldest request has the largest
   `priority * aging_s + seconds waited`: a low priority waits longer, but not forever.
2. In a class, models in memory come before those to be loaded. A model that was not served for
   `turn_s` although it was wanted is overdue: the longest overdue comes first, but a model that was
   loaded less than `turn_s` ago is not evicted for it while requests of its class wait.
3. Where a model has to wait until others are idle, requests for those are held back, and nothing
   behind it is loaded into the memory that they will free: in lower classes, and in its own if
   overdue.
4. Among the requests for one model, agents share evenly, and in each agent its sessions: see
   `fairness.py`.

It has no lock, no thread and no clock, knows no durations, and evicts nothing. Times are seconds of
one clock.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orion_oie.engine.scheduling.fairness import AgentShares
from orion_oie.engine.scheduling.lines import Line, Lines, Waiting
from orion_oie.schemas.availability import READY, UNKNOWN, Availability, ModelState


@dataclass(frozen=True, slots=True)
class Settings:
    """turn_s: the seconds for which a model is served before others have to be. aging_s: the
    seconds of waiting that are worth one step of priority."""

    turn_s: float = 10.0
    aging_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Decision:
    """The request to serve, or None for nothing now. `holds` maps each model whose requests are
    held back to the one that needs the memory."""

    pick: Waiting | None
    reason: str
    holds: Mapping[str, str]


class History:
    """The dispatches so far, as far as they affect the next choice. Only `note` changes it."""

    def __init__(self) -> None:
        self._dispatched_at: dict[str, float] = {}
        self._loaded_at: dict[str, float] = {}
        self._shares: dict[str, AgentShares] = {}

    def copy(self) -> "History":
        """An independent copy."""
        new = History()
        new._dispatched_at = dict(self._dispatched_at)
        new._loaded_at = dict(self._loaded_at)
        new._shares = {model: shares.copy() for model, shares in self._shares.items()}
        return new

    def note(self, pick: Waiting, lines: Lines, now: float, *, is_load: bool) -> None:
        """Note that `pick` out of `lines` is dispatched; `is_load`: its model is loaded for it."""
        self._dispatched_at[pick.model] = now
        if is_load:
            self._loaded_at[pick.model] = now
        shares = self._shares.setdefault(pick.model, AgentShares())
        shares.serve(pick.flow, lines.flows(pick.model))

    def unserved_since(self, model: str, arrived_at: float) -> float:
        """The time since which a model is wanted but not served, given its oldest request's
        arrival."""
        return max(arrived_at, self._dispatched_at.get(model, arrived_at))

    def is_in_turn(self, model: str, now: float, turn_s: float) -> bool:
        """True when the model was loaded less than a turn ago."""
        loaded_at = self._loaded_at.get(model)
        return loaded_at is not None and now - loaded_at < turn_s

    def fairest(self, line: Line) -> Waiting:
        """The request of a line whose turn it is."""
        shares = self._shares.get(line.model) or AgentShares()
        return line.oldest_of(shares.next_of(line.flows()))


@dataclass(frozen=True, slots=True)
class _Group:
    """The requests of one class for one model."""

    line: Line
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


def choose(
    waiting: Lines | Iterable[Waiting],
    availability: Mapping[str, Availability],
    history: History,
    now: float,
    settings: Settings,
) -> Decision:
    """The request to serve next, if any can be.

    1. Sort the lines into classes, without models that are full, and rank them (`_classes`).
    2. In each class find the groups that can be served, and note what the others hold back
       (`_runnable`).
    3. Of the classes with such groups take the first, of its groups the first, and of the group the
       request whose turn it is.

    The order of `waiting` does not matter; a model of unknown availability is taken to be loadable.
    """
    lines = waiting if isinstance(waiting, Lines) else Lines(waiting)
    holds: dict[str, str] = {}
    runnable: list[list[_Group]] = []
    for groups in _classes(lines, availability, history, now, settings):
        may_run = _runnable(groups, holds, history, now, settings)
        if may_run:
            runnable.append(may_run)
    if not runnable:
        return Decision(None, "nothing that waits can be served now", holds)
    # Not the class of the oldest request: a group that cannot run must not lend its age to others.
    group = min(runnable, key=lambda groups: _class_order(groups, settings))[0]
    if group.is_overdue:
        reason = f"'{group.model}' was not served for {now - group.unserved_since:.1f} s"
    elif group.availability.state is ModelState.READY:
        reason = f"'{group.model}' is in memory"
    else:
        reason = f"'{group.model}' can be loaded, and nothing before it can be served"
    return Decision(history.fairest(group.line), reason, holds)


def _classes(
    lines: Lines,
    availability: Mapping[str, Availability],
    history: History,
    now: float,
    settings: Settings,
) -> list[list[_Group]]:
    """The classes in order, each with its groups in order, without full models."""
    sorted_classes = []
    for its_lines in lines.classes():
        groups = []
        for line in its_lines:
            found = availability.get(line.model, UNKNOWN)
            if found.state is ModelState.FULL:
                continue
            oldest = line.oldest
            since = history.unserved_since(line.model, oldest.arrived_at)
            groups.append(_Group(line, oldest, found, since, now - since >= settings.turn_s))
        if groups:
            sorted_classes.append(sorted(groups, key=lambda group: group.rank))
    return sorted(sorted_classes, key=lambda groups: _class_order(groups, settings))


def _class_order(groups: list[_Group], settings: Settings) -> tuple[float, int]:
    """The sort key of a class. `now` is left out: it would shift all of them alike."""
    oldest = min((group.oldest for group in groups), key=lambda one: one.seq)
    return (oldest.arrived_at - oldest.priority * settings.aging_s, -oldest.priority)


def _runnable(
    groups: list[_Group],
    holds: dict[str, str],
    history: History,
    now: float,
    settings: Settings,
) -> list[_Group]:
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
    may_run: list[_Group] = []
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


def _hold(group: _Group, holds: dict[str, str]) -> None:
    """Keep the models to evict for a blocked one from being used again, also the idle ones."""
    if group.availability.blockers:
        for key in group.availability.displaced:
            holds.setdefault(key, group.model)


def order(
    waiting: Lines | Iterable[Waiting],
    availability: Mapping[str, Availability],
    history: History,
    now: float,
    settings: Settings,
) -> list[Waiting]:
    """All requests in the order in which they would be served if no other came, and if no model
    were full or blocked in its turn. An estimate: it knows no durations."""
    left = Lines(waiting)
    models = set(left.counts)
    later = {model: _once_idle(availability.get(model, UNKNOWN)) for model in models}
    history = history.copy()
    ordered: list[Waiting] = []
    while len(left):
        pick = choose(left, later, history, now, settings).pick
        if pick is None:
            raise RuntimeError("nothing can be served although nothing is full or blocked")
        gone = later[pick.model].victims
        is_load = later[pick.model].is_loadable
        history.note(pick, left, now, is_load=is_load)
        if is_load:
            later[pick.model] = READY
            for model in models - {pick.model}:  # it takes the memory of those that went
                if model in gone:
                    later[model] = Availability(ModelState.LOADABLE, frozenset({pick.model}))
                elif later[model].victims & gone:
                    victims = later[model].victims - gone | {pick.model}
                    later[model] = Availability(ModelState.LOADABLE, victims)
        ordered.append(pick)
        left.remove(pick)
    return ordered


def _once_idle(found: Availability) -> Availability:
    if found.state is ModelState.FULL:
        return READY
    if found.state is ModelState.BLOCKED:
        return Availability(ModelState.LOADABLE, found.displaced)
    return found


def why(one: Waiting, availability: Mapping[str, Availability], decision: Decision) -> str:
    """The reason that a request waits, in a sentence."""
    found = availability.get(one.model, UNKNOWN)
    if found.state is ModelState.FULL:
        return f"'{one.model}' answers as many requests as it may at once"
    if found.state is ModelState.BLOCKED:
        names = ", ".join(f"'{key}'" for key in sorted(found.blockers)) or "other models"
        return f"'{one.model}' is not in memory, and waits until {names} can be evicted"
    if decision.pick == one:
        return "it is next"
    if one.model in decision.holds:
        return f"'{one.model}' is held back so that '{decision.holds[one.model]}' gets memory"
    return "others come before it"
