"""Circuit breakers: what they count, when they open, and that one trial decides."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
from helpers import BOUND_S, Clock, run_all
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)

from orion_oie import errors
from orion_oie.config import BreakerConfig
from orion_oie.engine.breaker import (
    BreakerBoard,
    CircuitBreaker,
    is_fault,
)
from orion_oie.errors import (
    CircuitOpenError,
    GuardrailError,
    InvalidRequestError,
    OrionError,
    RequestCancelledError,
    WorkerCrashedError,
)
from orion_oie.schemas.stats import BreakerState

THRESHOLD = 3
PAUSE_S = 30.0
FEW = 2  # failures that open the breaker of the state machine: so it opens often
CONFIG = BreakerConfig(failure_threshold=THRESHOLD, reset_timeout_s=PAUSE_S)
CLOSED, OPEN, HALF_OPEN = BreakerState
CALLERS_OWN = {
    "BudgetExceededError",
    "CircuitOpenError",
    "ContextOverflowError",
    "DeadlineExceededError",
    "EngineClosedError",
    "GuardrailError",
    "InvalidRequestError",
    "QueueFullError",
    "RequestCancelledError",
    "UnknownAgentError",
}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def changes() -> list[tuple[BreakerState, BreakerState]]:
    return []


@pytest.fixture
def breaker(clock: Clock, changes: list[tuple[BreakerState, BreakerState]]) -> CircuitBreaker:
    return CircuitBreaker("m:load", CONFIG, clock, lambda old, new: changes.append((old, new)))


def fail(breaker: CircuitBreaker, times: int = 1) -> None:
    for _ in range(times):
        with pytest.raises(WorkerCrashedError), breaker.guard():
            raise WorkerCrashedError("it died")


def succeed(breaker: CircuitBreaker) -> None:
    with breaker.guard():
        pass


def state(breaker: CircuitBreaker) -> BreakerState:
    return breaker.stats().state


# What counts


def every_error() -> Iterator[type[OrionError]]:
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, OrionError):
            yield value


@pytest.mark.parametrize("cls", list(every_error()), ids=lambda cls: cls.__name__)
def test_only_failures_of_the_operation_are_faults(cls: type[OrionError]) -> None:
    """What the caller did, or was refused before the operation, says nothing against it."""
    assert is_fault(cls("")) is (cls.__name__ not in CALLERS_OWN)


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (ValueError(), True),
        (MemoryError(), True),
        (TimeoutError(), True),
        (KeyboardInterrupt(), False),
        (SystemExit(), False),
        (GeneratorExit(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_foreign_errors_are_faults_and_interrupts_are_not(
    error: BaseException, verdict: bool
) -> None:
    """An unexpected error is a failure; Ctrl-C and the end of the program are not."""
    assert is_fault(error) is verdict


# One breaker


def test_it_opens_after_failures_in_a_row(
    breaker: CircuitBreaker, changes: list[tuple[BreakerState, BreakerState]]
) -> None:
    """A success in between starts the count again; the last failure of the row opens."""
    fail(breaker, THRESHOLD - 1)
    succeed(breaker)
    fail(breaker, THRESHOLD - 1)
    assert state(breaker) is CLOSED
    assert changes == []
    fail(breaker)
    assert state(breaker) is OPEN
    assert changes == [(CLOSED, OPEN)]


def test_an_open_breaker_refuses_with_the_numbers(breaker: CircuitBreaker, clock: Clock) -> None:
    """While it is open nothing gets in, and the error says for how long."""
    fail(breaker, THRESHOLD)
    clock.tick(10)
    with pytest.raises(CircuitOpenError) as caught, breaker.guard():
        pytest.fail("was let in")
    assert caught.value.details == {
        "name": "m:load",
        "failures": 3,
        "reason": "WorkerCrashedError: it died",
        "retry_after_s": 20.0,
    }
    assert caught.value.message == (
        "m:load failed 3 times in a row and is paused; it is tried again in 20.0 s (the last time "
        "with WorkerCrashedError: it died)"
    )
    assert caught.value.retryable


def test_a_good_trial_closes_it(
    breaker: CircuitBreaker, clock: Clock, changes: list[tuple[BreakerState, BreakerState]]
) -> None:
    """After the pause one call is let in; if it succeeds everything is as before."""
    fail(breaker, THRESHOLD)
    clock.tick(PAUSE_S)
    succeed(breaker)
    assert changes == [(CLOSED, OPEN), (OPEN, HALF_OPEN), (HALF_OPEN, CLOSED)]
    fail(breaker, THRESHOLD - 1)
    assert state(breaker) is CLOSED


def test_it_recovers_again_and_again(breaker: CircuitBreaker, clock: Clock) -> None:
    """One recovery does not use up the next, also after trials that failed or were cancelled."""
    for _ in range(3):
        fail(breaker, THRESHOLD)
        clock.tick(PAUSE_S)
        fail(breaker)
        clock.tick(PAUSE_S)
        with pytest.raises(RequestCancelledError), breaker.guard():
            raise RequestCancelledError("x")
        succeed(breaker)
        assert state(breaker) is CLOSED
    assert breaker.stats().opened == 6


def test_a_bad_trial_opens_it_for_another_pause(breaker: CircuitBreaker, clock: Clock) -> None:
    """One failure is enough then, and the pause starts anew."""
    fail(breaker, THRESHOLD)
    clock.tick(PAUSE_S + 5)
    fail(breaker)
    assert breaker.stats().model_dump() == {
        "state": OPEN,
        "successes": 0,
        "failures": 4,
        "consecutive_failures": 4,
        "rejected": 0,
        "opened": 2,
        "retry_after_s": PAUSE_S,
    }


def test_the_pause_ends_to_the_moment(breaker: CircuitBreaker, clock: Clock) -> None:
    """Just before its end nothing is let in; at its end something is."""
    fail(breaker, THRESHOLD)
    clock.tick(PAUSE_S - 0.25)
    with pytest.raises(CircuitOpenError):
        succeed(breaker)
    clock.tick(0.25)
    succeed(breaker)


@pytest.mark.parametrize("error", [RequestCancelledError("x"), GuardrailError("x")])
def test_a_trial_without_a_verdict_is_repeated(
    breaker: CircuitBreaker, clock: Clock, error: OrionError
) -> None:
    """A trial that its caller ended decides nothing: the next call is the trial."""
    fail(breaker, THRESHOLD)
    clock.tick(PAUSE_S)
    with pytest.raises(type(error)), breaker.guard():
        raise error
    assert state(breaker) is HALF_OPEN
    succeed(breaker)
    assert state(breaker) is CLOSED


def test_a_second_call_does_not_join_the_trial(breaker: CircuitBreaker, clock: Clock) -> None:
    """While a trial runs others are refused and told why."""
    fail(breaker, THRESHOLD)
    clock.tick(PAUSE_S)
    with breaker.guard():
        with pytest.raises(CircuitOpenError, match="one trial is running") as caught:
            succeed(breaker)
        assert caught.value.details["retry_after_s"] == 0.0
    assert state(breaker) is CLOSED


def test_a_late_outcome_does_not_count(breaker: CircuitBreaker, clock: Clock) -> None:
    """A call from before the breaker opened cannot close it, fail its trial, or end its turn."""
    before = [breaker.guard() for _ in range(3)]
    for call in before:
        call.__enter__()
    fail(breaker, THRESHOLD)
    clock.tick(PAUSE_S)
    with breaker.guard():
        before[0].__exit__(None, None, None)
        assert state(breaker) is HALF_OPEN
        error = WorkerCrashedError("late")
        before[1].__exit__(type(error), error, None)
        assert state(breaker) is HALF_OPEN
        cancelled = RequestCancelledError("late")
        before[2].__exit__(type(cancelled), cancelled, None)
        with pytest.raises(CircuitOpenError):
            succeed(breaker)
    assert breaker.stats().model_dump() == {
        "state": CLOSED,
        "successes": 1,
        "failures": 3,
        "consecutive_failures": 0,
        "rejected": 1,
        "opened": 1,
        "retry_after_s": 0.0,
    }


def test_check_tells_without_trying(breaker: CircuitBreaker, clock: Clock) -> None:
    """`check` refuses while the pause runs, and never uses up the trial."""
    breaker.check()
    fail(breaker, THRESHOLD)
    with pytest.raises(CircuitOpenError):
        breaker.check()
    assert breaker.stats().rejected == 1
    clock.tick(PAUSE_S)
    breaker.check()
    assert state(breaker) is OPEN
    succeed(breaker)


def test_reset_forgets_everything(
    breaker: CircuitBreaker, clock: Clock, changes: list[tuple[BreakerState, BreakerState]]
) -> None:
    """After a reset it is a new breaker, and calls from before have no part in it."""
    old = breaker.guard()
    old.__enter__()
    fail(breaker, THRESHOLD)
    breaker.reset()
    breaker.reset()
    assert changes == [(CLOSED, OPEN), (OPEN, CLOSED)]
    error = WorkerCrashedError("late")
    old.__exit__(type(error), error, None)
    assert breaker.stats() == CircuitBreaker("m:load", CONFIG, clock).stats()
    fail(breaker, THRESHOLD - 1)
    assert state(breaker) is CLOSED


def test_the_error_of_the_operation_passes_through(breaker: CircuitBreaker) -> None:
    """The breaker adds nothing to what went wrong."""
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught, breaker.guard():
        raise error
    assert caught.value is error


def test_a_change_is_announced_outside_the_lock(clock: Clock) -> None:
    """Whoever listens may ask the breaker itself."""
    seen: list[BreakerState] = []
    breaker = CircuitBreaker("x", CONFIG, clock, lambda _o, _n: seen.append(state(breaker)))
    fail(breaker, THRESHOLD)
    clock.tick(PAUSE_S)
    succeed(breaker)
    breaker.reset()
    assert seen == [OPEN, HALF_OPEN, CLOSED]


def is_admitted(breaker: CircuitBreaker, refused: threading.Semaphore) -> bool:
    """Try to get in; whoever does stays until the seven others have been refused."""
    try:
        with breaker.guard():
            for _ in range(7):
                assert refused.acquire(timeout=BOUND_S)
            return True
    except CircuitOpenError:
        refused.release()
        return False


def test_exactly_one_of_many_threads_gets_the_trial(clock: Clock) -> None:
    """Eight threads race for the trial: one is let in, seven are refused, in every round."""
    breaker = CircuitBreaker("x", CONFIG, clock)
    refused = threading.Semaphore(0)
    for _ in range(25):
        breaker.reset()
        fail(breaker, THRESHOLD)
        clock.tick(PAUSE_S)
        runs = run_all([lambda: is_admitted(breaker, refused)] * 8)
        assert sum(run.join() for run in runs) == 1
        assert breaker.stats().rejected == 7
        assert state(breaker) is CLOSED


# Against a reference


@dataclass
class Call:
    """A call under way: the breaker's guard, and the era of the reference it was let in."""

    guard: AbstractContextManager[None]
    era: int


