"""The router: a cascade of stages, each asked only when the earlier ones are not sure.

    attachment -> linear model and explicit request -> hints and examples -> embedding
               -> the conversation so far -> tie-break -> models in memory

The linear model reads hashed n-grams and the shape of a prompt and scores topics. `topics` turns
the probabilities of topics into those of agents and weighs in the keywords and examples of the
registry. The embedding stage is fused late: its scores are added to those of the n-grams.
Confidence is the probability of the best agent, calibrated on prompts that no weight was fitted on.
"""

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orion_oie.errors import InvalidRequestError, OrionError
from orion_oie.models.specs import CONVERSATION, AgentSpec
from orion_oie.routing import reasons, residency, sessions
from orion_oie.routing.attachment import image_route
from orion_oie.routing.base import (
    NO_CONTEXT,
    RouteContext,
)
from orion_oie.routing.candidates import candidates, hidden_topics
from orion_oie.routing.decision import (
    DECIMALS,
    Decision,
    ResidentChoice,
    SessionPull,
    TieAnswer,
    TimeBudget,
)
from orion_oie.routing.embedding_stage import EmbeddingStage
from orion_oie.routing.explicit import explicit_request
from orion_oie.routing.keyword import KeywordRouter
from orion_oie.routing.profiles import (
    AGENT_TOPICS,
    Embedder,
    Profile,
    topics_to_learn,
)
from orion_oie.routing.reasons import Verdict
from orion_oie.routing.sessions import ConversationState, Sessions
from orion_oie.routing.topics import (
    ALONE,
    BESIDE_WEIGHTS,
)
from orion_oie.schemas.results import (
    Route,
    RouteCandidate,
)

if TYPE_CHECKING:
    from orion_oie.routing.linear.fitting import Example
    from orion_oie.routing.linear.model import LinearModel

# (question, first agent, second agent, time limit in seconds or None for the usual one) -> the
# probability that the first agent suits the question better; None if no model could judge.
TieBreak = Callable[[str, AgentSpec, AgentSpec, float | None], float | None]

FITTING_PULL = 0.3  # learns ten examples of a new agent at little cost to the other agents
SURE_WITHOUT_HINTS = 0.9  # probability from which on the hints of topic owners are not consulted
_CLOSE = 0.15  # largest difference in probability that the tie-break decides
_HISTORY_TURNS = 4
# Confidence in a prompt of hardly a word: at most so much, and so much more with all its substance.
_MOST_WITHOUT_WORDS, _MOST_BY_WORDS = 0.4, 0.45
_FLOOR = 1e-3  # least probability of the agent that answered last, so that its odds can grow


