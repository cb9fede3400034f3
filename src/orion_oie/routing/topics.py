"""Pure: from topics to agents.

The linear model knows topics, the registry has agents. An agent that owns a topic stands for it; of
several that own one, each has a share. An agent without a topic of its own takes its share of the
topics that its examples belong to, as its keywords and examples speak for it: without any
evidence it takes nothing, so it changes nothing.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_HINTED = 5.0  # for each e-fold of 1 + the sum of the weights of the hints found
_ALIKE = 6.0  # for a prompt that is the same as an example
_DOUBT = -3.0  # a share of 5 % of a topic by the faintest evidence
_TIE = 0.5  # how much evidence counts between agents that own the same topic
# How much hints raise the odds of a topic that their agent owns: beside weights that know it, and
# where there are none, and hints have to decide (the value that fits train.jsonl best).
BESIDE_WEIGHTS, ALONE = 0.4, 3.0
_LEAST_AFFINITY = 0.02
_MOST = 30.0  # evidence beyond this changes nothing


class Claim(NamedTuple):
    """What speaks for an agent: the sum of its hints that were found, and how alike its nearest
    example is, in [0, 1]. `affinity` says how much of each topic could be its own, in [0, 1]; it
    matters for an agent that owns none. A topic that is missing there has no affinity."""

    agent_id: str
    owns: Sequence[str]
    hinted: float = 0.0
    alike: float = 0.0
    affinity: Mapping[str, float] = {}


def shares(
    topics: Mapping[str, float], claims: Sequence[Claim], owners_hinted: float = BESIDE_WEIGHTS
) -> dict[str, float]:
    """The probability of each agent, adding up to 1; all 0 when nothing speaks for any.

    topics: the probability of each. What belongs to nobody is left out. owners_hinted: for each
    e-fold of 1 + the sum of the hints found of an owner, the log-odds that its topics gain.
    """
    found = {claim.agent_id: 0.0 for claim in claims}
    owners: dict[str, list[tuple[str, float]]] = {}
    boosts: dict[str, float] = {}
    rivals: list[tuple[Claim, float]] = []
    for claim in claims:
        strength = math.log1p(claim.hinted) if claim.hinted > 0 else 0.0
        if claim.owns:
            weight, boost = math.exp(_TIE * (strength + claim.alike)), owners_hinted * strength
            for topic in claim.owns:
                owners.setdefault(topic, []).append((claim.agent_id, weight))
                boosts[topic] = max(boost, boosts.get(topic, 0.0))
        elif claim.hinted > 0 or claim.alike > 0:
            evidence = _DOUBT + _HINTED * strength + _ALIKE * claim.alike
            rivals.append((claim, math.exp(min(_MOST, evidence))))
    for topic, probability in topics.items():
        weights = owners.get(topic, [])
        for claim, weight in rivals:
            # The more a prompt is like an example, the less its topic matters.
            affinity = claim.affinity.get(topic, 0.0) ** (1 - claim.alike)
            if affinity >= _LEAST_AFFINITY:
                weights = [*weights, (claim.agent_id, weight * affinity)]
        # A topic that nobody owns is claimed only as far as the evidence goes.
        whole = max(1.0, sum(weight for _, weight in weights))
        mass = probability * math.exp(boosts.get(topic, 0.0)) / whole
        for agent_id, weight in weights:
            found[agent_id] += mass * weight
    total = sum(found.values())
    return {agent_id: share / total if total > 0 else 0.0 for agent_id, share in found.items()}
