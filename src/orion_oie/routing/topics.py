"""Topic scores to agent scores: pure functions.

The linear model knows topics, the registry has agents. An agent that owns a topic receives its
probability; several owners share it. An agent without a topic of its own takes part of the topics
that its examples belong to, in proportion to the evidence of its keywords and examples; without
evidence it takes nothing.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_HINTED = 5.0  # log-odds for each e-fold of 1 + the sum of the weights of the hints found
_ALIKE = 6.0  # log-odds of a prompt that equals an example
_DOUBT = -3.0  # log-odds of the faintest evidence: a share of 5 % of a topic
_TIE = 0.5  # weight of evidence between agents that own the same topic
# How much hints raise the odds of a topic that their agent owns: beside trained weights, and alone,
# without any weights (the value that fits train.jsonl best).
BESIDE_WEIGHTS, ALONE = 0.4, 3.0
_LEAST_AFFINITY = 0.02
_MAX_EVIDENCE = 30.0  # more makes no difference, and would overflow in the end


class Claim(NamedTuple):
    """The evidence for one agent.

    owns: its topics. hinted: sum of the weights of its hints found in the prompt. alike: similarity
    of the prompt to its nearest example, in [0, 1]. affinity: the part of each topic, in [0, 1],
    that an agent without a topic of its own could take; a missing topic counts as 0.
    """

    agent_id: str
    owns: Sequence[str]
    hinted: float = 0.0
    alike: float = 0.0
    affinity: Mapping[str, float] = {}


def shares(
    topics: Mapping[str, float], claims: Sequence[Claim], owners_hinted: float = BESIDE_WEIGHTS
) -> dict[str, float]:
    """The probability of each agent; they add up to 1, or are all 0 without any evidence.

    topics: probability of each topic; a topic without an agent is left out. owners_hinted: log-odds
    that the topics of an owner gain for each e-fold of 1 + the sum of its hints found.
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
            rivals.append((claim, math.exp(min(_MAX_EVIDENCE, evidence))))
    for topic, probability in topics.items():
        weights = owners.get(topic, [])
        for claim, weight in rivals:
            # The more a prompt resembles an example, the less its topic matters.
            affinity = claim.affinity.get(topic, 0.0) ** (1 - claim.alike)
            if affinity >= _LEAST_AFFINITY:
                weights = [*weights, (claim.agent_id, weight * affinity)]
        # A topic without an owner is given away only as far as the evidence goes.
        whole = max(1.0, sum(weight for _, weight in weights))
        mass = probability * math.exp(boosts.get(topic, 0.0)) / whole
        for agent_id, weight in weights:
            found[agent_id] += mass * weight
    total = sum(found.values())
    return {agent_id: share / total if total > 0 else 0.0 for agent_id, share in found.items()}
