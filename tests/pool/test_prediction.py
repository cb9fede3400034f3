"""Which agent comes next: habits that are learnt and fade, and loads ahead that cost no one."""

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from helpers import Clock, run_all
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from orion_oie.pool.prediction import (
    NextAgentPredictor,
    Prediction,
    PredictionStats,
    PreloadDecision,
    PreloadLedger,
    PreloadReason,
    key_probabilities,
    should_preload,
)

HALF_LIFE_S = 100.0
MIN_PROBABILITY = 0.3


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def predictor(clock: Clock) -> NextAgentPredictor:
    return NextAgentPredictor(clock, half_life_s=HALF_LIFE_S)


def observe(
    predictor: NextAgentPredictor, agents: Sequence[str], session_id: str | None = None
) -> None:
    for agent_id in agents:
        predictor.observe(agent_id, session_id)


def probability(
    predictor: NextAgentPredictor, after: str, agent_id: str, session_id: str | None = None
) -> float:
    found = {one.agent_id: one.probability for one in predictor.predict(session_id, after)}
    return found.get(agent_id, 0.0)


# What is learnt


@pytest.mark.parametrize("session_id", [None, "s"])
def test_an_alternation_is_learnt_quickly(
    predictor: NextAgentPredictor, session_id: str | None
) -> None:
    """After A, B, A, B, A, B, A both moves are predicted with more than 0.8."""
    observe(predictor, "ABABABA", session_id)
    assert probability(predictor, "A", "B", session_id) > 0.8
    assert probability(predictor, "B", "A", session_id) > 0.8
    assert probability(predictor, "A", "A", session_id) == 0.0


def test_the_overall_numbers(predictor: NextAgentPredictor) -> None:
    """The formula by hand: three moves from A, two of them to B, half an observation is kept."""
    observe(predictor, "ABABACA")
    assert predictor.predict(None, "A") == [
        Prediction("B", pytest.approx(2 / 3.5)),
        Prediction("C", pytest.approx(1 / 3.5)),
    ]


def test_the_numbers_of_a_session(predictor: NextAgentPredictor) -> None:
    """The formula by hand: what a session did is weighed against the overall habit."""
    observe(predictor, "ABABAB", "other")
    observe(predictor, "ACA", "mine")
    overall = {"B": 3 / 4.5, "C": 1 / 4.5}
    assert predictor.predict("mine", "A") == [
        Prediction("C", pytest.approx((0.5 + overall["C"]) / 1.5)),
        Prediction("B", pytest.approx(overall["B"] / 1.5)),
    ]
    assert predictor.predict("new", "A") == predictor.predict(None, "A")
    assert predictor.predict(None, "A") == [
        Prediction("B", pytest.approx(overall["B"])),
        Prediction("C", pytest.approx(overall["C"])),
    ]


@given(others=st.integers(2, 60), session_weight=st.sampled_from([0.5, 1.0, 3.0]))
def test_its_own_habit_beats_that_of_others(others: int, session_weight: float) -> None:
    """After three moves of its own a session is believed, whatever most others do; they go on
    to be predicted what they do."""
    predictor = NextAgentPredictor(Clock(), session_weight=session_weight)
    for number in range(others):
        observe(predictor, "AB", f"other {number}")
    assert predictor.predict("mine", "A")[0].agent_id == "B"
    observe(predictor, "ACACAC", "mine")
    assert predictor.predict("mine", "A")[0].agent_id == "C"
    if others > 3:
        assert predictor.predict("other 0", "A")[0].agent_id == "B"


def test_the_more_a_session_did_the_less_others_count(predictor: NextAgentPredictor) -> None:
    """Each further move of its own makes the session's habit more probable."""
    observe(predictor, "AB" * 20, "other")
    seen = []
    for _ in range(8):
        observe(predictor, "AC", "mine")
        seen.append(probability(predictor, "A", "C", "mine"))
    assert seen == sorted(set(seen))
    assert seen[-1] > 0.8


