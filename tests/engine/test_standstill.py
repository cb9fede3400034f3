"""Health says when requests wait although nothing runs, whatever `stuck_after_s` is."""

from engines import MakeEngine
from helpers import BOUND_S, Held, wait_until

from orion_oie.backends.fake import FakeAnswer
from orion_oie.engine.watchdog import IDLE_S, Activity, idle, stuck

WAITS = Activity("r1", "the queue", 9.0, "a@q4", why="others come before it", is_waiting=True)


def test_who_waits_while_nothing_runs_is_named() -> None:
    """The one that waits longest, with the reason that it was given."""
    other = Activity("r2", "loading_agent", 12.0, "b@q4", is_waiting=True)
    assert idle([WAITS], 3.0) == [
        "request r1 waits for a@q4 although nothing has run or loaded for 3 s, because others come "
        "before it"
    ]
    assert idle([WAITS, other], 3.0)[0].startswith("request r2 waits for b@q4 although")


def test_work_and_short_waits_are_no_standstill() -> None:
    """Nothing is said while something runs, of a request that came just now, or that runs."""
    runs = Activity("r2", "inferencing", 9.0, "a@q4")
    new = Activity("r3", "the queue", IDLE_S / 2, "a@q4", why="it is next", is_waiting=True)
    assert idle([WAITS, runs], 0.0) == []
    assert idle([runs, new], 60.0) == []
    assert idle([], 60.0) == []


def test_of_very_many_the_rest_is_counted() -> None:
    """Those that are not named one by one are told as a number."""
    lines = stuck([WAITS], 5.0, more=40)
    assert len(lines) == 2
    assert lines[1] == "40 more requests have made no progress for 5 s"


def test_a_long_answer_is_no_standstill(make_engine: MakeEngine) -> None:
    """While one request is answered, those that wait for its place wait for something."""
    held = Held(FakeAnswer("Yes."))
    engine = make_engine({"*": held}, slots=1, stuck_after_s=3600.0)
    running = engine.submit("Hello?")
    held.wait_for()
    waiting = engine.submit("Hello?")
    wait_until(lambda: waiting.queue_position == 1)
    assert engine.health().reasons == []
    held.let_go.set()
    running.result(BOUND_S)
    waiting.result(BOUND_S)
