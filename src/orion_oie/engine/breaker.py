"""Circuit breakers: an operation that keeps failing is paused, then tried again carefully.

One breaker per (model, operation). A breaker decides; it calls nothing and waits for nothing.
`is_fault` defines a failure: cancellations and mistakes of the caller are none.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic

from orion_oie.config import BreakerConfig
from orion_oie.errors import (
    BudgetExceededError,
    CircuitOpenError,
    DeadlineExceededError,
    DigestMismatchError,
    EngineClosedError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
    RequestCancelledError,
    described,
)
from orion_oie.schemas.stats import BreakerState, BreakerStats

_CALLERS_OWN = (
    InvalidRequestError,
    RequestCancelledError,
    DeadlineExceededError,
    QueueFullError,
    EngineClosedError,
    BudgetExceededError,
    CircuitOpenError,
)


def is_fault(error: BaseException) -> bool:
    """True when the operation itself failed, not its caller, and not an interrupt."""
    return isinstance(error, Exception) and not isinstance(error, _CALLERS_OWN)


# Found by looking at the files: there is nothing to pause, and each caller should learn of it.
_OF_THE_FILES = (ModelNotFoundError, DigestMismatchError)


def counts(error: BaseException) -> bool:
    """True when an error counts towards the pause of an operation."""
    return is_fault(error) and not isinstance(error, _OF_THE_FILES)


class CircuitBreaker:
    """The states CLOSED, OPEN and HALF_OPEN of one operation. `clock` gives seconds.

    `on_change(old, new)` is called after a change, outside the lock.
    """

    def __init__(
        self,
        name: str,
        config: BreakerConfig,
        clock: Callable[[], float] = monotonic,
        on_change: Callable[[BreakerState, BreakerState], None] = lambda _old, _new: None,
    ) -> None:
        self.name = name
        self._config = config
        self._clock = clock
        self._on_change = on_change
        self._lock = threading.Lock()
        self._start_over()

    def _start_over(self) -> None:
        self._state = BreakerState.CLOSED
        self._opened_at = 0.0
        self._trial_running = False
        self._generation = 0
        self._successes = self._failures = self._consecutive = 0
        self._rejected = self._opened = 0
        self._reason = ""

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Run the operation inside; raises `CircuitOpenError` when it is paused."""
        generation = self._admit()
        try:
            yield
        except BaseException as error:
            if counts(error):
                self._failed(generation, error)
            else:
                self._abandoned(generation)
            raise
        self._succeeded(generation)

    def check(self) -> None:
        """Raise `CircuitOpenError` while the reset timeout runs; admits nothing."""
        with self._lock:
            if self._state is BreakerState.OPEN and self._retry_after_s() > 0:
                self._rejected += 1
                raise self._rejection()

    def paused_s(self) -> float:
        """Seconds until a call may be tried again; 0 unless it is open."""
        with self._lock:
            return self._retry_after_s() if self._state is BreakerState.OPEN else 0.0

    def note_failure(self) -> None:
        """Count a failure of an operation that runs without `guard`."""
        self._failed(self._generation)

    def note_success(self) -> None:
        """Close after a success of an operation that runs without `guard`."""
        if self._state is not BreakerState.CLOSED:
            self.reset()

    def reset(self) -> None:
        """Forget everything and close."""
        with self._lock:
            old = self._state
            generation = self._generation
            self._start_over()
            self._generation = generation + 1
        if old is not BreakerState.CLOSED:
            self._on_change(old, BreakerState.CLOSED)

    def stats(self) -> BreakerStats:
        with self._lock:
            return BreakerStats(
                state=self._state,
                successes=self._successes,
                failures=self._failures,
                consecutive_failures=self._consecutive,
                rejected=self._rejected,
                opened=self._opened,
                retry_after_s=self._retry_after_s() if self._state is BreakerState.OPEN else 0.0,
            )

    def _retry_after_s(self) -> float:
        return max(0.0, self._opened_at + self._config.reset_timeout_s - self._clock())

    def _admit(self) -> int:
        """Let a call in and return the generation that its outcome belongs to."""
        change = None
        try:
            with self._lock:
                if self._state is BreakerState.OPEN and self._retry_after_s() <= 0:
                    change = self._become(BreakerState.HALF_OPEN)
                if self._state is BreakerState.CLOSED:
                    return self._generation
                if self._state is BreakerState.HALF_OPEN and not self._trial_running:
                    self._trial_running = True
                    return self._generation
                self._rejected += 1
                raise self._rejection()
        finally:
            self._announce(change)

    def _rejection(self) -> CircuitOpenError:
        if self._state is BreakerState.HALF_OPEN:
            wait = "one trial is running; try again when it has ended"
            retry_after_s = 0.0
        else:
            retry_after_s = self._retry_after_s()
            wait = f"it is tried again in {retry_after_s:.1f} s"
        reason = f" (the last time with {self._reason})" if self._reason else ""
        return CircuitOpenError(
            f"{self.name} failed {self._consecutive} times in a row and is paused; {wait}{reason}",
            name=self.name,
            reason=self._reason,
            failures=self._consecutive,
            retry_after_s=retry_after_s,
        )

    def _succeeded(self, generation: int) -> None:
        change = None
        with self._lock:
            if generation == self._generation:
                self._successes += 1
                self._consecutive = 0
                if self._state is BreakerState.HALF_OPEN:
                    change = self._become(BreakerState.CLOSED)
        self._announce(change)

    def _failed(self, generation: int, error: BaseException | None = None) -> None:
        change = None
        with self._lock:
            if generation == self._generation:
                self._failures += 1
                self._consecutive += 1
                self._reason = "" if error is None else described(error)
                is_trial = self._state is BreakerState.HALF_OPEN
                if is_trial or self._consecutive >= self._config.failure_threshold:
                    self._opened += 1
                    self._opened_at = self._clock()
                    change = self._become(BreakerState.OPEN)
        self._announce(change)

    def _abandoned(self, generation: int) -> None:
        """The call ended without a verdict: a trial may be repeated."""
        with self._lock:
            if generation == self._generation:
                self._trial_running = False

    def _become(self, state: BreakerState) -> tuple[BreakerState, BreakerState]:
        # A new generation: outcomes of calls from before the change no longer count.
        old, self._state = self._state, state
        self._generation += 1
        self._trial_running = False
        return old, state

    def _announce(self, change: tuple[BreakerState, BreakerState] | None) -> None:
        if change is not None:
            self._on_change(*change)


