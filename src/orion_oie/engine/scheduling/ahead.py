"""The waiting requests as they will be once some of them are served, without a change to any. Pure.

It is for a look at the next few of very many: nothing is copied request by request.
"""

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter

from orion_oie.engine.scheduling.fairness import AgentShares
from orion_oie.engine.scheduling.history import History, Settings
from orion_oie.engine.scheduling.lines import AgentLine, Line, Lines, Waiting
from orion_oie.engine.scheduling.moment import Moment, class_key
from orion_oie.engine.scheduling.ranking import Group
from orion_oie.schemas.availability import Availability


class _Left:
    """The first of some requests that is not taken."""

    def __init__(self, requests: Iterable[Waiting], taken: set[int]) -> None:
        self._rest = iter(requests)
        self._taken = taken
        self._head = next(self._rest, None)

    def head(self) -> Waiting | None:
        """That request, None if all are taken."""
        while self._head is not None and self._head.seq in self._taken:
            self._head = next(self._rest, None)
        return self._head

    def seq(self) -> int | None:
        """Its number."""
        head = self.head()
        return None if head is None else head.seq


class _AgentAhead:
    """The requests of one agent in a line."""

    def __init__(
        self, own: AgentLine, past: AgentShares, shares: AgentShares, agent: str, taken: set[int]
    ) -> None:
        self._own, self._taken = own, taken
        self._lefts: dict[str | None, _Left] = {}
        self._shares = shares.sessions(agent)
        self._turns = own.turns.copy(self._head, past.sessions(agent), self._shares)

    def _left(self, session: str | None) -> _Left:
        left = self._lefts.get(session)
        if left is None:
            left = _Left(self._own.sessions[session].values(), self._taken)
            self._lefts[session] = left
        return left

    def _head(self, session: str | None) -> int | None:
        left = self._lefts.get(session)
        if left is not None:
            return left.seq()
        requests = self._own.sessions.get(session)
        return None if requests is None else next(iter(requests))

    def fairest(self) -> Waiting:
        """The request whose turn it is."""
        one = self._left(self._turns.next(self._shares)).head()
        assert one is not None
        return one


class LineAhead:
    """A line without the requests that are taken. `past` are the shares so far, and `shares` a copy
    of them that is served with what is taken."""

    def __init__(self, line: Line, past: AgentShares, shares: AgentShares, taken: set[int]) -> None:
        self.model, self.priority = line.model, line.priority
        self._line, self._past, self._shares, self._taken = line, past, shares, taken
        self._left = _Left(line, taken)
        self._lefts = {
            agent: _Left(own.requests.values(), taken) for agent, own in line.agents.items()
        }
        self._agents: dict[str, _AgentAhead] = {}
        self._turns = line.turns.copy(self._head, past.agents, shares.agents)
        self._number = len(line)

    def __len__(self) -> int:
        return self._number

    def _head(self, agent: str) -> int | None:
        left = self._lefts.get(agent)
        return None if left is None else left.seq()

    @property
    def oldest(self) -> Waiting:
        """The request that came first."""
        one = self._left.head()
        assert one is not None
        return one

    def take(self) -> Waiting:
        """The request whose turn it is, which is taken. Its shares are left as they are."""
        agent = self._turns.next(self._shares.agents)
        own = self._agents.get(agent)
        if own is None:
            own = self._agents[agent] = _AgentAhead(
                self._line.agents[agent], self._past, self._shares, agent, self._taken
            )
        one = own.fairest()
        self._taken.add(one.seq)
        self._number -= 1
        return one


class Ahead:
    """All lines, and the shares of those who ask."""

    def __init__(self, lines: Lines, history: History) -> None:
        self.history = history.copy()
        self.taken: set[int] = set()
        self._lines = lines
        self._left: dict[str, dict[str, dict[str | None, int]]] = {}
        self._classes = [[self._ahead(line, history) for line in its] for its in lines.classes()]

    def _ahead(self, line: Line, past: History) -> LineAhead:
        shares = past.shares(line.model), self.history.shares(line.model)
        return LineAhead(line, *shares, self.taken)

    def classes(self) -> list[list[LineAhead]]:
        """The lines of each priority that are not empty."""
        left = ([line for line in its if len(line)] for its in self._classes)
        return [its for its in left if its]

    def take(self, line: LineAhead) -> Waiting:
        """The request of a line whose turn it is. It is served."""
        one = line.take()
        askers = self._askers(one.model)
        sessions = askers[one.agent]
        self.history.shares(one.model).serve(one.agent, one.session, len(askers), len(sessions))
        sessions[one.session] -= 1
        if not sessions[one.session]:
            del sessions[one.session]
            if not sessions:
                del askers[one.agent]
        return one

    def _askers(self, model: str) -> dict[str, dict[str | None, int]]:
        if model not in self._left:
            self._left[model] = {
                agent: dict(sessions) for agent, sessions in self._lines.askers(model).items()
            }
        return self._left[model]


def follow(
    ahead: Ahead,
    lines: Sequence[Sequence[LineAhead]],
    later: Mapping[str, Availability],
    now: float,
    settings: Settings,
    most: int,
) -> tuple[list[Waiting], str | None]:
    """The requests that are served next, `most` of them, in order, and the model that is loaded for
    the last one. Takes them from `ahead`, whose `lines` may change each other's shares."""
    at = Moment(lines, later, ahead.history, now, settings)
    sides = [_Side(may_run, settings) for may_run in at.plans]
    served: list[Waiting] = []
    models: dict[str, None] = {}
    is_over = False
    while not is_over:
        side = min(sides, key=_side_order)
        group = side.next
        served.append(ahead.take(group.line))
        models[group.model] = None
        is_over = (
            len(served) == most
            or bool(at.pairs_of_note)
            or not len(group.line)
            or at.is_choice(group, True)
        )
        if not is_over:
            side.update()
    loaded = group.model if group.is_loadable else None
    ahead.history.note_models(models, now, loaded)
    return served, loaded


class _Side:
    """The groups of a class of which one is served next."""

    def __init__(self, may_run: Sequence[Group[LineAhead]], settings: Settings) -> None:
        self._groups = [group for group in may_run if group.rank == may_run[0].rank]
        self._most = class_key(may_run[len(self._groups) :], settings)
        self._priority = self._groups[0].line.priority
        self._handicap_s = self._priority * settings.aging_s
        self.update()

    def update(self) -> None:
        """Find the next group anew."""
        self.next = min(self._groups, key=_line_oldest)
        key = self.next.line.oldest.arrived_at - self._handicap_s
        self.order = (min(key, self._most), -self._priority)


def _line_oldest(group: Group[LineAhead]) -> int:
    return group.line.oldest.seq


_side_order = attrgetter("order")
