"""The order in which all that waits would be served, without a choice for each request. Pure.

Between two choices that depend on more than who is oldest, requests are served in a stretch: `Rest`
has the order within one line, and `stretch` merges lines up to the next such choice. The result is
the same as that of one choice after the other.

The key of a class, by which it comes before others, is that of its oldest request. Requests have to
be numbered in the order of their times: then the key of a class only grows while it is served.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

from orion_oie.engine.scheduling.history import History, Settings
from orion_oie.engine.scheduling.lines import Line, Row, Waiting
from orion_oie.engine.scheduling.moment import Moment, class_key
from orion_oie.engine.scheduling.ranking import Group, class_order
from orion_oie.schemas.availability import Availability

_oldest_of, _key_of = itemgetter(0), itemgetter(1)


class Rest:
    """The requests of a line that are left, in the order in which they are served."""

    def __init__(self, line: Line, history: History, settings: Settings) -> None:
        self.model = line.model
        self.priority = line.priority
        self._plan = line.plan(history.shares(line.model), settings.aging_s)
        self._at = 0

    def __len__(self) -> int:
        return len(self._plan.rows) - self._at

    @property
    def oldest(self) -> Waiting:
        """The request that came first."""
        return self._plan.oldest_at(self._at)

    @property
    def last_seq(self) -> int:
        """The number of the oldest that is left when only the last one is left."""
        return self._plan.oldest[-1]

    def number_until(self, seq: int) -> int:
        """How many are served as long as the oldest that is left is not newer than `seq`."""
        return bisect_right(self._plan.oldest, seq, self._at) - self._at

    def number_before(self, key: float, *, or_at: bool) -> int:
        """How many are served as long as the key of the oldest that is left is less than `key`, or
        equal to it."""
        cut = bisect_right if or_at else bisect_left
        return cut(self._plan.keys, key, self._at) - self._at

    def key(self, number: int) -> float:
        """The key of the oldest that is left once so many are served."""
        return self._plan.keys[self._at + number]

    def take(self, number: int) -> Sequence[Row]:
        """So many are served."""
        began, self._at = self._at, self._at + number
        return self._plan.rows[began : self._at]


class _Run:
    """The requests of one class up to the first choice that depends on more than their age.

    Of the groups that `may_run` those of the first rank are served. `is_choice(group, is_first)`:
    serving the first, or the last one of a group may change who is next.
    """

    def __init__(
        self,
        may_run: Sequence[Group[Rest]],
        is_choice: Callable[[Group[Rest], bool], bool],
        settings: Settings,
    ) -> None:
        self._settings = settings
        self.priority = may_run[0].line.priority
        self.groups = [group for group in may_run if group.rank == may_run[0].rank]
        self._most = class_key(may_run[len(self.groups) :], settings)  # the others stay as old
        firsts = {group.oldest.seq: group for group in self.groups if is_choice(group, True)}
        lasts = [group.line.last_seq for group in self.groups if is_choice(group, False)]
        last = max(group.line.last_seq for group in self.groups)
        until = min([*firsts, *lasts], default=last)
        self._numbers = {
            # After a first one that is a choice the same request may still be the oldest.
            group.model: 1 if group is firsts.get(until) else group.line.number_until(until)
            for group in self.groups
        }

    def end(self) -> float:
        """The key of the class before the last one is served."""
        numbers = self._numbers
        served = [group.line for group in self.groups if numbers[group.model]]
        return min(self._most, max(line.key(numbers[line.model] - 1) for line in served))

    def cut(self, key: float, *, or_at: bool, others: Sequence[Group[Rest]] = ()) -> None:
        """End where the key of the class becomes greater than `key`, or equal to it unless `or_at`.
        The class has to be as old as `others` too, if any are given, instead of those that may be
        served later."""
        most = class_key(others, self._settings) if others else self._most
        if most < key or (or_at and most == key):
            return
        for group in self.groups:
            number = group.line.number_before(key, or_at=or_at)
            self._numbers[group.model] = min(self._numbers[group.model], number)

    def take(self) -> tuple[list[Row], list[str], str | None]:
        """All are served: they, the models that serve them, and the one that is loaded."""
        served = [group for group in self.groups if self._numbers[group.model]]
        rows = [row for group in served for row in group.line.take(self._numbers[group.model])]
        if len(served) > 1:
            rows.sort(key=_oldest_of)
        if rows and rows[-1][1] > self._most:
            rows = [(seq, min(key, self._most), one) for seq, key, one in rows]
        loaded = next((group.model for group in served if group.is_loadable), None)
        return rows, [group.model for group in served], loaded


def stretch(
    rests: Sequence[Sequence[Rest]],
    later: Mapping[str, Availability],
    history: History,
    now: float,
    settings: Settings,
) -> tuple[list[Waiting], str | None]:
    """The requests that are served next, in order, and the model that is loaded for the last one.
    Takes them from `rests`, the lines of each priority, and notes them in `history`."""
    at = Moment(rests, later, history, now, settings)
    runs = {may_run[0].line.priority: _Run(may_run, at.is_choice, settings) for may_run in at.plans}
    _keep_order(at, runs, settings)
    if len(runs) > 1:
        _cut_at_first_end(runs)
    rows: list[Row] = []
    loaded = None
    for _, run in sorted(runs.items(), reverse=True):  # of equal keys, the higher priority is first
        its_rows, models, its_load = run.take()
        rows += its_rows
        history.note_models(models, now, its_load)
        loaded = loaded or its_load
    if len(runs) > 1:
        rows.sort(key=_key_of)
    return [one for _, _, one in rows], loaded


def _keep_order(at: Moment[Rest], runs: Mapping[int, _Run], settings: Settings) -> None:
    """End runs before classes change places whose order is of note."""
    for front, behind in at.pairs_of_note:
        run = runs.get(front[0].line.priority)
        if run is not None:
            others = [group for group in front if group not in run.groups]
            is_above = front[0].line.priority > behind[0].line.priority
            run.cut(class_order(behind, settings)[0], or_at=is_above, others=others)


def _cut_at_first_end(runs: Mapping[int, _Run]) -> None:
    """End all runs where the first of them ends."""
    end, below = min((run.end(), -priority) for priority, run in runs.items())
    for priority, run in runs.items():
        if priority != -below:
            run.cut(end, or_at=priority > -below)
