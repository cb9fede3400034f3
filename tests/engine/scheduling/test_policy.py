"""Whose turn it is: classes, models, fairness; nobody starves, and models are not thrashed."""

import heapq
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_oie.engine.scheduling.fairness import Shares
from orion_oie.engine.scheduling.history import History, Settings
from orion_oie.engine.scheduling.lines import Line, Lines, Waiting
from orion_oie.engine.scheduling.policy import Decision, choose, order, why
from orion_oie.schemas.availability import Availability, ModelState

READY, FULL = ModelState.READY, ModelState.FULL
LOADABLE, BLOCKED = ModelState.LOADABLE, ModelState.BLOCKED
USUAL = Settings(turn_s=10.0, aging_s=30.0)
IN_MEMORY = Availability(READY)
NO_PLACE = Availability(FULL)
NOT_HERE = Availability(LOADABLE)


def blocked(*blockers: str) -> Availability:
    return Availability(BLOCKED, blockers=frozenset(blockers))


def loadable(*evicts: str) -> Availability:
    return Availability(LOADABLE, victims=frozenset(evicts))


def asks(
    seq: int,
    model: str,
    at: float = 0.0,
    *,
    priority: int = 0,
    agent: str = "",
    session: str | None = None,
) -> Waiting:
    return Waiting(seq, model, agent, session, priority, at)


def line(*requests: Waiting) -> Line:
    """The line of some requests for one model."""
    whole = Line(0, requests[0].model)
    for one in requests:
        whole.add(one)
    return whole


def decide(
    waiting: Sequence[Waiting],
    availability: dict[str, Availability],
    now: float,
    history: History | None = None,
) -> Decision:
    return choose(waiting, availability, history or History(), now, USUAL)


def picked(*given: object) -> int | None:
    pick = decide(*given).pick  # type: ignore[arg-type]
    return None if pick is None else pick.seq


def loaded(model: str, at: float) -> History:
    """A history in which a model was loaded at that time for its first request."""
    history = History()
    history.note(asks(0, model), Lines(), at, is_load=True)
    return history


class Budget:
    """Stands for a pool: models of some size share some room. Of the idle ones the least recently
    used goes first, of those in use the first loaded: it stays the same until it is idle."""

    def __init__(self, room: int, sizes: dict[str, int] | None = None) -> None:
        self.users: dict[str, int] = {}
        self.loads: list[str] = []
        self._used: dict[str, int] = {}
        self._uses = itertools.count()
        self._room = room
        self._sizes = sizes or {}

    def _size(self, model: str) -> int:
        return self._sizes.get(model, 1)

    def availability(self, model: str) -> Availability:
        if model in self.users:
            return IN_MEMORY
        missing = self._size(model) + sum(map(self._size, self.users)) - self._room
        idle = [other for other, users in self.users.items() if not users]
        in_use = [other for other, users in self.users.items() if users]
        evicts, blockers = set(), set()
        for goes, models in ((evicts, sorted(idle, key=self._used.get)), (blockers, in_use)):
            for other in models:
                if missing > 0:
                    goes.add(other)
                    missing -= self._size(other)
        assert missing <= 0, "it is larger than the room"
        state = BLOCKED if blockers else LOADABLE
        return Availability(state, frozenset(evicts), frozenset(blockers))

    def enter(self, model: str) -> bool:
        """Use a model; True when that loads it."""
        availability = self.availability(model)
        assert availability.state is not BLOCKED, "whoever is dispatched finds room"
        is_load = availability.state is LOADABLE
        for other in availability.victims:
            del self.users[other]
        if is_load:
            self.loads.append(model)
        self.users[model] = self.users.get(model, 0) + 1
        return is_load

    def leave(self, model: str) -> None:
        self.users[model] -= 1
        self._used[model] = next(self._uses)


@dataclass(frozen=True)
class Stream:
    """Somebody who always has `depth` requests waiting, each in a new session if `is_new`."""

    model: str
    priority: int = 0
    agent: str = ""
    session: str | None = None
    depth: int = 1
    is_new: bool = False


