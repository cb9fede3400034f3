"""Memory pressure as a level. Pure: it measures nothing, has no clock and takes no action.

A threshold is a share of the total with an absolute cap, since 40 GiB left are plenty on any
machine. The level after a sample:

1. Below a threshold: at least the highest level whose threshold is not available, at once.
2. Otherwise it falls, but only to the highest level that any of the last samples reaches with
   thresholds raised by a margin.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from types import MappingProxyType

from orion_oie.errors import InvalidRequestError
from orion_oie.hardware.probe import SystemMemory

_GIB = 2**30


class PressureLevel(StrEnum):
    """Levels of memory pressure, in order: LOW < MEDIUM < HIGH < CRITICAL."""

    LOW = "low"  # there is memory for more models
    MEDIUM = "medium"  # loaded models can stay, but none should be loaded ahead of need
    HIGH = "high"  # idle models should be unloaded
    CRITICAL = "critical"  # the system may end processes: unload idle models, load nothing

    @property
    def rank(self) -> int:
        """0 for LOW to 3 for CRITICAL."""
        return _ORDER.index(self)

    # As plain strings, levels would compare alphabetically: "low" > "high".
    def __lt__(self, other: str) -> bool:
        return self.rank < PressureLevel(other).rank

    def __le__(self, other: str) -> bool:
        return self.rank <= PressureLevel(other).rank

    def __gt__(self, other: str) -> bool:
        return self.rank > PressureLevel(other).rank

    def __ge__(self, other: str) -> bool:
        return self.rank >= PressureLevel(other).rank


_ORDER = tuple(PressureLevel)


@dataclass(frozen=True, slots=True)
class Threshold:
    """The limit of a level: less memory available than `share` of the total and than `cap_bytes`.

    Raises `InvalidRequestError` unless the share is between 0 and 1 and the cap is positive.
    """

    share: float
    cap_bytes: int

    def __post_init__(self) -> None:
        if not (0 < self.share < 1 and self.cap_bytes > 0):
            raise InvalidRequestError(
                f"a threshold needs a share between 0 and 1 and a positive cap, not {self}"
            )

    def of(self, total_bytes: int) -> int:
        """The threshold in bytes on a machine with this much memory."""
        return min(int(self.share * total_bytes), self.cap_bytes)


DEFAULT_THRESHOLDS: Mapping[PressureLevel, Threshold] = MappingProxyType(
    {
        PressureLevel.MEDIUM: Threshold(0.25, 32 * _GIB),
        PressureLevel.HIGH: Threshold(0.10, 8 * _GIB),
        PressureLevel.CRITICAL: Threshold(0.05, 4 * _GIB),
    }
)


def level_of(
    memory: SystemMemory,
    thresholds: Mapping[PressureLevel, Threshold] = DEFAULT_THRESHOLDS,
    margin: float = 0.0,
) -> PressureLevel:
    """The highest level whose threshold, times 1 + `margin`, exceeds the available memory."""
    reached = (
        level
        for level, threshold in thresholds.items()
        if memory.available_bytes < threshold.of(memory.total_bytes) * (1 + margin)
    )
    return max(reached, default=PressureLevel.LOW)


class PressureGauge:
    """The level over time, with hysteresis: it rises at once and falls with a delay.

    It falls to the highest level among the last `calm_samples` samples, each judged by thresholds
    raised by the share `margin`. So memory that wavers around a threshold does not make the level
    waver. Not thread-safe.

    Raises `InvalidRequestError` for a negative margin, for `calm_samples` below 1, or if a margin
    reaches the next threshold.
    """

    def __init__(
        self,
        thresholds: Mapping[PressureLevel, Threshold] = DEFAULT_THRESHOLDS,
        *,
        margin: float = 0.2,
        calm_samples: int = 5,
    ) -> None:
        problems = [*_problems_of(thresholds, margin)]
        if calm_samples < 1:
            problems.append(f"calm_samples must be at least 1, not {calm_samples}")
        if problems:
            raise InvalidRequestError("; ".join(problems), problems=problems)
        self._thresholds = dict(thresholds)
        self._margin = margin
        self._level = PressureLevel.LOW
        self._recent = deque([PressureLevel.CRITICAL] * calm_samples, maxlen=calm_samples)

    @property
    def level(self) -> PressureLevel:
        """The level after the last sample; LOW before the first."""
        return self._level

    def update(self, sample: SystemMemory) -> PressureLevel:
        """Add a sample and return the level after it."""
        self._recent.append(level_of(sample, self._thresholds, self._margin))
        allowed = min(self._level, max(self._recent))
        self._level = max(allowed, level_of(sample, self._thresholds))
        return self._level


def _problems_of(thresholds: Mapping[PressureLevel, Threshold], margin: float) -> list[str]:
    """The faults of the thresholds and the margin, one line for each."""
    if margin < 0:
        return [f"margin must not be negative, not {margin}"]
    if PressureLevel.LOW in thresholds:
        return ["LOW is what is left when no threshold is reached: it has none"]
    problems = []
    ordered = sorted(thresholds.items())
    for (lower, wide), (higher, narrow) in pairwise(ordered):
        for name in ("share", "cap_bytes"):
            above, below = getattr(wide, name), getattr(narrow, name)
            if above <= below * (1 + margin):
                problems.append(
                    f"the {name} of {lower} must be more than that of {higher} and its margin: "
                    f"{above} against {below} and {margin:.0%}"
                )
    return problems
