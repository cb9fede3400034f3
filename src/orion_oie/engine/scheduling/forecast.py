"""The order in which all that waits would be served, without a choice for each request. Pure.

Between two choices that depend on more than who is oldest, requests are served in a stretch: `Rest`
has the order within one line, and `stretch` merges lines up to the next such choice. The result is
the same as that of one choice after the other.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter

from orion_oie.engine.scheduling.fairness import merged, oldest_left
from orion_oie.engine.scheduling.history import History, Settings
from orion_oie.engine.scheduling.lines import Line, Waiting
from orion_oie.engine.scheduling.ranking import Group, classes_of, runnable
from orion_oie.schemas.availability import Availability

_Row = tuple[int, Waiting, Waiting]  # number of the oldest that is left, the oldest, the served one


class Rest:
    """The requests of a line that are left, in the order in which they are served."""

    def __init__(self, line: Line, history: History) -> None:
        self.model = line.model
        self.priority = line.priority
        self._at = 0
        self._requests: Sequence[Waiting] = list(line)
        self._oldest = self._requests  # that is left, at each place
        self._seqs = [one.seq for one in self._requests]  # of the oldest: they never fall
        if not line.is_one_flow:
            shares = history.shares(line.model)
            by_agent = {
                agent: merged(sessions, shares.sessions(agent))
                for agent, sessions in line.flows().items()
            }
            by_seq = {one.seq: one for one in self._requests}
            self._requests = merged(by_agent, shares.agents)
            self._seqs = oldest_left(self._requests)
            self._oldest = [by_seq[seq] for seq in self._seqs]

    def __len__(self) -> int:
        return len(self._requests) - self._at

    @property
    def oldest(self) -> Waiting:
        """The request that came first."""
        return self._oldest[self._at]

    @property
    def last_seq(self) -> int:
        """The number of the oldest that is left when only the last one is left."""
        return self._seqs[-1]

    def until(self, seq: int, most: int) -> list[_Row]:
        """What is served as long as the oldest that is left is not newer than `seq`: `most` of
        it."""
        end = bisect_right(self._seqs, seq, self._at)
        ours = slice(self._at, min(end, self._at + most))
        return list(zip(self._seqs[ours], self._oldest[ours], self._requests[ours], strict=True))

    def number_before(self, seq: int) -> int:
        """How many are served as long as the oldest that is left is older than `seq`."""
        return bisect_left(self._seqs, seq, self._at) - self._at

    def has(self, seq: int) -> bool:
        """True when that one is the oldest at some time."""
        place = bisect_left(self._seqs, seq, self._at)
        return place < len(self._seqs) and self._seqs[place] == seq

    def take(self, number: int) -> None:
        """So many are served."""
        self._at += number


@dataclass(frozen=True, slots=True)
class _Run:
    """The requests of one class up to the first choice that depends on more than their age."""

    groups: Sequence[Group[Rest]]
    rows: Sequence[_Row]

    @classmethod
    def of(
        cls,
        may_run: Sequence[Group[Rest]],
        is_choice: Callable[[Group[Rest], bool], bool],
        most: int,
    ) -> "_Run":
        """The run of groups that may be served, of `most` requests. `is_choice(group, is_first)`:
        serving the first, or the last one of a group may change who is next."""
        equals = [group for group in may_run if group.rank[:2] == may_run[0].rank[:2]]
        firsts = [group.oldest.seq for group in equals if is_choice(group, True)]
        lasts = [group.line.last_seq for group in equals if is_choice(group, False)]
        until = min([*firsts, *lasts], default=max(group.line.last_seq for group in equals))
        rows = [row for group in equals for row in group.line.until(until, most)]
        if len(equals) > 1:
            rows.sort(key=itemgetter(0))
        del rows[most:]
        if until in firsts:  # the same one may stay the oldest
            first = next((number for number, row in enumerate(rows, 1) if row[0] == until), most)
            del rows[first:]
        return cls(equals, rows)

    def keys(self, others: Sequence[Group[Rest]], settings: Settings) -> list[float]:
        """The sort key of the class at each place; `others` are its groups that are not served. It
        is raised to the largest so far: after that one, what has a lower key is next in any case.
        """
        handicap_s = self.groups[0].line.priority * settings.aging_s
        oldest = min((group.oldest for group in others), key=lambda one: one.seq, default=None)
        keys = [
            (one if oldest is None or seq < oldest.seq else oldest).arrived_at - handicap_s
            for seq, one, _ in self.rows
        ]
        return list(accumulate(keys, max))

    def take(self, number: int) -> tuple[list[str], str | None]:
        """So many are served: the models that serve them, and the one that is loaded."""
        if not number:
            return [], None
        last = self.rows[number - 1][0]
        owner = next(group for group in self.groups if group.line.has(last))
        models, left = [owner.model], number
        for group in self.groups:
            before = group.line.number_before(last)
            if group is not owner and before:
                models.append(group.model)
                group.line.take(before)
                left -= before
        owner.line.take(left)
        return models, owner.model if owner.availability.is_loadable else None


def stretch(
    rests: Sequence[Sequence[Rest]],
    later: dict[str, Availability],
    history: History,
    now: float,
    settings: Settings,
    most: int,
) -> tuple[list[Waiting], str | None]:
    """The requests that are served next, in order, and the model that is loaded for the last one.
    Takes them from `rests`, the lines of each priority, and notes them in `history`. It looks at
    `most` requests of each priority."""
    holds: dict[str, str] = {}
    classes = classes_of(rests, later, history, now, settings)
    plans = [runnable(groups, holds, history, now, settings) for groups in classes]
    plans = sorted(filter(None, plans), key=lambda groups: -groups[0].line.priority)
    every = [group for groups in classes for group in groups]
    overdue = {group.model for group in every if group.is_overdue and group.unserved_since < now}
    oldest: set[int] = set()
    if holds and len(classes) > 1:
        # What is held back depends on the order of the classes, so on the oldest of each.
        oldest = {min(group.oldest.seq for group in groups) for groups in classes}

    def is_choice(group: Group[Rest], is_first: bool) -> bool:
        if is_first:
            is_load = group.availability.is_loadable
            return is_load or group.model in overdue or group.oldest.seq in oldest
        return history.is_in_turn(group.model, now, settings.turn_s)

    if not plans:
        raise RuntimeError("nothing can be served although nothing is full or blocked")
    runs = [_Run.of(may_run, is_choice, most) for may_run in plans]
    if len(runs) == 1:
        numbers, rows = [len(runs[0].rows)], list(runs[0].rows)
    else:
        keyed: list[tuple[float, _Row]] = []
        numbers = []
        keys = [
            run.keys(may_run[len(run.groups) :], settings)
            for run, may_run in zip(runs, plans, strict=True)
        ]
        first_end = min(range(len(runs)), key=lambda place: (keys[place][-1], place))
        for place, its in enumerate(keys):  # of equal keys, the higher priority is first
            cut = bisect_right if place <= first_end else bisect_left
            numbers.append(cut(its, keys[first_end][-1]))
            keyed += zip(its[: numbers[-1]], runs[place].rows, strict=False)
        keyed.sort(key=itemgetter(0))
        rows = [row for _, row in keyed]
    loaded = None
    for run, number in zip(runs, numbers, strict=True):
        models, its_load = run.take(number)
        history.note_models(models, now, its_load)
        loaded = loaded or its_load
    return [one for _, _, one in rows], loaded
