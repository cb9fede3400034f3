"""Routes in a conversation: it stays with its agent, leaves when clearly asked, and says so."""

import math
from typing import Any

import pytest
from helpers import run_all
from hypothesis import given, settings
from hypothesis import strategies as st
from routes import AGENTS, ANY_TEXT, Bag, agent, assert_sound, knowing

from orion_oie.models.specs import CONVERSATION
from orion_oie.routing.base import (
    VISION,
    RouteContext,
)
from orion_oie.routing.hybrid import HybridRouter
from orion_oie.routing.sessions import (
    LESS_BY_LENGTH,
    NEW_TOPIC,
    RESTLESS,
    RESTLESS_TURNS,
    SESSIONS,
    SHORT,
    SHORT_WORDS,
    STAY,
    ConversationState,
    Sessions,
    stay_log_odds,
)
from orion_oie.schemas.requests import (
    Message,
    Role,
)

# Words that the router below knows; "the" and "same" are words that it does not.
WORDS = {"loop": "code", "compile": "code", "sonnet": "creative", "table": "data"}
LONG = " ".join(["the", "same"] * 30)
NOBODY = "reasoning"  # who has most topics where no word is known
IN_CODE = RouteContext(session_id="s")


def router(**settings: Any) -> HybridRouter:
    return HybridRouter(model=knowing(WORDS, strength=60.0), **settings)


def clearly(word: str) -> str:
    """A long turn that leaves no doubt."""
    return " ".join(["the same", word] * 100)


def said(role: Role, content: str) -> Message:
    return Message(role=role, content=content)


# Where a conversation is


def test_standings() -> None:
    """Turns are counted from the last switch, and the first agent is no switch."""
    state = ConversationState("code")
    assert state.after("code") == ConversationState("code", 2)
    switched = state.after("code").after("data")
    assert switched == ConversationState("data", 1, has_switched=True)
    assert switched.after("data") == ConversationState("data", 2, has_switched=True)


def test_sessions_are_kept_apart() -> None:
    sessions = Sessions()
    assert sessions.of("a") is None
    for session_id, agent_id in (("a", "code"), ("b", "data"), ("a", "code"), ("b", "code")):
        sessions.note(session_id, agent_id)
    assert sessions.of("a") == ConversationState("code", 2)
    assert sessions.of("b") == ConversationState("code", 1, has_switched=True)


def test_the_sessions_asked_last_are_kept() -> None:
    """The number of sessions is bounded; the least recently used goes first."""
    sessions = Sessions(max_sessions=2)
    sessions.note("a", "code")
    sessions.note("b", "code")
    assert sessions.of("a") is not None
    sessions.note("c", "code")
    assert [sessions.of(each) is not None for each in "abc"] == [True, False, True]
    assert SESSIONS == 10_000


def test_sessions_from_several_threads() -> None:
    """No turn is lost."""
    sessions = Sessions()

    def note() -> None:
        for _ in range(200):
            sessions.note("s", "code")

    for run in run_all([note] * 4):
        run.join()
    assert sessions.of("s") == ConversationState("code", 800)


# How strongly a turn stays


def weight(query: str, state: ConversationState = ConversationState("code")) -> float:  # noqa: B008 (frozen)
    return stay_log_odds(query, state)[0]