class Simulation:
    """Serves requests in virtual time, by the decisions of `choose`."""

    def __init__(
        self,
        budget: Budget,
        *,
        threads: int = 1,
        per_model: int = 1,
        service_s: Callable[[], float] = lambda: 1.0,
        load_s: float = 0.0,
        at: Settings = USUAL,
    ) -> None:
        self.now = 0.0
        self.waiting: dict[int, Waiting] = {}
        self.served: list[Waiting] = []
        self.served_at: dict[int, float] = {}
        self.budget = budget
        self._threads = threads
        self._per_model = per_model
        self._service_s = service_s
        self._load_s = load_s
        self._settings = at
        self._history = History()
        self._ends: list[tuple[float, int, str]] = []
        self._streams: dict[int, Stream] = {}
        self._seq = itertools.count(1)

    def put(
        self, model: str, priority: int = 0, agent: str = "", session: str | None = None
    ) -> int:
        seq = next(self._seq)
        self.waiting[seq] = Waiting(seq, model, agent, session, priority, self.now)
        return seq

    def open(self, stream: Stream) -> None:
        for _ in range(stream.depth):
            self._put_of(stream)

    def _put_of(self, stream: Stream) -> None:
        session = f"new {self._seq}" if stream.is_new else stream.session
        seq = self.put(stream.model, stream.priority, stream.agent, session)
        self._streams[seq] = stream

    def run(self, is_done: Callable[[], object], until_s: float = 1e9) -> None:
        """Until it is done, or that time has come, or nothing is left to do."""
        while not is_done() and self.now < until_s:
            while len(self._ends) < self._threads and self._dispatch():
                pass
            if not self._ends:
                assert not self.waiting, "it waits although nothing runs"
                return
            self.now, _, model = heapq.heappop(self._ends)
            self.budget.leave(model)

    def _dispatch(self) -> bool:
        running = Counter(model for _, _, model in self._ends)
        availability = {
            model: self.budget.availability(model) if running[model] < self._per_model else NO_PLACE
            for model in {one.model for one in self.waiting.values()}
        }
        waiting = list(self.waiting.values())
        pick = choose(waiting, availability, self._history, self.now, self._settings).pick
        if pick is None:
            return False
        is_load = self.budget.enter(pick.model)
        self._history.note(pick, Lines(waiting), self.now, is_load=is_load)
        ends_at = self.now + self._service_s() + self._load_s * is_load
        heapq.heappush(self._ends, (ends_at, pick.seq, pick.model))
        del self.waiting[pick.seq]
        self.served.append(pick)
        self.served_at[pick.seq] = self.now
        if pick.seq in self._streams:
            self._put_of(self._streams.pop(pick.seq))
        return True


# Classes


def test_a_higher_priority_comes_first() -> None:
    """Of requests that came together, that of the highest priority is served, whoever is loaded."""
    waiting = [asks(1, "a", priority=-1), asks(2, "b", priority=1), asks(3, "a", priority=0)]
    assert picked(waiting, {"a": IN_MEMORY, "b": NOT_HERE}, 0.0) == 2


@pytest.mark.parametrize(("waited_s", "seq"), [(59.9, 2), (60.1, 1)])
def test_waiting_makes_up_for_priority(waited_s: float, seq: int) -> None:
    """Two priorities are worth twice `aging_s` of waiting, and not more."""
    waiting = [asks(1, "a", 0.0, priority=-1), asks(2, "a", waited_s, priority=1)]
    assert picked(waiting, {"a": IN_MEMORY}, waited_s) == seq


def test_age_is_not_lent() -> None:
    """An old request that cannot run lifts no other of its class over a higher class."""
    waiting = [asks(1, "a"), asks(2, "b", 50.0), asks(3, "b", 50.0, priority=1)]
    for availability in (NO_PLACE, blocked("c")):
        assert picked(waiting, {"a": availability, "b": IN_MEMORY}, 50.0) == 3


def test_lower_classes_use_what_higher_ones_cannot() -> None:
    """While the model of the higher class is full, a lower class runs on another one."""
    waiting = [asks(1, "a", priority=5), asks(2, "a"), asks(3, "b")]
    assert picked(waiting, {"a": NO_PLACE, "b": NOT_HERE}, 0.0) == 3
    assert picked(waiting, {"a": NO_PLACE, "b": NO_PLACE}, 0.0) is None


