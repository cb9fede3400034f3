"""What may be served at a moment of a forecast, and which services may change that. Pure.

As long as none of those happens, who is next depends only on who is oldest.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

from orion_oie.engine.scheduling.history import History, Settings
from orion_oie.engine.scheduling.ranking import Group, Wanted, class_order, classes_of, runnable
from orion_oie.schemas.availability import Availability

W = TypeVar("W", bound=Wanted)


class Moment(Generic[W]):
    """The classes in order, and what of them may be served."""

    def __init__(
        self,
        lines: Sequence[Sequence[W]],
        later: Mapping[str, Availability],
        history: History,
        now: float,
        settings: Settings,
    ) -> None:
        self._history, self._now, self._settings = history, now, settings
        holds: dict[str, str] = {}
        self.classes = classes_of(lines, later, history, now, settings)
        plans = [runnable(groups, holds, history, now, settings) for groups in self.classes]
        self.plans = [may_run for may_run in plans if may_run]
        if not self.plans:
            raise RuntimeError("nothing can be served although nothing is full or blocked")
        self.pairs_of_note = self._pairs_of_note() if holds and len(self.classes) > 1 else []
        self._overdue = {
            group.model
            for groups in self.classes
            for group in groups
            if group.is_overdue and group.unserved_since < now
        }

    def _pairs_of_note(self) -> list[tuple[Sequence[Group[W]], Sequence[Group[W]]]]:
        """Each class with each behind it if one of the two holds models back, and
        the other would load one if it came first."""
        holding: list[bool] = []
        loading: list[bool] = []
        for groups in self.classes:
            holds: dict[str, str] = {}
            may_run = runnable(groups, holds, self._history, self._now, self._settings)
            holding.append(bool(holds))
            loading.append(any(group.is_loadable for group in may_run))
        return [
            (self.classes[front], self.classes[behind])
            for front in range(len(holding))
            for behind in range(front + 1, len(holding))
            if (holding[front] and loading[behind]) or (loading[front] and holding[behind])
        ]

    def is_choice(self, group: Group[W], is_first: bool) -> bool:
        """True when serving the first one of a group, or its last one, may change who is next, and
        not only by who is oldest."""
        if is_first:
            return group.is_loadable or group.model in self._overdue
        return self._history.is_in_turn(group.model, self._now, self._settings.turn_s)


def class_key(groups: Sequence[Group[W]], settings: Settings) -> float:
    """The key of a class that has these groups, infinity if there are none."""
    return class_order(groups, settings)[0] if groups else math.inf
