"""The waiting requests, in lines: by priority and model, and in each line by agent and session.

The structure is updated as requests come and go, so that a decision need not sort them. It decides
nothing and has no lock.
"""

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from orion_oie.engine.scheduling.fairness import (
    AgentShares,
    Shares,
    Turns,
    merged,
    oldest_left,
)

K = TypeVar("K")

Flow = tuple[str, str | None]
"""An agent and one of its sessions; all requests without a session are one session."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A waiting request: `seq` numbers arrivals, and a higher priority comes first. `arrived_at` is
    in seconds of the queue's clock."""

    seq: int
    model: str
    agent: str
    session: str | None
    priority: int
    arrived_at: float

    @property
    def flow(self) -> Flow:
        return self.agent, self.session


Row = tuple[int, float, Waiting]
"""A request in the order of service. Before it, of the oldest one that is left then: the number,
and the key by which its class comes before others."""


class Plan:
    """The requests of a line in the order in which they are served while no other comes, and none
    of their agents is served out of another line of the model. `requests` are all, by number."""

    def __init__(
        self,
        requests: Mapping[int, Waiting],
        served: Sequence[Waiting],
        handicap_s: float,
        *,
        is_one_flow: bool,
        of: object,
    ) -> None:
        self._requests, self._handicap_s = requests, handicap_s
        self.is_one_flow, self.of = is_one_flow, of  # of: what it depends on beside the requests
        self.oldest = oldest_left([one.seq for one in served])  # these never fall,
        self.keys = [  # and these neither if requests are numbered in the order of their times
            one.arrived_at - handicap_s for one in map(requests.__getitem__, self.oldest)
        ]
        self.rows: list[Row] = list(zip(self.oldest, self.keys, served, strict=True))

    def oldest_at(self, place: int) -> Waiting:
        """The oldest one that is left once so many are served."""
        return self._requests[self.oldest[place]]

    def add(self, one: Waiting) -> None:
        """Put a request at the end of the only flow."""
        self.oldest.append(one.seq)
        self.keys.append(one.arrived_at - self._handicap_s)
        self.rows.append((one.seq, self.keys[-1], one))

    def remove(self, one: Waiting) -> None:
        """Take a request of the only flow out."""
        place = bisect_left(self.oldest, one.seq)
        del self.oldest[place], self.keys[place], self.rows[place]


class AgentLine:
    """The requests of one agent in a line."""

    def __init__(self) -> None:
        self._merged: tuple[object, Sequence[Waiting]] | None = None
        self.requests: OrderedDict[int, Waiting] = OrderedDict()
        self.sessions: dict[str | None, OrderedDict[int, Waiting]] = {}
        self.turns: Turns[str | None] = Turns(self._head)

    def _head(self, session: str | None) -> int | None:
        requests = self.sessions.get(session)
        return None if requests is None else next(iter(requests))

    def merged(self, shares: Shares[str | None]) -> Sequence[Waiting]:
        """The requests in the order in which they are served by these shares."""
        if len(self.sessions) == 1 or (
            len(self.sessions) == len(self.requests) and not shares.are_any_ahead(self.sessions)
        ):
            return list(self.requests.values())
        if self._merged is None or self._merged[0] is not shares.state:
            flows = {name: list(own.values()) for name, own in self.sessions.items()}
            self._merged = shares.state, merged(flows, shares)
        return self._merged[1]

    def add(self, one: Waiting) -> None:
        self._merged = None
        self.requests[one.seq] = one
        requests = self.sessions.get(one.session)
        if requests is None:
            self.sessions[one.session] = OrderedDict({one.seq: one})
            self.turns.add(one.session)
        else:
            requests[one.seq] = one

    def remove(self, one: Waiting) -> None:
        self._merged = None
        del self.requests[one.seq]
        requests = self.sessions[one.session]
        del requests[one.seq]
        if not requests:
            del self.sessions[one.session]


