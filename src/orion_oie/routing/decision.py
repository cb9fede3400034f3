"""One prompt on its way through the stages of the router: what is known of it so far, what each
stage has led to, and the time that is left.
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orion_oie.errors import DeadlineExceededError
from orion_oie.routing.profiles import Profile
from orion_oie.routing.topics import (
    BESIDE_WEIGHTS,
    Claim,
    shares,
)
from orion_oie.schemas.results import RouteCandidate

if TYPE_CHECKING:
    from orion_oie.routing.linear.model import LinearModel
    from orion_oie.routing.text.prompt import Prompt

DECIMALS = 4
_EXPLICIT_BONUS = 2.5  # added to the log-odds of a topic that is asked for outright


@dataclass
class Decision:
    """`topics` and `agents` hold probabilities. explicit: a topic that is asked for outright, and the
    words that say so. owners_hinted: see `mixing.shares`."""

    model: "LinearModel"
    prompt: "Prompt"
    profiles: Mapping[str, Profile]
    explicit: tuple[str, str] | None = None
    owners_hinted: float = BESIDE_WEIGHTS
    topics: dict[str, float] = field(default_factory=dict)
    agents: dict[str, float] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    asides: list[str] = field(default_factory=list)  # notes that are no part of the reason
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    hints: dict[str, RouteCandidate] = field(default_factory=dict)
    is_fused: bool = False
    best_by_text: str = ""  # the agent that the text alone speaks for

    @property
    def top(self) -> float:
        """The probability of the best agent."""
        return max(self.agents.values(), default=0.0)

    @property
    def best(self) -> str:
        """The best agent; the first of several, and empty where there are none."""
        return max(self.agents, key=self.agents.__getitem__, default="")

    def ranked(self) -> list[tuple[str, float]]:
        """Agents and their probabilities, the best first."""
        return sorted(self.agents.items(), key=lambda item: -item[1])

    def set_topics(self, logits: Iterable[float]) -> None:
        """The probabilities of the topics by their logits, and by what is asked for outright."""
        scores = dict(zip(self.model.topics, logits, strict=True))
        if self.explicit and self.explicit[0] in scores:
            scores[self.explicit[0]] += _EXPLICIT_BONUS
        # So few numbers are added up sooner without numpy.
        highest = max(scores.values())
        weights = {topic: math.exp(score - highest) for topic, score in scores.items()}
        total = sum(weights.values())
        self.topics = {topic: weight / total for topic, weight in weights.items()}

    def mix(self, stage: str, alike: Mapping[str, float] | None = None) -> None:
        """From topics to agents. alike: how alike the nearest example of an agent is."""
        claims = [
            Claim(
                agent_id,
                profile.owns,
                self.hints[agent_id].score if agent_id in self.hints else 0.0,
                (alike or {}).get(agent_id, 0.0),
                profile.affinity,
            )
            for agent_id, profile in self.profiles.items()
        ]
        self.agents = shares(self.topics, claims, self.owners_hinted)
        self.record(stage)

    def weigh(self, stage: str, gains: Mapping[str, float]) -> None:
        """Add to the log-odds of agents."""
        drawn = {a: p * math.exp(gains.get(a, 0.0)) for a, p in self.agents.items()}
        total = sum(drawn.values())
        if total > 0:
            self.agents = {agent_id: value / total for agent_id, value in drawn.items()}
            self.record(stage)

    def record(self, stage: str) -> None:
        """Keep the probabilities that a stage has led to."""
        if self.stages[-1:] != [stage]:
            self.stages.append(stage)
        for agent_id, probability in self.agents.items():
            self.scores.setdefault(agent_id, {})[stage] = round(probability, DECIMALS)


class TimeBudget:
    """For how long a route may wait for its stages, all together."""

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = limit_s
        self._until = math.inf if limit_s is None else time.monotonic() + limit_s
        self.has_failed = False  # the embedding stage, which is not asked again

    def left_s(self) -> float | None:
        """None without a limit. Raises `DeadlineExceededError` when nothing is left."""
        if self._limit_s is None:
            return None
        left_s = self._until - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceededError(
                f"the route has used its {self._limit_s:.3g} s", deadline_s=self._limit_s
            )
        return left_s
