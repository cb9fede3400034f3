"""Counts of what an engine did. Events are in `events.py`, the numbers of requests in its book."""

import threading
from collections.abc import Mapping

from orion_oie.schemas.results import Usage
from orion_oie.schemas.stats import RequestCounts


class Counters:
    """The counters behind `RequestCounts`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._errors: dict[str, int] = {}
        self._by_agent: dict[str, int] = {}

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a field of `RequestCounts`."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + amount

    def answered(self, agent_id: str, usage: Usage) -> None:
        """Count the tokens of a request that an agent answered."""
        with self._lock:
            for name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
                self._counts[name] = self._counts.get(name, 0) + getattr(usage, name)
            self._by_agent[agent_id] = self._by_agent.get(agent_id, 0) + 1

    def failed(self, error: BaseException) -> None:
        """Count the error that a request ended with."""
        with self._lock:
            name = type(error).__name__
            self._errors[name] = self._errors.get(name, 0) + 1

    def snapshot(self, of_requests: Mapping[str, int]) -> RequestCounts:
        """The current counts, with those of requests by their outcome."""
        with self._lock:
            return RequestCounts(
                **of_requests,
                **self._counts,
                errors=dict(self._errors),
                by_agent=dict(self._by_agent),
            )
