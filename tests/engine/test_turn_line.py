"""The line in front of a chat: one at a time, in the order of arrival."""

import threading
from contextlib import suppress

import pytest
from helpers import BOUND_S, run_all
from interrupts import Interrupted, points_of

from orion_oie.engine.turn_line import Place, TurnLine


def entered(line: TurnLine) -> Place:
    place = Place()
    line.enter(place)
    return place


def is_free(line: TurnLine) -> bool:
    with line.place_if_free() as place:
        return place is not None


def test_one_at_a_time_in_order() -> None:
    """The first place is ready at once, the others when those before them were left."""
    line = TurnLine()
    places = [entered(line) for _ in range(3)]
    assert [place.done() for place in places] == [True, False, False]
    line.leave(places[0])
    assert [place.done() for place in places] == [True, True, False]
    line.leave(places[1])
    assert places[2].done()


def test_a_place_may_be_left_before_its_turn_and_twice() -> None:
    """Then it is passed over; leaving it again changes nothing."""
    line = TurnLine()
    first, second, third = (entered(line) for _ in range(3))
    line.leave(second)
    line.leave(second)
    assert not third.done()
    line.leave(first)
    line.leave(first)
    assert third.done()
    assert not second.done()
    line.leave(third)
    assert entered(line).done()


def test_entering_if_free() -> None:
    """Only an empty line has a place for who does not want to wait."""
    line = TurnLine()
    with line.place_if_free() as place:
        assert place is not None
        assert place.done()
        assert not is_free(line)
        following = entered(line)
        assert not following.done()
    assert following.done()
    assert not is_free(line)
    line.leave(following)
    assert is_free(line)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_leaves_no_place_behind(error: type[BaseException]) -> None:
    """Neither while one enters or leaves, nor in between, with others behind it and without."""

    def visit(line: TurnLine, behind: list[Place]) -> None:
        with line.place() as place:
            assert place.done()
            behind.append(entered(line))

    points = points_of(lambda: visit(TurnLine(), []))
    assert points > 10
    for at in range(1, points + 1):
        line = TurnLine()
        behind: list[Place] = []
        with suppress(error), Interrupted(at, error):
            visit(line, behind)
        for place in behind:
            place.result(BOUND_S)
            line.leave(place)
        # One of `behind` that was interrupted while it entered by itself has nobody.
        assert is_free(line) or not behind, at


def test_many_threads_are_let_in_one_by_one() -> None:
    """No two are inside at the same time, some give up, and all get out."""
    line = TurnLine()
    inside = 0
    most = 0
    lock = threading.Lock()

    def visit(number: int) -> None:
        nonlocal inside, most
        for turn in range(50):
            place = entered(line)
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
    assert is_free(line)