def test_sessions_are_not_mixed_up(predictor: NextAgentPredictor) -> None:
    """Requests of sessions that come in turn are moves within each session, not between them."""
    for agent_id, session_id in zip("AXBY" * 4, itertools.cycle(["s", "t"]), strict=False):
        predictor.observe(agent_id, session_id)
    assert [one.agent_id for one in predictor.predict(None, "A")] == ["B"]
    assert [one.agent_id for one in predictor.predict(None, "X")] == ["Y"]


def test_without_a_session_the_last_of_all_counts(predictor: NextAgentPredictor) -> None:
    """A request without a session follows whatever came before it, also in a session; the first
    of a session follows nothing."""
    for number in range(3):
        predictor.observe("A", f"s{number}")
        predictor.observe("B")
    assert [one.agent_id for one in predictor.predict(None, "A")] == ["B"]
    assert predictor.predict(None, "B") == []


def test_too_little_predicts_nothing(predictor: NextAgentPredictor, clock: Clock) -> None:
    """One move is no habit, and neither are two that have faded; an unknown agent has none."""
    observe(predictor, "AB", "s")
    assert predictor.predict("s", "A") == []
    observe(predictor, "AB", "s")
    assert probability(predictor, "A", "B", "s") > 0.5
    clock.tick(HALF_LIFE_S)
    assert predictor.predict("s", "A") == []
    assert predictor.predict("s", "never heard of") == []
    assert predictor.predict("never heard of", "never heard of") == []


@given(
    observed=st.lists(
        st.tuples(
            st.sampled_from("ABCDE"), st.sampled_from([None, "s", "t", "u"]), st.floats(-50, 1e4)
        ),
        max_size=60,
    ),
    session_weight=st.floats(0, 1e6),
    min_weight=st.floats(0, 3),
)
def test_probabilities_are_probabilities(
    observed: list[tuple[str, str | None, float]], session_weight: float, min_weight: float
) -> None:
    """Whatever was seen, at whatever times (also if the clock goes back): each agent is named
    once, the most likely first, with a probability, and they sum to at most 1."""
    clock = Clock()
    predictor = NextAgentPredictor(
        clock,
        half_life_s=HALF_LIFE_S,
        session_weight=session_weight,
        min_weight=min_weight,
        max_sessions=2,
    )
    for agent_id, session_id, seconds in observed:
        predictor.observe(agent_id, session_id)
        clock.tick(seconds)
    for session_id, after in itertools.product([None, "s", "t", "u"], "ABCDE"):
        predictions = predictor.predict(session_id, after)
        probabilities = [one.probability for one in predictions]
        assert all(0.0 <= p <= 1.0 for p in probabilities)
        assert sum(probabilities) <= 1.0
        assert probabilities == sorted(probabilities, reverse=True)
        assert len({one.agent_id for one in predictions}) == len(predictions)
        assert predictor.predict(session_id, after) == predictions


# What is forgotten


@given(old=st.integers(2, 40), half_lives=st.integers(1, 6))
def test_old_habits_fade(old: int, half_lives: int) -> None:
    """A new habit wins once it weighs more than what is left of the old one, and not before."""
    clock = Clock()
    predictor = NextAgentPredictor(clock, half_life_s=HALF_LIFE_S, min_weight=0.0)
    observe(predictor, "AB" * old)
    clock.tick(half_lives * HALF_LIFE_S)
    left = old / 2**half_lives
    new = 0
    while probability(predictor, "A", "C") <= probability(predictor, "A", "B"):
        observe(predictor, "AC")
        new += 1
    assert left < new <= left + 1


def test_silence_makes_less_certain(predictor: NextAgentPredictor, clock: Clock) -> None:
    """With time a habit is less and less probable, and in the end not predicted at all."""
    observe(predictor, "AB" * 40)
    seen = []
    for _ in range(10):
        seen.append(probability(predictor, "A", "B"))
        clock.tick(HALF_LIFE_S)
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > 0.9
    assert seen[-1] == 0.0


