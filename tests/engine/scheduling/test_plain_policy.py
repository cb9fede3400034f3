"""The quick structures decide as the plain policy does, which looks at everything each time."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from plain_policy import PlainPolicy

from orion_oie.engine.scheduling.history import History, Settings
from orion_oie.engine.scheduling.lines import Lines, Waiting
from orion_oie.engine.scheduling.policy import choose, order
from orion_oie.schemas.availability import Availability, ModelState

NOW = 50.0
MODELS = "abcd"


def some(state: ModelState, **goes: str) -> Availability:
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


@settings(max_examples=150, deadline=None)
@given(
    waiting=st.one_of(
        crowd("x", [None], 3, in_order=True, most=20),
        crowd("xy", [None, "s", "t"], 1, in_order=True, most=20),
        crowd("xy", [None, "s"], 2, in_order=True, most=20),
    ),
    availability=availabilities,
    at=st.lists(settings_of, min_size=1, max_size=2),
    steps=st.lists(
        st.tuples(st.sampled_from(["serve", "remove", "add"]), st.integers(0, 20)), max_size=12
    ),
)
def test_each_order_of_the_same_lines_is_that_of_the_plain_policy(
    waiting: list[Waiting],
    availability: dict[str, Availability],
    at: list[Settings],
    steps: list[tuple[str, int]],
) -> None:
    """An order keeps what it found of a line. The next one sees what came, went and was served
    since, and other settings."""
    history, noted = History(), list[tuple[Waiting, list[Waiting], bool]]()
    lines, left = Lines(waiting), list(waiting)
    for number, (step, place) in enumerate(steps):
        now = at[number % len(at)]
        plain = PlainPolicy(now.turn_s, now.aging_s)
        for one, others, was_load in noted:
            plain.note(one, others, NOW, is_load=was_load)
        ordered = order(lines, availability, history, NOW, now)
        assert ordered == plain.order(left, availability, NOW)
        if step == "add" and waiting:
            like = waiting[place % len(waiting)]
            seq = len(waiting) + number
            new = Waiting(seq, like.model, like.agent, like.session, like.priority, NOW)
            lines.add(new)
            left.append(new)
        elif step != "add" and left:
            one = left[place % len(left)]
            if step == "serve":  # not the one whose turn it is: it may have come that way
                history.note(one, lines, NOW, is_load=place % 2 == 0)
                noted.append((one, list(left), place % 2 == 0))
            lines.remove(one)
            left.remove(one)


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