# Models


def test_what_is_in_memory_comes_first() -> None:
    """Within a class a loaded model is served before an older request loads another; among
    equals the oldest goes first."""
    waiting = [asks(1, "a"), asks(2, "b"), asks(3, "c", 1.0), asks(4, "d", 1.0)]
    here = dict.fromkeys("cd", IN_MEMORY)
    assert picked(waiting, {**here, "a": NOT_HERE, "b": NOT_HERE}, 2.0) == 3
    assert picked(waiting, {"a": NOT_HERE, "b": NOT_HERE, "c": NO_PLACE, "d": NO_PLACE}, 2.0) == 1


def test_a_model_that_nobody_knows_is_tried() -> None:
    """A model without a availability is loaded like others."""
    assert picked([asks(1, "?")], {}, 0.0) == 1
    assert picked([asks(1, "?"), asks(2, "a")], {"a": IN_MEMORY}, 0.0) == 2


@pytest.mark.parametrize(("now", "seq"), [(9.9, 3), (10.0, 2)])
def test_the_longest_overdue_comes_first(now: float, seq: int) -> None:
    """After `turn_s` without service a model comes before what is in memory, the longest first."""
    waiting = [asks(1, "b", 0.0), asks(2, "a", 0.0), asks(3, "c", 3.0)]
    availability = {"a": NOT_HERE, "b": NOT_HERE, "c": IN_MEMORY}
    history = History()
    history.note(asks(0, "b"), Lines(), 2.0, is_load=False)  # so b is overdue at 12
    history.note(asks(0, "c"), Lines(), 3.0, is_load=False)
    assert picked(waiting, availability, now, history) == seq
    assert picked(waiting, {**availability, "a": NO_PLACE}, 12.0, history) == 1


def test_an_unused_model_is_not_overdue() -> None:
    """The time before anybody wanted a model does not count."""
    history = History()
    history.note(asks(0, "a"), Lines(), 0.0, is_load=True)
    waiting = [asks(1, "b", 99.0), asks(2, "a", 100.0)]
    assert picked(waiting, {"a": NOT_HERE, "b": IN_MEMORY}, 100.0, history) == 1


@pytest.mark.parametrize(("now", "seq"), [(19.9, 2), (20.0, 1)])
def test_a_loaded_model_gets_its_turn(now: float, seq: int) -> None:
    """For `turn_s` from its load a model is not evicted for an overdue one of its class."""
    waiting = [asks(1, "a", 0.0), asks(2, "b", 1.0)]
    history = loaded("b", 10.0)
    assert picked(waiting, {"a": loadable("b"), "b": IN_MEMORY}, now, history) == seq


def test_a_turn_protects_only_what_would_go() -> None:
    """An overdue model that fits beside the one in its turn, or evicts another, is loaded."""
    waiting = [asks(1, "a", 0.0), asks(2, "b", 1.0)]
    for availability in (loadable(), loadable("c")):
        assert picked(waiting, {"a": availability, "b": IN_MEMORY}, 15.0, loaded("b", 10.0)) == 1
    alone = [asks(1, "a", 0.0), asks(2, "b", 1.0, priority=-1)]
    availability = {"a": loadable("b"), "b": IN_MEMORY}
    assert picked(alone, availability, 15.0, loaded("b", 10.0)) == 1


def test_who_waits_for_a_turn_is_not_overtaken_by_loads() -> None:
    """While an overdue model waits for the turn of another to end, nothing else is loaded."""
    waiting = [asks(1, "big", 0.0), asks(2, "a", 1.0), asks(3, "b", 2.0)]
    availability = {"big": loadable("b", "c"), "a": loadable("c"), "b": IN_MEMORY}
    assert picked(waiting, availability, 15.0, loaded("b", 10.0)) == 3
    assert picked(waiting, availability, 20.0, loaded("b", 10.0)) == 1


