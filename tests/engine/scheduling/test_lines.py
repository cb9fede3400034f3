"""The lines of waiting requests hold what a plain list would, in the same order."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from orion_oie.engine.scheduling.fairness import AgentShares
from orion_oie.engine.scheduling.lines import Lines, Waiting

requests = st.builds(
    Waiting,
    seq=st.just(0),
    model=st.sampled_from("ab"),
    agent=st.sampled_from("xy"),
    session=st.sampled_from([None, "s", "t"]),
    priority=st.integers(-1, 1),
    arrived_at=st.just(0.0),
)


def check(lines: Lines, plain: list[Waiting]) -> None:
    """Everything that can be asked of the lines, against the list."""
    assert list(lines) == plain
    assert len(lines) == len(plain)
    models = {one.model for one in plain}
    assert dict(lines.counts) == {m: sum(one.model == m for one in plain) for m in models}
    for of_priority in lines.classes():
        for line in of_priority:
            own = [one for one in plain if (one.priority, one.model) == (line.priority, line.model)]
            assert list(line) == own
            assert len(line) == len(own)
            assert line.oldest == own[0]
            flows = list(dict.fromkeys(one.flow for one in own))
            assert line.is_one_flow == (len(flows) == 1)
            assert line.fairest(AgentShares()) == own[0]
            plan = line.plan(AgentShares(), 30.0)
            assert {served.seq for _, _, served in plan.rows} == {one.seq for one in own}
            assert [seq for seq, _, _ in plan.rows] == list(plan.oldest)
            assert [key for _, key, _ in plan.rows] == list(plan.keys)
            assert plan.oldest_at(0) == own[0]
    for model in models:
        asked = Counter(one.flow for one in plain if one.model == model)
        askers = lines.askers(model)
        assert asked == {(a, s): number for a, own in askers.items() for s, number in own.items()}
    assert lines.askers("nobody's") == {}


@given(st.lists(st.tuples(requests, st.integers(0, 20)), max_size=40))
def test_lines_agree_with_a_list(steps: list[tuple[Waiting, int]]) -> None:
    """Requests come and go in any order."""
    lines, plain = Lines(), []
    for seq, (like, position) in enumerate(steps):
        if position < len(plain):
            lines.remove(plain.pop(position))
        one = Waiting(seq, like.model, like.agent, like.session, like.priority, 0.0)
        lines.add(one)
        plain.append(one)
        check(lines, plain)
    check(Lines(reversed(plain)), plain)
    while plain:
        lines.remove(plain.pop(0))
        check(lines, plain)


def test_the_plan_of_a_line_is_made_anew_once_somebody_was_served() -> None:
    """A service out of another line of the model changes the turns, though the line is the same."""
    lines = Lines(Waiting(seq, "m", agent, None, 0, 0.0) for seq, agent in enumerate("xy"))
    (line,) = next(iter(lines.classes()))
    shares = AgentShares()
    assert [one.agent for _, _, one in line.plan(shares, 1.0).rows] == ["x", "y"]
    shares.serve("x", None, 2, 1)
    assert [one.agent for _, _, one in line.plan(shares, 1.0).rows] == ["y", "x"]
