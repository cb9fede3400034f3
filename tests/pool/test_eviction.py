"""Who must go: never the busy, never too many, always the longest unused."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_oie.pool.eviction import (
    Limits,
    Resident,
    availability_of,
    choose_relief,
    choose_victims,
)
from orion_oie.schemas.availability import ModelState

resident_lists = st.lists(st.tuples(st.integers(0, 9).map(float), st.booleans()), max_size=8).map(
    lambda rows: [
        Resident(f"m{number}", last_used, is_in_use)
        for number, (last_used, is_in_use) in enumerate(rows)
    ]
)
capacities = st.integers(1, 9)


@pytest.mark.parametrize(
    ("residents", "capacity", "victims"),
    [
        ([], 1, []),
        ([Resident("a", 1, False)], 2, []),
        ([Resident("a", 1, False)], 1, ["a"]),
        ([Resident("a", 1, True)], 1, None),
        ([Resident("a", 2, False), Resident("b", 1, False)], 2, ["b"]),
        ([Resident("a", 2, False), Resident("b", 1, True)], 2, ["a"]),
        ([Resident("a", 2, False), Resident("b", 1, True)], 1, None),
        (
            [Resident("a", 3, False), Resident("b", 1, False), Resident("c", 2, False)],
            2,
            ["b", "c"],
        ),
    ],
)
def test_examples(residents: list[Resident], capacity: int, victims: list[str] | None) -> None:
    """The cases one would draw on paper."""
    assert choose_victims(residents, Limits(capacity)) == victims


@given(residents=resident_lists, capacity=capacities)
def test_a_model_in_use_never_goes(residents: list[Resident], capacity: int) -> None:
    """Every victim is a resident, is idle, and is named once."""
    victims = choose_victims(residents, Limits(capacity)) or []
    assert len(victims) == len(set(victims))
    assert set(victims) <= {one.key for one in residents if not one.is_in_use}


@given(residents=resident_lists, capacity=capacities)
def test_just_enough_go(residents: list[Resident], capacity: int) -> None:
    """There is room for one more afterwards, and would not be with one victim less."""
    victims = choose_victims(residents, Limits(capacity))
    if victims is not None:
        left = len(residents) - len(victims)
        assert left + 1 <= capacity
        assert not victims or left + 2 > capacity


@given(residents=resident_lists, capacity=capacities)
def test_the_longest_unused_go_first(residents: list[Resident], capacity: int) -> None:
    """No idle model that stays was unused for longer than one that goes; the oldest goes first."""
    victims = choose_victims(residents, Limits(capacity)) or []
    used = {one.key: one.last_used for one in residents}
    ages = [used[key] for key in victims]
    stay = [one.last_used for one in residents if not one.is_in_use and one.key not in victims]
    assert ages == sorted(ages)
    assert not ages or not stay or max(ages) <= min(stay)


@given(residents=resident_lists, capacity=capacities)
def test_it_gives_up_only_when_it_must(residents: list[Resident], capacity: int) -> None:
    """None means that even without any idle model there would be no room."""
    busy = sum(one.is_in_use for one in residents)
    assert (choose_victims(residents, Limits(capacity)) is None) == (busy + 1 > capacity)


@given(residents=resident_lists, capacity=capacities)
def test_deciding_changes_nothing(residents: list[Resident], capacity: int) -> None:
    """The same question gets the same answer, and the list stays as it was."""
    before = list(residents)
    assert choose_victims(residents, Limits(capacity)) == choose_victims(
        residents, Limits(capacity)
    )
    assert residents == before


# Bytes

sized_lists = st.lists(
    st.tuples(
        st.integers(0, 9).map(float),
        st.booleans(),
        st.integers(0, 50),
        st.sampled_from([1.0, 5.0]),
        st.booleans(),
    ),
    max_size=9,
).map(lambda rows: [Resident(f"m{number}", *row) for number, row in enumerate(rows)])
sizes = st.integers(0, 120)


def freed(residents: list[Resident], keys: list[str]) -> int:
    return sum(one.size_bytes for one in residents if one.key in keys)


@given(residents=sized_lists, size=sizes, budget=sizes)
def test_the_smallest_sufficient_set_goes(
    residents: list[Resident], size: int, budget: int
) -> None:
    """There is room afterwards; no smaller number of models would have been enough; nobody in use
    or pinned is among them; None only when all that can go would not be enough."""
    victims = choose_victims(residents, Limits(None, budget), size)
    held = sum(one.size_bytes for one in residents)
    can_go = {one.key: one.size_bytes for one in residents if one.can_go}
    if victims is None:
        assert held - sum(can_go.values()) + size > budget
        return
    assert set(victims) <= set(can_go)
    assert held - freed(residents, victims) + size <= budget or (not victims and held == 0 == size)
    largest = sorted(can_go.values(), reverse=True)[: max(0, len(victims) - 1)]
    assert not victims or held - sum(largest) + size > budget


@given(residents=sized_lists, size=sizes, budget=sizes, models=st.integers(1, 10))
def test_both_limits_are_kept(
    residents: list[Resident], size: int, budget: int, models: int
) -> None:
    """With a limit of models and one of bytes, what is chosen satisfies both."""
    victims = choose_victims(residents, Limits(models, budget), size)
    if victims is not None:
        assert len(residents) - len(victims) + 1 <= models
        assert sum(o.size_bytes for o in residents) - freed(residents, victims) + size <= budget


@given(residents=sized_lists, size=sizes, budget=sizes)
def test_who_is_in_the_way_is_named(residents: list[Resident], size: int, budget: int) -> None:
    """Once the models that are named are idle, there is room, if all of these go; nobody is named
    without need, or under the wrong heading."""
    limits = Limits(None, budget)
    wait = availability_of(residents, limits, size)
    if wait.state is ModelState.IMPOSSIBLE:
        pinned = sum(one.size_bytes for one in residents if one.is_pinned)
        assert pinned + size > budget
        return
    named = wait.blockers
    assert all(one.is_in_use for one in residents if one.key in named)
    assert all(one.can_go for one in residents if one.key in wait.victims)
    idle = [
        Resident(
            o.key, o.last_used, o.is_in_use and o.key not in named, o.size_bytes, 1.0, o.is_pinned
        )
        for o in residents
    ]
    assert choose_victims(idle, limits, size) is not None
    if choose_victims(residents, limits, size) is not None:
        assert wait.state is ModelState.LOADABLE
        assert not wait.blockers
    else:
        assert wait.state is ModelState.BLOCKED
        going = [*wait.displaced]
        held = sum(one.size_bytes for one in residents)
        assert wait.blockers
        assert held - freed(residents, going) + size <= budget


def test_what_is_dear_to_load_stays_before_what_is_cheap() -> None:
    """Of two that were used about as lately, the one goes that is loaded again sooner."""
    dear = Resident("dear", 8, False, 10, reload_s=20)
    cheap = Resident("cheap", 9, False, 10, reload_s=1)
    assert choose_victims([dear, cheap], Limits(None, 20), 5) == ["cheap"]
    old = Resident("old", 0, False, 10, reload_s=2)
    assert choose_victims([old, cheap, dear], Limits(None, 30), 5) == ["old"]


@given(residents=sized_lists, wanted=sizes)
def test_relief_gives_what_there_is(residents: list[Resident], wanted: int) -> None:
    """It gives back what is wanted, or all that is idle; with none to spare."""
    keys = choose_relief(residents, wanted)
    idle_bytes = sum(one.size_bytes for one in residents if one.can_go)
    assert freed(residents, keys) >= min(wanted, idle_bytes)
    assert all(one.can_go for one in residents if one.key in keys)
    if keys:
        smallest = min(one.size_bytes for one in residents if one.key in keys)
        assert freed(residents, keys) - smallest < wanted


def test_many_models_are_decided_quickly() -> None:
    """With more models than sets can be compared, what goes is still enough, and nothing of it can
    be left out."""
    residents = [Resident(f"m{n}", n, False, 10 + n % 7, 1.0 + n % 3) for n in range(60)]
    held = sum(one.size_bytes for one in residents)
    victims = choose_victims(residents, Limits(None, held), 100)
    assert victims is not None
    gone = freed(residents, victims)
    assert gone >= 100
    sizes = [one.size_bytes for one in residents if one.key in victims]
    assert gone - min(sizes) < 100


def all_compared(residents: list[Resident], limits: Limits, size: int) -> list[str] | None:
    """The oracle: of all sets, the smallest sufficient one of the least loss, then size."""
    newest = max((one.last_used for one in residents), default=0.0)
    idle = sorted((r for r in residents if r.can_go), key=lambda r: (r.last_used, r.key))
    held = sum(one.size_bytes for one in residents)
    ranked = [
        (
            len(some),
            sum(one.reload_s / (1.0 + newest - one.last_used) for one in some),
            sum(one.size_bytes for one in some),
            some,
        )
        for number in range(len(idle) + 1)
        for some in itertools.combinations(idle, number)
        if len(residents) - number + 1 <= (limits.models or 99)
        and held - sum(one.size_bytes for one in some) + size <= (limits.memory_bytes or 10**9)
    ]
    best = min(ranked, key=lambda rank: rank[:3], default=None)
    return None if best is None else [one.key for one in best[3]]


@given(residents=sized_lists, size=sizes, budget=st.integers(1, 120), models=st.integers(1, 10))
def test_it_is_the_best_of_all_sets(
    residents: list[Resident], size: int, budget: int, models: int
) -> None:
    """Looking at sets of one size only finds what looking at all of them finds."""
    limits = Limits(models, budget)
    assert choose_victims(residents, limits, size) == all_compared(residents, limits, size)