def test_short_turns_stay() -> None:
    """Each further word lowers the gain; turns of a few words nearly always stay."""
    lengths = [weight(" ".join(["a"] * count)) for count in range(1, 300)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == pytest.approx(STAY - LESS_BY_LENGTH * math.log(2) + SHORT)
    few = stay_log_odds(" ".join(["a"] * SHORT_WORDS), ConversationState("code"))
    assert few[1] == "the turn is short"
    more = stay_log_odds(" ".join(["a"] * (SHORT_WORDS + 1)), ConversationState("code"))
    assert more[1] == ""
    assert few[0] - more[0] > SHORT
    assert lengths[-1] == 0


def test_text_without_spaces_has_words_too() -> None:
    """A long turn in Chinese is no short turn."""
    assert stay_log_odds("那么", ConversationState("code"))[1] == "the turn is short"
    assert weight("这是一个相当长的问题" * 20) < weight("那么")
    assert stay_log_odds("这是一个相当长的问题" * 20, ConversationState("code"))[1] == ""


@pytest.mark.parametrize(
    "query",
    [
        "By the way, which tea goes with scones and a cold winter afternoon?",
        "Something completely different: how do tides work at the coast?",
        "New topic please, tell me a little about the tides at our coast",
        "Ganz andere Frage: wie funktionieren Ebbe und Flut an der Küste?",
        "Autre chose, comment fonctionnent les marées sur la côte ?",
        "换个话题，给我讲讲海边的潮汐是怎么回事",
    ],
)
def test_a_turn_may_say_that_it_is_about_something_else(query: str) -> None:
    """An announced change of topic lowers the gain, in several languages."""
    found, why = stay_log_odds(query, ConversationState("code"))
    assert "it says that it is about something else" in why
    words = len(query.split()) if query.isascii() else max(len(query.split()), len(query) // 4)
    plain = STAY - LESS_BY_LENGTH * math.log1p(words) + (SHORT if words <= SHORT_WORDS else 0)
    assert found == pytest.approx(max(0.0, plain + NEW_TOPIC))
    assert NEW_TOPIC < 0


def test_damping_after_a_switch() -> None:
    """For some turns after a change it takes more to change again."""
    switched = ConversationState("code", 1, has_switched=True)
    plain = weight("a b c d e f g h")
    assert weight("a b c d e f g h", switched) == pytest.approx(plain + RESTLESS)
    assert stay_log_odds("a b c d e f g h", switched)[1] == "the agent has just changed"
    for _ in range(RESTLESS_TURNS):
        switched = switched.after("code")
    assert weight("a b c d e f g h", switched) == plain
    assert weight("a b c d e f g h", ConversationState("code", 1)) == plain


@given(ANY_TEXT, st.booleans(), st.integers(1, 9))
@settings(deadline=None)
def test_no_turn_is_pushed_away(query: str, has_switched: bool, turns: int) -> None:
    """The log-odds are never negative, and have a bound."""
    found, why = stay_log_odds(query, ConversationState("code", turns, has_switched))
    assert 0 <= found <= STAY + SHORT + RESTLESS
    assert why.isprintable()


def test_a_long_turn_has_a_bound() -> None:
    """Of a million characters only the beginning is looked at."""
    assert stay_log_odds(LONG * 20_000, ConversationState("code")) == stay_log_odds(
        (LONG * 20_000)[:1000], ConversationState("code")
    )
    far = "a" * 1_000_000 + " by the way, what about something else?"
    assert stay_log_odds(far, ConversationState("code")) == stay_log_odds(
        "a", ConversationState("code")
    )


# Routes with a session id


def test_a_conversation_stays_on_follow_ups() -> None:
    """A short turn stays although its words fit another agent better, and the route says so."""
    used = router()
    assert used.route(clearly("loop"), AGENTS, IN_CODE).agent_id == "code"
    alone = used.route("now a table of it", AGENTS)
    assert (alone.agent_id, alone.notes, alone.stages) == ("data", [], ["linear"])
    found = used.route("now a table of it", AGENTS, IN_CODE)
    assert (found.agent_id, found.stages) == ("code", ["linear", "session"])
    assert found.notes == ["stays with code, though data fits the words better: the turn is short"]
    assert found.reason == found.notes[0], "the words speak for another agent"
    assert_sound(found, AGENTS)


def test_a_conversation_says_nothing_where_nothing_changed() -> None:
    used = router()
    used.route(clearly("loop"), AGENTS, IN_CODE)
    found = used.route("compile it", AGENTS, IN_CODE)
    assert (found.agent_id, found.notes, found.stages) == ("code", [], ["linear", "session"])


def test_a_conversation_leaves_on_a_clear_change() -> None:
    """A long turn that is clearly another agent's goes there, and the route says whom it leaves."""
    used = router()
    used.route(clearly("loop"), AGENTS, IN_CODE)
    found = used.route(clearly("sonnet"), AGENTS, IN_CODE)
    assert (found.agent_id, found.notes) == (
        "creative",
        ["leaves code, which answered last"],
    )
    stays = used.route("more of it", AGENTS, IN_CODE)
    assert stays.agent_id == "creative", "the conversation is now with the new agent"


def test_a_turn_without_any_words_of_an_agent_stays() -> None:
    """Nothing points anywhere, and even an agent without any share may go on."""
    agents = {**AGENTS, "tea": agent(keywords={"tea": 3})}
    used = router()
    assert used.route("tea", agents, IN_CODE).agent_id == "tea"
    for query in ("hm", "", "🙂", "go on then"):
        found = used.route(query, agents, IN_CODE)
        assert found.agent_id == "tea"
        assert_sound(found, agents)


def test_a_low_confidence_does_not_end_a_conversation() -> None:
    """The threshold is for questions that stand alone."""
    used = router(threshold=0.999)
    assert used.route(clearly("loop"), AGENTS, IN_CODE).agent_id == "code"
    found = used.route(LONG, AGENTS, IN_CODE)
    assert found.confidence < 0.999
    assert found.agent_id == "code"
    assert used.route(LONG, AGENTS).agent_id == CONVERSATION


def test_whoever_leaves_needs_the_threshold() -> None:
    """A turn stays at any confidence; it goes to another agent as a question that stands alone
    would, in a session and by a history."""
    used = router(threshold=1.1)
    used.note("s", "code")
    trial = RouteContext(session_id="s", is_trial=True)
    assert used.route("more of it", AGENTS, trial).agent_id == "code"
    found = used.route(clearly("sonnet"), AGENTS, trial)
    assert (found.agent_id, found.reason[:17]) == (CONVERSATION, "no agent is sure:")
    told = [said("user", clearly("loop"))]
    assert used.route("more of it", AGENTS, RouteContext(history=told)).agent_id == CONVERSATION


def test_sessions_do_not_mix() -> None:
    used = router()
    used.route(clearly("loop"), AGENTS, RouteContext(session_id="one"))
    used.route(clearly("sonnet"), AGENTS, RouteContext(session_id="two"))
    for session_id, agent_id in (("one", "code"), ("two", "creative"), ("three", NOBODY)):
        context = RouteContext(session_id=session_id, is_trial=True)
        assert used.route("and then", AGENTS, context).agent_id == agent_id


def test_a_trial_remembers_nothing() -> None:
    """A trial is remembered neither in a new conversation nor in a known one."""
    used = router()
    trial = RouteContext(session_id="s", is_trial=True)
    used.route(clearly("loop"), AGENTS, trial)
    assert used.route("more of it", AGENTS, trial).stages == ["linear"]
    used.route(clearly("loop"), AGENTS, IN_CODE)
    used.route(clearly("sonnet"), AGENTS, trial)
    assert used.route("more of it", AGENTS, trial).agent_id == "code"
    used.route("x", {**AGENTS, VISION: agent()}, RouteContext(1, "s", is_trial=True))
    assert used.route("more of it", AGENTS, trial).agent_id == "code"


def test_a_conversation_whose_agent_was_removed() -> None:
    """A conversation whose agent is gone starts anew, and resumes when the agent returns."""
    used = router()
    used.route(clearly("loop"), AGENTS, IN_CODE)
    rest = {agent_id: spec for agent_id, spec in AGENTS.items() if agent_id != "code"}
    trial = RouteContext(session_id="s", is_trial=True)
    found = used.route("more of it", rest, trial)
    assert (found.agent_id, found.stages) == (NOBODY, ["linear"])
    assert_sound(found, rest)
    assert used.route("more of it", AGENTS, trial).agent_id == "code"
    assert used.route("more of it", rest, IN_CODE).agent_id == NOBODY
    assert used.route("more of it", AGENTS, trial).agent_id == NOBODY


def test_an_image_counts_for_its_own_turn() -> None:
    """Nobody looks at an image that did not come with the turn: the words of the next one decide,
    and an agent that only looks at images does not answer it."""
    agents = {**AGENTS, VISION: agent()}
    used = router()
    used.route(clearly("loop"), agents, IN_CODE)
    assert used.route("and this?", agents, RouteContext(1, "s")).agent_id == VISION
    found = used.route("and what is on the left?", agents, IN_CODE)
    assert found.agent_id in AGENTS
    assert "session" not in found.stages
    assert_sound(found, agents)
    assert used.route(clearly("sonnet"), agents, IN_CODE).agent_id == "creative"
    told = [said("user", "what is in this image?")]
    assert used.route("more of it", agents, RouteContext(history=told)).agent_id in AGENTS


def test_an_agent_that_also_looks_at_images_keeps_its_conversation() -> None:
    """It owns more than vision, so it may answer the turns without an image as well."""
    agents = {**AGENTS, "eyes": agent(topics=["vision", "code"])}
    del agents["code"]
    used = router()
    assert used.route("and this?", agents, RouteContext(1, "s")).agent_id == "eyes"
    assert used.route("more of it", agents, IN_CODE).agent_id == "eyes"


# Routes with a history alone


def test_a_history_without_a_session() -> None:
    """The earlier questions say whom the conversation is with; answers do not matter."""
    used = router()
    history = [
        said("system", clearly("table")),
        said("user", clearly("loop")),
        said("assistant", clearly("sonnet")),
    ]
    found = used.route("a sonnet of it", AGENTS, RouteContext(history=history))
    assert (found.agent_id, found.stages) == ("code", ["linear", "session"])
    assert found.notes[0].startswith("stays with code, though creative fits the words better")
    nobody = [said("assistant", clearly("loop"))]
    alone = used.route("a sonnet of it", AGENTS, RouteContext(history=nobody))
    assert (alone.agent_id, alone.stages) == ("creative", ["linear"])


def test_a_history_is_read_as_it_was_asked() -> None:
    """Its turns stay and leave by the same rules, and nothing is remembered of them."""
    used = router()
    history = [
        said("user", clearly("loop")),
        said("user", "a sonnet of it"),
        said("user", clearly("table")),
        said("user", "shorter"),
    ]
    for end, agent_id in ((1, "code"), (2, "code"), (3, "data"), (4, "data")):
        context = RouteContext(history=history[:end])
        assert used.route("go on", AGENTS, context).agent_id == agent_id
    assert used.route("go on", AGENTS).stages == ["linear"]


def test_a_known_session_goes_before_the_history() -> None:
    """The agent that answered counts, not the one of the route; a new process reads the history."""
    used = router()
    used.route(clearly("loop"), AGENTS, IN_CODE)
    history = [said("user", clearly("sonnet"))]
    assert used.route("more of it", AGENTS, RouteContext(0, "s", history)).agent_id == "code"
    assert (
        router().route("more of it", AGENTS, RouteContext(0, "s", history)).agent_id == "creative"
    )


def test_only_the_last_questions_of_a_history_are_read() -> None:
    """A long history takes no longer than a few questions."""
    embedder = Bag()
    used = router(embedder=embedder)
    history = [said("user", f"hm {number}") for number in range(50)]
    used.route("hm", AGENTS, RouteContext(history=history))
    assert embedder.asked == [["hm"], *([f"hm {number}"] for number in range(46, 50))]


def test_residency_in_a_conversation() -> None:
    """A model in memory does not pull a clear conversation away."""
    used = router()
    used.route(clearly("loop"), AGENTS, IN_CODE)
    waits = dict.fromkeys(AGENTS, 0.0) | {"code": 60.0}
    context = RouteContext(session_id="s", wait_s=waits.get)
    assert used.route("more of it", AGENTS, context).agent_id == "code"


def test_an_unrelated_agent_changes_no_conversation() -> None:
    """Neither the route nor the confidence of a turn."""
    agents = {**AGENTS, "new": agent(keywords={"quobbleflux": 2}), "bare": agent()}
    for query in ("more of it", clearly("sonnet"), LONG, "a table of it"):
        used, other = router(), router()
        used.route(clearly("loop"), AGENTS, IN_CODE)
        other.route(clearly("loop"), agents, IN_CODE)
        before, after = used.route(query, AGENTS, IN_CODE), other.route(query, agents, IN_CODE)
        assert (after.agent_id, after.confidence) == (before.agent_id, before.confidence)