class Line:
    """The requests of one priority for one model."""

    def __init__(self, priority: int, model: str) -> None:
        self.priority = priority
        self.model = model
        self.requests: OrderedDict[int, Waiting] = OrderedDict()
        self.agents: dict[str, AgentLine] = {}
        self.turns: Turns[str] = Turns(self._head)
        self._plan: Plan | None = None

    def _head(self, agent: str) -> int | None:
        own = self.agents.get(agent)
        return None if own is None else next(iter(own.requests))

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Waiting]:
        """The requests, oldest first."""
        return iter(self.requests.values())

    @property
    def oldest(self) -> Waiting:
        """The request that came first."""
        return next(iter(self.requests.values()))

    @property
    def is_one_flow(self) -> bool:
        """True when all come from one session of one agent."""
        return len(self.agents) == 1 and all(len(a.sessions) == 1 for a in self.agents.values())

    def plan(self, shares: AgentShares, aging_s: float) -> Plan:
        """The requests in the order in which they are served by these shares. It may be used until
        one comes or goes, or somebody is served."""
        is_one_flow = self.is_one_flow
        of = (None if is_one_flow else shares.state, aging_s)
        plan = self._plan
        if plan is None or plan.of != of or plan.is_one_flow != is_one_flow:
            by_agent = {
                agent: own.merged(shares.sessions(agent)) for agent, own in self.agents.items()
            }
            served = merged(by_agent, shares.agents)
            handicap_s = self.priority * aging_s
            plan = Plan(self.requests, served, handicap_s, is_one_flow=is_one_flow, of=of)
            self._plan = plan
        return plan

    def fairest(self, shares: AgentShares) -> Waiting:
        """The request whose turn it is by these shares."""
        agent = self.turns.next(shares.agents)
        own = self.agents[agent]
        session = own.turns.next(shares.sessions(agent))
        return next(iter(own.sessions[session].values()))

    def add(self, one: Waiting) -> None:
        """Put a request that came after the others at the end."""
        self.requests[one.seq] = one
        own = self.agents.get(one.agent)
        if own is None:
            own = self.agents[one.agent] = AgentLine()
            own.add(one)
            self.turns.add(one.agent)
        else:
            own.add(one)
        if self._plan is not None and self._plan.is_one_flow and self.is_one_flow:
            self._plan.add(one)
        else:
            self._plan = None

    def remove(self, one: Waiting) -> None:
        """Take a request out."""
        if self._plan is not None and self._plan.is_one_flow:
            self._plan.remove(one)
        else:
            self._plan = None
        del self.requests[one.seq]
        own = self.agents[one.agent]
        own.remove(one)
        if not own.requests:
            del self.agents[one.agent]


class Lines:
    """All waiting requests. `requests` are added in the order of their arrival."""

    def __init__(self, requests: Iterable[Waiting] = ()) -> None:
        self._classes: dict[int, dict[str, Line]] = {}
        self._counts: dict[str, int] = {}
        self._askers: dict[str, dict[str, dict[str | None, int]]] = {}
        self._latest_at = -math.inf
        self.is_in_order = True  # no request came at an earlier time than one with a lower number
        for one in sorted(requests, key=lambda one: one.seq):
            self.add(one)

    def __len__(self) -> int:
        return sum(self._counts.values())

    def __iter__(self) -> Iterator[Waiting]:
        """All requests, oldest first."""
        every = [one for lines in self._classes.values() for line in lines.values() for one in line]
        return iter(sorted(every, key=lambda one: one.seq))

    @property
    def counts(self) -> Mapping[str, int]:
        """The number of waiting requests, by model."""
        return self._counts

    def classes(self) -> Iterable[Iterable[Line]]:
        """The lines of each priority."""
        return (lines.values() for lines in self._classes.values())

    def askers(self, model: str) -> Mapping[str, Mapping[str | None, int]]:
        """The number of requests for a model, in any priority, by agent and session."""
        return self._askers.get(model, {})

    def add(self, one: Waiting) -> None:
        """Put a request that came after the others at the end of its line."""
        self.is_in_order = self.is_in_order and one.arrived_at >= self._latest_at
        self._latest_at = one.arrived_at
        lines = self._classes.setdefault(one.priority, {})
        line = lines.get(one.model)
        if line is None:
            line = lines[one.model] = Line(one.priority, one.model)
        line.add(one)
        self._counts[one.model] = self._counts.get(one.model, 0) + 1
        sessions = self._askers.setdefault(one.model, {}).setdefault(one.agent, {})
        sessions[one.session] = sessions.get(one.session, 0) + 1

    def remove(self, one: Waiting) -> None:
        """Take a request out of its line."""
        lines = self._classes[one.priority]
        line = lines[one.model]
        line.remove(one)
        if not line:
            del lines[one.model]
            if not lines:
                del self._classes[one.priority]
        agents = self._askers[one.model]
        sessions = agents[one.agent]
        _take_one(self._counts, one.model)
        _take_one(sessions, one.session)
        if not sessions:
            del agents[one.agent]
            if not agents:
                del self._askers[one.model]


def _take_one(counts: dict[K, int], key: K) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
