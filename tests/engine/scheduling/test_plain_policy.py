"""The quick structures decide as the plain policy does, which looks at everything each time."""

from collections.abc import Iterable, Sequence
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from plain_policy import PlainPolicy

from orion_oie.engine.scheduling.history import History, Settings
from orion_oie.engine.scheduling.lines import Lines, Waiting
from orion_oie.engine.scheduling.policy import choose, order
from orion_oie.schemas.availability import Availability, ModelState

NOW = 50.0
MODELS = "abcd"


def some(state: ModelState, **goes: Iterable[str]) -> Availability:
    return Availability(state, **{name: frozenset(models) for name, models in goes.items()})


found = st.sampled_from(
    [
        some(ModelState.READY),
        some(ModelState.FULL),
        some(ModelState.LOADABLE),
        some(ModelState.LOADABLE, victims="a"),
        some(ModelState.LOADABLE, victims="bc"),
        some(ModelState.BLOCKED, blockers="a"),
        some(ModelState.BLOCKED, blockers="b", victims="c"),
        some(ModelState.SHORT),
    ]
)
availabilities = st.dictionaries(st.sampled_from(MODELS), found)
settings_of = st.builds(Settings, st.sampled_from([0.0, 10.0, 45.0]), st.sampled_from([1.0, 30.0]))


def crowd(
    agents: str = "xyz",
    sessions: Sequence[str | None] = (None, "s", "t"),
    priorities: int = 2,
    *,
    in_order: bool = False,
    most: int = 30,
) -> st.SearchStrategy[list[Waiting]]:
    """Lists of requests, which came in the order of their numbers or at any times."""
    one = st.tuples(
        st.sampled_from(MODELS),
        st.sampled_from(agents),
        st.sampled_from(sessions),
        st.integers(0, priorities - 1),
        st.floats(0, NOW) if not in_order else st.sampled_from([0.1, 1.0, 2.5]),
    )

    def numbered(rows: list[tuple[str, str, str | None, int, float]]) -> list[Waiting]:
        made, at = [], 0.0
        for seq, (model, agent, session, priority, time) in enumerate(rows):
            at = at + time if in_order else time
            made.append(Waiting(seq, model, agent, session, priority, min(at, NOW)))
        return made

    return st.lists(one, max_size=most).map(numbered)


crowds = st.one_of(
    crowd(),
    crowd(priorities=1),
    crowd(priorities=1, in_order=True),
    crowd("x", [None], 3),
    crowd("x", [None], 3, in_order=True),
    crowd("xy", [None], 1, in_order=True),
    crowd("x", "stuvw", 1),
    crowd("xy", [None, "s"], 1, in_order=True),
    crowd("xy", [None, "s"], 3, in_order=True),
    crowd("x", [None], 4, in_order=True, most=45),
)


def histories(noted: Sequence[Waiting], at: Settings) -> tuple[History, PlainPolicy]:
    """The same past, in both forms."""
    history, plain = History(), PlainPolicy(at.turn_s, at.aging_s)
    for number, one in enumerate(noted):
        is_load = number % 3 == 0
        history.note(one, Lines(noted), one.arrived_at, is_load=is_load)
        plain.note(one, noted, one.arrived_at, is_load=is_load)
    return history, plain


@settings(max_examples=400, deadline=None)
@given(waiting=crowds, noted=crowd(most=12), availability=availabilities, at=settings_of)
def test_the_order_is_that_of_the_plain_policy(
    waiting: list[Waiting],
    noted: list[Waiting],
    availability: dict[str, Availability],
    at: Settings,
) -> None:
    """The whole order, for any crowd, past and memory."""
    history, plain = histories(noted, at)
    assert order(waiting, availability, history, NOW, at) == plain.order(waiting, availability, NOW)


@settings(max_examples=100, deadline=None)
@given(
    waiting=crowd("xy", [None, "s"], 3, in_order=True),
    noted=crowd(most=12),
    availability=availabilities,
    at=settings_of,
    exact=st.integers(0, 10),
)
def test_where_flows_wait_in_several_priorities_the_first_are_exact(
    waiting: list[Waiting],
    noted: list[Waiting],
    availability: dict[str, Availability],
    at: Settings,
    exact: int,
) -> None:
    """The first of the order are those of the plain policy, and nobody is lost behind them."""
    history, plain = histories(noted, at)
    ordered = order(waiting, availability, history, NOW, at, exact=exact)
    assert ordered[:exact] == plain.order(waiting, availability, NOW)[:exact]
    assert sorted(one.seq for one in ordered) == [one.seq for one in waiting]


def test_of_very_many_the_first_are_exact() -> None:
    """Flows of several priorities are followed to the end where few wait, else for the first."""
    who = [("x", "s"), ("y", None), ("x", "t")]
    for count, exact in ((500, 500), (501, 100)):
        waiting = [
            Waiting(seq, MODELS[seq % 2], *who[seq * seq % 3], seq * seq % 7 % 3, seq / 10)
            for seq in range(count)
        ]
        found = order(waiting, {}, History(), NOW, Settings())
        whole = order(waiting, {}, History(), NOW, Settings(), exact=count)
        assert found[:exact] == whole[:exact]
        assert (found == whole) == (exact == count)
        assert sorted(one.seq for one in found) == list(range(count))


