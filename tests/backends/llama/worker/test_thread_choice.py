"""The number of threads for each step, on machines that are simulated: what a step takes there is
known here, and the choice has to find the best number."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_oie.backends.llama.worker.thread_choice import StepKind, ThreadChoice
from orion_oie.hardware.load import CoreLoad


class Machine:
    """`cores` cores, of which others use `others`. A step alone takes `step_s` on one core; threads
    that share a core hold all others up. What the machine tells of its load may be switched off."""

    def __init__(self, cores: int = 2, step_s: float = 0.012, *, tells: bool = True) -> None:
        self.cores, self.step_s, self.tells = cores, step_s, tells
        self.others = 0.0
        self.now = 0.0
        self.noise = 0.0
        self.chance = random.Random(7)
        self.spoilt: Callable[[int], float] = lambda _threads: 1.0
        self.choice = ThreadChoice(cores, self.load if tells else None, lambda: self.now)

    def load(self) -> CoreLoad:
        return CoreLoad(self.cores, self.others)

    def seconds(self, threads: int, rows: int = 1) -> float:
        alone = self.step_s * (rows + 0.7) * (0.2 + 0.8 / threads)
        missing = max(0.0, threads + self.others - self.cores)
        shared = 1.0 if threads == 1 else 1 + 2 * missing
        crowd = max(1.0, (1 + self.others) / self.cores)  # the system shares the cores out
        return alone * max(shared, crowd) * self.spoilt(threads)

    def best(self) -> int:
        return min(range(1, self.cores + 1), key=self.seconds)

    def step(self, kind: StepKind = "decode", rows: int = 1) -> int:
        threads = self.choice.number(kind, rows)
        spread = self.chance.uniform(1 - self.noise, 1 + self.noise)
        seconds = self.seconds(threads, rows) * spread
        self.now += seconds
        self.choice.note(kind, rows, seconds)
        return threads

    def run(self, seconds: float, kind: StepKind = "decode", rows: int = 1) -> list[int]:
        """The numbers of threads that were used in this time."""
        end = self.now + seconds
        used = []
        while self.now < end:
            used.append(self.step(kind, rows))
        return used

    def rest(self, seconds: float) -> None:
        self.now += seconds

    def share_of_best(self, seconds: float) -> float:
        """The speed in this time, as a part of the speed of the best number."""
        started, steps = self.now, len(self.run(seconds))
        return steps * self.seconds(self.best()) / (self.now - started)


def test_alone_all_cores_are_used_and_nothing_is_tried() -> None:
    """Following others costs nothing where there are none."""
    machine = Machine()
    machine.noise = 0.1
    assert set(machine.run(60)) == {2}


def test_alone_steps_of_all_sizes_are_no_disturbance() -> None:
    """Small and large batches take turns, as streams come and go."""
    machine = Machine()
    machine.noise = 0.1
    used = []
    for _ in range(3000):
        rows = machine.chance.randrange(1, 63)
        used.append(machine.step("prefill" if machine.chance.random() < 0.5 else "decode", rows))
    assert used.count(2) > 0.99 * len(used)


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("cores", [2, 4, 16])
def test_it_adapts_within_a_second(cores: int, tells: bool) -> None:
    machine = Machine(cores, tells=tells)
    machine.run(2)
    machine.others = 1
    machine.run(1)
    assert machine.share_of_best(10) > (0.9 if tells else 0.8)


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("cores", [2, 4, 16])
def test_it_is_back_within_three_seconds(cores: int, tells: bool) -> None:
    machine = Machine(cores, tells=tells)
    machine.run(2)
    machine.others = 1
    machine.run(20)
    machine.others = 0
    machine.run(3 if tells else 5)
    assert set(machine.run(1)) == {cores}


def test_it_adapts_when_others_were_there_first() -> None:
    """No earlier step shows what the machine could do."""
    machine = Machine()
    machine.others = 1
    machine.run(1)
    assert machine.share_of_best(10) > 0.9


def test_it_adapts_after_a_rest() -> None:
    """Others came and went while nothing was computed."""
    machine = Machine()
    machine.run(2)
    machine.rest(600)
    machine.others = 1
    machine.run(1)
    assert machine.share_of_best(5) > 0.9
    machine.rest(600)
    machine.others = 0
    machine.run(1)
    assert machine.share_of_best(5) > 0.95


def test_a_machine_that_shares_well_keeps_its_threads() -> None:
    """Large batches lose little by a core that is shared: what is measured counts, not the load."""
    machine = Machine()
    machine.spoilt = lambda threads: 1.5 if threads == 1 else 0.5
    machine.others = 1
    used = machine.run(60, "prefill", 512)
    assert used.count(2) > 0.9 * len(used)


def test_slow_steps_count_without_a_word_of_the_load() -> None:
    """A virtual machine, or a quota, takes the core: the load shows nothing."""
    machine = Machine()
    machine.run(2)
    machine.spoilt = lambda threads: 4.0 if threads == 2 else 1.0
    machine.run(1)
    used = machine.run(10)
    assert used.count(1) > 0.9 * len(used)


def test_each_kind_of_steps_has_its_number() -> None:
    machine = Machine()
    machine.others = 1
    for _ in range(200):
        machine.spoilt = lambda threads: 1.0
        machine.step("decode")
        machine.spoilt = lambda threads: 1.0 if threads == 1 else 0.2
        machine.step("prefill", 512)
    assert machine.choice.number("decode", 1) == 1
    assert machine.choice.number("prefill", 512) == 2


def test_the_share_of_the_host_is_the_upper_bound() -> None:
    machine = Machine(cores=4)
    machine.run(2)
    machine.choice.most = 2
    assert set(machine.run(5)) == {2}
    machine.choice.most = 4
    assert machine.step() == 4


def test_a_lower_share_ends_a_trial_above_it() -> None:
    machine = Machine(cores=4)
    machine.others = 3
    machine.run(5)
    machine.others = 0
    while machine.choice.number("decode", 1) == 1:
        machine.step()
    machine.choice.most = 1
    assert set(machine.run(1)) == {1}


def test_it_remembers_its_choice_across_a_smaller_share() -> None:
    machine = Machine(cores=4)
    machine.others = 2
    machine.run(5)
    before = machine.choice.number("decode", 1)
    machine.choice.most = 1
    machine.step()
    machine.choice.most = 4
    assert machine.choice.number("decode", 1) == before < 4


def test_a_fixed_number_stays() -> None:
    choice = ThreadChoice(2, is_fixed=True)
    for seconds in (0.01, 0.01, 1.0, 1.0, 1.0):
        assert choice.number("decode", 1) == 2
        choice.note("decode", 1, seconds)
    assert choice.number("decode", 1) == 2


def test_a_context_that_grows_is_no_disturbance() -> None:
    """Steps become slower as the answer grows: few trials, and the number stays."""
    machine = Machine()
    used = []
    for _ in range(4000):
        machine.step_s *= 1.0003
        used.append(machine.step())
    assert used.count(2) > 0.97 * len(used)


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=8),
    st.sampled_from([1, 2, 4, 16]),
    st.booleans(),
)
def test_whatever_comes_and_goes_the_number_is_allowed(
    loads: list[float], cores: int, tells: bool
) -> None:
    machine = Machine(cores, tells=tells)
    machine.noise = 0.2
    for others in loads:
        machine.others = others
        assert all(1 <= threads <= cores for threads in machine.run(0.7))


def test_others_that_come_and_go_cost_little() -> None:
    machine = Machine()
    machine.noise = 0.1
    shares = []
    for turn in range(20):
        machine.others = float(turn % 2)
        shares.append(machine.share_of_best(2))
    assert sum(shares) / len(shares) > 0.85
