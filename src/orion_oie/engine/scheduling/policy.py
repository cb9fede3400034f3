"""Whose turn it is: which waiting request is served next, and which are held back. Pure.

- The class of requests whose oldest one has the largest `priority * aging_s + seconds waited` comes
  first: a low priority waits longer, never for ever.
- In a class, models in memory come before those to be loaded. A model that was not served for
  `turn_s` although it was wanted is overdue: the longest overdue comes first, but a model that was
  loaded less than `turn_s` ago is not evicted for it while requests of its class wait.
- Where a model has to wait until others are idle, requests for those are held back, and nothing
  behind it is loaded into the room that is to come: in lower classes, and in its own if overdue.
- Among the requests for one model, agents share evenly, in each agent its sessions: `fairness.py`.

It has no lock, no thread and no clock, does not know how long anything takes, and evicts nothing.
Times are seconds of one clock.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from orion_oie.engine.scheduling.fairness import AgentShares


class ModelState(Enum):
    """Whether a request for a model could be served now."""

    READY = "ready"  # in memory or being loaded, and takes one more request
    FULL = "full"  # in memory or being loaded, and has its fill of running requests
    LOADABLE = "loadable"  # not in memory, could be loaded now: at most idle models have to go
    BLOCKED = "blocked"  # not in memory, and something in use must end before it can be loaded


@dataclass(frozen=True, slots=True)
class Standing:
    """How a model stands with the memory.

    evicts: the idle models that have to go for it; empty if there is room.
    blockers: of a BLOCKED model, those in use that have to go as well, when they are idle. As long
        as these are in use, name the same ones each time: else none of them is awaited to the end.
    """

    state: ModelState
    evicts: frozenset[str] = frozenset()
    blockers: frozenset[str] = frozenset()

    @property
    def goers(self) -> frozenset[str]:
        """All that have to go for it."""
        return self.evicts | self.blockers


# Of a model that nothing is known of: it is tried. Others that are loadable are not this object.
UNKNOWN = Standing(ModelState.LOADABLE)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A waiting request: `seq` numbers arrivals, a higher priority comes first, and all requests
    without a session are one session."""

    seq: int
    model: str
    agent: str
    session: str | None
    priority: int
    arrived_at: float