OUTCOMES = {
    "success": None,
    "fault": WorkerCrashedError("fault"),
    "cancel": RequestCancelledError("cancel"),
    "caller error": InvalidRequestError("caller error"),
    "interrupt": KeyboardInterrupt(),
}
# Faults come first and most often: rare events follow only those.
outcomes = st.sampled_from(["fault"] * 5 + ["success"] * 3 + [*OUTCOMES])


class BreakerMachine(RuleBasedStateMachine):
    """Any interleaving of calls, outcomes, time and resets agrees with a plain reference.

    The reference numbers the eras between changes: an outcome counts only in the era in which
    its call was let in.
    """

    calls = Bundle("calls")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.announced: list[tuple[BreakerState, BreakerState]] = []
        config = BreakerConfig(failure_threshold=FEW, reset_timeout_s=PAUSE_S)
        self.breaker = CircuitBreaker(
            "x", config, self.clock, lambda *change: self.announced.append(change)
        )
        self.expected: list[tuple[BreakerState, BreakerState]] = []
        self.era = 0
        self.forget()

    def forget(self) -> None:
        self.state = CLOSED
        self.reopens_at = 0.0
        self.trials = 0
        self.row = ""
        self.successes = self.failures = self.rejected = self.opened = 0

    def become(self, new: BreakerState) -> None:
        self.expected.append((self.state, new))
        self.state = new
        self.era += 1
        self.trials = 0

    @rule(target=calls)
    def start(self) -> Call:
        """A call asks to be let in and takes its time."""
        return self.begin()

    def begin(self) -> Call:
        if self.state is OPEN and self.clock.now >= self.reopens_at:
            self.become(HALF_OPEN)
        may_enter = self.state is CLOSED or (self.state is HALF_OPEN and not self.trials)
        guard = self.breaker.guard()
        try:
            guard.__enter__()
        except CircuitOpenError:
            assert not may_enter
            self.rejected += 1
            return Call(guard, era=-1)
        assert may_enter
        self.trials += 1
        return Call(guard, self.era)

    @rule(outcomes=st.lists(outcomes, min_size=1, max_size=FEW))
    def call(self, outcomes: list[str]) -> None:
        """Calls come one after the other."""
        for outcome in outcomes:
            self.end(self.begin(), outcome)

    @rule(call=consumes(calls), outcome=outcomes)
    def finish(self, call: Call, outcome: str) -> None:
        """A call ends somehow, perhaps long after the breaker changed."""
        self.end(call, outcome)

    def end(self, call: Call, outcome: str) -> None:
        if call.era < 0:
            return
        error = OUTCOMES[outcome]
        if error is None:
            call.guard.__exit__(None, None, None)
        else:
            assert not call.guard.__exit__(type(error), error, None)
        if call.era != self.era:
            return
        if outcome == "success":
            self.successes += 1
            self.row = ""
            if self.state is HALF_OPEN:
                self.become(CLOSED)
        elif outcome == "fault":
            self.failures += 1
            self.row += "x"
            if self.state is HALF_OPEN or len(self.row) >= FEW:
                self.opened += 1
                self.reopens_at = self.clock.now + PAUSE_S
                self.become(OPEN)
        else:
            self.trials = 0

    @rule(seconds=st.sampled_from([PAUSE_S, PAUSE_S, PAUSE_S - 0.5, 0.5]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.clock.tick(seconds)

    @rule()
    def check(self) -> None:
        """Somebody asks without wanting in."""
        is_paused = self.state is OPEN and self.clock.now < self.reopens_at
        try:
            self.breaker.check()
        except CircuitOpenError:
            assert is_paused
            self.rejected += 1
        else:
            assert not is_paused

    @precondition(lambda self: self.opened)  # else it comes so often that nothing gets far
    @rule()
    def reset(self) -> None:
        """The counts are forgotten."""
        self.breaker.reset()
        if self.state is not CLOSED:
            self.expected.append((self.state, CLOSED))
        self.era += 1
        self.forget()

    @invariant()
    def agrees(self) -> None:
        """State, counts and announcements are the reference's."""
        assert self.announced == self.expected
        assert self.breaker.stats().model_dump() == {
            "state": self.state,
            "successes": self.successes,
            "failures": self.failures,
            "consecutive_failures": len(self.row),
            "rejected": self.rejected,
            "opened": self.opened,
            "retry_after_s": max(0.0, self.reopens_at - self.clock.now)
            if self.state is OPEN
            else 0.0,
        }


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=200, stateful_step_count=30)


# All breakers of an engine


def board_fails(board: BreakerBoard, model_id: str, operation: str) -> None:
    for _ in range(THRESHOLD):
        with pytest.raises(WorkerCrashedError), board.guard(model_id, operation):
            raise WorkerCrashedError("it died")


def test_operations_and_models_are_apart(clock: Clock) -> None:
    """A model that cannot be loaded does not pause another, nor its own other operation."""
    changes: list[tuple[str, BreakerState, BreakerState]] = []
    board = BreakerBoard(CONFIG, clock, lambda *change: changes.append(change))
    board_fails(board, "m", "load")
    with board.guard("m", "generate"), board.guard("n", "load"):
        pass
    with pytest.raises(CircuitOpenError), board.guard("m", "load"):
        pass
    assert changes == [("m:load", CLOSED, OPEN)]
    assert {name: stats.state for name, stats in board.stats().items()} == {
        "m:generate": CLOSED,
        "m:load": OPEN,
        "n:load": CLOSED,
    }
    assert list(board.stats()) == sorted(board.stats())


def test_a_model_is_paused_while_one_of_its_operations_is(clock: Clock) -> None:
    """`check` looks at all operations of exactly that model until the pause is over."""
    board = BreakerBoard(CONFIG, clock)
    board_fails(board, "m", "generate")
    for other in ("", "M", "m:", "mm", "m:generate", "never heard of"):
        board.check(other)
    with pytest.raises(CircuitOpenError, match="m:generate failed 3 times"):
        board.check("m")
    clock.tick(PAUSE_S)
    board.check("m")


def test_a_board_that_is_off_lets_everything_through(clock: Clock) -> None:
    """Without breakers failures are not counted and nothing is ever paused."""
    board = BreakerBoard(CONFIG.model_copy(update={"enabled": False}), clock)
    board_fails(board, "m", "load")
    board_fails(board, "m", "load")
    board.check("m")
    assert board.stats() == {}


def test_resetting_the_board_closes_every_breaker(clock: Clock) -> None:
    """One call puts all models back into use."""
    board = BreakerBoard(CONFIG, clock)
    for name in ("m", "n"):
        board_fails(board, name, "load")
    board.reset()
    assert {stats.state for stats in board.stats().values()} == {CLOSED}
    with board.guard("m", "load"), board.guard("n", "load"):
        pass
