"""Access to private parts for the few tests that have no public way; each function says why."""

from collections.abc import Callable

from orion_oie.cancellation import DeadlineTimer


def at_idle_timeout(
    timer: DeadlineTimer, is_due: Callable[[], bool], act: Callable[[], None]
) -> None:
    """Let the idle wait of a timer end in vain once `is_due()`, and call `act` at that moment.

    The race under test lies between the end of that wait and the next look at the deadlines; only
    the timer's own condition reaches that point.
    """
    wait = timer._condition.wait

    def wait_in_vain(timeout: float | None = None) -> bool:
        if timer._pending or not is_due():
            return wait(timeout)
        act()
        return False

    timer._condition.wait = wait_in_vain