class HybridRouter:
    """Routes by the stages of this module. Thread-safe.

    threshold: confidence below which the conversation agent answers. model: weights to use
    instead of the packaged ones. embedder: the embedding model of the embedding stage; None
    disables that stage. enable_linear, enable_explicit, enable_hints, enable_sessions: False
    disables the stage. folder: directory that caches the vectors of examples; None keeps them in
    memory. residency_s: seconds of waiting saved at which an agent whose model is in memory may
    overtake the best by the full gap (see `residency`); 0 disables that. tie_break: called when
    two agents are close; see `TieBreak`.
    """

    def __init__(
        self,
        threshold: float = 0.25,
        *,
        model: "LinearModel | None" = None,
        embedder: Embedder | None = None,
        enable_linear: bool = True,
        enable_explicit: bool = True,
        enable_hints: bool = True,
        enable_sessions: bool = True,
        folder: Path | None = None,
        residency_s: float = 5.0,
        tie_break: TieBreak | None = None,
    ) -> None:
        self.threshold = threshold
        self.residency_s = residency_s
        self._model = model
        self._model_lock = threading.RLock()
        self._embedding_stage = None if embedder is None else EmbeddingStage(embedder, folder)
        self._enable_linear = enable_linear
        self._enable_explicit = enable_explicit
        self._enable_hints = enable_hints
        self._enable_sessions = enable_sessions
        self._tie_break = tie_break
        self._keywords = KeywordRouter(threshold)
        self._sessions = Sessions()
        self._profiles: dict[str, Profile] = {}

    @property
    def model(self) -> "LinearModel":
        """The weights in use."""
        if self._model is None:
            # Loads numpy and a megabyte of weights, so importing the library must not do it.
            from orion_oie.routing.linear.model import (
                empty_model,
                shipped_model,
            )

            with self._model_lock:
                if self._model is None:
                    self._model = shipped_model() if self._enable_linear else empty_model()
        return self._model

    @property
    def embedding_model(self) -> str | None:
        """The name under which the weights keep the head of the embedding model: that of the head
        which was found to be its own, else the name of the model."""
        stage = self._embedding_stage
        return None if stage is None else stage.known_head_of(self.model) or stage.name

    def route(
        self, query: str, agents: Mapping[str, AgentSpec], context: RouteContext = NO_CONTEXT
    ) -> Route:
        """Choose the agent for `query`; the result holds every agent's score after each stage.

        1. An image is attached and an agent owns `vision`: that agent, no further stage. Without
           an image, agents that own nothing else are no candidates.
        2. Score the topics with the linear model; raise the odds of a topic that the prompt
           requests explicitly; turn topics into agents.
        3. Consult keywords and examples: always those of agents without a topic, those of topic
           owners only while the best agent is below `SURE_WITHOUT_HINTS`.
        4. Consult the embedding model while the best agent is below `SURE_WITHOUT_EMBEDDING`, or
           if examples of an agent without a topic may contradict a sure one.
        5. In a conversation: raise the odds of the agent that answered last.
        6. The best two agents are close: ask the tie-break.
        7. Among near-equal agents, prefer one whose model is in memory.
        8. The best agent answers. Below `threshold` the conversation agent does, unless the best
           one answered last.

        The session of `context` remembers the agent, unless the call is a trial. If the embedding
        stage or the tie-break fails, the route goes on without it and notes the failure.
        """
        attached = image_route(agents, context)
        if attached is not None:
            self._remember(attached.agent_id, context)
            return attached
        agents = candidates(agents, context.images)
        budget = TimeBudget(context.limit_s)
        decision = self._decide_by_text(query, agents, context, budget)
        state = self._conversation_state(context, agents, budget)
        if state is not None:
            self._favour_last_agent(query, state, decision)
        self._break_tie(query, agents, decision, budget)
        self._prefer_resident(decision, context)
        route = self._to_route(decision, agents, state)
        self._remember(route.agent_id, context)
        return route

    def note(self, session_id: str, agent_id: str) -> None:
        """Record that this agent answered a turn of the session."""
        self._sessions.note(session_id, agent_id)

    def fit(
        self,
        examples: "Iterable[Example | tuple[str, str]]",
        agents: Mapping[str, AgentSpec] | None = None,
        *,
        pull: float = FITTING_PULL,
    ) -> "LinearModel":
        """Train the weights on examples: pairs of text and agent, or `Example`s. Returns the new
        model, which the router uses from now on; `model.save(path)` stores it.

        agents: the agents of the registry, for the topics they own. pull: strength of the prior
        that holds the weights where they are. The calibration stays unchanged.

        Waits without limit for an embedder that is ready. Raises `InvalidRequestError` for no
        example, for a malformed one, for one whose agent owns no topic (its hints list none) and
        for a `pull` below 0; also whatever the embedder raises.
        """
        from orion_oie.routing.linear.fitting import (
            check,
            fitted,
        )

        rows = [_example(one, number) for number, one in enumerate(examples)]
        check(rows, pull)
        names = dict(AGENT_TOPICS)
        for agent_id, spec in (agents or {}).items():
            names[agent_id] = topics_to_learn(agent_id, spec, self.model.topics)
        vectors = None
        stage = self._embedding_stage
        if stage is not None and stage.is_ready():
            vectors = stage.embedded([row.text for row in rows], self.model)
        with self._model_lock:  # a concurrent call continues from the model that this one makes
            model = fitted(self.model, rows, topics_of=names, vectors=vectors, pull=pull)
            self._model, self._profiles = model, {}
        return model

    # -- the stages

    def _decide_by_text(
        self,
        query: str,
        agents: Mapping[str, AgentSpec],
        context: RouteContext,
        budget: TimeBudget,
    ) -> Decision:
        """Run the stages that read the text."""
        from orion_oie.routing.text.prompt import read

        prompt, model = read(query), self.model
        profiles = self._profiles_of(agents, model)
        logits = model.logits(prompt.grams, prompt.signals)
        if not self._enable_linear:
            logits = logits * 0
        owners_hinted = BESIDE_WEIGHTS if self._enable_linear else ALONE
        explicit = explicit_request(prompt.parts.instruction) if self._enable_explicit else None
        hidden = hidden_topics(agents, context.images)
        decision = Decision(model, prompt, profiles, explicit, owners_hinted, hidden)
        decision.set_topics((logits * model.calibration.alone).tolist())
        decision.share_topics("linear" if self._enable_linear else "start")
        if self._enable_hints:
            self._consult_hints(decision)
        stage = self._embedding_stage
        if stage is not None and stage.is_wanted(decision, may_load=context.may_load):
            stage.consult(decision, logits, budget)
        decision.best_by_text = decision.best
        return decision

    def _consult_hints(self, decision: Decision) -> None:
        """Weigh in keywords and examples: of agents without a topic always, else when unsure. Only
        the former see web addresses, in which their hints may be looked for."""
        profiles, is_sure = decision.profiles, decision.top >= SURE_WITHOUT_HINTS
        prompt = decision.prompt
        asked = {a: p for a, p in profiles.items() if not is_sure or not p.owns}
        if not asked:
            return
        specs = {agent_id: profile.spec for agent_id, profile in profiles.items()}
        texts = {prompt.text: asked}
        if prompt.addresses:
            whole = "\n".join([prompt.text, *prompt.addresses])
            owners = {a: p for a, p in asked.items() if p.owns}
            texts = {prompt.text: owners, whole: {a: p for a, p in asked.items() if not p.owns}}
        for text, some in texts.items():
            if some:
                found = self._keywords.candidates(text, prompt.language, specs, some, prompt.shapes)
                decision.hints |= {one.agent_id: one for one in found if one.score > 0}
        alike = {a: p.spelled_alike(prompt) for a, p in asked.items() if not p.owns}
        if decision.hints or any(alike.values()):
            decision.share_topics("hints", alike)

    def _favour_last_agent(self, query: str, state: ConversationState, decision: Decision) -> None:
        """Raise the odds of the agent that answered last in the conversation."""
        weight, why = sessions.stay_log_odds(query, state)
        decision.session = SessionPull(state.agent_id, decision.best, why)
        decision.agents[state.agent_id] += _FLOOR
        decision.add_log_odds("session", {state.agent_id: weight})

    def _prefer_resident(self, decision: Decision, context: RouteContext) -> None:
        if context.wait_s is None:
            return
        taken = residency.faster_alternative(
            decision.ranked()[:3], context.wait_s, self.residency_s
        )
        if taken is None:
            return
        agent_id, saved = taken
        best_id, best = decision.ranked()[0]
        behind = decision.agents.pop(agent_id)
        # It has to come first in the order as well, since the two may be equal.
        decision.agents = {agent_id: best, **decision.agents, best_id: behind}
        decision.record("residency")
        decision.resident = ResidentChoice(agent_id, best_id, saved)

    def _break_tie(
        self,
        query: str,
        agents: Mapping[str, AgentSpec],
        decision: Decision,
        budget: TimeBudget,
    ) -> None:
        ranked = decision.ranked()
        if self._tie_break is None or len(ranked) < 2 or ranked[0][1] - ranked[1][1] > _CLOSE:
            return
        (first, p), (second, q) = ranked[:2]
        if q <= 0:
            return
        try:
            said = self._tie_break(query, agents[first], agents[second], budget.left_s())
        except OrionError as error:
            decision.asides.append(f"the tie-break failed: {error.message}")
            return
        if said is None:
            return
        decision.agents[first], decision.agents[second] = (p + q) * said, (p + q) * (1 - said)
        decision.record("tie_break")
        decision.tie = TieAnswer(first, second, said)

    # -- the result

    def _verdict(
        self, decision: Decision, agents: Mapping[str, AgentSpec], state: ConversationState | None
    ) -> Verdict:
        """The agent that answers. A turn that stays with its agent need not reach the threshold."""
        ranked = decision.ranked()
        best, probability = ranked[0] if ranked else (CONVERSATION, 0.0)
        confidence = self._confidence(decision, probability)
        is_sure = probability > 0 and confidence >= self.threshold
        if is_sure or (state is not None and state.agent_id == best):
            return Verdict(best, best, confidence, is_fallback=False)
        chosen = CONVERSATION if CONVERSATION in agents else best
        return Verdict(chosen, best, confidence, is_fallback=True)

    def _to_route(
        self, decision: Decision, agents: Mapping[str, AgentSpec], state: ConversationState | None
    ) -> Route:
        verdict = self._verdict(decision, agents, state)
        chosen = verdict.agent_id
        evidence: dict[str, dict[str, float]] = {
            agent_id: hinted.evidence for agent_id, hinted in decision.hints.items()
        }
        evidence[chosen] = {**self._evidence(decision, chosen), **evidence.get(chosen, {})}
        notes, asides = reasons.notes(decision, chosen)
        return Route(
            agent_id=chosen,
            confidence=verdict.confidence,
            reason=reasons.reason(decision, verdict, evidence[chosen], notes),
            language=decision.prompt.language.code,
            candidates=[
                RouteCandidate.model_construct(  # unvalidated for speed: built 7 times a route
                    agent_id=agent_id,
                    score=round(probability, DECIMALS),
                    evidence=evidence.get(agent_id, {}),
                    stages=decision.scores.get(agent_id, {}),
                )
                for agent_id, probability in decision.ranked()
            ],
            stages=decision.stages,
            notes=[*notes, *asides],
        )

    def _confidence(self, decision: Decision, probability: float) -> float:
        calibration = decision.model.calibration
        slope, shift = (
            calibration.confidence_fused if decision.is_fused else calibration.confidence_alone
        )
        if probability <= 0:
            return 0.0
        p = min(1 - 1e-6, max(1e-6, probability))
        z = slope * math.log(p / (1 - p)) + shift
        confidence = 1 / (1 + math.exp(min(500.0, -z)))
        much = decision.prompt.substance
        if much < 1:
            confidence = min(confidence, _MOST_WITHOUT_WORDS + _MOST_BY_WORDS * much)
        return round(confidence, DECIMALS)

    def _evidence(self, decision: Decision, chosen: str) -> dict[str, float]:
        """The words and shapes that speak most for an agent against the best of the others."""
        if not self._enable_linear or decision.agents.get(chosen, 0.0) <= 0:
            return {}
        owned = decision.profiles[chosen].owns
        if not owned:
            return {}
        names, known = list(decision.model.topics), decision.topics
        rival = next((agent_id for agent_id, _ in decision.ranked() if agent_id != chosen), None)
        rivals = decision.profiles[rival].owns if rival is not None else ()
        first = max(owned, key=lambda topic: known.get(topic, 0.0))
        rest = [topic for topic in rivals or known if topic != first]
        second = max(rest, key=lambda topic: known.get(topic, 0.0), default=first)
        return decision.model.reasons(
            decision.prompt.grams,
            decision.prompt.signals,
            names.index(first),
            names.index(second),
        )

    # -- state between calls

    def _profiles_of(
        self, agents: Mapping[str, AgentSpec], model: "LinearModel"
    ) -> dict[str, Profile]:
        """The profiles of `agents`; rebuilt only for agents that are new or have changed."""
        known, current = self._profiles, {}
        for agent_id, spec in agents.items():
            profile = known.get(agent_id)
            if profile is None or not profile.is_of(spec, model):
                profile = Profile(agent_id, spec, model)
            current[agent_id] = profile
        self._profiles = current
        return current

    def _conversation_state(
        self, context: RouteContext, agents: Mapping[str, AgentSpec], budget: TimeBudget
    ) -> ConversationState | None:
        if not self._enable_sessions:
            return None
        if context.session_id is not None:
            known = self._sessions.of(context.session_id)
            if known is not None:
                return known if known.agent_id in agents else None
        return self._state_from_history(context, agents, budget)

    def _state_from_history(
        self, context: RouteContext, agents: Mapping[str, AgentSpec], budget: TimeBudget
    ) -> ConversationState | None:
        """The state of a conversation, reconstructed from its earlier questions alone."""
        state: ConversationState | None = None
        asked = [message.content for message in context.history if message.role == "user"]
        for question in asked[-_HISTORY_TURNS:]:
            decision = self._decide_by_text(question, agents, context, budget)
            if state is not None:
                self._favour_last_agent(question, state, decision)
            if decision.top > 0:
                best = self._verdict(decision, agents, state).agent_id
                state = state.after(best) if state else ConversationState(best)
        return state

    def _remember(self, agent_id: str, context: RouteContext) -> None:
        if context.session_id is not None and not context.is_trial:
            self._sessions.note(context.session_id, agent_id)


def _example(given: "Example | tuple[str, str]", number: int) -> "Example":
    from orion_oie.routing.linear.fitting import Example

    if isinstance(given, Example):
        return given
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        raise InvalidRequestError(
            f"example {number}: a pair of text and agent is needed, or an Example, "
            f"not {type(given).__name__}"
        )
    return Example(*given)
