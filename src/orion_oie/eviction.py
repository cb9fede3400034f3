"""Which loaded models must go to make room for one more. Pure: decides, unloads nothing."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Resident:
    """A model in memory. `last_used` grows with time; `is_in_use` protects it."""

    key: str
    last_used: float
    is_in_use: bool


def choose_victims(residents: Sequence[Resident], capacity: int) -> list[str] | None:
    """Keys of the least recently used idle models whose removal leaves room for one more.

    None when too many are in use: wait until one is idle.
    """
    excess = len(residents) + 1 - capacity
    if excess <= 0:
        return []
    idle = sorted((r for r in residents if not r.is_in_use), key=lambda r: r.last_used)
    if len(idle) < excess:
        return None
    return [resident.key for resident in idle[:excess]]