class BreakerBoard:
    """All breakers of an engine, by (model, operation), made when first asked for."""

    def __init__(
        self,
        config: BreakerConfig,
        clock: Callable[[], float] = monotonic,
        on_change: Callable[[str, BreakerState, BreakerState], None] = lambda _n, _o, _s: None,
    ) -> None:
        self._config = config
        self._clock = clock
        self._on_change = on_change
        self._lock = threading.Lock()
        self._breakers: dict[str, dict[str, CircuitBreaker]] = {}  # by model, then by operation

    @contextmanager
    def guard(self, model_id: str, operation: str) -> Iterator[None]:
        """`CircuitBreaker.guard` of that model's operation; no guard when breakers are off."""
        if not self._config.enabled:
            yield
            return
        with self._breaker(model_id, operation).guard():
            yield

    def check(self, model_id: str) -> None:
        """Raise `CircuitOpenError` while any operation of the model is paused."""
        for breaker in self._of(model_id):
            breaker.check()

    def paused_s(self, model_id: str) -> float:
        """Seconds for which an operation of the model is still paused, 0 if none is. Unlike
        `check`, it counts as no attempt."""
        return max((breaker.paused_s() for breaker in self._of(model_id)), default=0.0)

    def stats(self) -> dict[str, BreakerStats]:
        """Statistics by `model:operation`."""
        return {one.name: one.stats() for one in sorted(self._all(), key=lambda one: one.name)}

    def reset(self) -> None:
        """Close every breaker and forget its counts."""
        for breaker in self._all():
            breaker.reset()

    def _of(self, model_id: str) -> list[CircuitBreaker]:
        with self._lock:
            return list(self._breakers.get(model_id, {}).values())

    def _all(self) -> list[CircuitBreaker]:
        with self._lock:
            return [one for breakers in self._breakers.values() for one in breakers.values()]

    def _breaker(self, model_id: str, operation: str) -> CircuitBreaker:
        with self._lock:
            breakers = self._breakers.setdefault(model_id, {})
            if operation not in breakers:
                name = f"{model_id}:{operation}"
                breakers[operation] = CircuitBreaker(
                    name, self._config, self._clock, partial(self._on_change, name)
                )
            return breakers[operation]
