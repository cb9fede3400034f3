"""Even shares for agents, and within each agent for its sessions, however much each of them asks.

Start-time fair queueing in two levels. It counts requests, not how long they take, and keeps no
requests: callers pass who asks and who was served.
"""

from collections.abc import Iterable


class Shares:
    """The shares of some flows. Each has a virtual time, which advances by one when it is served.

    A flow that was idle comes back at the common clock, not before it: idle time is not saved up.
    The clock also moves by itself, by a little less than a fair share: otherwise an endless supply
    of new flows, which all start at the clock, would keep an old one from its turn.
    """

    def __init__(self) -> None:
        self._clock = 0.0
        self._ends: dict[str | None, float] = {}

    def copy(self) -> "Shares":
        """An independent copy."""
        new = Shares()
        new._clock, new._ends = self._clock, dict(self._ends)
        return new

    def start(self, flow: str | None) -> float:
        """The virtual time of a flow: the least is next."""
        return max(self._clock, self._ends.get(flow, 0.0))

    def serve(self, flow: str | None, flows: int) -> None:
        """A flow is served, one of `flows` that ask."""
        start = self.start(flow)
        self._ends[flow] = start + 1
        self._clock = max(start, self._clock + 1 / (flows + 1))
        if len(self._ends) > 2 * flows + 16:  # those behind the clock are as good as new
            self._ends = {flow: end for flow, end in self._ends.items() if end > self._clock}


class AgentShares:
    """The shares of agents, and of the sessions of each; a session may be None."""

    def __init__(self) -> None:
        self._agents = Shares()
        self._sessions: dict[str, Shares] = {}

    def copy(self) -> "AgentShares":
        """An independent copy."""
        new = AgentShares()
        new._agents = self._agents.copy()
        new._sessions = {agent: shares.copy() for agent, shares in self._sessions.items()}
        return new

    def next_of(self, asking: Iterable[tuple[str, str | None]]) -> tuple[str, str | None]:
        """The (agent, session) pair whose turn it is; of equals, the first."""
        pairs = dict.fromkeys(asking)
        if len(pairs) == 1:
            return next(iter(pairs))
        agent = min(dict.fromkeys(agent for agent, _ in pairs), key=self._agents.start)
        sessions = self._sessions.get(agent) or Shares()
        own = (session for other, session in pairs if other == agent)
        return agent, min(own, key=sessions.start)

    def serve(
        self, served: tuple[str, str | None], asking: Iterable[tuple[str, str | None]]
    ) -> None:
        """One of those who ask is served."""
        agent, session = served
        pairs = {served, *asking}
        self._agents.serve(agent, len({other for other, _ in pairs}))
        own = sum(other == agent for other, _ in pairs)
        self._sessions.setdefault(agent, Shares()).serve(session, own)
