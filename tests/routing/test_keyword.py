"""The keyword router: explainable scores, honest confidence, and an answer for any text."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_oie.models.specs import (
    CONVERSATION,
    AgentSpec,
    RegistryFile,
)
from orion_oie.routing import keyword as keyword_module
from orion_oie.routing.base import VISION, RouteContext
from orion_oie.routing.candidates import candidates
from orion_oie.routing.keyword import FAR_FACTOR, KeywordRouter
from orion_oie.schemas.results import Route

THRESHOLD = 0.35
MODELS_JSON = Path(__file__).parents[2] / "models.json"
AGENTS = RegistryFile.model_validate_json(MODELS_JSON.read_text(encoding="utf-8")).agents
any_text = st.text(alphabet=st.characters(exclude_categories=()), max_size=400)


def agent(**routing: Any) -> AgentSpec:
    return AgentSpec(
        name="A", description="", system_prompt="", models={"primary": "m"}, routing=routing
    )


def route(query: str, agents: Mapping[str, AgentSpec], threshold: float = THRESHOLD) -> Route:
    return KeywordRouter(threshold).route(query, agents)


def evidence(query: str, **routing: Any) -> dict[str, float]:
    return route(query, {"a": agent(**routing)}).candidates[0].evidence


# How a hint is found


@pytest.mark.parametrize(
    ("keyword", "text", "is_found"),
    [
        ("rust", "Is Rust hard to learn?", True),
        ("rust", "I do not trust this crusty bread", False),
        ("Straße", "die STRASSE ist lang", True),
        ("naïve", "a NAÏVE question", True),
        ("c++", "port it to C++, please", True),
        ("c++", "vitamin c and more", False),
        ("node.js", "a Node.js server", True),
        (".net", "a .NET library", True),
        ("e-mail", "send an e-mail now", True),
        ("translat*", "the translation, please", True),
        ("translat*", "lost in mistranslation", False),
        ("weather", "weather_report", False),
        ("翻译", "请翻译这句话", True),
        ("번역", "번역해 주세요", True),
        ("แปล", "ช่วยแปลหน่อย", True),
        ("python", "用Python写一个函数", True),
        ("解析log", "请解析log文件", True),
        ("解析log", "请解析logic", False),
    ],
)
def test_keywords(keyword: str, text: str, is_found: bool) -> None:
    """Keywords match whole words in any case; without borders where a script has no spaces."""
    assert evidence(text, keywords={keyword: 2}) == ({f"keyword:{keyword}": 2} if is_found else {})


@pytest.mark.parametrize(
    ("phrase", "text", "is_found"),
    [
        ("short story", "Write a SHORT\n  story now", True),
        ("short story", "a short storyboard", False),
        ("let's play", "Let’s play chess", True),
        ("unit test*", "my unit tests fail", True),
        ("in c", "loops in C?", True),
        ("in c", "loops in css", False),
        ("as soon as", "as soon as possible", True),
        ("", "anything", False),
    ],
)
def test_phrases(phrase: str, text: str, is_found: bool) -> None:
    """Phrases match across any white space and either apostrophe, on word borders."""
    assert evidence(text, phrases={phrase: 1}) == ({f"phrase:{phrase}": 1} if is_found else {})


def test_patterns_ignore_case() -> None:
    """A pattern is searched in the text as it was written, in any case."""
    assert evidence("see Ticket-42", patterns={r"ticket-\d+": 3}) == {r"pattern:ticket-\d+": 3}
    assert evidence("see ticket", patterns={r"ticket-\d+": 3}) == {}


def test_features_are_scaled_by_their_strength() -> None:
    """A feature contributes its weight times the strength of the shape."""
    weak = evidence("rename old_user_name", features={"code_shape": 2})
    strong = evidence("def f(x):\n    return x", features={"code_shape": 2})
    assert 0 < weak["feature:code_shape"] < strong["feature:code_shape"] <= 2


def test_a_word_counts_once() -> None:
    """Repeating a word adds nothing to its evidence."""
    assert evidence("cheese " * 40, keywords={"cheese": 1.5}) == {"keyword:cheese": 1.5}


def test_the_middle_of_a_long_text_counts_less() -> None:
    """A long text is mostly material: its middle counts by a factor, and patterns skip it."""
    text = f"{'lorem ' * 120}cheese{' ipsum' * 120}"
    assert evidence(text, keywords={"cheese": 2}) == {"keyword:cheese": 2 * FAR_FACTOR}
    assert evidence(text, patterns={"cheese": 2}) == {}
    assert evidence(f"cheese {text}", keywords={"cheese": 2}) == {"keyword:cheese": 2}


# Score, confidence, decision


def test_confidence_formula() -> None:
    """The confidence is best / (best + 1) * (0.6 + 0.4 * margin), as documented."""
    alone = {"a": agent(keywords={"tea": 1})}
    tie = {"a": agent(keywords={"tea": 3}), "b": agent(keywords={"tea": 3})}
    apart = {"a": agent(keywords={"tea": 4}), "b": agent(keywords={"tea": 1})}
    assert route("tea", alone).confidence == pytest.approx(1 / 2)
    assert route("tea", tie).confidence == pytest.approx(3 / 4 * 0.6)
    assert route("tea", apart).confidence == pytest.approx(4 / 5 * (0.6 + 0.4 * 3 / 4))
    assert route("coffee", apart).confidence == 0


@given(st.floats(0.1, 20), st.floats(0.1, 20), st.floats(0.1, 20))
@settings(deadline=None)
def test_confidence_grows_with_the_margin(best: float, low: float, high: float) -> None:
    """With the same best score, a closer runner-up never raises the confidence."""
    low, high = sorted((min(low, best), min(high, best)))

    def confidence(second: float) -> float:
        agents = {"a": agent(keywords={"tea": best}), "b": agent(keywords={"tea": second})}
        return route("tea", agents).confidence

    assert 0 < confidence(high) <= confidence(low) < 1


def test_candidates_are_sorted_and_complete() -> None:
    """Every agent is a candidate, best first, equal ones in the order of the registry."""
    agents = {
        "none": agent(),
        "low": agent(keywords={"tea": 1}),
        "top": agent(keywords={"tea": 2}, phrases={"green tea": 1}),
        "same": agent(keywords={"green": 1}),
    }
    found = route("green tea", agents)
    assert [c.agent_id for c in found.candidates] == ["top", "low", "same", "none"]
    assert found.candidates[0].evidence == {"keyword:tea": 2, "phrase:green tea": 1}


def test_low_confidence_goes_to_conversation() -> None:
    """Under the threshold the conversation agent answers, and the reason names the best one."""
    agents = {"tea": agent(keywords={"tea": 0.3}), CONVERSATION: agent()}
    found = route("tea", agents)
    assert found.agent_id == CONVERSATION
    assert found.confidence < THRESHOLD
    assert (
        found.reason == "no agent is sure: the best guess was tea (0.23), so conversation answers"
    )


def test_the_reason_never_rounds_up_to_the_threshold() -> None:
    """A confidence just under the threshold is not printed as if it had been reached."""
    found = route("tea", {"tea": agent(keywords={"tea": 0.5366}), CONVERSATION: agent()})
    assert 0.349 < found.confidence < THRESHOLD
    assert "the best guess was tea (0.34)" in found.reason


def test_nothing_found_goes_to_conversation() -> None:
    """A text without any hint is a conversation, with no confidence."""
    found = route("Hmm.", {"tea": agent(keywords={"tea": 1}), CONVERSATION: agent()})
    assert (found.agent_id, found.confidence) == (CONVERSATION, 0)
    assert found.reason == "no agent's hints occur in the question"


def test_without_a_conversation_agent() -> None:
    """Without a conversation agent the best one answers, and the first one when none scored."""
    agents = {"first": agent(), "tea": agent(keywords={"tea": 0.3})}
    assert route("tea", agents).agent_id == "tea"
    assert route("coffee", agents).agent_id == "first"
    assert route("tea", {}).agent_id == CONVERSATION


@pytest.mark.parametrize(
    ("threshold", "chosen"), [(0.0, "tea"), (0.5, "tea"), (0.51, CONVERSATION)]
)
def test_the_threshold_is_the_callers(threshold: float, chosen: str) -> None:
    """An agent answers from the threshold on, itself included."""
    agents = {CONVERSATION: agent(), "tea": agent(keywords={"tea": 1})}
    assert route("tea", agents, threshold).agent_id == chosen


def test_the_reason_is_in_words() -> None:
    """The reason lists the strongest evidence as a person would."""
    routing = {
        "keywords": {"python": 2, "loop": 1},
        "phrases": {"for loop": 3},
        "patterns": {r"fix\b": 0.9},
        "features": {"code_shape": 3},
    }
    agents = {"code": agent(**routing), "other": agent(features={"non_english": 3})}
    assert route("python loop", agents).reason == "keywords 'python', 'loop'"
    assert route("Fix this loop", agents).reason == "keyword 'loop' and a pattern"
    assert (
        route("a python for loop: user.save()", agents).reason
        == "phrase 'for loop', keywords 'python', 'loop' and code shape"
    )
    assert route("Warum ist das so?", agents).reason == "the language is de"


# Agents change at run time


def test_a_new_agent_takes_part_at_once() -> None:
    """An agent that is registered between two calls is chosen by the second one."""
    router, agents = KeywordRouter(THRESHOLD), dict(candidates(AGENTS, 0))
    query = "Which mulch suits my orchids and hydrangeas?"
    assert router.route(query, agents).agent_id == CONVERSATION
    agents["gardener"] = agent(keywords={"orchid*": 2, "mulch": 2})
    assert router.route(query, agents).agent_id == "gardener"
    del agents["gardener"]
    assert "gardener" not in {c.agent_id for c in router.route(query, agents).candidates}


def test_changed_hints_count_at_once() -> None:
    """Replacing an agent's spec replaces its hints."""
    router = KeywordRouter(THRESHOLD)
    assert router.route("tea", {"a": agent(keywords={"tea": 1})}).candidates[0].score == 1
    assert router.route("tea", {"a": agent(keywords={"tea": 2})}).candidates[0].score == 2


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows with each compilation, which costs time and shows in nothing else."""
    compiled: list[Any] = []

    class Counting(keyword_module._CompiledHints):
        def __init__(self, hints: Any) -> None:
            compiled.append(hints)
            super().__init__(hints)

    monkeypatch.setattr(keyword_module, "_CompiledHints", Counting)
    return compiled


def test_hints_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same or an equal set of agents is not compiled again; one new agent compiles one."""
    compiled = compilations(monkeypatch)
    router, agents = KeywordRouter(THRESHOLD), dict(candidates(AGENTS, 0))
    for query in ("one", "two", "three"):
        router.route(query, agents)
    equal = {name: spec.model_copy(deep=True) for name, spec in agents.items()}
    router.route("four", equal)
    assert len(compiled) == len(agents)
    router.route("five", {**equal, "new": agent(keywords={"tea": 1})})
    assert len(compiled) == len(agents) + 1


