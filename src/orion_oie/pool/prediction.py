"""The prediction of the next agent, and the decision to load its model ahead of need.

`NextAgentPredictor` learns from the order of requests, `should_preload` decides, `PreloadLedger`
counts hits and misses. The module loads, evicts and measures nothing, and sees no text of a
session.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from time import monotonic

from orion_oie.schemas.stats import PredictionStats

# The share of the evidence that is kept for an agent that was never seen there, in observations.
_UNSEEN_WEIGHT = 0.5
# Where users come and go at random, what is less likely than this costs more loads than it saves.
_WORTH_AN_EVICTION = 0.5
_NEGLIGIBLE_WEIGHT = 0.01  # of an observation: it is forgotten then


@dataclass(frozen=True, slots=True)
class Prediction:
    """An agent that may be asked next, with its probability in [0, 1]."""

    agent_id: str
    probability: float


@dataclass(slots=True)
class _Row:
    """The weights of the agents that followed one agent, as they were at `at_s`."""

    at_s: float
    weights: dict[str, float]


class _Habits:
    """Moves from agent to agent, of one session or of all; `last` is the agent seen last."""

    def __init__(self, half_life_s: float) -> None:
        self.last: str | None = None
        self._half_life_s = half_life_s
        self._rows: dict[str, _Row] = {}

    def __len__(self) -> int:
        return len(self._rows) + sum(len(row.weights) for row in self._rows.values())

    def after(self, agent_id: str, now_s: float) -> dict[str, float]:
        """The weights of what came after an agent, decayed until now."""
        row = self._rows.get(agent_id)
        if row is None:
            return {}
        factor = 0.5 ** (max(0.0, now_s - row.at_s) / self._half_life_s)
        faded = {other: weight * factor for other, weight in row.weights.items()}
        return {other: weight for other, weight in faded.items() if weight >= _NEGLIGIBLE_WEIGHT}

    def add(self, before: str, agent_id: str, now_s: float) -> None:
        weights = self.after(before, now_s)
        weights[agent_id] = weights.get(agent_id, 0.0) + 1.0
        self._rows[before] = _Row(now_s, weights)

    def prune(self, now_s: float) -> None:
        """Forget what is negligible."""
        faded = {before: self.after(before, now_s) for before in self._rows}
        self._rows = {before: _Row(now_s, weights) for before, weights in faded.items() if weights}


class NextAgentPredictor:
    """A first-order model of which agent follows which. Thread-safe; `clock` gives seconds.

    An observation weighs 1, and half as much each `half_life_s`. With `n(b)` the weight of the
    moves from agent `a` to `b`, and `n` that of all moves from `a`:

        overall:    P(b) = n(b) / (n + 0.5)
        a session:  P(b) = (w * own_n(b) + P_overall(b)) / (w * own_n + 1)

    The first is additive smoothing with all of the smoothing left to agents not seen yet; the
    second is a Dirichlet prior with the overall habit as its mean (MacKay and Peto, "A
    hierarchical Dirichlet language model", 1995): the more a session did itself, the less the
    others count. `session_weight` is `w`, what one observation of the session counts against the
    overall habit: with 0.5 both are even after two. Moves that weigh less than `min_weight`
    together, in all sessions, predict nothing.

    Memory is bounded: `max_sessions` sessions are kept, the least recently seen goes (and is a
    new one when it comes back); moves whose weight is negligible are forgotten.
    """

    def __init__(
        self,
        clock: Callable[[], float] = monotonic,
        *,
        half_life_s: float = 3600.0,
        session_weight: float = 0.5,
        min_weight: float = 1.5,
        max_sessions: int = 256,
    ) -> None:
        self._clock = clock
        self._half_life_s = half_life_s
        self._session_weight = session_weight
        self._min_weight = min_weight
        self._max_sessions = max_sessions
        self._lock = threading.Lock()
        self._overall = _Habits(half_life_s)
        self._sessions: OrderedDict[str, _Habits] = OrderedDict()
        self._seen: set[str] = set()  # all agents, of which there are as many as in the registry
        self._prune_at_s = clock() + half_life_s

    def knows_others(self, agent_id: str) -> bool:
        """True when there was a request for another agent than this one."""
        return len(self._seen) > 1 or agent_id not in self._seen

    def observe(self, agent_id: str, session_id: str | None = None) -> None:
        """Note a request for an agent. It follows the session's last one; without a session, the
        last one of all. The first request of a session follows nothing."""
        with self._lock:
            self._seen.add(agent_id)
            now_s = self._clock()
            if now_s >= self._prune_at_s:
                self._prune(now_s)
            before = self._overall.last
            if session_id is not None:
                session = self._session(session_id)
                before, session.last = session.last, agent_id
                if before is not None:
                    session.add(before, agent_id, now_s)
            if before is not None:
                self._overall.add(before, agent_id, now_s)
            self._overall.last = agent_id

    def predict(self, session_id: str | None, after: str) -> list[Prediction]:
        """All agents that may follow `after`, the most likely first; the probabilities sum to
        less than 1. Empty where too little is known."""
        with self._lock:
            now_s = self._clock()
            overall = self._overall.after(after, now_s)
            session = None if session_id is None else self._sessions.get(session_id)
            own = {} if session is None else session.after(after, now_s)
        weight = sum(overall.values())
        if weight < self._min_weight:
            return []
        habits = {agent_id: n / (weight + _UNSEEN_WEIGHT) for agent_id, n in overall.items()}
        own_weight = self._session_weight * sum(own.values())
        predictions = [
            Prediction(
                agent_id,
                (self._session_weight * own.get(agent_id, 0.0) + habit) / (own_weight + 1.0),
            )
            for agent_id, habit in habits.items()
        ]
        return sorted(predictions, key=lambda one: (-one.probability, one.agent_id))

    def sizes(self) -> tuple[int, int]:
        """The number of sessions that are remembered, and of all entries about agents."""
        with self._lock:
            entries = sum(len(session) for session in self._sessions.values())
            return len(self._sessions), entries + len(self._overall)

    def _session(self, session_id: str) -> _Habits:
        session = self._sessions.setdefault(session_id, _Habits(self._half_life_s))
        self._sessions.move_to_end(session_id)
        while len(self._sessions) > self._max_sessions:
            self._sessions.popitem(last=False)
        return session

    def _prune(self, now_s: float) -> None:
        self._prune_at_s = now_s + self._half_life_s
        for habits in (self._overall, *self._sessions.values()):
            habits.prune(now_s)


class PreloadReason(StrEnum):
    """The reason for which a model is, or is not, loaded ahead of need."""

    LIKELY = "it is likely to be needed next"
    DISABLED = "loading ahead is off"
    WAITING = "requests are waiting"
    MEMORY = "memory is short"
    UNLIKELY = "no model is likely enough"
    RESIDENT = "the likely models are in memory"
    NO_SPACE = "it does not fit, or its size is not known"
    WOULD_EVICT = "it would evict what is as likely"


@dataclass(frozen=True, slots=True)
class PreloadDecision:
    """The model to load: `key`, for `agent_id`, the likeliest agent that uses it; None for nothing.
    `probability` is that of the key. `reason` is about the likeliest model that is not in memory.
    """

    reason: PreloadReason
    key: str | None = None
    agent_id: str | None = None
    probability: float = 0.0


def key_probabilities(
    predictions: Sequence[Prediction], key_of_agent: Mapping[str, str]
) -> dict[str, float]:
    """The probability that each model is needed next, the most likely first. Agents that share a
    model add up; those without a key are left out."""
    sums: dict[str, float] = {}
    for one in predictions:
        key = key_of_agent.get(one.agent_id)
        if key is not None:
            sums[key] = sums.get(key, 0.0) + one.probability
    return dict(sorted(sums.items(), key=lambda item: (-item[1], item[0])))


def should_preload(
    predictions: Sequence[Prediction],
    residents: Mapping[str, float],
    key_of_agent: Mapping[str, str],
    *,
    free_bytes: int,
    footprints_bytes: Mapping[str, int],
    victims: Mapping[str, tuple[str, ...] | None],
    is_calm: bool,
    is_anything_waiting: bool,
    is_enabled: bool,
    min_probability: float = 0.3,
) -> PreloadDecision:
    """The model to load ahead of need. Pure: decides, loads nothing.

    residents: models in memory or being loaded, with the probability that each is needed next, by
        any agent.
    victims: for each model, the residents to evict for it: () for none, None (or no entry) when
        evicting does not free enough memory. One that is not among `residents` is never evicted.
    free_bytes: the memory that is free without evicting.

    Nothing is loaded while requests wait or memory is short. A model is loaded only if it is needed
    with `min_probability`, fits, and its victims together are less likely than it; and one that has
    victims only if it is needed at least as likely as not.
    """
    if not is_enabled:
        return PreloadDecision(PreloadReason.DISABLED)
    if is_anything_waiting:
        return PreloadDecision(PreloadReason.WAITING)
    if not is_calm:
        return PreloadDecision(PreloadReason.MEMORY)
    probabilities = key_probabilities(predictions, key_of_agent)
    likely = {key: p for key, p in probabilities.items() if p >= min_probability}
    reasons = [] if likely else [PreloadReason.UNLIKELY]
    for key, probability in likely.items():
        if key in residents:
            continue
        leaving = victims.get(key)
        footprint_bytes = footprints_bytes.get(key)
        if leaving is None or footprint_bytes is None:
            reasons.append(PreloadReason.NO_SPACE)
            continue
        freed_bytes = sum(footprints_bytes.get(victim, 0) for victim in leaving)
        lost = sum(
            max(residents.get(victim, inf), probabilities.get(victim, 0.0)) for victim in leaving
        )
        if footprint_bytes > free_bytes + freed_bytes:
            reasons.append(PreloadReason.NO_SPACE)
        elif leaving and (lost >= probability or probability < _WORTH_AN_EVICTION):
            reasons.append(PreloadReason.WOULD_EVICT)
        else:
            users = [one for one in predictions if key_of_agent.get(one.agent_id) == key]
            agent_id = max(users, key=lambda one: one.probability).agent_id
            return PreloadDecision(PreloadReason.LIKELY, key, agent_id, probability)
    return PreloadDecision(reasons[0] if reasons else PreloadReason.RESIDENT)


class PreloadLedger:
    """The counts of loads ahead, by key, for `PredictionStats`. Thread-safe. `enabled` is only
    passed on."""

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._lock = threading.Lock()
        self._unused: set[str] = set()
        self._predictions = self._hits = self._misses = self._wasted = 0

    def started(self, key: str) -> None:
        """Note that a load ahead began. An earlier one that was not used counts as wasted."""
        with self._lock:
            self._write_off(key)
            self._predictions += 1
            self._unused.add(key)

    def is_ahead(self, key: str) -> bool:
        """True while a load ahead has not been used."""
        with self._lock:
            return key in self._unused

    def used(self, key: str) -> None:
        """Note that a request found the model in memory, or being loaded ahead."""
        with self._lock:
            if key in self._unused:
                self._unused.remove(key)
                self._hits += 1

    def gone(self, key: str) -> None:
        """Note that the model was evicted or unloaded, or that its load failed."""
        with self._lock:
            self._write_off(key)

    def cold(self, key: str) -> None:
        """Note that a request had to begin a load; a load ahead that was not used was wasted."""
        with self._lock:
            self._write_off(key)
            self._misses += 1

    def stats(self) -> PredictionStats:
        """The counts now."""
        with self._lock:
            needed = self._hits + self._misses
            return PredictionStats(
                predictions=self._predictions,
                hits=self._hits,
                misses=self._misses,
                wasted=self._wasted,
                hit_rate=self._hits / needed if needed else None,
                enabled=self._enabled,
            )

    def _write_off(self, key: str) -> None:
        if key in self._unused:
            self._unused.remove(key)
            self._wasted += 1
