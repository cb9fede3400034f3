"""The line in front of a chat: one at a time, in the order of arrival."""

import threading

from helpers import BOUND_S, run_all

from orion_oie.engine.turn_line import TurnLine


def test_one_at_a_time_in_order() -> None:
    """The first place is ready at once, the others when those before them were left."""
    line = TurnLine()
    places = [line.enter() for _ in range(3)]
    assert [place.done() for place in places] == [True, False, False]
    line.leave(places[0])
    assert [place.done() for place in places] == [True, True, False]
    line.leave(places[1])
    assert places[2].done()


def test_a_place_may_be_left_before_its_turn_and_twice() -> None:
    """Then it is passed over; leaving it again changes nothing."""
    line = TurnLine()
    first, second, third = (line.enter() for _ in range(3))
    line.leave(second)
    line.leave(second)
    assert not third.done()
    line.leave(first)
    line.leave(first)
    assert third.done()
    assert not second.done()
    line.leave(third)
    assert line.enter().done()


def test_entering_if_free() -> None:
    """Only an empty line has a place for who does not want to wait."""
    line = TurnLine()
    place = line.enter_if_free()
    assert place is not None
    assert place.done()
    assert line.enter_if_free() is None
    following = line.enter()
    line.leave(place)
    assert following.done()
    assert line.enter_if_free() is None
    line.leave(following)
    assert line.enter_if_free() is not None


def test_many_threads_are_let_in_one_by_one() -> None:
    """No two are inside at the same time, some give up, and all get out."""
    line = TurnLine()
    inside = 0
    most = 0
    lock = threading.Lock()

    def visit(number: int) -> None:
        nonlocal inside, most
        for turn in range(50):
            place = line.enter()
            if (number + turn) % 7 == 0:
                line.leave(place)
                continue
            place.result(BOUND_S)
            with lock:
                inside += 1
                most = max(most, inside)
            with lock:
                inside -= 1
            line.leave(place)

    for run in run_all([lambda n=n: visit(n) for n in range(8)]):
        run.join()
    assert (most, inside) == (1, 0)
    assert line.enter_if_free() is not None