def test_one_router_serves_several_threads() -> None:
    """Threads with different agents get the answers that each would get alone."""
    router = KeywordRouter(THRESHOLD)
    sets = [AGENTS, {"a": agent(keywords={"tea": 1})}, {"a": agent(keywords={"tea": 2})}]
    jobs = [(f"tea number {i}", sets[i % 3]) for i in range(150)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: router.route(*job), jobs))
    assert together == [route(*job) for job in jobs]


# Any text


@settings(deadline=None)
@given(any_text)
def test_a_route_for_any_text(text: str) -> None:
    """Any text gets a route to a known agent whose score is the sum of its evidence."""
    found = route(text, AGENTS)
    assert found.agent_id in AGENTS
    assert 0 <= found.confidence <= 1
    assert found.reason
    assert {c.agent_id for c in found.candidates} == set(AGENTS) - {VISION}
    for candidate in found.candidates:
        assert candidate.score == pytest.approx(sum(candidate.evidence.values()))
        assert all(weight > 0 for weight in candidate.evidence.values())
    if found.confidence < THRESHOLD:
        assert found.agent_id == CONVERSATION
    else:
        assert found.agent_id == found.candidates[0].agent_id


@settings(deadline=None, max_examples=50)
@given(any_text, st.lists(st.text(min_size=1, max_size=12), max_size=6))
def test_any_hint_is_accepted(text: str, hints: list[str]) -> None:
    """Keywords and phrases of any characters are taken literally and found in their own text."""
    agents = {"a": agent(keywords=dict.fromkeys(hints, 1.0), phrases=dict.fromkeys(hints, 1.0))}
    found = route(text, agents).candidates[0]
    assert found.score == pytest.approx(sum(found.evidence.values()))


