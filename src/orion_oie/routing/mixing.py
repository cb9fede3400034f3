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
_OWNER_HINTED = 0.4
_LEAST_AFFINITY = 0.02


class Claim(NamedTuple):
    """What speaks for an agent: the sum of its hints that were found, and how alike its nearest
    example is, in [0, 1]. `affinity` says how much of each topic could be its own, in [0, 1]; it
    matters for an agent that owns none. A topic that is missing there has no affinity."""

    agent_id: str
    owns: Sequence[str]
    hinted: float = 0.0
    alike: float = 0.0
    affinity: Mapping[str, float] = {}


def shares(topics: Mapping[str, float], claims: Sequence[Claim]) -> dict[str, float]:
    """The probability of each agent, adding up to 1; all 0 when nothing speaks for any.

    topics: the probability of each. What belongs to nobody is left out.
    """
    found = {claim.agent_id: 0.0 for claim in claims}
    for topic, probability in topics.items():
        weights = {claim.agent_id: _weight(claim, topic) for claim in claims}
        total = sum(weights.values())
        owners = [_strength(claim) for claim in claims if topic in claim.owns]
        boost = math.exp(_OWNER_HINTED * max(owners)) if owners else 1.0
        # A topic that nobody owns is claimed only as far as the evidence goes.
        scale = 1.0 if owners else max(1.0, total)
        for agent_id, weight in weights.items() if total > 0 else ():
            found[agent_id] += probability * boost * weight / max(total, scale)
    total = sum(found.values())
    return {agent_id: share / total if total > 0 else 0.0 for agent_id, share in found.items()}


def _strength(claim: Claim) -> float:
    return math.log1p(max(0.0, claim.hinted))


def _weight(claim: Claim, topic: str) -> float:
    if topic in claim.owns:
        return math.exp(_TIE * (_strength(claim) + claim.alike))
    if claim.owns or (claim.hinted <= 0 and claim.alike <= 0):
        return 0.0
    affinity = claim.affinity.get(topic, 0.0)
    if affinity < _LEAST_AFFINITY:
        return 0.0
    evidence = _DOUBT + _HINTED * _strength(claim) + _ALIKE * claim.alike
    return affinity * math.exp(min(30.0, evidence))
