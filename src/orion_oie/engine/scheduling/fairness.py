"""Even shares for agents, and within each agent for its sessions, however much each of them asks.

Start-time fair queueing in two levels. It counts requests, not how long they take, and keeps no
requests: callers pass who asks and who was served.

`Shares` is the rule; `Turns` finds the next of many flows without looking at all of them, and
`merged` the whole order of some that nobody else disturbs.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import accumulate
from typing import Generic, Protocol, TypeVar


class Numbered(Protocol):
    """Something that came at a time: a lower number came first."""

    @property
    def seq(self) -> int: ...


F = TypeVar("F", bound=Hashable)
N = TypeVar("N", bound=Numbered)


class Shares(Generic[F]):
    """The shares of some flows. Each has a virtual time, which advances by one when it is served.

    A flow that was idle comes back at the common clock, not before it: idle time is not saved up.
    The clock also moves by itself, by a little less than a fair share: otherwise an endless supply
    of new flows, which all start at the clock, would keep an old one from its turn.
    """

    def __init__(self) -> None:
        self._clock = 0.0
        self._ends: dict[F, float] = {}
        self.state: object = None  # another one whenever a flow is served; equal for equal shares

    def copy(self) -> "Shares[F]":
        """An independent copy."""
        new = Shares[F]()
        new._clock, new._ends, new.state = self._clock, dict(self._ends), self.state
        return new

    @property
    def clock(self) -> float:
        """The common clock."""
        return self._clock

    def end(self, flow: F) -> float:
        """The virtual time at which the latest service of a flow ends. The flow starts then, or at
        the clock: the least start is next, and of equals the flow with the oldest request."""
        return self._ends.get(flow, 0.0)

    def are_any_ahead(self, flows: Iterable[F]) -> bool:
        """True when one of these starts later than at the clock."""
        ends, clock = self._ends, self._clock
        return any(ends[flow] > clock for flow in flows if flow in ends)

    def serve(self, flow: F, flows: int) -> None:
        """A flow is served, one of `flows` that ask."""
        self.state = object()
        start = max(self._clock, self.end(flow))
        self._ends[flow] = start + 1
        self._clock = max(start, self._clock + 1 / (flows + 1))
        if len(self._ends) > 2 * flows + 16:  # those behind the clock are as good as new
            self._ends = {flow: end for flow, end in self._ends.items() if end > self._clock}


class AgentShares:
    """The shares of agents, and of the sessions of each; a session may be None."""

    def __init__(self) -> None:
        self.agents: Shares[str] = Shares()
        self._sessions: dict[str, Shares[str | None]] = {}

    @property
    def state(self) -> object:
        """Another one whenever somebody is served: the agents are at each service."""
        return self.agents.state

    def copy(self) -> "AgentShares":
        """An independent copy."""
        new = AgentShares()
        new.agents = self.agents.copy()
        new._sessions = {agent: shares.copy() for agent, shares in self._sessions.items()}
        return new

    def sessions(self, agent: str) -> Shares[str | None]:
        """The shares of the sessions of an agent."""
        return self._sessions.setdefault(agent, Shares())

    def serve(self, agent: str, session: str | None, agents: int, sessions: int) -> None:
        """A session is served, one of `sessions` of its agent, which is one of `agents`."""
        self.agents.serve(agent, agents)
        self.sessions(agent).serve(session, sessions)


class Turns(Generic[F]):
    """The flows that wait, the one whose turn it is at hand: a step costs O(log n).

    head: the number of the oldest request of a flow, None if it has none. It only grows as long as
    the flow waits.

    Nothing is updated when a flow is served or its oldest request leaves: what was noted of it then
    is too early, comes up in time, and is put right.
    """

    def __init__(self, head: Callable[[F], int | None]) -> None:
        self._head = head
        self._shares: Shares[F] | None = None  # by which it is sorted
        self._noted: dict[F, None] = {}
        self._at_clock: list[tuple[int, F]] = []  # a heap of those that start at the clock
        self._ahead: list[tuple[float, int, F]] = []  # and of those that start later

    def add(self, flow: F) -> None:
        """Note that a flow waits that did not before."""
        head = self._head(flow)
        if flow not in self._noted and head is not None:
            self._noted[flow] = None
            heappush(self._at_clock, (head, flow))

    def copy(
        self, head: Callable[[F], int | None], past: Shares[F], shares: Shares[F]
    ) -> "Turns[F]":
        """The same flows with heads of their own, by `shares`, a copy of the shares `past`."""
        new = Turns(head)
        new._noted = dict(self._noted)
        if self._shares is past:
            new._shares = shares
            new._at_clock, new._ahead = list(self._at_clock), list(self._ahead)
        return new

    def next(self, shares: Shares[F]) -> F:
        """The flow whose turn it is by these shares. Raises `LookupError` if none waits."""
        if len(self._noted) == 1:
            flow = next(iter(self._noted))
            if self._head(flow) is not None:
                return flow
        if shares is not self._shares:
            self._sort_anew(shares)
        while True:
            clock = shares.clock
            while self._ahead and self._ahead[0][0] <= clock:
                _, seq, flow = heappop(self._ahead)
                heappush(self._at_clock, (seq, flow))
            if self._at_clock:
                seq, flow = self._at_clock[0]
                end = shares.end(flow)
                if self._head(flow) == seq and end <= clock:
                    return flow
                heappop(self._at_clock)
            elif self._ahead:
                noted_end, seq, flow = self._ahead[0]
                end = shares.end(flow)
                if self._head(flow) == seq and end == noted_end:
                    return flow
                heappop(self._ahead)
            else:
                raise LookupError("no flow waits")
            self._place(flow, end, clock)

    def _sort_anew(self, shares: Shares[F]) -> None:
        self._shares = shares
        self._ahead.clear()
        heads = [(self._head(flow), flow) for flow in self._noted]
        self._at_clock = [(head, flow) for head, flow in heads if head is not None]
        self._noted = {flow: None for _, flow in self._at_clock}
        heapify(self._at_clock)

    def _place(self, flow: F, end: float, clock: float) -> None:
        head = self._head(flow)
        if head is None:
            del self._noted[flow]
        elif end <= clock:
            heappush(self._at_clock, (head, flow))
        else:
            heappush(self._ahead, (end, head, flow))


def oldest_left(seqs: Sequence[int]) -> list[int]:
    """For each place in an order of numbers, the least one from there on."""
    left = list(accumulate(reversed(seqs), min))
    left.reverse()
    return left


def merged(flows: Mapping[F, Sequence[N]], shares: Shares[F]) -> Sequence[N]:
    """All requests of some flows, each in its own order, in the order in which they are served by
    these shares while no other comes. Leaves the shares as they are."""
    if len(flows) == 1:
        return next(iter(flows.values()))
    clock, number = shares.clock, len(flows)
    at_clock: list[tuple[int, int]] = []  # a heap: the oldest request, and the number of the flow
    later: list[tuple[float, int, int]] = []
    for index, (flow, requests) in enumerate(flows.items()):
        end, seq = shares.end(flow), min(one.seq for one in requests)
        if end <= clock:
            at_clock.append((seq, index))
        else:
            later.append((end, seq, index))
    heapify(at_clock)
    ahead = deque(sorted(later))  # what is served is put at its end, and keeps it sorted
    lefts = [
        zip(requests, oldest_left([one.seq for one in requests])[1:], strict=False)
        for requests in flows.values()
    ]
    lasts = [requests[-1] for requests in flows.values()]
    order: list[N] = []
    step = 1 / (number + 1)
    while number:
        while ahead and ahead[0][0] <= clock:
            _, seq, index = ahead.popleft()
            heappush(at_clock, (seq, index))
        if at_clock:
            seq, index = heappop(at_clock)
            start = clock
        else:
            start, seq, index = ahead.popleft()
        both = next(lefts[index], None)
        clock += step
        if clock < start:
            clock = start
        if both is None:
            order.append(lasts[index])
            number -= 1
            step = 1 / (number + 1)
        else:
            order.append(both[0])
            entry = (start + 1, both[1], index)
            if ahead and entry < ahead[-1]:  # both end at the same time: the older request is first
                insort(ahead, entry)
            else:
                ahead.append(entry)
    return order