@settings(deadline=None, max_examples=20)
@given(any_text, any_text)
def test_only_the_ends_of_a_long_text_are_read(one: str, other: str) -> None:
    """The middle of a very long text changes nothing, so the work is bounded."""
    head, tail, fill = "Summarize this. " * 300, "And be brief. " * 300, 1_000
    assert route(head + one.ljust(fill) + tail, AGENTS) == route(
        head + other.ljust(fill) + tail, AGENTS
    )


@pytest.mark.parametrize(
    "piece",
    ["a", " ", "\n", "write a ", "python ", "1 + ", "你", "if how many ", "\ud800", "a,b\n"],
)
def test_a_million_characters(piece: str) -> None:
    """A million characters of anything are routed without an error."""
    assert route(piece * (1_000_000 // len(piece)), AGENTS).agent_id in AGENTS


# The registry that comes with the library


@pytest.mark.parametrize(
    ("agent_id", "example"),
    [(name, text) for name, spec in AGENTS.items() for text in spec.routing.examples],
)
def test_examples_reach_their_agent(agent_id: str, example: str) -> None:
    """The examples of each agent are routed to it, those about images with one."""
    context = RouteContext(images=int(agent_id == VISION))
    found = KeywordRouter(THRESHOLD).route(example, AGENTS, context)
    assert found.agent_id == agent_id
    assert route(example, AGENTS).agent_id in set(AGENTS) - {VISION}


@pytest.mark.parametrize(
    ("language", "query"),
    [
        ("fr", "Comment enlever une tache de vin rouge ?"),
        ("es", "¿Qué necesito para plantar un limonero?"),
        ("de", "Schreibe eine Python-Funktion, die zwei Zahlen addiert"),
        ("it", "Quanto fa 17 per 23?"),
        ("pt", "Como faço para instalar o Docker no Ubuntu?"),
        ("zh", "写一首关于秋天的诗"),
        ("ja", "SQLで重複した行を削除する方法を教えて"),
        ("ko", "파이썬 리스트를 정렬하는 방법은?"),
        ("ar", "ما هو حاصل ضرب ١٢ في ٧؟"),
        ("ru", "Напиши рассказ про старый маяк"),
    ],
)
def test_other_languages_are_multilingual(language: str, query: str) -> None:
    """A question in another language is multilingual whatever it is about."""
    found = route(query, AGENTS)
    assert (found.agent_id, found.language) == ("multilingual", language)


@pytest.mark.parametrize(
    ("agent_id", "query"),
    [
        ("conversation", "What is the function of the pancreas?"),
        ("conversation", "My script for the week: sleep, read, repeat. Any tips?"),
        ("conversation", "Which wine should be on the table with salmon?"),
        ("conversation", "Tell me about the life of snakes such as the python."),
        ("conversation", "How do I say no to my boss politely?"),
        ("conversation", "What were the causes of the French Revolution?"),
        ("conversation", "Who wrote the poem The Raven?"),
        ("creative", "Write a poem about a lonely SQL database"),
        ("creative", "Write a short story about a mathematician who fears triangles"),
        ("creative", "Write a haiku about debugging code at night"),
        ("creative", "I need a podcast script on Java, the island and its volcanoes"),
        ("code", "Write a Python function that counts words in a poem"),
        ("code", "Write a program that translates Morse code to letters"),
        ("reasoning", "A poet writes 3 poems a day. How many poems are that in 2 weeks?"),
        ("multilingual", "Translate this poem into German: The sea is calm tonight."),
        ("multilingual", "Write a thank-you email in Spanish"),
        ("data", "Classify each review of this novel as positive or negative"),
        ("data", "Extract the names of the characters from the story as JSON"),
    ],
)
def test_misleading_words(agent_id: str, query: str) -> None:
    """Words of another agent's subject do not outweigh what is asked for."""
    assert route(query, AGENTS).agent_id == agent_id


def test_the_registry_is_whole() -> None:
    """models.json has its agents, each with known models and its own short prompt, and with a lite
    model but for the one that looks at images: there none may answer that cannot see."""
    registry = RegistryFile.model_validate_json(MODELS_JSON.read_text(encoding="utf-8"))
    wanted = {CONVERSATION, "code", "creative", "multilingual", "reasoning", "data", VISION}
    assert wanted <= set(registry.agents)
    prompts = [spec.system_prompt for spec in registry.agents.values()]
    assert len(set(prompts)) == len(prompts)
    assert all(15 <= len(prompt.split()) <= 40 for prompt in prompts)
    for agent_id, spec in registry.agents.items():
        assert spec.models.lite == (None if agent_id == VISION else "smollm2-135m-instruct")
        assert {spec.models.primary, *spec.models.fallback} <= set(registry.models)
    assert registry.agents[VISION].fallback_agent == CONVERSATION
    assert registry.models[registry.agents[VISION].models.primary].type == "vision-lm"
    for names in (
        *registry.model_groups.values(),
        *(r.models for r in registry.recommendations.values()),
    ):
        assert set(names) <= set(registry.models)
