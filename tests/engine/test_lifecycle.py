"""The states of a request: the moves that exist, the time they took, and nothing left behind."""

import gc
import re
import weakref
from collections import deque
from itertools import pairwise
from pathlib import Path

import pytest
from helpers import Clock
from hypothesis import given
from hypothesis import strategies as st
from transitions import MachineError

from orion_oie.engine import lifecycle
from orion_oie.engine.lifecycle import (
    TRANSITIONS,
    RequestLifecycle,
    RequestState,
)

S = RequestState
TOP = Path(__file__).parents[2]
TRIGGERS = [trigger for trigger, _, _ in TRANSITIONS]
FINAL = {S.SUCCESS, S.CANCELLED, S.ERROR}
TO_THE_MODEL = ["validate", "route", "load", "generate"]
LOST_TWICE = [S.FALLBACK, S.LOADING_AGENT, S.FALLBACK, S.LOADING_AGENT]


def moves_from(state: RequestState) -> dict[str, RequestState]:
    """What the table allows in a state: trigger to destination."""
    return {
        trigger: destination
        for trigger, source, destination in TRANSITIONS
        if state in (source if isinstance(source, list) else [source])
    }


def shortest_ways() -> dict[RequestState, list[str]]:
    """The triggers that lead from IDLE to each state."""
    ways: dict[RequestState, list[str]] = {S.IDLE: []}
    waiting = deque([S.IDLE])
    while waiting:
        state = waiting.popleft()
        for trigger, destination in moves_from(state).items():
            if destination not in ways:
                ways[destination] = [*ways[state], trigger]
                waiting.append(destination)
    return ways


WAYS = shortest_ways()
ILLEGAL = [(state, move) for state in S for move in TRIGGERS if move not in moves_from(state)]


class Recorded(RequestLifecycle):
    """A lifecycle that notes its changes and goes the way it is told."""

    def __init__(self, *triggers: str) -> None:
        self.changes: list[tuple[RequestState, RequestState]] = []
        self.clock = Clock()
        super().__init__(lambda old, new: self.changes.append((old, new)), self.clock)
        for trigger in triggers:
            self.move(trigger)


# The moves


@pytest.mark.parametrize(
    ("way", "states"),
    [
        ([*TO_THE_MODEL, "succeed"], [S.LOADING_AGENT, S.INFERENCING, S.SUCCESS]),
        (
            [*TO_THE_MODEL, "fall_back", "load", "fall_back", "load", "generate", "succeed"],
            [S.LOADING_AGENT, S.INFERENCING, *LOST_TWICE, S.INFERENCING, S.SUCCESS],
        ),
        (
            ["validate", "route", "load", "fall_back", "fail"],
            [S.LOADING_AGENT, S.FALLBACK, S.ERROR],
        ),
        (["validate", "route", "load", "cancel"], [S.LOADING_AGENT, S.CANCELLED]),
    ],
)
def test_the_ways_of_a_request(way: list[str], states: list[RequestState]) -> None:
    """The usual way, two fallbacks, a fallback that finds nothing, and a cancel."""
    states = [S.IDLE, S.VALIDATING, S.ROUTING, *states]
    request = Recorded(*way)
    assert request.state is states[-1]
    assert request.changes == list(pairwise(states))


def test_every_state_can_be_reached() -> None:
    """No state of the machine is dead."""
    assert set(WAYS) == set(S)


@pytest.mark.parametrize("state", [state for state in S if state not in FINAL])
def test_a_request_can_end_anywhere(state: RequestState) -> None:
    """Whatever it is doing, a request can be cancelled and can fail."""
    assert Recorded(*WAYS[state], "cancel").state is S.CANCELLED
    assert Recorded(*WAYS[state], "fail").state is S.ERROR


@pytest.mark.parametrize(
    ("state", "move"), ILLEGAL, ids=[f"{state.value}-{move}" for state, move in ILLEGAL]
)
def test_an_illegal_move_is_an_error(state: RequestState, move: str) -> None:
    """A move that the table does not have raises, changes nothing and is not announced."""
    request = Recorded(*WAYS[state])
    before = list(request.changes)
    with pytest.raises(MachineError):
        request.move(move)
    assert request.state is state
    assert request.changes == before


def test_final_states_are_final() -> None:
    """From success, cancelled and error there is no move, and only from those."""
    assert {state for state in S if state.is_final} == FINAL
    assert {state for state in S if not moves_from(state)} == FINAL


def test_an_unknown_move_is_a_mistake_of_the_program() -> None:
    """A trigger that does not exist is not taken for an illegal move."""
    with pytest.raises(AttributeError):
        Recorded().move("jump")


def test_requests_do_not_share_their_state() -> None:
    """One machine moves all requests, each on its own."""
    first, second = Recorded("validate"), Recorded()
    first.move("route")
    assert (first.state, second.state) == (S.ROUTING, S.IDLE)
    assert second.changes == []


# Time


