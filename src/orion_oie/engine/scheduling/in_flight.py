"""The requests being served, by model, and the corrections that they imply for availabilities.

Between the moment a request is dispatched and the moment the pool shows it lie some microseconds. A
decision in between would give the same memory to two models, or evict one that a request is about
to use. So availabilities are corrected until they show what was dispatched, or for `SETTLE_S` at
most. No lock and no clock: the queue has them. Times are seconds.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orion_oie.schemas.availability import READY, UNKNOWN, Availability, ModelState

SETTLE_S = 0.1


@dataclass(frozen=True, slots=True)
class _Load:
    began_at: float
    victims: frozenset[str]


class InFlight:
    """Counts the requests being served, at most `per_model` for one model."""

    def __init__(self, per_model: int) -> None:
        self._per_model = per_model
        self._running: Counter[str] = Counter()
        self._loads: dict[str, _Load] = {}  # by model, until the pool shows it
        self._dispatched_at: dict[str, float] = {}  # of the latest one, while it may not show
        self._arriving: Counter[str] = Counter()  # those that wait for their model

    @property
    def loads(self) -> list[str]:
        """Models dispatched to be loaded that the pool does not show yet."""
        return list(self._loads)

    @property
    def arriving(self) -> int:
        """The number of requests that wait for the load of their model, as far as the pool shows
        it."""
        return self._arriving.total()

    def must_arrive(self, model: str, found: Availability) -> bool:
        """True when a request for a model of this availability waits for a load."""
        return found.is_loadable or found.is_arriving or model in self._loads

    def places(self, model: str) -> int:
        """The number of further requests for a model that may be served."""
        return max(0, self._per_model - self._running[model])

    def begin(self, model: str, found: Availability, now: float) -> None:
        """A request for a model of this availability is dispatched."""
        self._running[model] += 1
        self._dispatched_at[model] = now
        if self.must_arrive(model, found):
            self._arriving[model] += 1
        if found.is_loadable and found.state is not ModelState.UNKNOWN:
            self._loads[model] = _Load(now, found.victims)

    def end(self, model: str) -> None:
        """A request for a model has ended."""
        self._running[model] -= 1
        if self._arriving[model] > self._running[model]:
            self._arriving[model] -= 1
        if not self._arriving[model]:
            del self._arriving[model]
        if not self._running[model]:
            del self._running[model]
            self._dispatched_at.pop(model, None)
            self._loads.pop(model, None)

    def settle(self, shown: Mapping[str, Availability], now: float) -> None:
        """Forget loads that the pool shows, and whatever is older than `SETTLE_S`; note what has
        arrived."""
        for model in list(self._arriving):
            found = shown.get(model, UNKNOWN)
            if found.state is ModelState.READY and not found.is_arriving:
                del self._arriving[model]
        for model, load in list(self._loads.items()):
            is_seen = not shown.get(model, UNKNOWN).is_loadable
            if is_seen or now - load.began_at >= SETTLE_S:
                del self._loads[model]
        for model, at in list(self._dispatched_at.items()):
            if now - at >= SETTLE_S:
                del self._dispatched_at[model]

    def settles_in_s(self, now: float) -> float:
        """Seconds until `settle` would forget something by its age, or infinity."""
        times = (*self._dispatched_at.values(), *(one.began_at for one in self._loads.values()))
        return min(times, default=math.inf) + SETTLE_S - now

    def judge(
        self, shown: Mapping[str, Availability], models: Iterable[str]
    ) -> dict[str, Availability]:
        """The availability of models, from what the pool shows and what is in flight."""
        evicts_any = any(load.victims for load in self._loads.values())
        return {m: self._judge(m, shown.get(m, UNKNOWN), evicts_any) for m in models}

    def _judge(self, model: str, shown: Availability, evicts_any: bool) -> Availability:
        if not self.places(model):
            return Availability(ModelState.FULL)
        if shown.state is ModelState.UNKNOWN:
            return shown
        if shown.is_loadable:
            if model in self._loads:
                return READY
            if self._loads:  # there may be memory for one only
                return Availability(ModelState.BLOCKED)
            used = shown.victims & self._dispatched_at.keys()
            if used:
                return Availability(ModelState.BLOCKED, shown.victims - used, used)
            return shown
        if shown.state is ModelState.READY and evicts_any and not self._running[model]:
            return Availability(ModelState.BLOCKED)  # it may be the one that goes
        return shown
