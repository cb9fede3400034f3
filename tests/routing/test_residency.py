"""Preference for agents that can answer sooner: a clear difference is never bridged."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from orion_oie.routing.residency import NEAR, faster_alternative

LIMIT_S = 5.0


def taken(
    best: float, second: float, waits: dict[str, float | None], limit_s: float = LIMIT_S
) -> tuple[str, float] | None:
    return faster_alternative([("a", best), ("b", second)], waits.get, limit_s)


def test_the_gap_that_is_bridged_grows_with_the_wait() -> None:
    """All of NEAR from the limit on, half of it for half the wait, nothing for nothing."""
    assert taken(0.5, 0.5 - 0.9 * NEAR, {"a": 5.0, "b": 0.0}) == ("b", 5.0)
    assert taken(0.5, 0.5 - 0.9 * NEAR, {"a": 2.5, "b": 0.0}) is None
    assert taken(0.5, 0.5 - 0.4 * NEAR, {"a": 2.5, "b": 0.0}) == ("b", 2.5)
    assert taken(0.5, 0.5 - 0.9 * NEAR, {"a": 50.0, "b": 40.0}) == ("b", 10.0)
    assert taken(0.5, 0.5, {"a": 0.0, "b": 0.0}) is None
    assert taken(0.5, 0.5, {"a": 3.0, "b": 3.0}) is None
    assert taken(0.5, 0.5, {"a": 3.0, "b": 4.0}) is None


def test_what_is_not_known_changes_nothing() -> None:
    """An unknown wait neither gains nor loses an agent its place."""
    assert taken(0.5, 0.5, {"a": None, "b": 0.0}) is None
    assert taken(0.5, 0.5, {"a": 9.0, "b": None}) is None
    assert taken(0.5, 0.5, {}) is None


def test_it_can_be_off() -> None:
    assert taken(0.5, 0.5, {"a": 9.0, "b": 0.0}, limit_s=0) is None
    assert faster_alternative([], lambda _agent_id: 1.0, LIMIT_S) is None
    assert faster_alternative([("a", 1.0)], lambda _agent_id: 1.0, LIMIT_S) is None


def test_the_best_of_those_that_can_answer_sooner() -> None:
    """The order of the agents stays that of their probabilities."""
    ranked = [("a", 0.4), ("b", 0.39), ("c", 0.38)]
    assert faster_alternative(ranked, {"a": 9.0, "b": 1.0, "c": 0.0}.get, LIMIT_S) == ("b", 8.0)
    assert faster_alternative(ranked, {"a": 9.0, "b": 9.0, "c": 0.0}.get, LIMIT_S) == ("c", 9.0)


def test_an_agent_without_any_probability_is_never_taken() -> None:
    """An agent of probability 0 is never chosen, however small the best probability is."""
    assert taken(NEAR / 2, 0.0, {"a": 9.0, "b": 0.0}) is None
    assert taken(0.0, 0.0, {"a": 9.0, "b": 0.0}) is None


def test_waits_are_asked_for_only_where_it_matters() -> None:
    """`wait_s` is costly, so it is not called without a near rival."""
    asked: list[str] = []

    def wait_s(agent_id: str) -> float:
        asked.append(agent_id)
        return 0.0

    faster_alternative([("a", 0.9), ("b", 0.1)], wait_s, LIMIT_S)
    assert asked == []
    faster_alternative([("a", 0.5), ("b", 0.49)], wait_s, LIMIT_S)
    assert asked == ["a"]


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=6),
    st.lists(st.none() | st.floats(0, 1e9), min_size=6, max_size=6),
    st.floats(0, 1e3),
    st.floats(0, 0.5),
)
@settings(deadline=None)
def test_a_clear_difference_is_never_bridged(
    probabilities: list[float], waits: list[float | None], limit_s: float, near: float
) -> None:
    """The chosen agent is near, has a probability above 0, and saves the stated seconds."""
    names = "abcdef"
    ranked = sorted(zip(names, probabilities, strict=False), key=lambda item: -item[1])
    wait_of = dict(zip(names, waits, strict=True))
    found = faster_alternative(ranked, wait_of.get, limit_s, near)
    if found is None:
        return
    agent_id, saved = found
    (best_id, best), probability = ranked[0], dict(ranked)[agent_id]
    best_wait, wait = wait_of[best_id], wait_of[agent_id]
    assert best_wait is not None
    assert wait is not None
    assert agent_id != best_id
    assert probability > 0
    assert best - probability <= near
    assert saved > 0
    assert math.isclose(saved, best_wait - wait)
