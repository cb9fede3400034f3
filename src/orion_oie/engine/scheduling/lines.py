"""The waiting requests, in lines: by priority and model, and in each line by agent and session.

The structure is updated as requests come and go, so that a decision need not sort them. It decides
nothing and has no lock.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

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


class Line:
    """The requests of one priority for one model."""

    def __init__(self, priority: int, model: str) -> None:
        self.priority = priority
        self.model = model
        self._requests: OrderedDict[int, Waiting] = OrderedDict()
        self._flows: dict[Flow, OrderedDict[int, Waiting]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._requests.values())

    @property
    def oldest(self) -> Waiting:
        """The request that came first."""
        return next(iter(self._requests.values()))

    def flows(self) -> list[Flow]:
        """The flows that wait, in the order of their oldest requests."""
        if len(self._flows) == 1:
            return list(self._flows)
        return sorted(self._flows, key=lambda flow: next(iter(self._flows[flow])))

    def oldest_of(self, flow: Flow) -> Waiting:
        """The request of a flow that came first."""
        return next(iter(self._flows[flow].values()))

    def add(self, one: Waiting) -> None:
        """Put a request that came after the others at the end."""
        self._requests[one.seq] = one
        self._flows.setdefault(one.flow, OrderedDict())[one.seq] = one

    def remove(self, one: Waiting) -> None:
        """Take a request out."""
        del self._requests[one.seq]
        flow = self._flows[one.flow]
        del flow[one.seq]
        if not flow:
            del self._flows[one.flow]


class Lines:
    """All waiting requests. `requests` are added in the order of their arrival."""

    def __init__(self, requests: Iterable[Waiting] = ()) -> None:
        self._classes: dict[int, dict[str, Line]] = {}
        self._counts: dict[str, int] = {}
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

    def flows(self, model: str) -> list[Flow]:
        """The flows that wait for a model, in any priority."""
        lines = [lines[model] for lines in self._classes.values() if model in lines]
        if len(lines) == 1:
            return lines[0].flows()
        return list(dict.fromkeys(flow for line in lines for flow in line.flows()))

    def add(self, one: Waiting) -> None:
        """Put a request that came after the others at the end of its line."""
        lines = self._classes.setdefault(one.priority, {})
        line = lines.get(one.model)
        if line is None:
            line = lines[one.model] = Line(one.priority, one.model)
        line.add(one)
        self._counts[one.model] = self._counts.get(one.model, 0) + 1

    def remove(self, one: Waiting) -> None:
        """Take a request out of its line."""
        lines = self._classes[one.priority]
        line = lines[one.model]
        line.remove(one)
        if not line:
            del lines[one.model]
            if not lines:
                del self._classes[one.priority]
        self._counts[one.model] -= 1
        if not self._counts[one.model]:
            del self._counts[one.model]