def test_a_clock_that_goes_back_adds_nothing(predictor: NextAgentPredictor, clock: Clock) -> None:
    """Then nothing decays, and nothing grows."""
    observe(predictor, "ABA")
    observe(predictor, "BA")
    before = predictor.predict(None, "A")
    clock.tick(-3 * HALF_LIFE_S)
    assert predictor.predict(None, "A") == before != []


def test_decay_does_not_depend_on_when_one_looks(clock: Clock) -> None:
    """Asking in between, or seeing other agents, changes nothing: decay goes by time alone."""
    quiet, busy = (NextAgentPredictor(clock, half_life_s=HALF_LIFE_S) for _ in range(2))
    for predictor in (quiet, busy):
        observe(predictor, "ABACAB" * 5, "s")
    for _ in range(20):
        clock.tick(HALF_LIFE_S / 9)
        busy.predict("s", "A")
        observe(busy, "XY", "t")
    for one, other in zip(quiet.predict("s", "A"), busy.predict("s", "A"), strict=True):
        assert one.agent_id == other.agent_id
        assert one.probability == pytest.approx(other.probability)


def test_sessions_are_bounded(clock: Clock) -> None:
    """The session that was seen least recently is forgotten, and is a new one afterwards."""
    predictor = NextAgentPredictor(clock, max_sessions=2)
    observe(predictor, "AB" * 9, "other")
    observe(predictor, "AC" * 3, "mine")
    assert predictor.predict("mine", "A")[0].agent_id == "C"
    predictor.observe("A", "third")
    assert predictor.predict("mine", "A")[0].agent_id == "C"
    predictor.observe("A", "fourth")
    assert predictor.predict("mine", "A") == predictor.predict(None, "A")
    assert predictor.sizes()[0] == 2


def test_a_session_that_comes_again_stays(clock: Clock) -> None:
    """It is the least recently seen that goes, not the oldest."""
    predictor = NextAgentPredictor(clock, max_sessions=2)
    observe(predictor, "AB" * 9, "other")
    observe(predictor, "AC" * 3, "mine")
    predictor.observe("A", "other")
    predictor.observe("A", "third")
    assert predictor.predict("mine", "A") == predictor.predict(None, "A")
    assert predictor.predict("other", "A") != predictor.predict(None, "A")


@settings(max_examples=25)
@given(
    ids=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=200),
    max_sessions=st.integers(1, 5),
)
def test_memory_is_bounded(ids: list[tuple[int, int]], max_sessions: int) -> None:
    """However many sessions and agents there are: no more sessions than allowed, and what was
    not seen for long takes no room, although nobody asks for it."""
    clock = Clock()
    predictor = NextAgentPredictor(clock, half_life_s=HALF_LIFE_S, max_sessions=max_sessions)
    for agent, session in ids:
        predictor.observe(f"a{agent}", f"s{session}")
        assert predictor.sizes()[0] <= max_sessions
    clock.tick(20 * HALF_LIFE_S)
    observe(predictor, "AB", "new")
    assert predictor.sizes()[1] == 4  # one move, of the session and of all, and whence it came


class Agent(str):
    """An agent's name that lets other threads run whenever a table is asked for it."""

    def __hash__(self) -> int:
        time.sleep(0)
        return super().__hash__()


def test_many_threads_lose_nothing(clock: Clock) -> None:
    """Observed by eight threads at once, the weights are those of one after the other."""
    predictor = NextAgentPredictor(clock, half_life_s=HALF_LIFE_S)
    rounds = 25

    def work(number: int) -> None:
        for _ in range(rounds):
            observe(predictor, [Agent("A"), Agent("B")], f"s{number}")
            predictor.predict(f"s{number}", Agent("A"))

    for run in run_all([lambda number=number: work(number) for number in range(8)]):
        run.join()
    moves = 8 * rounds
    assert probability(predictor, "A", "B") == pytest.approx(moves / (moves + 0.5), rel=1e-12)


