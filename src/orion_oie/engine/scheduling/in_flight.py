"""What is being served, by model, and what that says about models beyond what was told of them.

Between the moment a request is dispatched and the moment its model's standing shows it lie some
microseconds. Who decided again in between would give the same room to two models, or evict one that
a request is on its way to. So standings are corrected until they show what was dispatched, or for
`SETTLE_S` at most. No lock and no clock: the queue has them. Times are seconds.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orion_oie.engine.scheduling.policy import (
    UNKNOWN,
    ModelState,
    Standing,
)

SETTLE_S = 0.1


@dataclass(frozen=True, slots=True)
class _Load:
    began_at: float
    evicts: frozenset[str]


class InFlight:
    """Counts the requests being served, at most `per_model` for one model."""

    def __init__(self, per_model: int) -> None:
        self._per_model = per_model
        self._running: Counter[str] = Counter()
        self._loads: dict[str, _Load] = {}  # by model, until its standing shows it
        self._dispatched_at: dict[str, float] = {}  # of the latest one, while it may not show

    @property
    def loads(self) -> list[str]:
        """Models that were dispatched to be loaded, which their standings did not show yet."""
        return list(self._loads)

    def places(self, model: str) -> int:
        """How many more requests for a model may be served."""
        return max(0, self._per_model - self._running[model])

    def begin(self, model: str, standing: Standing, now: float) -> None:
        """A request for a model that stands so is dispatched."""
        self._running[model] += 1
        self._dispatched_at[model] = now
        if standing.state is ModelState.LOADABLE and standing is not UNKNOWN:
            self._loads[model] = _Load(now, standing.evicts)

    def end(self, model: str) -> None:
        """A request for a model has ended."""
        self._running[model] -= 1
        if not self._running[model]:
            del self._running[model]
            self._dispatched_at.pop(model, None)
            self._loads.pop(model, None)

    def settle(self, told: Mapping[str, Standing], now: float) -> None:
        """Forget loads that were told of, and everything that was long ago."""
        for model, load in list(self._loads.items()):
            is_seen = told.get(model, UNKNOWN).state is not ModelState.LOADABLE
            if is_seen or now - load.began_at >= SETTLE_S:
                del self._loads[model]
        for model, at in list(self._dispatched_at.items()):
            if now - at >= SETTLE_S:
                del self._dispatched_at[model]

    def settles_in_s(self, now: float) -> float:
        """When `settle` would forget something next, were nothing told; infinite without any."""
        times = (*self._dispatched_at.values(), *(one.began_at for one in self._loads.values()))
        return min(times, default=math.inf) + SETTLE_S - now

    def judge(self, told: Mapping[str, Standing], models: Iterable[str]) -> dict[str, Standing]:
        """The standings of models, from what was told of them and what is in flight."""
        evicts_any = any(load.evicts for load in self._loads.values())
        return {model: self._judge(model, told.get(model, UNKNOWN), evicts_any) for model in models}

    def _judge(self, model: str, told: Standing, evicts_any: bool) -> Standing:
        if not self.places(model):
            return Standing(ModelState.FULL)
        if told is UNKNOWN:
            return told
        if told.state is ModelState.LOADABLE:
            if model in self._loads:
                return Standing(ModelState.READY)
            if self._loads:  # there may be room for one only
                return Standing(ModelState.BLOCKED)
            used = told.evicts & self._dispatched_at.keys()
            return Standing(ModelState.BLOCKED, told.evicts - used, used) if used else told
        if told.state is ModelState.READY and evicts_any and not self._running[model]:
            return Standing(ModelState.BLOCKED)  # it may be the one that goes
        return told