class Engine:
    """Requests that come in the order of their numbers, and are served or taken back, in both
    forms; models that evict each other. All of it by chance."""

    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self.models = "abcdef"[: chance.choice([2, 3, 4, 6])]
        self.priorities = chance.choice([1, 2, 3, 4])
        are_many = chance.random() < 0.5
        self.agents = "xyz"[: chance.choice([1, 2, 3]) if are_many else 1]
        self.sessions = ([None, "s", "t", "u"] if are_many else [None])[: chance.choice([1, 2, 4])]
        self.gaps = chance.choice([[0.0, 0.1], [0.0, 1.0, 2.5], [0.1, 30.0], [5.0]])
        self.seq, self.now = 0, 0.0
        self.lines, self.left, self.history = Lines(), list[Waiting](), History()
        self.noted: list[tuple[Waiting, list[Waiting], float, bool]] = []
        self.change_memory()

    def change_memory(self) -> None:
        self.availability = {one: self.some_availability() for one in self.models[:5]}

    def some_availability(self) -> Availability:
        one, two = ({m for m in self.models if self.chance.random() < 0.3} for _ in range(2))
        kinds = [
            some(ModelState.READY),
            some(ModelState.FULL),
            some(ModelState.LOADABLE, victims=one),
            some(ModelState.LOADABLE, victims=one),
            some(ModelState.BLOCKED, victims=one, blockers=two),
        ]
        return self.chance.choice(kinds)

    def put(self) -> None:
        pick = self.chance.choice
        self.now += pick(self.gaps)
        self.seq += 1
        who = pick(self.models), pick(self.agents), pick(self.sessions)
        one = Waiting(self.seq, *who, self.chance.randrange(self.priorities), self.now)
        self.lines.add(one)
        self.left.append(one)

    def take(self) -> None:
        if not self.left:
            return
        one = self.chance.choice(self.left)
        if self.chance.random() < 0.7:
            found = self.availability.get(one.model)
            is_load = found is None or found.is_loadable
            self.history.note(one, self.lines, self.now, is_load=is_load)
            self.noted.append((one, list(self.left), self.now, is_load))
        self.lines.remove(one)
        self.left.remove(one)

    def plain(self, at: Settings) -> PlainPolicy:
        plain = PlainPolicy(at.turn_s, at.aging_s)
        for one, left, now, is_load in self.noted:
            plain.note(one, left, now, is_load=is_load)
        return plain


@settings(max_examples=200, deadline=None)
@given(chance=st.randoms(use_true_random=True))
def test_each_order_of_the_same_lines_is_that_of_the_plain_policy(chance: Random) -> None:
    """An order keeps what it found of a line. The next one sees what came, went, was served and
    loaded since, and other settings."""
    engine = Engine(chance)
    for _ in range(chance.randrange(45)):
        engine.put()
    for _ in range(4):
        engine.now += chance.choice([0.0, 1.0, 20.0])
        at = Settings(chance.choice([0.0, 3.0, 10.0, 45.0]), chance.choice([0.0, 1.0, 30.0]))
        ordered = order(engine.lines, engine.availability, engine.history, engine.now, at)
        plain = engine.plain(at).order(engine.left, engine.availability, engine.now)
        assert ordered == plain
        for _ in range(chance.randrange(3)):
            engine.take()
        if chance.random() < 0.5:
            engine.change_memory()
        for _ in range(chance.randrange(3)):
            engine.put()


@settings(max_examples=200, deadline=None)
@given(
    waiting=crowds,
    availability=availabilities,
    at=settings_of,
    steps=st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=40),
)
def test_each_choice_is_that_of_the_plain_policy(
    waiting: list[Waiting],
    availability: dict[str, Availability],
    at: Settings,
    steps: list[tuple[int, bool]],
) -> None:
    """Choice after choice over the same lines, while requests are served, taken back and come."""
    history, plain = histories([], at)
    lines, left, coming = Lines(waiting[::2]), waiting[::2], waiting[1::2]
    for seq, (place, is_load) in enumerate(steps, len(waiting)):
        pick = choose(lines, availability, history, NOW, at).pick
        assert pick == plain.choose(left, availability, NOW)
        if pick is not None:
            history.note(pick, lines, NOW, is_load=is_load)
            plain.note(pick, left, NOW, is_load=is_load)
            lines.remove(pick)
            left.remove(pick)
        if place < len(left):
            lines.remove(left.pop(place))
        if place < len(coming):
            like = coming[place]
            new = Waiting(seq, like.model, like.agent, like.session, like.priority, NOW)
            lines.add(new)
            left.append(new)