# What is loaded ahead

MODELS = ("k1", "k2", "k3", "k4")
EVERYTHING_FINE = {"is_calm": True, "is_anything_waiting": False, "is_enabled": True}


def decide(
    predictions: dict[str, float],
    residents: dict[str, float] | None = None,
    *,
    victims: dict[str, tuple[str, ...] | None] | None = None,
    free_bytes: int = 100,
    **others: bool,
) -> PreloadDecision:
    """A decision about agents that have a model of the same name, each of 100 bytes."""
    return should_preload(
        [Prediction(agent_id, p) for agent_id, p in predictions.items()],
        residents or {},
        {key: key for key in MODELS},
        free_bytes=free_bytes,
        footprints_bytes=dict.fromkeys(MODELS, 100),
        victims=dict.fromkeys(MODELS, ()) if victims is None else victims,
        **{**EVERYTHING_FINE, **others},
    )


def test_the_likeliest_is_loaded() -> None:
    """With room and in peace, the likeliest model that is not here is loaded."""
    assert decide({"k1": 0.6, "k2": 0.35}) == PreloadDecision(PreloadReason.LIKELY, "k1", "k1", 0.6)
    assert decide({"k1": 0.6, "k2": 0.35}, {"k1": 0.6}).key == "k2"


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"is_enabled": False}, PreloadReason.DISABLED),
        ({"is_anything_waiting": True}, PreloadReason.WAITING),
        ({"is_calm": False}, PreloadReason.MEMORY),
        ({"free_bytes": 99}, PreloadReason.NO_SPACE),
        ({"victims": {}}, PreloadReason.NO_SPACE),
        ({"victims": {"k1": None}}, PreloadReason.NO_SPACE),
        ({"residents": {"k1": 0.9}}, PreloadReason.RESIDENT),
        ({"residents": {"k2": 0.9}, "victims": {"k1": ("k2",)}}, PreloadReason.WOULD_EVICT),
        (
            {"residents": {"k2": 0.1}, "victims": {"k1": ("k2",)}, "free_bytes": 0},
            PreloadReason.LIKELY,
        ),
        ({"predictions": {"k1": 0.3}}, PreloadReason.LIKELY),
        ({"predictions": {"k1": 0.29}}, PreloadReason.UNLIKELY),
        ({"predictions": {}}, PreloadReason.UNLIKELY),
        ({"predictions": {"no model": 0.9}}, PreloadReason.UNLIKELY),
    ],
    ids=str,
)
def test_what_speaks_against_it(others: dict[str, object], reason: PreloadReason) -> None:
    """Each obstacle alone is enough, and is named; the last room is made by a victim."""
    decision = decide(**{"predictions": {"k1": 0.9}, **others})  # type: ignore[arg-type]
    assert decision.reason is reason
    assert decision.key == ("k1" if reason is PreloadReason.LIKELY else None)


def test_victims_count_together() -> None:
    """Two models that are a little less likely each are not given up for one."""
    residents, victims = {"k2": 0.3, "k3": 0.2}, {"k1": ("k2", "k3")}
    assert decide({"k1": 0.4}, residents, victims=victims).reason is PreloadReason.WOULD_EVICT
    assert decide({"k1": 0.6}, residents, victims=victims).key == "k1"


def test_an_obstacle_for_one_is_none_for_the_next() -> None:
    """When the likeliest has no room, the next one is loaded; when none has, it is about the
    likeliest that the reason speaks."""
    predictions = {"k1": 0.5, "k2": 0.4}
    assert decide(predictions, victims={"k1": None, "k2": ()}).key == "k2"
    refused = decide(predictions, {"k3": 0.45}, victims={"k1": None, "k2": ("k3",)})
    assert refused.reason is PreloadReason.NO_SPACE


