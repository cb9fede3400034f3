"""Parked states: never more bytes than allowed, the right ones stay, nothing writes over them, and
they are found again."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from orion_oie.backends.llama.worker.host_cache import (
    Arena,
    HostCache,
    OffloadedState,
)

UNIT = 64  # bytes: buffers begin at multiples of this
LIMIT = 100  # units


def tokens_of(name: str) -> list[int]:
    return [ord(letter) for letter in name]


def put(cache: HostCache, name: str, units: int, **fields: Any) -> OffloadedState | None:
    """Park a state, the tokens of which are the letters of its name; None when it is refused."""
    is_preempted = fields.get("is_preempted", False)
    buffer = cache.allocate(units * UNIT, is_preempted=is_preempted)
    if buffer is None:
        return None
    assert buffer.nbytes == units * UNIT
    state = OffloadedState(tokens_of(name), buffer, **fields)
    cache.add(state)
    return state


def names_in(cache: HostCache) -> set[str]:
    """The names of the states that are kept."""
    return {"".join(map(chr, state.tokens)) for state in cache}


def bytes_of(states: Iterable[OffloadedState]) -> int:
    return sum(state.data.nbytes for state in states)


@pytest.fixture
def cache() -> HostCache:
    return HostCache(LIMIT * UNIT)


# -- what happens in any order


def gaps_between(buffers: Iterable[NDArray[np.uint8]], base: int, room: int) -> list[int]:
    """The sizes of the free stretches of a room in which these buffers lie."""
    gaps, end = [], 0
    for buffer in sorted(buffers, key=lambda buffer: buffer.ctypes.data):
        begin = buffer.ctypes.data - base
        gaps.append(begin - end)
        end = min(room, begin + -(-buffer.nbytes // UNIT) * UNIT)
    assert all(gap >= 0 for gap in gaps), "two buffers overlap"
    return [*gaps, room - end]


sizes = st.one_of(st.integers(1, 110 * UNIT), st.integers(1, LIMIT // 2).map(lambda n: n * UNIT))


@settings(max_examples=100)
@given(
    room=st.sampled_from([LIMIT * UNIT, LIMIT * UNIT + 17]),
    events=st.lists(st.one_of(sizes, st.integers(-20, 0)), max_size=40),
)
def test_an_arena_in_any_order(room: int, events: list[int]) -> None:
    """Buffers that are taken and given back in any order do not overlap, keep what is written to
    them, and are refused only where no gap is large enough."""
    arena = Arena(room)
    taken: list[NDArray[np.uint8]] = []
    base = None
    for number, event in enumerate(events):
        if event <= 0:
            if taken:
                arena.free(taken.pop(-event % len(taken)))
            continue
        buffer = arena.allocate(event)
        base = buffer.ctypes.data if base is None and buffer is not None else base
        largest = max(gaps_between(taken, base or 0, room))
        assert (buffer is not None) == (event <= largest)
        if buffer is not None:
            assert buffer.nbytes == event
            buffer[:] = number
            taken.append(buffer)
    fills = [set(buffer.tolist()) for buffer in taken]
    assert all(len(fill) == 1 for fill in fills)
    assert len(set().union(*fills)) == len(taken)


def test_an_arena_is_used_again() -> None:
    """What was given back is taken from the beginning on; all of it at last."""
    arena = Arena(10 * UNIT)
    buffers = [arena.allocate(units * UNIT) for units in (2, 3, 4)]
    first, second, third = (buffer for buffer in buffers if buffer is not None)
    base = first.ctypes.data
    assert arena.allocate(2 * UNIT) is None
    arena.free(second)
    again = arena.allocate(2 * UNIT + 1)
    assert again is not None
    assert again.ctypes.data == second.ctypes.data
    assert arena.allocate(UNIT + 1) is None
    for buffer in (first, again, third):
        arena.free(buffer)
    whole = arena.allocate(10 * UNIT)
    assert whole is not None
    assert whole.ctypes.data == base


def test_an_arena_is_packed() -> None:
    """Gaps become one; what was written is still there, and all of it can be taken."""
    arena = Arena(10 * UNIT)
    buffers = [arena.allocate(2 * UNIT) for _ in range(5)]
    kept = [buffer for buffer in buffers[1::2] if buffer is not None]
    for number, buffer in enumerate(kept):
        buffer[:] = number
    for buffer in buffers[::2]:
        assert buffer is not None
        arena.free(buffer)
    assert arena.allocate(6 * UNIT) is None
    assert arena.free_bytes == 6 * UNIT
    moved = arena.compact(kept[::-1])[::-1]
    assert [set(buffer.tolist()) for buffer in moved] == [{0}, {1}]
    assert arena.allocate(6 * UNIT) is not None
    arena.free(moved[0])
    assert arena.free_bytes == 2 * UNIT


# What happens to a cache: a new state (its size in bytes and its kind), or a use (a place among
# the states that are kept).
KINDS: Sequence[dict[str, bool]] = ({}, {"is_prefix": True}, {"is_preempted": True})
additions = st.tuples(sizes, st.sampled_from([*KINDS[:2] * 3, KINDS[2]]))
events = st.lists(st.one_of(additions, st.integers(0, 20)), max_size=40)


class NaiveCache:
    """The rules of a cache in the plainest words: a list of what is kept, the oldest use first."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.kept: list[OffloadedState] = []

    def use(self, place: int) -> OffloadedState:
        state = self.kept.pop(place)
        self.kept.append(state)
        return state

    def fits(self, size: int) -> bool:
        taken = sum(-(-state.data.nbytes // UNIT) * UNIT for state in self.kept)
        return size <= self.room - taken

    def victim(self) -> OffloadedState:
        others = [kept for kept in self.kept if not kept.is_preempted]
        prefixes = [kept for kept in others if kept.is_prefix]
        conversations = [kept for kept in others if not kept.is_prefix]
        too_many = 4 * bytes_of(prefixes) > self.room
        candidates = others if too_many else conversations or prefixes
        return (candidates or self.kept)[0]

    def make_room(self, size: int, is_preempted: bool) -> bool:
        while not self.fits(size):
            victim = self.victim()
            if victim.is_preempted and not is_preempted:
                return False
            self.kept.remove(victim)
        return True


@settings(max_examples=100)
@given(events=events)
def test_a_lot_in_any_order(events: list[tuple[int, dict[str, bool]] | int]) -> None:
    """Whatever is added and used: the bytes stay within the limit and are counted right, states
    are not written over, and what is kept is what the plain rules keep."""
    room = LIMIT * UNIT
    cache, naive = HostCache(room), NaiveCache(room)
    for number, event in enumerate(events):
        if isinstance(event, int):
            if naive.kept:
                cache.touch(naive.use(event % len(naive.kept)))
            continue
        size, kind = event
        before = list(naive.kept)
        buffer = cache.allocate(size, is_preempted=kind.get("is_preempted", False))
        if size > room:
            assert buffer is None
            assert set(cache) == set(before)
            continue
        if naive.make_room(size, kind.get("is_preempted", False)):
            assert buffer is not None
            buffer[:] = number
            state = OffloadedState([number], buffer, **kind)
            cache.add(state)
            naive.kept.append(state)
        else:
            assert buffer is None
            assert set(cache) >= {state for state in before if state.is_preempted}
            naive.kept = [state for state in before if state in set(cache)]
        assert list(cache) == sorted(cache, key=lambda state: state.tokens)
        assert set(cache) == set(naive.kept)
        assert len(cache) == len(naive.kept)
        assert cache.used_bytes == bytes_of(cache) <= room
        assert all((state.data == state.tokens[0]).all() for state in cache)


# -- what stays


def test_the_longest_unused_goes_first(cache: HostCache) -> None:
    """A state that was used again outlives one that was added after it."""
    oldest = put(cache, "a", 40)
    assert oldest is not None
    assert put(cache, "b", 40)
    cache.touch(oldest)
    assert put(cache, "c", 40)
    assert names_in(cache) == {"a", "c"}


def test_a_new_state_counts_as_used(cache: HostCache) -> None:
    """What a state says of its last use from before does not count in the cache."""
    put(cache, "a", 40)
    put(cache, "b", 40, last_used=10**9)
    put(cache, "c", 40)
    put(cache, "d", 40)
    assert names_in(cache) == {"c", "d"}


def test_only_as_much_goes_as_must(cache: HostCache) -> None:
    """A state that fits exactly costs nobody's; one byte more costs one."""
    put(cache, "a", 30)
    put(cache, "b", 30)
    assert put(cache, "c", 40)
    assert names_in(cache) == {"a", "b", "c"}
    assert put(cache, "d", 1)
    assert names_in(cache) == {"b", "c", "d"}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_state_larger_than_the_room_is_refused(cache: HostCache, kind: dict[str, bool]) -> None:
    """It costs nothing of what is there; one as large as the room is kept."""
    put(cache, "a", 50)
    put(cache, "b", 50, is_prefix=True)
    assert cache.allocate(LIMIT * UNIT + 1, is_preempted="is_preempted" in kind) is None
    assert names_in(cache) == {"a", "b"}
    assert cache.used_bytes == LIMIT * UNIT
    assert put(cache, "d", LIMIT, **kind)
    assert names_in(cache) == {"d"}
    assert cache.used_bytes == LIMIT * UNIT


def test_a_lot_without_room_keeps_nothing() -> None:
    """A limit of zero bytes switches offloading off."""
    cache = HostCache(0)
    assert put(cache, "a", 1) is None
    assert put(cache, "a", 1, is_preempted=True) is None
    assert len(cache) == cache.used_bytes == 0


@pytest.mark.parametrize(
    ("prefix", "left"),
    [
        (20, {"agent", "new"}),
        (25, {"agent", "new"}),  # exactly a quarter of the room
        (26, {"talk", "new"}),
    ],
)
def test_prefixes_go_last_up_to_a_quarter_of_the_room(
    cache: HostCache, prefix: int, left: set[str]
) -> None:
    """A prefix outlives conversations that were used after it; above a quarter of the room it is a
    state like any other."""
    put(cache, "agent", prefix, is_prefix=True)
    put(cache, "talk", LIMIT - prefix)
    assert put(cache, "new", min(prefix, LIMIT - prefix))
    assert names_in(cache) == left


def test_prefixes_that_nobody_repeats_leave_room_for_conversations(cache: HostCache) -> None:
    """However many prefixes come, a conversation that is in use stays."""
    talk = put(cache, "talk", 30)
    assert talk is not None
    for number in range(50):
        cache.touch(talk)
        assert put(cache, f"agent {number}", 10, is_prefix=True)
    assert "talk" in names_in(cache)
    assert cache.used_bytes == LIMIT * UNIT


def test_prefixes_alone_go_in_the_order_of_their_use(cache: HostCache) -> None:
    """Where only prefixes are left, the longest unused goes."""
    first = put(cache, "a", 25, is_prefix=True)
    assert first is not None
    put(cache, "b", 75, is_prefix=True)
    cache.touch(first)
    assert put(cache, "c", 75, is_prefix=True)
    assert names_in(cache) == {"a", "c"}


def test_a_preempted_task_keeps_its_state(cache: HostCache) -> None:
    """Neither conversations nor prefixes drive it out, but that of another preempted task may."""
    put(cache, "task", 40, is_preempted=True)
    put(cache, "agent", 30, is_prefix=True)
    assert put(cache, "talk", 60)
    assert names_in(cache) == {"task", "talk"}
    for is_prefix in (False, True):
        assert put(cache, "new", 61, is_prefix=is_prefix) is None
        assert "task" in names_in(cache)
    assert put(cache, "urgent", 61, is_preempted=True)
    assert names_in(cache) == {"urgent"}
    assert cache.used_bytes == 61 * UNIT


# -- what goes on purpose


def test_a_state_that_is_removed_leaves_room(cache: HostCache) -> None:
    """It alone goes, and its bytes with it, also when another has the same tokens."""
    twin, state = put(cache, "a", 40), put(cache, "a", 60)
    assert state is not None
    cache.remove(state)
    assert list(cache) == [twin]
    assert cache.used_bytes == 40 * UNIT
    assert put(cache, "b", 60)
    assert names_in(cache) == {"a", "b"}


def test_beginnings_of_a_conversation_go(cache: HostCache) -> None:
    """The same tokens and shorter beginnings go; longer and other states stay, and those that are
    kept for a reason of their own."""
    for name in ("ab", "abc", "abcd"):
        put(cache, name, 10)
    stay = [
        put(cache, "abcde", 10),
        put(cache, "abx", 10),
        put(cache, "bc", 10),
        put(cache, "a", 10, is_prefix=True),
        put(cache, "abcd", 10, is_prefix=True),
        put(cache, "abc", 10, is_preempted=True),
    ]
    cache.drop_beginnings_of(tokens_of("abcd"))
    assert list(cache) == stay
    assert cache.used_bytes == 60 * UNIT
    assert put(cache, "abcd", 30)
    assert len(cache) == 7


# -- what is found


def test_has_state(cache: HostCache) -> None:
    """The exact state is always found; a longer one only where one may go on from it."""
    put(cache, "abc", 10)
    put(cache, "agent", 10, is_prefix=True)
    for name, exactly, or_longer in [
        ("abc", True, True),
        ("ab", False, True),
        ("abcd", False, False),
        ("abx", False, False),
        ("bc", False, False),
        ("agent", True, True),
        ("age", False, True),
        ("", False, True),
    ]:
        tokens = tokens_of(name)
        assert cache.has_state(tokens, or_longer=False) == exactly, name
        assert cache.has_state(tokens, or_longer=True) == or_longer, name


def test_nothing_is_found_in_an_empty_lot(cache: HostCache) -> None:
    """Not even the empty state."""
    assert not cache.has_state([], or_longer=True)
    assert not cache.has_state([1], or_longer=False)
    assert not cache.has_prefix([])


def test_has_prefix(cache: HostCache) -> None:
    """Exactly these tokens, and kept as a prefix: no shorter, no longer, no conversation."""
    put(cache, "agent", 10, is_prefix=True)
    put(cache, "talk", 10)
    found = [
        name for name in ("agent", "agen", "agents", "talk") if cache.has_prefix(tokens_of(name))
    ]
    assert found == ["agent"]
