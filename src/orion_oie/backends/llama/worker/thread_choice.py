"""The number of threads for each step, by what the steps before it took.

llama.cpp's threads wait for each other several hundred times in a step. When another process takes
one core, all of them wait for the thread that ran there, and fewer threads are faster. So this
module compares:

    a step becomes slower than it was    -> try fewer threads
    others use the cores that it wants   -> try fewer threads
    others leave cores free              -> try more threads

A trial takes a few steps. The number that needs less time for the same work stays; after a trial
without success the next one waits longer. Each kind of steps has a number of its own: a large batch
loses less by a missing core than a small one. The host's share is the upper bound.

Decides from times that it is given; computes nothing and calls nothing native.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from orion_oie.hardware.load import CoreLoad

StepKind = Literal["decode", "prefill", "embed"]

_LARGE_ROWS = 64  # and more: a batch of long prompts only
_LOOK_EVERY_S = 0.2
_ENOUGH_STEPS = 4  # for a comparison,
_ENOUGH_S = 0.1  # or less of them that took so long
_STEPS_KEPT = 8
_SLOWER = 1.25  # than usual: worth a trial
_FASTER = 0.97  # than the number before: worth to stay
_HOPELESS = 1.4  # a trial that is so much slower ends after two steps
_MISSING = -0.4  # cores that threads would have to share; less is noise
_FREE = 0.6  # cores: another thread would find a place
_FIRST_WAIT_S = 0.25
_WAIT_FOR_TRIAL = 8  # times its length: what trials cost stays small where steps are long
_LONGEST_WAIT_UP_S = 2.0
_LONGEST_WAIT_DOWN_S = 16.0
_TRY_ANYWAY_S = 10.0  # although others seem to use all other cores
_TRY_BLINDLY_S = 2.0  # if nothing tells what others use
# What a step costs beside its rows, in rows: 1 to 2 for models of 135 million to 1 billion weights.
_FIXED_ROWS = 1.5


class _Times:
    """The latest steps with one number of threads. The cost of a step is what it took, as a
    multiple of what such a step usually takes."""

    def __init__(self, kept: int) -> None:
        self._costs: deque[float] = deque(maxlen=kept)
        self._seconds: deque[float] = deque(maxlen=kept)

    def add(self, seconds: float, cost: float) -> None:
        self._costs.append(cost)
        self._seconds.append(seconds)

    def __len__(self) -> int:
        return len(self._costs)

    @property
    def are_enough(self) -> bool:
        return len(self._costs) >= _ENOUGH_STEPS or self.seconds >= _ENOUGH_S

    @property
    def seconds(self) -> float:
        """The sum of the steps that are kept."""
        return sum(self._seconds)

    @property
    def cost(self) -> float:
        """The mean; of four or more without the largest, which may be an accident."""
        costs = list(self._costs)
        if len(costs) >= _ENOUGH_STEPS:
            costs.remove(max(costs))
        return sum(costs) / len(costs)


@dataclass
class _Wait:
    """When a direction may be tried again: each failure doubles the wait, and a cost that is much
    higher than at the last failure ends it."""

    longest_s: float
    until: float = 0.0
    next_s: float = _FIRST_WAIT_S
    failed_at_cost: float = 0.0
    failures: int = 0

    def is_over(self, now: float, cost: float) -> bool:
        return now >= self.until or 0 < _SLOWER * self.failed_at_cost < cost

    def step(self, threads: int) -> int:
        """The step upwards when nothing tells how many cores are free: double, or else one more."""
        return 1 if self.failures % 2 else threads

    def fail(self, now: float, cost: float, trial_s: float) -> None:
        wait_s = max(self.next_s, _WAIT_FOR_TRIAL * trial_s)
        self.until, self.failed_at_cost = now + wait_s, cost
        self.next_s = min(self.longest_s, self.next_s * 2)
        self.failures += 1

    def reset(self, now: float) -> None:
        self.failures = 0
        self.until, self.next_s, self.failed_at_cost = now + _FIRST_WAIT_S, _FIRST_WAIT_S, 0.0


@dataclass
class _Trial:
    """Another number of threads, measured against the cost of the one before. `is_free`: more
    threads, for which there are cores."""

    threads: int
    reference: float
    is_free: bool = False
    times: _Times = field(default_factory=lambda: _Times(_ENOUGH_STEPS))


@dataclass
class _Choice:
    """The state for one kind of steps. `wish` None is all that the host allows. `usual` are the
    seconds for a row when nothing disturbs, by the number of threads and the order of magnitude of
    the rows: costs are multiples of those with `threads`, also in a trial of another number."""

    wish: int | None = None
    threads: int = 0
    times: _Times = field(default_factory=lambda: _Times(_STEPS_KEPT))
    usual: dict[tuple[int, int], float] = field(default_factory=dict)
    trial: _Trial | None = None
    up: _Wait = field(default_factory=lambda: _Wait(_LONGEST_WAIT_UP_S))
    down: _Wait = field(default_factory=lambda: _Wait(_LONGEST_WAIT_DOWN_S))

    def stay(self, threads: int) -> None:
        self.threads = threads
        self.times = _Times(_STEPS_KEPT)
        self.trial = None


class ThreadChoice:
    """Chooses between 1 and `most` threads. `read_load` measures the load since its last call; it
    is None where nothing tells the load. `clock` gives seconds. With `is_fixed` the choice is
    always `most`."""

    def __init__(
        self,
        most: int,
        read_load: Callable[[], CoreLoad | None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        *,
        is_fixed: bool = False,
    ) -> None:
        self.most = most
        self._is_fixed = is_fixed
        self._read_load = read_load
        self._clock = clock
        self._load: CoreLoad | None = None
        self._looked_at = -1.0
        self._tried_more_at = clock()
        self._choices: dict[tuple[StepKind, bool], _Choice] = {}

    def number(self, kind: StepKind, rows: int) -> int:
        """The number for the next step, of so many rows."""
        if self._is_fixed:
            return self.most
        choice = self._choice(kind, rows)
        allowed = self.most if choice.wish is None else min(choice.wish, self.most)
        if choice.threads != allowed:  # the host's share was changed
            choice.stay(allowed)
        return allowed if choice.trial is None else min(choice.trial.threads, self.most)

    def note(self, kind: StepKind, rows: int, seconds: float) -> None:
        """Learn from a step that used this `number`."""
        if self._is_fixed:
            return
        now = self._clock()
        choice = self._choice(kind, rows)
        self._look(now)
        each_s = seconds / (rows + _FIXED_ROWS)
        like = choice.threads, rows.bit_length()
        usual_s = choice.usual.get(like)
        if choice.trial is None:
            choice.times.add(seconds, each_s / (usual_s or each_s))
            choice.usual[like] = _learned(usual_s, each_s)
            if choice.times.are_enough:
                self._consider(choice, now)
        elif usual_s is None:
            choice.stay(choice.threads)  # nothing to compare with: a trial without a result
        else:
            choice.trial.times.add(seconds, each_s / usual_s)
            self._judge(choice, choice.trial, now)

    def _choice(self, kind: StepKind, rows: int) -> _Choice:
        return self._choices.setdefault((kind, rows >= _LARGE_ROWS), _Choice())

    def _look(self, now: float) -> None:
        if self._read_load is not None and now - self._looked_at >= _LOOK_EVERY_S:
            self._load = self._read_load()
            # Without an answer, the worker was idle for long: ask again soon.
            self._looked_at = now if self._load is not None else now - 0.7 * _LOOK_EVERY_S

    def _free_cores(self, threads: int) -> float | None:
        """The cores that are left beside others and so many threads; negative when there are too
        few, None when nobody knows."""
        return None if self._load is None else self._load.cores - self._load.others - threads

    def _consider(self, choice: _Choice, now: float) -> None:
        """Begin a trial if there is a reason for one."""
        threads, cost = choice.threads, choice.times.cost
        free = self._free_cores(threads)
        is_disturbed = cost > _SLOWER or (free is not None and free < _MISSING)
        if is_disturbed and threads > 1 and choice.down.is_over(now, cost):
            fewer = threads // 2 if free is None else min(threads - 1, round(threads + free))
            choice.trial = _Trial(max(1, fewer), cost)
            return
        if threads < self.most and choice.up.is_over(now, cost):
            patience_s = _TRY_BLINDLY_S if self._read_load is None else _TRY_ANYWAY_S
            is_free = free is not None and free >= _FREE
            if is_free or now - self._tried_more_at >= patience_s:
                more = choice.up.step(threads) if free is None else max(1, round(free))
                choice.trial = _Trial(min(self.most, threads + more), cost, is_free=is_free)
                self._tried_more_at = now

    def _judge(self, choice: _Choice, trial: _Trial, now: float) -> None:
        """End a trial when its result is clear."""
        cost = trial.times.cost
        is_hopeless = len(trial.times) >= 2 and cost > _HOPELESS * trial.reference
        if not is_hopeless and not trial.times.are_enough:
            return
        if cost < (1.0 if trial.is_free else _FASTER) * trial.reference:
            choice.wish = None if trial.threads >= self.most else trial.threads
            choice.stay(trial.threads)
            choice.up.reset(now)
            choice.down.reset(now)
        else:
            wait = choice.up if trial.threads > choice.threads else choice.down
            wait.fail(now, trial.reference, trial.times.seconds)
            choice.stay(choice.threads)


def _learned(usual_s: float | None, each_s: float) -> float:
    """Follow less at once, and more slowly: that is a context that grows, not a disturbance."""
    if usual_s is None or each_s < usual_s:
        return each_s
    return usual_s + 0.01 * (each_s - usual_s)
