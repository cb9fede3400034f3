"""Profiles of agents: topics, examples, and vectors that are cached."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from gguf_embedder import GGUFEmbedder
from helpers import run_all
from hypothesis import given, settings
from hypothesis import strategies as st
from minilm import write_minilm
from numpy.typing import NDArray
from routes import AGENTS, ANY_TEXT, Bag, agent, assert_sound, knowing

from orion_oie.backends.base import LoadSpec
from orion_oie.backends.llama.host.loader import LlamaBackend
from orion_oie.cancellation import CancelScope
from orion_oie.errors import WorkerCrashedError
from orion_oie.models.specs import AgentSpec
from orion_oie.routing.hybrid import HybridRouter
from orion_oie.routing.linear.model import (
    TOPICS,
    empty_model,
)
from orion_oie.routing.profiles import (
    EMBEDDED_CHARS,
    Profile,
    Prototypes,
    text_to_embed,
    topics_of,
    topics_to_learn,
)
from orion_oie.routing.text.prompt import read
from orion_oie.schemas.results import ModelInfo

EXAMPLES = ("a pot of green tea", "which leaves are best cold")


# Topics


@pytest.mark.parametrize(
    ("agent_id", "topics", "owned", "learned"),
    [
        ("code", None, ("code",), ("code",)),
        ("reasoning", None, ("math", "logic"), ("math", "logic")),
        ("tea", None, (), ("tea",)),
        ("code", [], (), ()),
        ("code", ["data", "creative"], ("data", "creative"), ("data", "creative")),
        ("tea", ["data", "unheard-of"], ("data",), ("data", "unheard-of")),
        ("tea", ["data", "data"], ("data",), None),
    ],
)
def test_topics_of_an_agent(
    agent_id: str,
    topics: list[str] | None,
    owned: tuple[str, ...],
    learned: tuple[str, ...] | None,
) -> None:
    """Those that its hints name, else those of its name; to learn from, a new one as well."""
    spec = agent(topics=topics)
    assert topics_of(agent_id, spec, TOPICS) == owned
    if learned is not None:
        assert topics_to_learn(agent_id, spec, TOPICS) == learned


def test_a_model_may_know_the_agent_by_its_name() -> None:
    """An agent with a topic of its own name does not get the other names as well."""
    assert topics_of("reasoning", agent(), ("reasoning", "math")) == ("reasoning",)
    assert topics_of("reasoning", agent(), ("math", "code")) == ("math",)
    assert topics_of("code", agent(), ()) == ()


# Profiles


def test_a_profile_is_good_until_something_changes() -> None:
    model = empty_model()
    spec = agent(examples=list(EXAMPLES))
    profile = Profile("tea", spec, model)
    assert profile.is_of(spec, model)
    assert profile.is_of(AgentSpec.model_validate(spec.model_dump()), model)
    assert not profile.is_of(agent(examples=["milk"]), model)
    assert not profile.is_of(spec, empty_model())


def test_what_is_spelled_alike() -> None:
    """The nearest example counts: 1 for the same words, 0 for other ones or without examples."""
    model = empty_model()
    profile = Profile("tea", agent(examples=list(EXAMPLES)), model)
    for text in EXAMPLES:
        assert profile.spelled_alike(read(text)) == 1
    assert 0 < profile.spelled_alike(read("a pot of milk")) < 1
    assert profile.spelled_alike(read("12345 !?")) == 0
    assert Profile("tea", agent(), model).spelled_alike(read(EXAMPLES[0])) == 0


def test_topics_that_examples_belong_to() -> None:
    """All of the one that they are most of; any topic could be without examples."""
    model = knowing({"loop": "code", "table": "data"})
    examples = ["loop", "a loop", "the loop", "table"]
    affinity = Profile("new", agent(examples=examples), model).affinity()
    assert affinity["code"] == 1
    assert 0.2 < affinity["data"] < 0.5
    assert affinity["creative"] < 0.01
    assert set(Profile("new", agent(), model).affinity().values()) == {1.0}
    hidden = Profile("new", agent(examples=examples), model).affinity(frozenset(("code",)))
    assert (hidden["code"], hidden["data"]) == (0, 1)


@given(st.lists(ANY_TEXT, max_size=3), ANY_TEXT)
@settings(deadline=None)
def test_any_examples(examples: list[str], text: str) -> None:
    """Profiles of any texts have numbers in [0, 1]."""
    profile = Profile("new", agent(examples=examples), empty_model())
    assert 0 <= profile.spelled_alike(read(text)) <= 1
    assert all(0 <= value <= 1 for value in profile.affinity().values())
    assert len(profile.examples) == len(examples)


# What is embedded


def test_the_instruction_is_embedded_first() -> None:
    """It stands before the payload, wherever it was; both up to a number of characters."""
    code = "def area(radius):\n    return 3.14 * radius ** 2"
    text = text_to_embed(read(f"```python\n{code}\n```\nWhy is this so slow?"))
    assert text.startswith("Why is this so slow?\n")
    assert "def area" in text
    assert text_to_embed(read("hello")) == "hello"
    assert text_to_embed(read(" \n" * 400 + "hello")) == "hello"
    assert len(text_to_embed(read("word " * 1000))) == EMBEDDED_CHARS


@given(ANY_TEXT)
@settings(deadline=None)
def test_what_is_embedded_has_a_bound(text: str) -> None:
    assert len(text_to_embed(read(text))) <= EMBEDDED_CHARS


class Likening:
    """An embedding model by which all texts but "example" have the same cosine to each other."""

    name = "likening"

    def __init__(self, cosine: float) -> None:
        self._shared, self._own = cosine**0.5, (1 - cosine) ** 0.5

    def is_ready(self) -> bool:
        return True

    def is_loaded(self) -> bool:
        return True

    def embed(self, texts: Sequence[str], limit_s: float | None = None) -> NDArray[np.float32]:
        axes = np.eye(16, dtype=np.float32)
        if list(texts) == ["example"]:
            return axes[14:15]
        rows: NDArray[np.float32] = self._shared * axes[15] + self._own * axes[: len(texts)]
        return rows


@pytest.mark.parametrize("floor", [0.0, 0.5, 0.8])
def test_what_is_meant_alike(floor: float) -> None:
    """By where the cosine is between that of texts that have nothing in common and 1: some models
    find all texts alike."""
    prototypes = Prototypes(Likening(floor), None)

    def at(part: float) -> float:
        cosine = floor + part * (1 - floor)
        vector = np.zeros(16, np.float32)
        vector[14], vector[13] = cosine, (1 - cosine**2) ** 0.5
        return prototypes.alike(vector, ["example"])

    assert (at(0.0), at(0.32), at(0.75), at(1.0)) == (0, 0, 1, 1)
    assert at(0.535) == pytest.approx(0.5, abs=1e-2)
    assert prototypes.alike(np.zeros(16, np.float32), []) == 0


# Vectors of examples


def vectors_of(embedder: Bag, folder: Path | None, texts: Sequence[str] = EXAMPLES) -> Prototypes:
    prototypes = Prototypes(embedder, folder)
    found = prototypes.vectors(texts, Bag.dimensions)
    assert found.dtype == np.float32
    assert np.allclose(found, Bag().embed(texts), atol=1e-3)
    return prototypes


def test_examples_are_embedded_once() -> None:
    """By one router in memory; other texts, or another order, are other examples."""
    embedder = Bag()
    prototypes = vectors_of(embedder, None)
    for _ in range(3):
        prototypes.vectors(EXAMPLES, Bag.dimensions)
    assert embedder.asked == [list(EXAMPLES)]
    prototypes.vectors(EXAMPLES[:1], Bag.dimensions)
    prototypes.vectors(EXAMPLES[::-1], Bag.dimensions)
    assert len(embedder.asked) == 3


def test_examples_are_kept_in_a_folder(tmp_path: Path) -> None:
    """By a digest of the model and the texts: the next process embeds none, and nothing is said of
    the texts by the names."""
    folder = tmp_path / "new" / "vectors"
    first, second, other = Bag(), Bag(), Bag()
    found = vectors_of(first, folder).vectors(EXAMPLES, Bag.dimensions)
    again = vectors_of(second, folder).vectors(EXAMPLES, Bag.dimensions)
    assert np.array_equal(found, again), "the same numbers before and after a start"
    assert (first.asked, second.asked) == ([list(EXAMPLES)], [])
    (file,) = folder.iterdir()
    assert len(file.stem) == 32
    other.name = "other"
    vectors_of(other, folder)
    assert other.asked == [list(EXAMPLES)]
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[:20],
        lambda content: b"PK\x03\x04" + content,
        lambda content: b"\x93NUMPY" + b"\xff" * 50,
        lambda content: os.urandom(len(content)),
        lambda content: content[:-2] + b"\x00\x7e",  # not a number
        lambda content: content.replace(b"<f2", b"<f4"),
        lambda content: content.replace(b"(2, 4096)", b"(4096, 2)"),
        lambda content: content.replace(b"(2, 4096)", b"(1, 8192)"),
        lambda content: content.replace(b"(2, 4096)", b"(2, 40)  "),
        lambda content: content.replace(b"<f2", b"|O "),
        lambda content: content.replace(b"False", b"((((("),
    ],
)
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    vectors_of(Bag(), tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    embedder = Bag()
    vectors_of(embedder, tmp_path)
    assert embedder.asked == [list(EXAMPLES)]
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    """A damaged cache costs the time to embed again, but no route fails."""
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "vectors"
    vectors_of(Bag(), folder)
    (tmp_path / "taken").mkdir()
    embedder = Bag()
    vectors_of(embedder, tmp_path / "taken")
    (file,) = (tmp_path / "taken").iterdir()
    file.unlink()
    (file / "in the way").mkdir(parents=True)
    vectors_of(embedder, tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == [file.name]
    agents = {**AGENTS, "tea": agent(examples=list(EXAMPLES))}
    router = HybridRouter(model=empty_model(), embedder=Bag(), folder=folder)
    assert "embedding" in router.route("cold leaves", agents).stages


def test_what_the_model_raises_is_raised(tmp_path: Path) -> None:
    """A failed embedding raises, and nothing of the failure is cached."""
    embedder = Bag()
    embedder.is_broken = True
    prototypes = Prototypes(embedder, tmp_path)
    with pytest.raises(WorkerCrashedError):
        prototypes.vectors(EXAMPLES, Bag.dimensions)
    assert list(tmp_path.iterdir()) == []
    embedder.is_broken = False
    assert len(prototypes.vectors(EXAMPLES, Bag.dimensions)) == 2


def test_several_threads_at_the_same_folder(tmp_path: Path) -> None:
    """Concurrent callers all get the vectors, and one complete file stays."""
    all_prototypes = [Prototypes(Bag(), tmp_path) for _ in range(2)]

    def look(prototypes: Prototypes) -> NDArray[np.float32]:
        return prototypes.vectors(EXAMPLES, Bag.dimensions)

    runs = run_all([lambda one=one: look(one) for one in all_prototypes * 4])  # type: ignore[misc]
    found = [run.join() for run in runs]
    assert all(np.array_equal(one, found[0]) for one in found)
    assert len(list(tmp_path.iterdir())) == 1
    embedder = Bag()
    vectors_of(embedder, tmp_path)
    assert embedder.asked == []


# With a real embedding model


class MiniLM:
    """all-MiniLM-L6-v2 in a worker, by any name."""

    def __init__(self, embedder: GGUFEmbedder, name: str) -> None:
        self._embedder = embedder
        self.name = name

    def is_ready(self) -> bool:
        return True

    def is_loaded(self) -> bool:
        return self._embedder.pid is not None

    def embed(self, texts: Sequence[str], limit_s: float | None = None) -> NDArray[np.float32]:
        return self._embedder.embed(texts, CancelScope())


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GGUFEmbedder]:
    path = write_minilm(tmp_path_factory.mktemp("minilm") / "minilm.gguf")
    info = ModelInfo(model_id="minilm", variant="f16", name="M", version="2", license="apache-2.0")
    embedder = GGUFEmbedder(LlamaBackend().load, LoadSpec(info, (path,), is_embedding=True))
    yield embedder
    embedder.close()


SAILING = agent(
    examples=[
        "How do I reef the mainsail when the wind picks up?",
        "Which knot holds a jib sheet on its cleat?",
        "When does the tide turn in the harbour mouth?",
    ]
)


def test_other_words_of_the_same_meaning(minilm: GGUFEmbedder, tmp_path: Path) -> None:
    """Without a head the examples speak: a question that shares hardly a word is found."""
    agents = {**AGENTS, "sailing": SAILING}
    words = HybridRouter(model=empty_model())
    router = HybridRouter(model=empty_model(), embedder=MiniLM(minilm, "m"), folder=tmp_path)
    for question in (
        "shorten the sails in a strong wind",
        "what rope hitch fastens the foresail line",
    ):
        assert words.route(question, agents).agent_id != "sailing"
        found = router.route(question, agents)
        assert (found.agent_id, found.stages[-1]) == ("sailing", "embedding")
    assert router.route("refactor a database driver", agents).agent_id != "sailing"
    assert len(list(tmp_path.iterdir())) == 2  # of the examples, and of what has nothing in common


def test_the_trained_head_of_the_package(minilm: GGUFEmbedder) -> None:
    """Vectors of the model that the weights know are fused with the words."""
    router, plain = HybridRouter(embedder=MiniLM(minilm, "all-minilm-l6-v2")), HybridRouter()
    agents = {**AGENTS, "sailing": SAILING}
    for text in ("hm, and what would you say to that?", "🙂 fix the pot", "الطقس 12", "\x00 yes"):
        found = router.route(text, agents)
        assert_sound(found, agents)
        assert (found.stages[-1], found.notes) == ("embedding", [])
        assert found.candidates != plain.route(text, agents).candidates


def test_text_that_no_model_can_read(minilm: GGUFEmbedder) -> None:
    """A lone surrogate costs the stage at most."""
    router = HybridRouter(model=empty_model(), embedder=MiniLM(minilm, "m"))
    assert_sound(router.route("\ud800 hm \udfff", AGENTS), AGENTS)
