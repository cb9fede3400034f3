"""Prompt tokens a step may read, on machines that are simulated: what it takes a machine to compute
rows is known here, and the budget has to find it out."""

import random
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_oie.backends.llama.worker.prefill_budget import (
    STRETCH,
    PrefillBudget,
)

MOST = 512
MOST_STRETCH = 3.0


class Machine:
    """A step takes `step_s`, and `row_s` for each row, and up to `noise` more or less than that."""

    def __init__(self, step_s: float, row_s: float, noise: float = 0.0, seed: int = 0) -> None:
        self.step_s, self.row_s, self.noise = step_s, row_s, noise
        self.chance = random.Random(seed)

    def seconds(self, rows: int) -> float:
        return self.step_s + self.row_s * rows

    def measured(self, rows: int) -> float:
        return self.seconds(rows) * self.chance.uniform(1 - self.noise, 1 + self.noise)

    def stretch(self, running: int, prompt_tokens: int) -> float:
        """How many times as long as a usual step one with prompt tokens takes."""
        return self.seconds(running + prompt_tokens) / self.seconds(running)

    def allowed(self, running: int) -> int:
        """The prompt tokens for somebody who knows the machine."""
        spare_s = (STRETCH - 1) * self.seconds(running)
        return max(1, min(MOST, int(spare_s / self.row_s)))

    def learn_baseline(self, budget: PrefillBudget, *counts: int) -> None:
        """Steps without prompt tokens, five for each count of running sequences."""
        for running in counts * 5:
            budget.note(running, 0, self.measured(running))

    def learn_prompts(self, budget: PrefillBudget, running: int, steps: int) -> None:
        """Steps with as many prompt tokens as the budget says."""
        for _ in range(steps):
            prompt_tokens = budget.tokens(running)
            budget.note(running, prompt_tokens, self.measured(running + prompt_tokens))

    def learnt(self, *counts: int) -> PrefillBudget:
        """A budget that saw enough of this machine."""
        budget = PrefillBudget(MOST)
        self.learn_baseline(budget, *counts)
        for running in counts:
            self.learn_prompts(budget, running, 40)
        return budget


NOISE = 0.1
MACHINES = {
    "a step costs 20 rows": (20e-3, 1e-3),
    "a step costs 100 rows": (20e-3, 2e-4),
    "a step costs 2 rows": (20e-3, 1e-2),
    "a step costs as much as a row": (5e-3, 5e-3),
    "only rows cost": (0.0, 1e-2),
}

machines = pytest.mark.parametrize("costs", MACHINES.values(), ids=list(MACHINES))


@machines
@pytest.mark.parametrize("seed", range(8))
def test_a_busy_day(costs: tuple[float, float], seed: int) -> None:
    """Prompts of all lengths come and go beside one to four answers, and times are noisy: no step
    is ever planned too long, and most of what is allowed is used."""
    machine = Machine(*costs, NOISE, seed)
    budget, counts = machine.learnt(1, 2, 3, 4), range(1, 5)
    running = left = 0
    used = []
    for _ in range(300):
        if machine.chance.random() < 0.2:
            running = machine.chance.choice([0, *counts])
        if left == 0 and machine.chance.random() < 0.3:
            left = machine.chance.randint(1, 400)
        prompt_tokens = min(left, budget.tokens(running))
        left -= prompt_tokens
        if running + prompt_tokens == 0:
            continue
        budget.note(running, prompt_tokens, machine.measured(running + prompt_tokens))
        for count in counts:
            tokens = budget.tokens(count)
            assert machine.stretch(count, tokens) <= MOST_STRETCH
            used.append(tokens / machine.allowed(count))
    assert mean(used) > 0.7


@machines
@pytest.mark.parametrize("running", [1, 3, 16])
def test_without_noise_it_finds_the_allowance(costs: tuple[float, float], running: int) -> None:
    """On a machine that is exact, it comes to what somebody who knows the machine would allow."""
    machine = Machine(*costs)
    tokens = machine.learnt(running).tokens(running)
    allowed = machine.allowed(running)
    assert 0.9 * allowed - 1 <= tokens <= allowed
    assert machine.stretch(running, tokens) <= MOST_STRETCH


@pytest.mark.parametrize("row_s", [0.0, 1e-7, 1e-5])
@pytest.mark.parametrize("noise", [0.0, NOISE])
def test_free_rows_are_used(row_s: float, noise: float) -> None:
    """Where more rows cost next to nothing, it grows to the most that a step can have."""
    assert Machine(20e-3, row_s, noise).learnt(1).tokens(1) == MOST


def test_it_grows_from_a_first_guess_within_a_few_steps() -> None:
    """A prompt that comes before anything is known of prompts is not held up for long."""
    machine = Machine(20e-3, 2e-4, NOISE)
    budget = PrefillBudget(MOST)
    machine.learn_baseline(budget, 1)
    first = budget.tokens(1)
    assert 1 < first < 32
    machine.learn_prompts(budget, 1, 20)
    assert budget.tokens(1) > 0.5 * machine.allowed(1)


def test_nobody_waits_for_a_prompt_alone() -> None:
    """Without running sequences a step is as large as it can be, whatever is known."""
    assert PrefillBudget(MOST).tokens(0) == MOST
    assert PrefillBudget(7).tokens(0) == 7
    assert Machine(0.0, 1e-2).learnt(1, 2).tokens(0) == MOST