@dataclass(frozen=True, slots=True)
class Settings:
    """turn_s: how long a model is served before others have to be. aging_s: how much longer a
    request has to wait to be worth one priority more."""

    turn_s: float = 10.0
    aging_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done: serve `pick`, or nothing now. `holds` maps each model whose requests are
    held back to the one that needs the room."""

    pick: Waiting | None
    reason: str
    holds: Mapping[str, str]


class History:
    """What was dispatched, as far as it matters for what comes next. Only `note` changes it."""

    def __init__(self) -> None:
        self._dispatched_at: dict[str, float] = {}
        self._loaded_at: dict[str, float] = {}
        self._shares: dict[str, AgentShares] = {}

    def copy(self) -> "History":
        """One that can be changed without changing this."""
        new = History()
        new._dispatched_at = dict(self._dispatched_at)
        new._loaded_at = dict(self._loaded_at)
        new._shares = {model: shares.copy() for model, shares in self._shares.items()}
        return new

    def note(self, pick: Waiting, waiting: Iterable[Waiting], now: float, *, is_load: bool) -> None:
        """`pick` out of `waiting` is being served from now on; `is_load`: its model is loaded for
        it."""
        self._dispatched_at[pick.model] = now
        if is_load:
            self._loaded_at[pick.model] = now
        asking = ((one.agent, one.session) for one in waiting if one.model == pick.model)
        shares = self._shares.setdefault(pick.model, AgentShares())
        shares.serve((pick.agent, pick.session), asking)

    def unserved_since(self, model: str, arrived_at: float) -> float:
        """Since when a model is wanted and not served, if its oldest request came at that time."""
        return max(arrived_at, self._dispatched_at.get(model, arrived_at))

    def is_in_turn(self, model: str, now: float, turn_s: float) -> bool:
        """True when the model was loaded less than a turn ago."""
        loaded_at = self._loaded_at.get(model)
        return loaded_at is not None and now - loaded_at < turn_s

    def fairest(self, requests: Sequence[Waiting]) -> Waiting:
        """The one of these requests for one model, oldest first, whose turn it is."""
        shares = self._shares.get(requests[0].model) or AgentShares()
        agent, session = shares.next_of((one.agent, one.session) for one in requests)
        return next(one for one in requests if (one.agent, one.session) == (agent, session))


@dataclass(frozen=True, slots=True)
class _Group:
    """The requests of one class for one model, oldest first."""

    requests: list[Waiting]
    standing: Standing
    unserved_since: float
    is_overdue: bool

    @property
    def model(self) -> str:
        return self.requests[0].model

    @property
    def rank(self) -> tuple[int, float, int]:
        """Groups of a class are served in this order."""
        oldest = self.requests[0].seq
        if self.is_overdue:
            return (0, self.unserved_since, oldest)
        return (_RANKS[self.standing.state], 0.0, oldest)


_RANKS = {ModelState.READY: 1, ModelState.LOADABLE: 2, ModelState.BLOCKED: 3}


def choose(
    waiting: Iterable[Waiting],
    standings: Mapping[str, Standing],
    history: History,
    now: float,
    settings: Settings,
) -> Decision:
    """Which of the waiting requests is served next, if any can be. The order of `waiting` does not
    matter; a model without a standing is taken to be loadable."""
    holds: dict[str, str] = {}
    runnable: list[list[_Group]] = []
    for groups in _classes(waiting, standings, history, now, settings):
        may_run = _held_or_runnable(groups, holds, history, now, settings)
        if may_run:
            runnable.append(may_run)
    if not runnable:
        return Decision(None, "nothing that waits can be served now", holds)
    # Not the class of the oldest of all: what cannot run must not lend its age to those beside it.
    group = min(runnable, key=lambda groups: _class_order(groups, settings))[0]
    if group.is_overdue:
        reason = f"'{group.model}' was not served for {now - group.unserved_since:.1f} s"
    elif group.standing.state is ModelState.READY:
        reason = f"'{group.model}' is in memory"
    else:
        reason = f"'{group.model}' can be loaded, and nothing before it can be served"
    return Decision(history.fairest(group.requests), reason, holds)


def _classes(
    waiting: Iterable[Waiting],
    standings: Mapping[str, Standing],
    history: History,
    now: float,
    settings: Settings,
) -> list[list[_Group]]:
    """The classes in their order, each with its groups in theirs; without what is full."""
    classes: dict[int, dict[str, list[Waiting]]] = {}
    for one in sorted(waiting, key=lambda one: one.seq):
        if standings.get(one.model, UNKNOWN).state is not ModelState.FULL:
            classes.setdefault(one.priority, {}).setdefault(one.model, []).append(one)
    sorted_classes = []
    for models in classes.values():
        groups = []
        for model, requests in models.items():
            since = history.unserved_since(model, requests[0].arrived_at)
            is_overdue = now - since >= settings.turn_s
            groups.append(_Group(requests, standings.get(model, UNKNOWN), since, is_overdue))
        sorted_classes.append(sorted(groups, key=lambda group: group.rank))
    return sorted(sorted_classes, key=lambda groups: _class_order(groups, settings))


def _class_order(groups: list[_Group], settings: Settings) -> tuple[float, int]:
    """Smaller comes first. `now` would change all alike."""
    oldest = min((group.requests[0] for group in groups), key=lambda one: one.seq)
    return (oldest.arrived_at - oldest.priority * settings.aging_s, -oldest.priority)


def _held_or_runnable(
    groups: list[_Group],
    holds: dict[str, str],
    history: History,
    now: float,
    settings: Settings,
) -> list[_Group]:
    """Those groups of a class that could be served now. Adds to `holds` what they hold back."""
    in_turn = {
        group.model
        for group in groups
        if group.standing.state is ModelState.READY
        and history.is_in_turn(group.model, now, settings.turn_s)
    }
    kept_for = next(iter(holds.values()), None)  # the room that is to come
    may_run: list[_Group] = []
    for group in groups:
        model, standing = group.model, group.standing
        if standing.state is ModelState.BLOCKED:
            if standing.blockers:
                kept_for = kept_for or model
                if not standing.goers & in_turn:
                    _hold(group, holds)
        elif standing.state is ModelState.LOADABLE and kept_for is not None:
            holds.setdefault(model, kept_for)
        elif standing.evicts & in_turn:
            kept_for = model
        elif model not in holds:
            may_run.append(group)
    for group in groups:
        _hold(group, holds)  # the others that are blocked hold back lower classes only
    return may_run


def _hold(group: _Group, holds: dict[str, str]) -> None:
    """Keep what has to go for a blocked model from being used again, the idle ones included."""
    if group.standing.blockers:
        for key in group.standing.goers:
            holds.setdefault(key, group.model)


def order(
    waiting: Iterable[Waiting],
    standings: Mapping[str, Standing],
    history: History,
    now: float,
    settings: Settings,
) -> list[Waiting]:
    """All of them in the order in which they would be served if no other came, and what is full
    or blocked now were not when it is its turn. An estimate: it knows no durations."""
    left = {one.seq: one for one in waiting}
    models = {one.model for one in left.values()}
    later = {model: _once_idle(standings.get(model, UNKNOWN)) for model in models}
    history = history.copy()
    ordered: list[Waiting] = []
    while left:
        pick = choose(left.values(), later, history, now, settings).pick
        assert pick is not None, "nothing is full or blocked"
        gone = later[pick.model].evicts
        is_load = later[pick.model].state is ModelState.LOADABLE
        history.note(pick, left.values(), now, is_load=is_load)
        if is_load:
            later[pick.model] = Standing(ModelState.READY)
            for model in models - {pick.model}:  # it has the place of those that went
                if model in gone:
                    later[model] = Standing(ModelState.LOADABLE, evicts=frozenset({pick.model}))
                elif later[model].evicts & gone:
                    evicts = later[model].evicts - gone | {pick.model}
                    later[model] = Standing(ModelState.LOADABLE, evicts=evicts)
        ordered.append(left.pop(pick.seq))
    return ordered


def _once_idle(standing: Standing) -> Standing:
    if standing.state is ModelState.FULL:
        return Standing(ModelState.READY)
    if standing.state is ModelState.BLOCKED:
        return Standing(ModelState.LOADABLE, evicts=standing.goers)
    return standing


def why(one: Waiting, standings: Mapping[str, Standing], decision: Decision) -> str:
    """A sentence: why a request waits."""
    standing = standings.get(one.model, UNKNOWN)
    if standing.state is ModelState.FULL:
        return f"'{one.model}' answers as many requests as it may at once"
    if standing.state is ModelState.BLOCKED:
        names = ", ".join(f"'{key}'" for key in sorted(standing.blockers)) or "other models"
        return f"'{one.model}' is not in memory, and waits until {names} can make room"
    if decision.pick == one:
        return "it is next"
    if one.model in decision.holds:
        return f"'{one.model}' is held back so that '{decision.holds[one.model]}' gets room"
    return "others come before it"