def test_time_is_kept_for_each_state() -> None:
    """The milliseconds of repeated visits add up, and the present state counts so far."""
    request = Recorded()
    for trigger, seconds in [
        ("validate", 1), ("route", 2), ("load", 4), ("generate", 8), ("fall_back", 16),
        ("load", 32), ("generate", 64),
    ]:  # fmt: skip
        request.clock.now += seconds
        request.move(trigger)
    request.clock.now += 128
    spent = {"idle": 1e3, "validating": 2e3, "routing": 4e3, "loading_agent": 72e3}
    assert request.state_ms() == {**spent, "fallback": 32e3, "inferencing": 144e3}


def test_time_stands_still_at_the_end() -> None:
    """After the end no state grows, and the final one took no time."""
    request = Recorded("validate", "fail")
    request.clock.now += 100
    assert request.state_ms() == {"idle": 0.0, "validating": 0.0}


def test_a_refused_move_costs_no_time() -> None:
    """An illegal move does not end the time of the state."""
    request = Recorded("validate")
    request.clock.now += 1
    with pytest.raises(MachineError):
        request.move("succeed")
    request.clock.now += 1
    assert request.state_ms()["validating"] == 2e3


# Progress


def test_progress_at_each_state() -> None:
    """Progress starts at 0, ends at 100, and a fallback starts over behind the routing."""
    at = {state: Recorded(*way).progress for state, way in WAYS.items()}
    assert (at[S.IDLE], at[S.SUCCESS]) == (0, 100)
    assert at[S.IDLE] < at[S.VALIDATING] < at[S.ROUTING] < at[S.LOADING_AGENT] < at[S.INFERENCING]
    assert at[S.FALLBACK] == at[S.LOADING_AGENT]


@pytest.mark.parametrize("end", ["cancel", "fail"])
def test_progress_stays_where_a_request_ended(end: str) -> None:
    """What was cancelled or failed is not shown as complete."""
    request = Recorded(*TO_THE_MODEL)
    request.advance(0.5)
    reached = request.progress
    request.move(end)
    request.advance(1.0)
    assert 40 < request.progress == reached < 100


@pytest.mark.parametrize("state", [S.IDLE, S.VALIDATING, S.ROUTING, S.FALLBACK, S.SUCCESS])
def test_only_loading_and_writing_advance(state: RequestState) -> None:
    """A report that comes too early or too late is ignored."""
    request = Recorded(*WAYS[state])
    before = request.progress
    request.advance(1.0)
    assert request.progress == before


def test_a_loaded_model_and_a_written_answer_fill_their_part() -> None:
    """Loading ends where writing begins; only success is 100."""
    request = Recorded("validate", "route", "load")
    request.advance(1.0)
    at_the_end = request.progress
    request.move("generate")
    assert request.progress == at_the_end
    request.advance(1.0)
    assert request.progress == 99


reports = st.floats(-1, 2) | st.sampled_from([float("inf"), float("nan")])


@given(
    start=st.sampled_from([state for state in S if state not in FINAL]),
    steps=st.lists(st.sampled_from(["load", "generate", "fall_back"]) | reports, max_size=20),
    end=st.sampled_from(["succeed", "cancel", "fail"]),
)
def test_progress_never_falls_within_an_attempt(
    start: RequestState, steps: list[str | float], end: str
) -> None:
    """Whatever is reported in whatever order, progress is in 0-100 and falls only in a fallback."""
    request = Recorded(*WAYS[start])
    shown = request.progress
    for step in [*steps, end, 1.0]:
        if isinstance(step, str):
            if step not in moves_from(request.state):
                continue
            request.move(step)
        else:
            request.advance(step)
        assert 0 <= request.progress <= 100
        assert (request.progress == 100) is (request.state is S.SUCCESS)
        assert request.progress >= shown or step == "fall_back"
        shown = request.progress


# What remains


@pytest.mark.parametrize("end", ["cancel", "fail", "succeed"])
def test_a_finished_request_is_forgotten(end: str) -> None:
    """The shared machine keeps nothing of a request: a long-lived engine does not grow."""
    request = Recorded(*TO_THE_MODEL)
    request.move(end)
    forgotten = weakref.ref(request)
    del request
    gc.collect()
    assert forgotten() is None


def test_the_document_is_in_step() -> None:
    """docs/lifecycle.md is what the library generates: `python -m orion_oie lifecycle`."""
    written = (TOP / "docs" / "lifecycle.md").read_text(encoding="utf-8")
    assert written == lifecycle.document()


def test_the_diagram_shows_every_move() -> None:
    """Each row of the table is an arrow of the diagram, and each arrow a row."""
    arrows = set(re.findall(r"^\s*(\w+) --> (\w+): (.+)$", lifecycle.mermaid(), re.MULTILINE))
    shown = {(a, b, move) for a, b, moves in arrows for move in moves.split(" | ")}
    assert shown == {
        (state.name, destination.name, move)
        for state in S
        for move, destination in moves_from(state).items()
    }