def test_agents_that_share_a_model_add_up() -> None:
    """A model of two agents is as likely as both together, whether it would come or go."""
    both = [Prediction("c", 0.4), Prediction("b", 0.25), Prediction("a", 0.2)]
    keys = {"a": "shared", "b": "shared", "c": "single"}
    assert key_probabilities(both, keys) == {"shared": pytest.approx(0.45), "single": 0.4}
    sizes = {"shared": 1, "single": 1}
    others: dict[str, object] = {"footprints_bytes": sizes, **EVERYTHING_FINE}
    decision = should_preload(
        both, {}, keys, free_bytes=1, victims={"shared": (), "single": ()}, **others
    )
    assert (decision.key, decision.agent_id) == ("shared", "b")
    decision = should_preload(
        both, {"shared": 0.0}, keys, free_bytes=0, victims={"single": ("shared",)}, **others
    )
    assert decision.reason is PreloadReason.WOULD_EVICT


def test_an_unknown_victim_counts_as_needed() -> None:
    """What the caller says nothing about is not evicted."""
    assert decide({"k1": 1.5}, victims={"k1": ("k4",)}).reason is PreloadReason.WOULD_EVICT


@dataclass(frozen=True)
class Situation:
    """What a decision is made from: for four agents a share and a model; for each model its size,
    its victims, and the probability that it is needed, or None if it is not in memory."""

    shares: tuple[float, ...]
    keys: tuple[str | None, ...]
    sizes: tuple[int | None, ...]
    victims: tuple[tuple[str, ...] | None, ...]
    needed: tuple[float | None, ...]
    free_bytes: int
    obstacle: str

    def decide(self) -> PreloadDecision:
        return should_preload(
            self.predictions,
            self.residents,
            self.key_of_agent,
            free_bytes=self.free_bytes,
            footprints_bytes={
                key: size for key, size in zip(MODELS, self.sizes, strict=True) if size
            },
            victims=dict(zip(MODELS, self.victims, strict=True)),
            is_calm=self.obstacle != "memory",
            is_anything_waiting=self.obstacle == "waiting",
            is_enabled=self.obstacle != "disabled",
            min_probability=MIN_PROBABILITY,
        )

    @property
    def predictions(self) -> list[Prediction]:
        total = max(1.0, sum(self.shares))
        return [Prediction(f"a{i}", share / total) for i, share in enumerate(self.shares)]

    @property
    def residents(self) -> dict[str, float]:
        return {key: p for key, p in zip(MODELS, self.needed, strict=True) if p is not None}

    @property
    def key_of_agent(self) -> dict[str, str]:
        return {f"a{i}": key for i, key in enumerate(self.keys) if key is not None}


def each(options: Sequence[object], count: int) -> st.SearchStrategy:
    return st.tuples(*[st.sampled_from(options)] * count)


situations = st.builds(
    Situation,
    shares=each([0.0, 0.0, 0.1, 0.3, 0.5, 0.9], 4),
    keys=each([*MODELS, *MODELS, None], 4),
    sizes=each([1, 1, 2, 3, None], 4),
    victims=each([(), None, *itertools.combinations(MODELS, 1), ("k1", "k2"), ("k3", "k4")], 4),
    needed=each([None, None, 0.0, 0.1, 0.2, 0.3, 0.5], 4),
    free_bytes=st.integers(0, 3),
    obstacle=st.sampled_from(["none"] * 6 + ["memory", "waiting", "disabled"]),
)


