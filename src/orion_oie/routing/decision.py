"""The state of one routing decision: the prompt, the probabilities so far, the result of each
stage, and the time left.
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from orion_oie.errors import DeadlineExceededError
from orion_oie.models.specs import CONVERSATION
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
_EXPLICIT_BONUS = 2.5  # added to the log-odds of a topic that is requested explicitly
_EXCLUSION_MALUS = 2.5  # subtracted from those of a topic that is excluded
_WITHOUT_WORDS = 1.5  # log-odds of conversation for a prompt without a single word


class SessionPull(NamedTuple):
    """The agent that answered last, the best one by the words alone, and the reasons to stay."""

    last: str
    better: str
    why: str


class TieAnswer(NamedTuple):
    """Two close agents, and the probability that the tie-break gave the first one."""

    first: str
    second: str
    said: float


class ResidentChoice(NamedTuple):
    """An agent whose model is in memory, the near-equal one that it overtook, and the seconds of
    waiting that this saves."""

    faster: str
    slower: str
    saved_s: float


@dataclass
class Decision:
    """One prompt and its probabilities for each topic and agent.

    explicit: a topic that the prompt requests explicitly, and the words that do so. owners_hinted:
    see `topics.shares`. hidden: topics that the question cannot have. asides: notes on stages that
    failed or were not used.
    """

    model: "LinearModel"
    prompt: "Prompt"
    profiles: Mapping[str, Profile]
    explicit: tuple[str, str] | None = None
    owners_hinted: float = BESIDE_WEIGHTS
    hidden: frozenset[str] = frozenset()
    topics: dict[str, float] = field(default_factory=dict)
    agents: dict[str, float] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    asides: list[str] = field(default_factory=list)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    hints: dict[str, RouteCandidate] = field(default_factory=dict)
    is_fused: bool = False
    best_by_text: str = ""  # the best agent after the stages that read the text
    session: SessionPull | None = None
    tie: TieAnswer | None = None
    resident: ResidentChoice | None = None

    @property
    def top(self) -> float:
        """The probability of the best agent."""
        return max(self.agents.values(), default=0.0)

    @property
    def best(self) -> str:
        """The most probable agent, the first if several are equal; empty if there is none."""
        return max(self.agents, key=self.agents.__getitem__, default="")

    def ranked(self) -> list[tuple[str, float]]:
        """Agents and their probabilities, best first."""
        return sorted(self.agents.items(), key=lambda item: -item[1])

    def set_topics(self, logits: Iterable[float]) -> None:
        """Set the probabilities of the topics from their logits and the explicit request; the
        hidden ones have none."""
        known = zip(self.model.topics, logits, strict=True)
        scores = {topic: score for topic, score in known if topic not in self.hidden}
        if not scores:
            self.topics = {}
            return
        if self.explicit and self.explicit[0] in scores:
            scores[self.explicit[0]] += _EXPLICIT_BONUS
        for topic in self.prompt.excluded:
            if topic in scores:
                scores[topic] -= _EXCLUSION_MALUS
        much = self.prompt.substance
        if much < 1:  # the less there is to read, the less the scores count
            scores = {topic: much * score for topic, score in scores.items()}
            if CONVERSATION in scores:
                scores[CONVERSATION] += (1 - much) * _WITHOUT_WORDS
        # For so few numbers plain Python is faster than numpy.
        highest = max(scores.values())
        weights = {topic: math.exp(score - highest) for topic, score in scores.items()}
        total = sum(weights.values())
        self.topics = {topic: weight / total for topic, weight in weights.items()}

    def share_topics(self, stage: str, alike: Mapping[str, float] | None = None) -> None:
        """Set the probabilities of the agents from those of the topics. alike: similarity of the
        prompt to the nearest example of each agent."""
        claims = [
            Claim(
                agent_id,
                profile.owns,
                self.hints[agent_id].score if agent_id in self.hints else 0.0,
                (alike or {}).get(agent_id, 0.0),
                profile.affinity(self.hidden),
            )
            for agent_id, profile in self.profiles.items()
        ]
        self.agents = shares(self.topics, claims, self.owners_hinted)
        self.record(stage)

    def add_log_odds(self, stage: str, gains: Mapping[str, float]) -> None:
        """Add `gains` to the log-odds of agents."""
        drawn = {a: p * math.exp(gains.get(a, 0.0)) for a, p in self.agents.items()}
        total = sum(drawn.values())
        if total > 0:
            self.agents = {agent_id: value / total for agent_id, value in drawn.items()}
            self.record(stage)

    def record(self, stage: str) -> None:
        """Store the current probabilities as the result of a stage."""
        if self.stages[-1:] != [stage]:
            self.stages.append(stage)
        for agent_id, probability in self.agents.items():
            self.scores.setdefault(agent_id, {})[stage] = round(probability, DECIMALS)


class TimeBudget:
    """The time that all stages of one route together may wait."""

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = limit_s
        self._until = math.inf if limit_s is None else time.monotonic() + limit_s
        self.embedding_failed = False  # then the stage is not tried again for this route

    def left_s(self) -> float | None:
        """The seconds left; None without a limit. Raises `DeadlineExceededError` at the limit."""
        if self._limit_s is None:
            return None
        left_s = self._until - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceededError(
                f"the route has used its {self._limit_s:.3g} s", deadline_s=self._limit_s
            )
        return left_s
