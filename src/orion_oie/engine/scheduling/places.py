"""The positions of waiting requests, from an order that is kept for a while."""

import time
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from orion_oie.engine.scheduling.lines import Waiting

# An order is kept for a while if it took long to find, for its share of the time.
_LONG_S, _SHARE, _KEPT_S = 1e-3, 0.05, 1.0


@dataclass(slots=True)
class Places:
    """The places of requests in the order of a moment, and those of which left since. It is of a
    number of changes, and took some time to make. Seconds of `time.monotonic`."""

    places: dict[int, int]
    changes: int
    took_s: float
    made_at: float
    gone: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, ordered: Sequence[Waiting], changes: int, began_at: float) -> "Places":
        """The places in an order that was begun to be made at `began_at`."""
        places = dict(zip([one.seq for one in ordered], range(len(ordered)), strict=True))
        made_at = time.monotonic()
        return cls(places, changes, made_at - began_at, made_at)

    def is_of_use(self, changes: int) -> bool:
        """True while it is exact, or would take too much time to be made again."""
        age_s = time.monotonic() - self.made_at
        if changes == self.changes:
            return age_s < _KEPT_S
        return self.took_s > _LONG_S and age_s < min(_KEPT_S, self.took_s / _SHARE)

    def leave(self, seq: int) -> None:
        """A request leaves."""
        place = self.places.pop(seq, None)
        if place is not None:
            insort(self.gone, place)

    def position(self, seq: int) -> int | None:
        """The position of a request, 1 for the next; None for one that came later."""
        place = self.places.get(seq)
        return None if place is None else place + 1 - bisect_left(self.gone, place)