def test_availability_that_contradict_each_other_stop_nobody() -> None:
    """A model that another would evict, and that is not in memory all the same, has no turn."""
    waiting = [asks(1, "a", 0.0), asks(2, "b", 1.0)]
    availability = {"a": loadable("b"), "b": NOT_HERE}
    assert picked(waiting, availability, 15.0, loaded("b", 10.0)) == 1


# Who is held back


def test_nobody_is_held_back_for_a_moment() -> None:
    """While the blocked one is not overdue, its own class goes on with what it waits for."""
    decision = decide([asks(1, "a"), asks(2, "b")], {"a": blocked("b"), "b": IN_MEMORY}, 5.0)
    assert decision.pick == asks(2, "b")


def test_the_overdue_get_room() -> None:
    """An overdue blocked model holds back exactly the models that have to become idle."""
    waiting = [asks(1, "a"), asks(2, "b"), asks(3, "c", 9.0)]
    availability = {"a": blocked("b"), "b": IN_MEMORY, "c": IN_MEMORY}
    history = History()
    history.note(asks(0, "b"), Lines(), 9.0, is_load=False)
    decision = decide(waiting, availability, 10.0, history)
    assert decision.pick == waiting[2]
    assert decision.holds == {"b": "a"}
    assert picked(waiting[:2], availability, 10.0, history) is None


def test_a_higher_class_gets_room_at_once() -> None:
    """A blocked model of a higher class holds back the lower classes without being overdue."""
    waiting = [asks(1, "a", priority=1), asks(2, "b"), asks(3, "c")]
    availability = {"a": blocked("b"), "b": IN_MEMORY, "c": IN_MEMORY}
    decision = decide(waiting, availability, 0.0)
    assert decision.pick == waiting[2]
    assert decision.holds == {"b": "a"}
    same = [replace(waiting[0], priority=0), *waiting[1:]]
    assert decide(same, availability, 0.0).pick == waiting[1]


def test_a_lower_class_holds_nobody_above_it() -> None:
    """However overdue, a blocked model of a lower class does not stop a higher one."""
    waiting = [asks(1, "a", 0.0), asks(2, "b", 20.0, priority=1)]
    assert picked(waiting, {"a": blocked("b"), "b": IN_MEMORY}, 25.0) == 2
    late = [waiting[0], replace(waiting[1], arrived_at=31.0)]
    assert picked(late, {"a": blocked("b"), "b": IN_MEMORY}, 35.0) is None


def test_room_that_is_to_come_is_kept() -> None:
    """Behind a model that waits for room nothing else is loaded; before it, as ever."""
    waiting = [asks(1, "a", 1.0), asks(2, "b", 2.0)]
    availability = {"a": blocked("c"), "b": NOT_HERE}
    assert picked(waiting, availability, 5.0) == 2
    decision = decide(waiting, availability, 11.0)
    assert decision.pick is None
    assert decision.holds == {"c": "a", "b": "a"}
    assert picked([asks(1, "a", 1.0), asks(0, "b", 0.5)], availability, 11.0) == 0


def test_a_turn_is_not_cut_short_by_its_own_class() -> None:
    """An overdue model waits for the turn of the one that has the room, then holds it back."""
    waiting = [asks(1, "a"), asks(2, "b")]
    availability = {"a": blocked("b"), "b": IN_MEMORY}
    history = loaded("b", 8.0)
    assert picked(waiting, availability, 17.0, history) == 2
    assert decide(waiting, availability, 18.0, history).holds == {"b": "a"}


@pytest.mark.parametrize(("now", "seq"), [(19.9, 2), (20.0, None)])
def test_room_is_not_kept_empty_during_a_turn(now: float, seq: int | None) -> None:
    """Of several models that have to go, none is held back while one of them, idle or not, has its
    turn; then all of them are, so that they do not take turns in being used."""
    waiting = [asks(1, "big", 0.0), asks(2, "a", 1.0), asks(3, "b", 2.0)]
    needs_both = Availability(BLOCKED, victims=frozenset("b"), blockers=frozenset("a"))
    availability = {"big": needs_both, "a": IN_MEMORY, "b": IN_MEMORY}
    history = loaded("b", 10.0)
    for model in "ab":
        history.note(asks(0, model), Lines(), 14.0, is_load=False)
    assert picked(waiting, availability, now, history) == seq