@settings(max_examples=1000)
@given(situation=situations)
def test_a_load_ahead_costs_nobody(situation: Situation) -> None:
    """Whatever is loaded: it is likely and absent, it fits, nothing waits, memory is calm, and no
    resident that would go is as likely; together those that go are less likely, too."""
    decision = situation.decide()
    assert (decision.key is None) == (decision.reason is not PreloadReason.LIKELY)
    assert decision == situation.decide()
    if decision.key is None:
        return
    assert situation.obstacle == "none"
    users = [
        one
        for one in situation.predictions
        if situation.key_of_agent.get(one.agent_id) == decision.key
    ]
    assert decision.agent_id in {one.agent_id for one in users}
    assert decision.probability == pytest.approx(sum(one.probability for one in users))
    assert decision.probability >= MIN_PROBABILITY
    assert decision.key not in situation.residents
    sizes = dict(zip(MODELS, situation.sizes, strict=True))
    leaving = dict(zip(MODELS, situation.victims, strict=True))[decision.key]
    assert leaving is not None
    lost = [situation.residents[victim] for victim in leaving]
    assert all(p < decision.probability for p in lost)
    assert sum(lost) < decision.probability
    assert sizes[decision.key] <= situation.free_bytes + sum(sizes[one] or 0 for one in leaving)


def test_the_situations_reach_every_end() -> None:
    """The check itself: among the situations there are loads with and without victims, and
    every reason against one, so that the property does not hold vacuously."""
    seen: Counter[tuple[PreloadReason, bool]] = Counter()

    @settings(max_examples=1000, database=None, derandomize=True)
    @given(situation=situations)
    def look(situation: Situation) -> None:
        decision = situation.decide()
        victims = dict(zip(MODELS, situation.victims, strict=True))
        seen[decision.reason, bool(decision.key and victims[decision.key])] += 1

    look()
    assert {reason for reason, _ in seen} == set(PreloadReason)
    assert min(seen[PreloadReason.LIKELY, has_victims] for has_victims in (True, False)) > 3


# What came of it


class LedgerMachine(RuleBasedStateMachine):
    """Any order of events agrees with books kept one load at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = PreloadLedger()
        self.fates: list[list[str]] = []  # of each load ahead: its key and what became of it
        self.misses = 0

    def unused(self, key: str) -> Iterator[list[str]]:
        return (fate for fate in self.fates if fate == [key, ""])

    def settle(self, key: str, fate: str) -> None:
        for load in self.unused(key):
            load[1] = fate

    @rule(key=st.sampled_from(MODELS))
    def started(self, key: str) -> None:
        self.ledger.started(key)
        self.settle(key, "wasted")
        self.fates.append([key, ""])

    @rule(key=st.sampled_from(MODELS))
    def used(self, key: str) -> None:
        self.ledger.used(key)
        self.settle(key, "hit")

    @rule(key=st.sampled_from(MODELS))
    def gone(self, key: str) -> None:
        self.ledger.gone(key)
        self.settle(key, "wasted")

    @rule(key=st.sampled_from(MODELS))
    def cold(self, key: str) -> None:
        self.ledger.cold(key)
        self.settle(key, "wasted")
        self.misses += 1

    @invariant()
    def agrees(self) -> None:
        """Every load ahead is used, wasted or open, and only once."""
        fates = Counter(fate for _, fate in self.fates)
        needed = fates["hit"] + self.misses
        assert self.ledger.stats() == PredictionStats(
            predictions=len(self.fates),
            hits=fates["hit"],
            misses=self.misses,
            wasted=fates["wasted"],
            hit_rate=fates["hit"] / needed if needed else None,
            enabled=True,
        )


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=50, stateful_step_count=25)


def test_a_use_counts_once() -> None:
    """Only the first use of a load ahead is a hit; what nobody loaded ahead is none."""
    ledger = PreloadLedger(enabled=False)
    assert ledger.stats().hit_rate is None
    ledger.started("m")
    for key in ("m", "m", "n"):
        ledger.used(key)
    ledger.gone("m")
    ledger.cold("m")
    assert ledger.stats().model_dump() == {
        "predictions": 1,
        "hits": 1,
        "misses": 1,
        "wasted": 0,
        "hit_rate": 0.5,
        "enabled": False,
    }
