"""Who must go: never the busy, never too many, always the longest unused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_oie.eviction import Resident, choose_victims

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
    assert choose_victims(residents, capacity) == victims


@given(residents=resident_lists, capacity=capacities)
def test_a_model_in_use_never_goes(residents: list[Resident], capacity: int) -> None:
    """Every victim is a resident, is idle, and is named once."""
    victims = choose_victims(residents, capacity) or []
    assert len(victims) == len(set(victims))
    assert set(victims) <= {one.key for one in residents if not one.is_in_use}


@given(residents=resident_lists, capacity=capacities)
def test_just_enough_go(residents: list[Resident], capacity: int) -> None:
    """There is room for one more afterwards, and would not be with one victim less."""
    victims = choose_victims(residents, capacity)
    if victims is not None:
        left = len(residents) - len(victims)
        assert left + 1 <= capacity
        assert not victims or left + 2 > capacity


@given(residents=resident_lists, capacity=capacities)
def test_the_longest_unused_go_first(residents: list[Resident], capacity: int) -> None:
    """No idle model that stays was unused for longer than one that goes; the oldest goes first."""
    victims = choose_victims(residents, capacity) or []
    used = {one.key: one.last_used for one in residents}
    ages = [used[key] for key in victims]
    stay = [one.last_used for one in residents if not one.is_in_use and one.key not in victims]
    assert ages == sorted(ages)
    assert not ages or not stay or max(ages) <= min(stay)


@given(residents=resident_lists, capacity=capacities)
def test_it_gives_up_only_when_it_must(residents: list[Resident], capacity: int) -> None:
    """None means that even without any idle model there would be no room."""
    busy = sum(one.is_in_use for one in residents)
    assert (choose_victims(residents, capacity) is None) == (busy + 1 > capacity)


@given(residents=resident_lists, capacity=capacities)
def test_deciding_changes_nothing(residents: list[Resident], capacity: int) -> None:
    """The same question gets the same answer, and the list stays as it was."""
    before = list(residents)
    assert choose_victims(residents, capacity) == choose_victims(residents, capacity)
    assert residents == before