def test_steps_of_prompts_alone_teach_what_a_row_costs() -> None:
    """What is learnt while nobody runs holds when somebody does."""
    machine = Machine(20e-3, 2e-4)
    budget = PrefillBudget(MOST)
    machine.learn_prompts(budget, 0, 5)
    machine.learn_baseline(budget, 1)
    # Alone, a row seems to cost its share of the step too: at most that much is left unused.
    assert 0.8 * machine.allowed(1) <= budget.tokens(1) <= machine.allowed(1)


@given(
    most=st.integers(1, MOST),
    steps=st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, MOST), st.floats(1e-7, 1e3)), max_size=30
    ),
    running=st.integers(0, 16),
)
def test_some_but_not_too_many(
    most: int, steps: list[tuple[int, int, float]], running: int
) -> None:
    """Whatever times were measured, a prompt goes on and a step is not larger than it can be."""
    budget = PrefillBudget(most)
    budget.note(1, 0, 1e-2)
    assert 1 <= budget.tokens(running) <= most
    for count, prompt_tokens, seconds in steps:
        if count + prompt_tokens > 0:
            budget.note(count, prompt_tokens, seconds)
        assert 1 <= budget.tokens(running) <= most


@given(
    step_s=st.floats(0, 0.1),
    row_s=st.floats(1e-4, 1e-2),
    known=st.integers(1, 16),
    running=st.integers(1, 16),
)
def test_unknown_counts_are_guessed_from_the_nearest(
    step_s: float, row_s: float, known: int, running: int
) -> None:
    """For a count of running sequences that was not seen yet, a step is not planned too long, and
    has a part of the allowance that is as large as the counts are near."""
    machine = Machine(step_s, row_s)
    tokens = machine.learnt(known).tokens(running)
    assert machine.stretch(running, tokens) <= MOST_STRETCH
    nearness = min(known / running, running / known)
    assert tokens >= int(0.9 * nearness * machine.allowed(running))


def test_the_nearest_count_is_the_guide() -> None:
    """Two counts are known: one between them is taken for the nearer one, or a part of it."""
    budget = PrefillBudget(MOST)
    budget.note(2, 0, 0.010)
    budget.note(10, 0, 0.100)
    budget.note(0, 100, 0.010)  # 0.1 ms for a row
    plans = [budget.tokens(running) for running in (1, 2, 5, 8, 10, 20)]
    usual_ms = [5, 10, 10, 80, 100, 100]
    expected = [min(MOST, round((STRETCH - 1) * 10 * ms)) for ms in usual_ms]
    assert plans == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("factor", [0.01, 10.0])
@pytest.mark.parametrize("is_prompt_step", [False, True])
def test_one_odd_step_does_not_ruin_it(factor: float, is_prompt_step: bool) -> None:
    """After a step ten times as long, or next to no time, a dozen ordinary ones put it right."""
    machine = Machine(20e-3, 1e-3, 0.02)
    budget = machine.learnt(1)
    prompt_tokens = budget.tokens(1) if is_prompt_step else 0
    budget.note(1, prompt_tokens, factor * machine.seconds(1 + prompt_tokens))
    for _ in range(12):
        machine.learn_prompts(budget, 1, 1)
        budget.note(1, 0, machine.measured(1))
    tokens = budget.tokens(1)
    assert tokens > 0.6 * machine.allowed(1)
    assert machine.stretch(1, tokens) <= MOST_STRETCH


@pytest.mark.parametrize("running", [1, 2, 5, 16])
def test_it_is_careful_before_it_saw_a_usual_step(running: int) -> None:
    """Where prompts came first, and rows may be all that costs, a step is not planned too long."""
    machine = Machine(0.0, 1e-3)
    budget = PrefillBudget(MOST)
    machine.learn_prompts(budget, 0, 5)
    assert machine.stretch(running, budget.tokens(running)) <= MOST_STRETCH


def test_a_long_step_is_not_taken_for_usual() -> None:
    """One step without a prompt that takes twice as long does not double what prompts may take."""
    machine = Machine(20e-3, 1e-3)
    budget = machine.learnt(1)
    budget.note(1, 0, 2 * machine.seconds(1))
    assert machine.stretch(1, budget.tokens(1)) <= MOST_STRETCH


def test_free_rows_are_not_believed_at_once() -> None:
    """After a first prompt that cost no time at all, the next one is larger, but not boundless."""
    budget = PrefillBudget(10**6)
    budget.note(1, 0, 20e-3)
    first = budget.tokens(1)
    budget.note(1, first, 20e-3)
    assert 2 * first < budget.tokens(1) < 40 * first


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_it_follows_a_machine_that_changes(factor: float) -> None:
    """When all steps become slower or faster, or only rows do, it finds the new allowance."""
    for change in ({"step_s": 20e-3 * factor}, {"row_s": 1e-3 * factor}):
        budget = Machine(20e-3, 1e-3).learnt(1)
        machine = Machine(**{"step_s": 20e-3, "row_s": 1e-3, **change})
        for _ in range(20):
            machine.learn_baseline(budget, 1)
            machine.learn_prompts(budget, 1, 1)
        assert budget.tokens(1) == pytest.approx(machine.allowed(1), rel=0.1)