def test_only_what_is_blocked_holds_back() -> None:
    """A model that can be loaded, or whose blockers nobody names, holds back nothing."""
    waiting = [asks(1, "a", priority=1), asks(2, "b"), asks(3, "c")]
    assert decide(waiting, {"a": loadable("b")}, 50.0).holds == {}
    decision = decide(waiting, {"a": Availability(BLOCKED, victims=frozenset("b"))}, 50.0)
    assert decision.pick == waiting[1]
    assert decision.holds == {}


# Over time


def test_requests_for_three_models_come_in_three_turns() -> None:
    """ABCABC... with room for one becomes A.. B.. C.., each loaded once."""
    simulation = Simulation(Budget(1), service_s=lambda: 0.3, load_s=0.5)
    for _ in range(10):
        for model in "abc":
            simulation.put(model)
    simulation.run(lambda: False)
    assert simulation.budget.loads == ["a", "b", "c"]
    assert [one.model for one in simulation.served] == ["a"] * 10 + ["b"] * 10 + ["c"] * 10


def test_slow_requests_take_turns() -> None:
    """When ten requests take longer than a turn, each model gets two turns, no more."""
    simulation = Simulation(Budget(1), service_s=lambda: 1.9, load_s=0.4)
    for _ in range(10):
        for model in "abc":
            simulation.put(model)
    simulation.run(lambda: False)
    assert simulation.budget.loads == ["a", "b", "c"] * 2


@pytest.mark.parametrize("models", ["ab", "abcdefgh"])
@pytest.mark.parametrize("threads", [1, 3])
def test_overload_does_not_thrash(models: str, threads: int) -> None:
    """With endless requests for more models than there is room for, a load serves a turn."""
    simulation = Simulation(Budget(1), threads=threads, per_model=threads, load_s=1.0)
    for model in models:
        simulation.open(Stream(model, depth=4))
    simulation.run(lambda: False, 500.0)
    turns = Counter(simulation.budget.loads)
    assert set(turns) == set(models)
    assert max(turns.values()) - min(turns.values()) <= 1
    assert len(simulation.budget.loads) <= 500 / 10
    per_turn = len(simulation.served) / len(simulation.budget.loads)
    assert per_turn >= 9 * threads


