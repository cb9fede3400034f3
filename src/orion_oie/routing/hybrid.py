"""The router: a cascade of stages, each asked only when the ones before are not sure.

    attachment -> linear model and explicit wishes -> hints and examples -> embedding
               -> the conversation so far -> what is in memory -> tie-break

The linear model reads hashed n-grams and the shape of a prompt. It gives the probabilities of
topics; `mixing` turns them into those of agents, where keywords and examples of the registry take
part. The embedding stage is fused late: its scores are added to those of the n-grams. Confidence is
the probability of the best agent, calibrated on prompts that no weight was fitted on.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from orion_oie.errors import OrionError
from orion_oie.routing import residency
from orion_oie.routing.base import CONVERSATION, NO_CONTEXT, VISION, RouteContext
from orion_oie.routing.keyword import KeywordRouter
from orion_oie.routing.mixing import ALONE, BESIDE_WEIGHTS, Claim, shares
from orion_oie.routing.profiles import (
    AGENT_TOPICS,
    Embedder,
    Profile,
    Prototypes,
    meant_alike,
    text_to_embed,
    topics_of,
    topics_to_learn,
)
from orion_oie.routing.sessions import Sessions, Standing, pull
from orion_oie.routing.wishes import wish
from orion_oie.schemas import Route, RouteCandidate
from orion_oie.specs import AgentSpec

if TYPE_CHECKING:
    from orion_oie.routing.fitting import Example
    from orion_oie.routing.linear import Floats, LinearModel
    from orion_oie.routing.prompt import Prompt

TieBreak = Callable[[str, AgentSpec, AgentSpec], float | None]

# What the stages before have to reach for the next ones to be spared: probabilities.
SURE_WITHOUT_HINTS = 0.9
FITTING_PULL = 0.3  # ten examples of a new agent are learned, and nobody else loses much
SURE_WITHOUT_EMBEDDING = 0.9
_ATTACHED = 0.97
_WISHED = 2.5  # added to the log-odds of a topic that is asked for outright
_CLOSE = 0.15  # of probability: the tie-break looks at no more
_HISTORY_TURNS = 4
_PROTOTYPE_SHARPNESS = 12.0  # of cosines, where no head was trained for the embedding model
_SHOWN_REASONS = 3
_EMBEDDED_AT_ONCE = 16
_DECIMALS = 4
_FLOOR = 1e-3  # no agent is so unlikely that a conversation could not be with it


@dataclass
class _Work:
    """One prompt on its way through the stages."""

    model: "LinearModel"
    prompt: "Prompt"
    profiles: Mapping[str, Profile]
    topics: dict[str, float]
    agents: dict[str, float] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    asides: list[str] = field(default_factory=list)  # notes that are no part of the reason
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    hints: dict[str, RouteCandidate] = field(default_factory=dict)
    is_fused: bool = False

    def ranked(self) -> list[tuple[str, float]]:
        """Agents and their probabilities, the best first."""
        return sorted(self.agents.items(), key=lambda item: -item[1])

    def record(self, stage: str) -> None:
        """Keep the probabilities that a stage has led to."""
        self.stages.append(stage)
        for agent_id, probability in self.agents.items():
            self.scores.setdefault(agent_id, {})[stage] = round(probability, _DECIMALS)


class HybridRouter:
    """Routes by the stages of the module. Thread-safe.

    threshold: confidence under which the conversation agent answers. model: other weights than
    those that come with the package. embedder: what the embedding stage embeds with; None leaves
    that stage out. enable_linear, enable_hints: False leaves out the stage. folder: where vectors
    of examples are kept; None keeps them in memory. residency_s: seconds of waiting from which on
    an agent whose model is in memory may win over a near-equal one, 0 never. tie_break: the
    probability that the first of two agents is the better one, asked when the two are close.
    """

    def __init__(
        self,
        threshold: float = 0.25,
        *,
        model: "LinearModel | None" = None,
        embedder: Embedder | None = None,
        enable_linear: bool = True,
        enable_hints: bool = True,
        folder: Path | None = None,
        residency_s: float = 5.0,
        tie_break: TieBreak | None = None,
    ) -> None:
        self.threshold = threshold
        self.residency_s = residency_s
        self._given = model
        self._embedder = embedder
        self._prototypes = None if embedder is None else Prototypes(embedder, folder)
        self._enable_linear = enable_linear
        self._enable_hints = enable_hints
        self._tie_break = tie_break
        self._keywords = KeywordRouter(threshold)
        self._sessions = Sessions()
        self._profiles: dict[str, Profile] = {}

    @property
    def model(self) -> "LinearModel":
        """The weights in use."""
        if self._given is None:
            # numpy and a megabyte of weights: a mere import of the library should not pay for it.
            from orion_oie.routing.linear import empty_model, shipped_model

            self._given = shipped_model() if self._enable_linear else empty_model()
        return self._given

    def route(
        self, query: str, agents: Mapping[str, AgentSpec], context: RouteContext = NO_CONTEXT
    ) -> Route:
        """The agent for `query`, with what every stage thought of every agent."""
        attached = self._attached(agents, context)
        if attached is not None:
            self._remember(attached.agent_id, context)
            return attached
        work = self._judged(query, agents, context)
        standing = self._standing(context, agents)
        if standing is not None:
            self._stay(query, standing, work)
        self._prefer_resident(work, context)
        self._break_tie(query, agents, work)
        route = self._route(work, agents)
        self._remember(route.agent_id, context)
        return route

    def note(self, session_id: str, agent_id: str) -> None:
        """A turn of the session is answered by an agent that was asked for by name."""
        self._sessions.note(session_id, agent_id)

    def fit(
        self,
        examples: "Iterable[Example | tuple[str, str]]",
        agents: Mapping[str, AgentSpec] | None = None,
        *,
        pull: float = FITTING_PULL,
    ) -> "LinearModel":
        """Draw the weights towards examples: pairs of text and agent, or `Example`s. Returns the
        new model, which is in use from now on; `model.save(path)` keeps it.

        agents: the registry's, for the topics that they own. pull: how strongly the weights are
        held where they are. The calibration stays as it was.

        Raises `InvalidRequestError` for no example, for one that is none or whose agent owns no
        topic (its hints name an empty list), for a `pull` below 0, and what the embedding raises
        when there is an embedder that is ready.
        """
        from orion_oie.routing.fitting import Example, fitted
        from orion_oie.routing.prompt import read

        rows = [one if isinstance(one, Example) else Example(*one) for one in examples]
        names = dict(AGENT_TOPICS)
        for agent_id, spec in (agents or {}).items():
            names[agent_id] = topics_to_learn(agent_id, spec, self.model.topics)
        vectors = None
        if rows and self._embedder is not None and self._embedder.is_ready():
            texts = [text_to_embed(read(row.text)) for row in rows]
            vectors = (self._embedder.name, self._embedded(texts))
        self._given = fitted(self.model, rows, topics_of=names, vectors=vectors, pull=pull)
        self._profiles = {}
        return self._given

    def _embedded(self, texts: Sequence[str]) -> "Floats":
        """Vectors of many texts, shape (texts, dimensions), in pieces: each may take a while."""
        import numpy as np

        assert self._embedder is not None
        pieces = range(0, len(texts), _EMBEDDED_AT_ONCE)
        found = [self._embedder.embed(texts[at : at + _EMBEDDED_AT_ONCE]) for at in pieces]
        return np.concatenate(found)

    # -- the stages

    def _attached(self, agents: Mapping[str, AgentSpec], context: RouteContext) -> Route | None:
        if not context.images:
            return None
        owner = next((a for a, s in agents.items() if topics_of(a, s, (VISION,))), None)
        if owner is None:
            return None
        return Route(
            agent_id=owner,
            confidence=_ATTACHED,
            reason="an image is attached" if context.images == 1 else "images are attached",
            candidates=[RouteCandidate(agent_id=owner, score=_ATTACHED)],
            stages=["attachment"],
        )

    def _judged(self, query: str, agents: Mapping[str, AgentSpec], context: RouteContext) -> _Work:
        """The stages that look at the text."""
        from orion_oie.routing.prompt import read

        prompt, model = read(query), self.model
        profiles = self._profiles_of(agents, model)
        logits = model.logits(prompt.grams, prompt.signals)
        if not self._enable_linear:
            logits = logits * 0
        work = _Work(model, prompt, profiles, {})
        wished = wish(prompt.parts.instruction)
        self._set_topics(work, logits * model.calibration.alone, wished)
        self._mix(work, profiles, "linear" if self._enable_linear else "start")
        if wished:
            work.notes.append(f"asked for outright: '{wished[1]}'")
        if self._enable_hints:
            self._consult_hints(query, work, profiles)
        if self._is_embedding_wanted(work, profiles, may_load=context.may_load):
            self._consult_embedding(work, profiles, logits, wished, context.limit_s)
        return work

    def _set_topics(self, work: _Work, logits: "Floats", wished: tuple[str, str] | None) -> None:
        scores = dict(zip(work.model.topics, logits.tolist(), strict=True))
        if wished and wished[0] in scores:
            scores[wished[0]] += _WISHED
        # So few numbers are added up sooner without numpy.
        highest = max(scores.values())
        weights = {topic: math.exp(score - highest) for topic, score in scores.items()}
        total = sum(weights.values())
        work.topics = {topic: weight / total for topic, weight in weights.items()}

    def _mix(
        self,
        work: _Work,
        profiles: Mapping[str, Profile],
        stage: str,
        alike: Mapping[str, float] | None = None,
    ) -> None:
        claims = [
            Claim(
                agent_id,
                profile.owns,
                work.hints[agent_id].score if agent_id in work.hints else 0.0,
                (alike or {}).get(agent_id, 0.0),
                profile.affinity,
            )
            for agent_id, profile in profiles.items()
        ]
        owners_hinted = BESIDE_WEIGHTS if self._enable_linear else ALONE
        work.agents = shares(work.topics, claims, owners_hinted)
        work.record(stage)

    def _consult_hints(self, query: str, work: _Work, profiles: Mapping[str, Profile]) -> None:
        """Keywords and examples: always those of agents without a topic, the rest when unsure."""
        is_sure = _top(work) >= SURE_WITHOUT_HINTS
        asked = {a: p for a, p in profiles.items() if not is_sure or not p.owns}
        if not asked:
            return
        specs = {agent_id: profile.spec for agent_id, profile in profiles.items()}
        found = self._keywords.candidates(
            query, work.prompt.language, specs, asked, work.prompt.shapes
        )
        work.hints = {one.agent_id: one for one in found if one.score > 0}
        alike = {a: p.spelled_alike(work.prompt) for a, p in asked.items() if not p.owns}
        if work.hints or any(alike.values()):
            self._mix(work, profiles, "hints", alike)

    def _is_embedding_wanted(
        self, work: _Work, profiles: Mapping[str, Profile], *, may_load: bool
    ) -> bool:
        if self._embedder is None or not work.prompt.has_words:
            return False
        is_sure = _top(work) >= SURE_WITHOUT_EMBEDDING
        best = max(work.topics, key=lambda topic: work.topics[topic])
        rivals = (p for p in profiles.values() if not p.owns and p.examples)
        if is_sure and not any(p.affinity.get(best, 0.0) > 0.3 for p in rivals):
            return False
        if not self._embedder.is_ready():
            work.asides.append(f"the embedding model {self._embedder.name} is not here")
            return False
        if not may_load and not self._embedder.is_loaded():
            work.asides.append(f"the embedding model {self._embedder.name} would be loaded")
            return False
        return True

    def _consult_embedding(
        self,
        work: _Work,
        profiles: Mapping[str, Profile],
        logits: "Floats",
        wished: tuple[str, str] | None,
        limit_s: float | None,
    ) -> None:
        assert self._embedder is not None
        assert self._prototypes is not None
        # Asked for the examples of agents without a topic alone, it leaves the topics as they are.
        is_sure = _top(work) >= SURE_WITHOUT_EMBEDDING
        try:
            vector = self._embedder.embed([text_to_embed(work.prompt)], limit_s)[0]
            found = work.model.vector_logits(self._embedder.name, vector, work.prompt.signals)
            alike = {
                agent_id: meant_alike(
                    vector, self._prototypes.vectors(profile.examples, len(vector), limit_s)
                )
                for agent_id, profile in profiles.items()
                if profile.examples and not (profile.owns and (is_sure or found is not None))
            }
        except OrionError as error:
            work.asides.append(f"the embedding stage failed: {error.message}")
            return
        calibration = work.model.calibration
        if found is not None and is_sure:
            self._mix(work, profiles, "embedding", alike)
            return
        if found is not None:
            fused = logits * calibration.grams + found * calibration.vector
            self._set_topics(work, fused, wished)
            work.is_fused = True
            self._mix(work, profiles, "embedding", alike)
            return
        # No head was trained for this model: the examples of all agents speak for them.
        self._mix(work, profiles, "embedding", alike)
        drawn = {
            a: p * math.exp(_PROTOTYPE_SHARPNESS * 0.35 * alike.get(a, 0.0))
            for a, p in work.agents.items()
        }
        total = sum(drawn.values())
        if total > 0:
            work.agents = {agent_id: value / total for agent_id, value in drawn.items()}
            work.stages.pop()
            work.record("embedding")

    def _stay(self, query: str, standing: Standing, work: _Work) -> None:
        """Raise the odds of the agent that the conversation is with."""
        weight, why = pull(query, standing)
        raised = {
            agent_id: (p + _FLOOR) * math.exp(weight) if agent_id == standing.agent_id else p
            for agent_id, p in work.agents.items()
        }
        total = sum(raised.values())
        best = work.ranked()[0][0] if work.agents else standing.agent_id
        work.agents = {agent_id: p / total for agent_id, p in raised.items()}
        work.record("session")
        now = work.ranked()[0][0] if work.agents else standing.agent_id
        if now == standing.agent_id and best != now:
            because = f": {why}" if why else ""
            work.notes.append(f"stays with {now}, though {best} fits the words better{because}")
        elif now != standing.agent_id:
            work.notes.append(f"leaves {standing.agent_id}, which answered last")

    def _prefer_resident(self, work: _Work, context: RouteContext) -> None:
        if context.wait_s is None:
            return
        taken = residency.nearer(work.ranked()[:3], context.wait_s, self.residency_s)
        if taken is None:
            return
        agent_id, saved = taken
        best_id, best = work.ranked()[0]
        behind = work.agents.pop(agent_id)
        # First in order as well: the two may be equal.
        work.agents = {agent_id: best, **work.agents, best_id: behind}
        work.record("residency")
        work.notes.append(
            f"{agent_id} instead of the near-equal {best_id}: it can answer {saved:.1f} s earlier"
        )

    def _break_tie(self, query: str, agents: Mapping[str, AgentSpec], work: _Work) -> None:
        ranked = work.ranked()
        if self._tie_break is None or len(ranked) < 2 or ranked[0][1] - ranked[1][1] > _CLOSE:
            return
        (first, p), (second, q) = ranked[:2]
        if q <= 0:
            return
        try:
            said = self._tie_break(query, agents[first], agents[second])
        except OrionError as error:
            work.asides.append(f"the tie-break failed: {error.message}")
            return
        if said is None:
            return
        work.agents[first], work.agents[second] = (p + q) * said, (p + q) * (1 - said)
        work.record("tie_break")
        work.notes.append(
            f"a language model was asked: {first} {said:.2f}, {second} {1 - said:.2f}"
        )

    # -- what comes of it

    def _route(self, work: _Work, agents: Mapping[str, AgentSpec]) -> Route:
        ranked = work.ranked()
        confidence = self._confidence(work, ranked[0][1] if ranked else 0.0)
        best = ranked[0][0] if ranked else CONVERSATION
        is_chosen = bool(ranked) and ranked[0][1] > 0 and confidence >= self.threshold
        if not is_chosen and "session" not in work.stages:
            chosen = CONVERSATION if CONVERSATION in agents else best
            reached = math.floor(confidence * 100) / 100
            reason = (
                f"no agent reached {self.threshold:g}; best was {best} at {reached:.2f}"
                if ranked and ranked[0][1] > 0
                else "nothing in the question points to an agent"
            )
        else:
            chosen, reason = best, ""
        evidence = self._evidence(work, ranked)
        return Route(
            agent_id=chosen,
            confidence=confidence,
            reason=reason or self._reason(work, chosen, evidence),
            language=work.prompt.language.code,
            candidates=[
                RouteCandidate.model_construct(  # checked by its maker: it is built 7 times a route
                    agent_id=agent_id,
                    score=round(probability, _DECIMALS),
                    evidence={
                        **(evidence if agent_id == best else {}),
                        **(work.hints[agent_id].evidence if agent_id in work.hints else {}),
                    },
                    stages=work.scores.get(agent_id, {}),
                )
                for agent_id, probability in ranked
            ],
            stages=work.stages,
            notes=[*work.notes, *work.asides],
        )

    def _confidence(self, work: _Work, probability: float) -> float:
        calibration = work.model.calibration
        slope, shift = (
            calibration.confidence_fused if work.is_fused else calibration.confidence_alone
        )
        if probability <= 0:
            return 0.0
        p = min(1 - 1e-6, max(1e-6, probability))
        z = slope * math.log(p / (1 - p)) + shift
        return round(1 / (1 + math.exp(min(500.0, -z))), _DECIMALS)

    def _evidence(self, work: _Work, ranked: Sequence[tuple[str, float]]) -> dict[str, float]:
        """The words and shapes that counted most for the best agent against the second."""
        if not self._enable_linear or not ranked or ranked[0][1] <= 0:
            return {}
        topics = list(work.model.topics)
        owned = [work.profiles[agent_id].owns for agent_id, _ in ranked[:2]]
        if not owned[0]:
            return {}
        first = max(owned[0], key=lambda topic: work.topics[topic])
        rest = [t for t in (owned[1] if len(owned) > 1 else ()) or topics if t != first]
        second = max(rest, key=lambda topic: work.topics[topic], default=first)
        return work.model.reasons(
            work.prompt.grams, work.prompt.signals, topics.index(first), topics.index(second)
        )

    def _reason(self, work: _Work, chosen: str, evidence: Mapping[str, float]) -> str:
        hints = work.hints[chosen].evidence if chosen in work.hints else {}
        named = [_in_words(name) for name in (*evidence, *hints)]
        shown = list(dict.fromkeys(named))[:_SHOWN_REASONS]
        reason = f"reads most like {chosen}"
        if shown:
            reason += f": {', '.join(shown)}"
        return "; ".join([reason, *work.notes])

    # -- what is remembered

    def _profiles_of(
        self, agents: Mapping[str, AgentSpec], model: "LinearModel"
    ) -> dict[str, Profile]:
        """The profiles of `agents`; made again only for what is new or has changed."""
        known, current = self._profiles, {}
        for agent_id, spec in agents.items():
            profile = known.get(agent_id)
            if profile is None or not profile.is_of(spec, model):
                profile = Profile(agent_id, spec, model)
            current[agent_id] = profile
        self._profiles = current
        return current

    def _standing(self, context: RouteContext, agents: Mapping[str, AgentSpec]) -> Standing | None:
        if context.session_id is not None:
            known = self._sessions.of(context.session_id)
            if known is not None:
                return known if known.agent_id in agents else None
        return self._told(context, agents)

    def _told(self, context: RouteContext, agents: Mapping[str, AgentSpec]) -> Standing | None:
        """Where a conversation is by its earlier questions alone."""
        standing: Standing | None = None
        asked = [message.content for message in context.history if message.role == "user"]
        for question in asked[-_HISTORY_TURNS:]:
            work = self._judged(question, agents, context)
            if standing is not None:
                self._stay(question, standing, work)
            ranked = work.ranked()
            if ranked and ranked[0][1] > 0:
                best = ranked[0][0]
                standing = standing.after(best) if standing else Standing(best)
        return standing

    def _remember(self, agent_id: str, context: RouteContext) -> None:
        if context.session_id is not None and not context.is_trial:
            self._sessions.note(context.session_id, agent_id)


def _top(work: _Work) -> float:
    return max(work.agents.values(), default=0.0)


def _in_words(name: str) -> str:
    """Evidence as a reason names it: words in quotes, shapes without."""
    kind, _, what = name.partition(":")
    if kind in ("shape", "feature"):
        return what.strip().replace("_", " ")
    if kind == "pattern":
        return "a pattern"
    return f"'{what if kind in ('keyword', 'phrase') else name}'"
