"""From topics to agents: shares that add up, owners, guests, and agents without evidence."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_oie.routing.topics import (
    ALONE,
    Claim,
    shares,
)

TOPICS = {"code": 0.6, "data": 0.3, "creative": 0.1}
NAMES = sorted(TOPICS)

amounts = st.floats(0, 1e6)
claims = st.builds(
    Claim,
    st.text(max_size=3),
    st.lists(st.sampled_from([*NAMES, "unknown"]), unique=True, max_size=3),
    amounts,
    st.floats(0, 1),
    st.dictionaries(st.sampled_from(NAMES), st.floats(0, 1)),
)
all_claims = st.lists(claims, max_size=6, unique_by=lambda claim: claim.agent_id)
topics = st.lists(st.floats(0.001, 1), min_size=3, max_size=3).map(
    lambda values: {n: v / sum(values) for n, v in zip(NAMES, values, strict=True)}
)


def owner(agent_id: str, *owns: str, **evidence: Any) -> Claim:
    return Claim(agent_id, owns, **evidence)


def guest(agent_id: str, **evidence: Any) -> Claim:
    return Claim(agent_id, (), **{"affinity": dict.fromkeys(TOPICS, 1.0), **evidence})


def test_an_owner_has_its_topics() -> None:
    """One topic or several; what belongs to nobody is shared out in proportion."""
    found = shares(TOPICS, [owner("coder", "code"), owner("rest", "data", "creative")])
    assert found == pytest.approx({"coder": 0.6, "rest": 0.4})
    without = shares(TOPICS, [owner("coder", "code"), owner("poet", "creative")])
    assert without == pytest.approx({"coder": 6 / 7, "poet": 1 / 7})
    assert shares(TOPICS, [owner("poet", "creative", "unknown")]) == {"poet": 1.0}


def test_owners_of_one_topic_share_it() -> None:
    """Two owners have half each without evidence; more evidence gives a larger share."""
    plain = shares(TOPICS, [owner("a", "code"), owner("b", "code")])
    assert plain == {"a": 0.5, "b": 0.5}
    hinted = shares(TOPICS, [owner("a", "code"), owner("b", "code", hinted=math.e - 1)])
    assert hinted["b"] / hinted["a"] == pytest.approx(math.exp(0.5))
    alike = shares(TOPICS, [owner("a", "code"), owner("b", "code", alike=1.0)])
    assert alike == pytest.approx(hinted)


def test_hints_raise_the_topics_of_an_owner() -> None:
    """A little beside weights that know the topics, much where the hints have to decide."""
    agents = [owner("coder", "code"), owner("poet", "creative", hinted=math.e - 1)]
    beside = shares(TOPICS, agents)
    assert beside["poet"] / beside["coder"] == pytest.approx(math.exp(0.4) / 6)
    alone = shares(TOPICS, agents, ALONE)
    assert alone["poet"] / alone["coder"] == pytest.approx(math.exp(3.0) / 6)


def test_a_guest_takes_by_its_evidence() -> None:
    """Faint evidence takes about a twentieth, clear evidence most, of topics that could be its."""
    agents = [owner("coder", "code"), owner("analyst", "data"), owner("poet", "creative")]
    faint = shares(TOPICS, [*agents, guest("new", alike=1e-9)])
    assert faint["new"] == pytest.approx(math.exp(-3) / (1 + math.exp(-3)))
    clear = shares(TOPICS, [*agents, guest("new", hinted=3.0)])
    assert clear["new"] > 0.9
    same = shares(TOPICS, [*agents, guest("new", alike=1.0)])
    assert same["new"] > 0.9
    only_poems = guest("new", hinted=3.0, affinity={"creative": 1.0, "code": 0.01})
    narrow = shares(TOPICS, [*agents, only_poems])
    assert narrow["coder"] == pytest.approx(0.6)
    assert narrow["new"] + narrow["poet"] == pytest.approx(0.1)


def test_a_guest_of_a_topic_that_nobody_owns() -> None:
    """A topic without an owner is given away in proportion to the evidence, up to all of it."""
    faint = shares(TOPICS, [owner("coder", "code"), guest("new", alike=1e-9)])
    part = math.exp(-3)
    taken = 0.4 * part + 0.6 * part / (1 + part)
    assert faint["new"] == pytest.approx(taken / (taken + 0.6 / (1 + part)))
    strong = shares(TOPICS, [owner("coder", "code"), guest("new", hinted=1000.0)])
    assert strong["new"] == pytest.approx(1, abs=1e-6)


def test_without_any_evidence() -> None:
    """All are 0 when nothing speaks for any of them."""
    assert shares(TOPICS, [guest("a"), guest("b")]) == {"a": 0.0, "b": 0.0}
    assert shares(TOPICS, [owner("a", "unknown")]) == {"a": 0.0}
    assert shares(TOPICS, []) == {}
    assert shares({}, [owner("a", "code")]) == {"a": 0.0}


@given(topics, all_claims)
@settings(deadline=None)
def test_shares_add_up(found: dict[str, float], given_claims: list[Claim]) -> None:
    """The shares add up to 1 or are all 0, and each is a probability, whatever the evidence."""
    result = shares(found, given_claims)
    assert list(result) == [claim.agent_id for claim in given_claims]
    assert all(0 <= share <= 1 + 1e-9 for share in result.values())
    total = sum(result.values())
    assert total == 0 or total == pytest.approx(1)
    if any(set(claim.owns) & set(found) for claim in given_claims):
        assert total > 0


@given(topics, all_claims, st.integers(0, 6))
@settings(deadline=None)
def test_an_agent_without_evidence_changes_nothing(
    found: dict[str, float], given_claims: list[Claim], place: int
) -> None:
    """An agent without evidence changes nothing, whatever its place and its examples."""
    before = shares(found, given_claims)
    after = shares(found, [*given_claims[:place], guest("newcomer"), *given_claims[place:]])
    assert after.pop("newcomer") == 0
    assert after == before


@given(topics, all_claims, amounts, amounts)
@settings(deadline=None)
def test_more_evidence_never_takes_a_share_away(
    found: dict[str, float], given_claims: list[Claim], less: float, more: float
) -> None:
    """The share of an agent grows with its hints, be it an owner or a guest."""
    less, more = sorted((less, more))
    for one in (owner("newcomer", "code"), guest("newcomer")):
        weak = shares(found, [*given_claims, one._replace(hinted=less)])["newcomer"]
        strong = shares(found, [*given_claims, one._replace(hinted=more)])["newcomer"]
        assert weak <= strong + 1e-9