streams = st.builds(
    Stream,
    model=st.sampled_from("abcd"),
    priority=st.integers(-1, 2),
    agent=st.sampled_from("xy"),
    session=st.sampled_from([None, "s", "t"]),
    depth=st.integers(1, 4),
    is_new=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(
    flood=st.lists(streams, min_size=1, max_size=5),
    victim=st.tuples(st.sampled_from("ae"), st.integers(-1, 1), st.sampled_from("xyz")),
    room=st.integers(1, 4),
    size=st.integers(1, 4),
    threads=st.integers(1, 3),
    per_model=st.integers(1, 2),
    seed=st.integers(0, 2**32),
    load_s=st.sampled_from([0.0, 1.0, 3.0]),
)
def test_nobody_starves(
    flood: list[Stream],
    victim: tuple[str, int, str],
    room: int,
    size: int,
    threads: int,
    per_model: int,
    seed: int,
    load_s: float,
) -> None:
    """Beside any endless streams, of higher priorities, for loaded models, in new sessions all the
    time, a request, also for a large model, is served in bounded time: its handicap, a round of
    turns, and its share."""
    rng = random.Random(seed)
    simulation = Simulation(
        Budget(room, {"e": min(size, room)}),
        threads=threads,
        per_model=per_model,
        service_s=lambda: rng.uniform(0.5, 3.0),
        load_s=load_s,
    )
    for stream in flood:
        simulation.open(stream)
    simulation.run(lambda: False, 30.0)
    model, priority, agent = victim
    arrived_at = simulation.now
    seq = simulation.put(model, priority, agent, "victim")
    handicap_s = USUAL.aging_s * max(0, *(stream.priority - priority for stream in flood))
    round_s = 4 * (USUAL.turn_s + 3.0 + load_s)
    backlog_s = 3 * (3.0 + load_s) * sum(stream.depth for stream in flood)
    bound_s = handicap_s + round_s + backlog_s
    simulation.run(lambda: seq in simulation.served_at, arrived_at + bound_s)
    assert seq in simulation.served_at


def test_a_warm_model_that_never_falls_idle_makes_room() -> None:
    """Two overlapping endless streams for one model stop within a turn and a service for a request
    that needs the room."""
    simulation = Simulation(Budget(1), threads=3, per_model=3, service_s=lambda: 2.0, load_s=1.0)
    simulation.open(Stream("a", session="s", depth=3))
    simulation.now = 0.5
    simulation.open(Stream("a", session="t", depth=3))
    simulation.run(lambda: False, 20.0)
    seq = simulation.put("b")
    simulation.run(lambda: seq in simulation.served_at, 100.0)
    assert simulation.served_at[seq] <= 20.0 + USUAL.turn_s + 2 * 2.0


def test_a_large_model_gets_its_room_beside_small_ones() -> None:
    """Small models, which always fit somewhere, do not take the room of a large one for ever."""
    budget = Budget(2, {"big": 2})
    simulation = Simulation(budget, threads=2, per_model=1, service_s=lambda: 1.0)
    for model in "abcd":
        simulation.open(Stream(model))
    simulation.run(lambda: False, 5.5)
    seq = simulation.put("big")
    simulation.run(lambda: seq in simulation.served_at, 200.0)
    assert simulation.served_at[seq] <= 5.5 + 4 * USUAL.turn_s


# Fairness


def turns_of(simulation: Simulation, count: int) -> list[str | None]:
    already = len(simulation.served)
    simulation.run(lambda: len(simulation.served) >= already + count)
    return [one.session for one in simulation.served[already : already + count]]


def test_a_crowd_in_one_session_delays_no_other() -> None:
    """Beside a hundred requests of one session, another's only one is next."""
    simulation = Simulation(Budget(1))
    for _ in range(100):
        simulation.put("a", session="crowd")
    turns_of(simulation, 10)
    simulation.put("a", session="one")
    assert turns_of(simulation, 1) == ["one"]


def test_agents_share_before_sessions_do() -> None:
    """Many sessions of one agent together get as much as the only one of another agent."""
    simulation = Simulation(Budget(1))
    for number in range(10):
        simulation.open(Stream("a", agent="many", session=str(number), depth=3))
    simulation.open(Stream("a", agent="single", session="only"))
    simulation.run(lambda: len(simulation.served) >= 100)
    shares = Counter(one.agent for one in simulation.served[:100])
    assert abs(shares["many"] - shares["single"]) <= 2
    sessions = Counter(one.session for one in simulation.served[:100] if one.agent == "many")
    assert max(sessions.values()) - min(sessions.values()) <= 1
    assert len(sessions) == 10


@pytest.mark.parametrize("level", ["agent", "session"])
def test_shares_do_not_depend_on_demand(level: str) -> None:
    """Whoever always waits, with one request or with many, is served as often as each other."""
    simulation = Simulation(Budget(1))
    for number in range(8):
        simulation.open(Stream("a", depth=8 - number, **{level: f"{number}"}))  # type: ignore[arg-type]
    simulation.run(lambda: len(simulation.served) >= 83)
    shares = Counter(getattr(one, level) for one in simulation.served)
    assert len(shares) == 8
    assert max(shares.values()) - min(shares.values()) <= 1


def test_silence_saves_nothing_up() -> None:
    """Who comes back after a long silence gets its share from then on, not what it missed."""
    simulation = Simulation(Budget(1))
    simulation.open(Stream("a", session="busy", depth=5))
    turns_of(simulation, 50)
    simulation.open(Stream("a", session="back", depth=5))
    assert Counter(turns_of(simulation, 20)) == {"busy": 10, "back": 10}


@settings(max_examples=100, deadline=None)
@given(
    depths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    before=st.integers(0, 40),
    is_known=st.booleans(),
)
def test_a_session_waits_for_two_of_each_other(
    depths: list[int], before: int, is_known: bool
) -> None:
    """However many requests others have, one is served after at most two of each session."""
    simulation = Simulation(Budget(1))
    if is_known:
        simulation.put("a", session="one")
    for number, depth in enumerate(depths):
        simulation.open(Stream("a", session=str(number), depth=depth))
    turns_of(simulation, before)
    seq = simulation.put("a", session="one")
    already = len(simulation.served)
    simulation.run(lambda: seq in simulation.served_at)
    between = Counter(one.session for one in simulation.served[already:-1])
    between.pop("one", None)
    assert all(count <= 2 for count in between.values())


def test_new_sessions_without_end_keep_nobody_waiting() -> None:
    """Where each request comes in a new session, an old session gets its turn all the same."""
    simulation = Simulation(Budget(1))
    simulation.put("a", session="old")
    simulation.open(Stream("a", depth=5, is_new=True))
    turns_of(simulation, 1)
    seq = simulation.put("a", session="old")
    simulation.run(lambda: seq in simulation.served_at, 100.0)
    assert simulation.served_at[seq] <= 10.0


@pytest.mark.parametrize("level", ["agent", "session"])
def test_a_copy_is_its_own(level: str) -> None:
    """What is noted in a copy of a history is not in the history."""
    first, second = (replace(asks(n, "a"), **{level: f"{n}"}) for n in (1, 2))  # type: ignore[arg-type]
    history = History()
    for one in (first, second):
        history.note(one, Lines([first, second]), 0.0, is_load=False)
    copy = history.copy()
    copy.note(first, Lines([first, second]), 5.0, is_load=True)
    assert copy.fairest(line(first, second)) == second
    assert history.fairest(line(first, second)) == first
    assert copy.is_in_turn("a", 5.0, 1.0)
    assert copy.unserved_since("a", 0.0) == 5.0
    assert not history.is_in_turn("a", 5.0, 1.0)
    assert history.unserved_since("a", 0.0) == 0.0


def kept_by(shares: Shares) -> int:
    """The number of sessions that are remembered: their forgetting changes no decision."""
    return len(shares._ends)


def test_forgotten_sessions_take_no_memory() -> None:
    """However many sessions there were, only as many are kept as matter."""
    shares = Shares()
    for number in range(10_000):
        shares.serve(str(number), 5)
        assert kept_by(shares) <= 26


# The decision itself

availability_of = st.sampled_from(
    [IN_MEMORY, NO_PLACE, NOT_HERE, loadable("a"), loadable("b", "c"), blocked("a"), blocked("b")]
)
anybody = st.builds(
    Waiting,
    seq=st.integers(1, 10**6),
    model=st.sampled_from("abcd"),
    agent=st.sampled_from("xy"),
    session=st.sampled_from([None, "s", "t"]),
    priority=st.integers(-2, 2),
    arrived_at=st.floats(0, 50),
)
crowds = st.lists(anybody, max_size=25, unique_by=lambda one: one.seq)


def some_history(noted: Sequence[Waiting]) -> History:
    history = History()
    for number, one in enumerate(noted):
        history.note(one, Lines(noted), one.arrived_at, is_load=number % 3 == 0)
    return history


@given(
    waiting=crowds,
    noted=crowds,
    availability=st.dictionaries(st.sampled_from("abcd"), availability_of),
    seed=st.randoms(use_true_random=False),
)
def test_choosing_is_deterministic(
    waiting: list[Waiting],
    noted: list[Waiting],
    availability: dict[str, Availability],
    seed: random.Random,
) -> None:
    """The same question in another order gets the same answer, and asking changes nothing."""
    history = some_history(noted)
    decision = decide(waiting, availability, 50.0, history)
    shuffled = seed.sample(waiting, len(waiting))
    order(shuffled, availability, history, 50.0, USUAL)
    assert decide(shuffled, availability, 50.0, history) == decision


@given(
    waiting=crowds,
    noted=crowds,
    availability=st.dictionaries(st.sampled_from("abcd"), availability_of),
)
def test_what_is_picked_can_run(
    waiting: list[Waiting], noted: list[Waiting], availability: dict[str, Availability]
) -> None:
    """The pick is one of those that wait and has a model that could serve it; if nothing is picked,
    everything is full, blocked or held back."""
    decision = decide(waiting, availability, 50.0, some_history(noted))
    may_run = [
        one for one in waiting if availability.get(one.model, NOT_HERE).state in (READY, LOADABLE)
    ]
    if decision.pick is not None:
        assert decision.pick in may_run
    else:
        assert {one.model for one in may_run} <= decision.holds.keys()
    needy = {
        one.model
        for one in waiting
        if availability.get(one.model, NOT_HERE).state in (BLOCKED, LOADABLE)
    }
    assert set(decision.holds.values()) <= needy


@given(
    waiting=crowds,
    noted=crowds,
    availability=st.dictionaries(st.sampled_from("abcd"), availability_of),
)
def test_the_order_has_everybody_once(
    waiting: list[Waiting], noted: list[Waiting], availability: dict[str, Availability]
) -> None:
    """The whole order names each once, and begins with who is next when nothing is in the way."""
    history = some_history(noted)
    ordered = order(waiting, availability, history, 50.0, USUAL)
    assert sorted(ordered, key=lambda one: one.seq) == sorted(waiting, key=lambda one: one.seq)
    states = {availability.get(one.model, NOT_HERE).state for one in waiting}
    if waiting and not states & {FULL, BLOCKED}:
        assert ordered[0] == decide(waiting, availability, 50.0, history).pick


def test_the_order_groups_models() -> None:
    """Positions foresee that a model which was loaded serves all its requests."""
    waiting = [asks(number, "abc"[number % 3]) for number in range(9)]
    for availability in (
        {"a": loadable("x"), "b": loadable("x"), "c": loadable("x")},
        {"a": NO_PLACE, "b": blocked("a"), "c": blocked("a")},
    ):
        ordered = order(waiting, availability, History(), 1.0, USUAL)
        assert "".join(one.model for one in ordered) == "aaabbbccc"
    overdue = order(waiting, availability, loaded("a", 95.0), 100.0, USUAL)
    assert "".join(one.model for one in overdue) == "aaabbbccc"
    availability = {"a": IN_MEMORY, "b": loadable("a"), "c": NO_PLACE}
    history = History()
    for model in "ac":
        history.note(asks(0, model), Lines(), 95.0, is_load=False)
    goes = order(waiting, availability, history, 100.0, USUAL)
    assert "".join(one.model for one in goes) == "bcbcbcaaa"


def test_why_it_waits() -> None:
    """The reason names what the request waits for."""
    waiting = [asks(1, "a"), asks(2, "b"), asks(3, "c"), asks(4, "d"), asks(5, "d")]
    availability = {"a": blocked("b"), "b": IN_MEMORY, "c": NO_PLACE, "d": IN_MEMORY}
    history = History()
    for model in "bcd":
        history.note(asks(0, model), Lines(), 9.0, is_load=False)
    decision = decide(waiting, availability, 12.0, history)
    assert [why(one, availability, decision) for one in waiting] == [
        "'a' is not in memory, and waits until 'b' can be evicted",
        "'b' is held back so that 'a' gets memory",
        "'c' answers as many requests as it may at once",
        "it is next",
        "others come before it",
    ]
    assert decision.reason == "'d' is in memory"
    assert decide([], {}, 0.0).reason == "nothing that waits can be served now"


@pytest.mark.parametrize(
    ("models", "priorities", "availability"),
    [(1, 1, IN_MEMORY), (256, 1, blocked("m0")), (64, 200, NOT_HERE), (256, 1, loadable("m0"))],
)
def test_choosing_is_quick(models: int, priorities: int, availability: Availability) -> None:
    """Among 256 requests, however they differ, it takes less than 10 ms, also on a busy machine."""
    waiting = [
        asks(
            number,
            f"m{number % models}",
            number / 100,
            priority=number % priorities - priorities // 2,
            agent=f"x{number % 16}",
            session=str(number),
        )
        for number in range(256)
    ]
    availability = {one.model: availability for one in waiting}
    history = some_history(waiting)
    lines = Lines(waiting)  # a queue keeps them
    best_s = 1.0
    for _ in range(30):
        began_at = time.perf_counter()
        choose(lines, availability, history, 20.0, USUAL)
        best_s = min(best_s, time.perf_counter() - began_at)
    assert best_s < 1e-2
