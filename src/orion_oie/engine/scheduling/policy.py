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

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orion_oie.engine.scheduling.ahead import Ahead, follow
from orion_oie.engine.scheduling.forecast import Rest, stretch
from orion_oie.engine.scheduling.history import History, Settings
from orion_oie.engine.scheduling.lines import Line, Lines, Waiting
from orion_oie.engine.scheduling.ranking import Group, class_order, classes_of, runnable
from orion_oie.schemas.availability import READY, UNKNOWN, Availability, ModelState


@dataclass(frozen=True, slots=True)
class Decision:
    """The request to serve, or None for nothing now. `holds` maps each model whose requests are
    held back to the one that needs the memory."""

    pick: Waiting | None
    reason: str
    holds: Mapping[str, str]


def choose(
    waiting: Lines | Iterable[Waiting],
    availability: Mapping[str, Availability],
    history: History,
    now: float,
    settings: Settings,
) -> Decision:
    """The request to serve next, if any can be.

    1. Sort the lines into classes, without models that are full, and rank them (`classes_of`).
    2. In each class find the groups that can be served, and note what the others hold back
       (`runnable`).
    3. Of the classes with such groups take the first, of its groups the first, and of the group the
       request whose turn it is.

    The order of `waiting` does not matter; a model of unknown availability is taken to be loadable.
    """
    lines = waiting if isinstance(waiting, Lines) else Lines(waiting)
    holds: dict[str, str] = {}
    plans: list[list[Group[Line]]] = []
    for groups in classes_of(lines.classes(), availability, history, now, settings):
        may_run = runnable(groups, holds, history, now, settings)
        if may_run:
            plans.append(may_run)
    if not plans:
        return Decision(None, "nothing that waits can be served now", holds)
    # Not the class of the oldest request: a group that cannot run must not lend its age to others.
    group = min(plans, key=lambda groups: class_order(groups, settings))[0]
    if group.is_overdue:
        reason = f"'{group.model}' was not served for {now - group.unserved_since:.1f} s"
    elif group.availability.state is ModelState.READY:
        reason = f"'{group.model}' is in memory"
    else:
        reason = f"'{group.model}' can be loaded, and nothing before it can be served"
    return Decision(history.fairest(group.line), reason, holds)


def order(
    waiting: Lines | Iterable[Waiting],
    availability: Mapping[str, Availability],
    history: History,
    now: float,
    settings: Settings,
    *,
    exact: int | None = None,
) -> list[Waiting]:
    """All requests in the order in which they would be served if no other came, and if no model
    were full or blocked in its turn. An estimate: it knows no durations.

    Where several agents or sessions wait for one model in several priorities, what is served of one
    priority changes whose turn it is in the others. That is followed for the first `exact` only:
    by default for all of up to 500, and for the first 100 of more. Those behind them are ordered as
    if each priority had shares of its own."""
    lines = waiting if isinstance(waiting, Lines) else Lines(waiting)
    later = {model: _once_idle(availability.get(model, UNKNOWN)) for model in lines.counts}
    if not lines.is_in_order:
        return _step_by_step(Lines(lines), later, history.copy(), now, settings)
    first: list[Waiting] = []
    if _is_entangled(lines):
        if exact is None:
            exact = len(lines) if len(lines) <= _FEW else _FIRST
        first = _follow(Ahead(lines, history), dict(later), now, settings, exact)
    if len(first) == len(lines):
        return first
    done = {one.seq for one in first}
    rests = [[Rest(line, history, settings) for line in its] for its in lines.classes()]
    rest = _merge(rests, later, history.without_shares(), now, settings)
    return first + [one for one in rest if one.seq not in done] if first else rest


_FEW, _FIRST = 500, 100


def _is_entangled(lines: Lines) -> bool:
    """True when several flows wait for one model in several priorities: what is served of one of
    its lines then changes whose turn it is in the others."""
    number = Counter(line.model for its_lines in lines.classes() for line in its_lines)
    flows = (sum(map(len, lines.askers(m).values())) for m, count in number.items() if count > 1)
    return any(one > 1 for one in flows)


def _merge(
    classes: list[list[Rest]],
    later: dict[str, Availability],
    history: History,
    now: float,
    settings: Settings,
) -> list[Waiting]:
    """The order, stretch by stretch. Uses up all that it is given."""
    ordered: list[Waiting] = []
    while classes:
        served, loaded = stretch(classes, later, history, now, settings)
        ordered += served
        if loaded is not None:
            _load(loaded, later)
        left = ([rest for rest in rests if len(rest)] for rests in classes)
        classes = [rests for rests in left if rests]
    return ordered


def _follow(
    ahead: Ahead, later: dict[str, Availability], now: float, settings: Settings, number: int
) -> list[Waiting]:
    """The first so many of the order. Uses up all that it is given."""
    ordered: list[Waiting] = []
    while len(ordered) < number and (classes := ahead.classes()):
        served, loaded = follow(ahead, classes, later, now, settings, number - len(ordered))
        ordered += served
        if loaded is not None:
            _load(loaded, later)
    return ordered


def _step_by_step(
    left: Lines,
    later: dict[str, Availability],
    history: History,
    now: float,
    settings: Settings,
) -> list[Waiting]:
    """The order, by one choice after the other. Uses up all that it is given."""
    ordered: list[Waiting] = []
    while len(left):
        pick = choose(left, later, history, now, settings).pick
        if pick is None:
            raise RuntimeError("nothing can be served although nothing is full or blocked")
        is_load = later[pick.model].is_loadable
        history.note(pick, left, now, is_load=is_load)
        if is_load:
            _load(pick.model, later)
        ordered.append(pick)
        left.remove(pick)
    return ordered


def _load(loaded: str, later: dict[str, Availability]) -> None:
    """Foresee that a model is loaded: it takes the memory of those that go."""
    gone = later[loaded].victims
    later[loaded] = READY
    for model, found in later.items():
        if model == loaded:
            continue
        if model in gone:
            later[model] = Availability(ModelState.LOADABLE, frozenset({loaded}))
        elif found.victims & gone:
            later[model] = Availability(ModelState.LOADABLE, found.victims - gone | {loaded})


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
