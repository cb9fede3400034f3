"""A trained head belongs to the embedding model that computes the same, whatever it is called."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_embedder import GGUFEmbedder
from minilm import minilm_folder, write_minilm
from numpy.typing import NDArray
from routes import AGENTS, Bag, agent, assert_sound, knowing, probes_of

from orion_oie.backends.base import LoadSpec
from orion_oie.backends.llama.host.loader import LlamaBackend
from orion_oie.cancellation import CancelScope
from orion_oie.errors import DeadlineExceededError
from orion_oie.models.specs import RegistryFile
from orion_oie.routing.base import RouteContext
from orion_oie.routing.hybrid import HybridRouter
from orion_oie.routing.linear.fitting import read_examples
from orion_oie.routing.linear.model import TOPICS, Head, LinearModel, empty_model, load_model
from orion_oie.routing.linear.probes import PROBE_TEXTS, Probes
from orion_oie.routing.text.signals import SIGNALS
from orion_oie.schemas.results import ModelInfo

ROOT = Path(__file__).parents[2]
OWN = ROOT / "benchmarks" / "routing" / "own.jsonl"
SHIPPED = RegistryFile.model_validate_json((ROOT / "models.json").read_text("utf-8")).agents
NO_HEAD = "the weights hold no head for the embedding model "


class Turned(Bag):
    """Another model of the same name and width."""

    def embed(self, texts: Sequence[str], limit_s: float | None = None) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = np.roll(super().embed(texts, limit_s), 7, axis=1)
        return rows


def with_heads(**probes: Probes) -> LinearModel:
    """Weights that know nothing, and heads of which each is sure of another topic."""
    heads = {}
    for number, (name, of_model) in enumerate(probes.items()):
        bias = np.zeros(len(TOPICS), np.float32)
        bias[number] = 30.0
        shape = (Bag.dimensions + len(SIGNALS), len(TOPICS))
        heads[name] = Head(np.zeros(shape, np.float32), bias, of_model)
    return replace(knowing({"loop": "code"}), heads=heads)


def test_a_head_is_found_by_what_the_model_computes() -> None:
    """Not by its name: a namesake is passed over, and the one of another name is used."""
    model = with_heads(bag=probes_of(Turned()), other=probes_of(Bag()))
    model = replace(model, heads={**model.heads, "none": replace(model.heads["bag"])})
    found = HybridRouter(model=model, embedder=Bag()).route("hm hm", AGENTS)
    assert found.agent_id == TOPICS[1]
    assert not any(NO_HEAD in note for note in found.notes)
    assert_sound(found, AGENTS)


def test_a_model_without_a_head_is_noted() -> None:
    """Its vectors are compared with the examples of the agents, as for any other model."""
    agents = {**AGENTS, "tea": agent(examples=["brew green tea leaves"])}
    router = HybridRouter(model=with_heads(bag=probes_of(Bag())), embedder=Turned())
    for _ in range(2):
        found = router.route("leaves tea green brew", agents)
        assert found.agent_id == "tea"
        assert f"{NO_HEAD}bag" in found.notes
    plain = HybridRouter(model=with_heads(), embedder=Turned()).route("hm hm", AGENTS)
    assert plain.notes == [], "weights without any head have nothing to say"


def test_the_probes_are_embedded_once() -> None:
    """At the first route that needs them, within its time; never for a sure one."""
    embedder = Bag()
    model = with_heads(bag=probes_of(Bag()), other=probes_of(Bag(), ("another text",)))
    router = HybridRouter(model=model, embedder=embedder)
    router.route("is this a loop", AGENTS)
    assert embedder.asked == []
    for _ in range(3):
        router.route("hm hm", AGENTS, RouteContext(limit_s=9.0))
    assert embedder.asked.count(list(PROBE_TEXTS)) == 1
    assert embedder.asked.count(["another text"]) == 1
    assert all(limit is not None and 0 < limit <= 9 for limit in embedder.limits)


class SlowToProbe(Bag):
    """Answers in time for one text alone."""

    def embed(self, texts: Sequence[str], limit_s: float | None = None) -> NDArray[np.float32]:
        if len(texts) > 1 and limit_s != math.inf:
            raise DeadlineExceededError("it takes longer", deadline_s=limit_s)
        return super().embed(texts, limit_s)


def test_probes_that_fail() -> None:
    """The route goes on without the stage and says so; the next one tries again."""
    embedder = SlowToProbe()
    router = HybridRouter(model=with_heads(bag=probes_of(Bag())), embedder=embedder)
    for _ in range(2):
        found = router.route("hm hm", AGENTS)
        assert found.notes == ["the embedding stage failed: it takes longer"]
        assert "embedding" not in found.stages
    router.fit([("rain", "creative")], AGENTS)
    assert "embedding" in router.route("hm hm", AGENTS).stages


def test_training_goes_on_with_the_head_of_another_name(tmp_path: Path) -> None:
    """The head that was found is trained further, and saved with its probes."""
    pairs = [(f"something of {topic}", topic) for topic in TOPICS] * 10
    first = HybridRouter(model=empty_model(), embedder=Bag())
    model = first.fit(pairs, AGENTS, pull=0.1)
    assert first.embedding_model == "bag"
    path = model.save(tmp_path / "weights.npz")

    class Renamed(Bag):
        name = "renamed"

    second = HybridRouter(model=load_model(path), embedder=Renamed())
    assert second.embedding_model == "renamed", "nothing was embedded yet"
    before = second.model.heads["bag"]
    after = second.fit([("umbrella sales", "data")] * 5, AGENTS, pull=0.1)
    assert set(after.heads) == {"bag"}
    assert second.embedding_model == "bag"
    assert np.abs(after.heads["bag"].weights - before.weights).max() > 0.01
    assert after.heads["bag"].probes is before.probes
    assert load_model(after.save(path)).head_of(probes_of(Bag())) == "bag"
    unlike = HybridRouter(model=load_model(path), embedder=Turned())
    assert unlike.fit([("rain", "creative")], AGENTS).heads == {}, "a namesake, too few examples"
    assert unlike.embedding_model == "bag"


# The real model


class Real:
    """An embedder of the router over one of the real model."""

    def __init__(self, name: str, embedder: Any) -> None:
        self.name = name
        self._embedder = embedder

    def is_ready(self) -> bool:
        return True

    def is_loaded(self) -> bool:
        return True

    def embed(self, texts: Sequence[str], _limit_s: float | None = None) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = self._embedder.embed(texts, CancelScope())
        return rows


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    """MiniLM in 8 bits, in a worker."""
    file = write_minilm(tmp_path_factory.mktemp("minilm") / "m.gguf", quantization="q8_0")
    info = ModelInfo(model_id="mine", variant="q8_0", name="M", version="1", license="apache-2.0")
    embedder = GGUFEmbedder(LlamaBackend().load, LoadSpec(info, (file,), is_embedding=True))
    yield Real("mine", embedder)
    embedder.close()


@pytest.fixture(scope="module")
def original() -> Real:
    """MiniLM in the library it comes from, in 32 bits."""
    pytest.importorskip("sentence_transformers")
    from orion_oie.embeddings.sentence_transformer import SentenceTransformerEmbedder

    return Real("model", SentenceTransformerEmbedder(minilm_folder()))


def test_the_head_of_the_package_is_found_for_every_form_of_its_model(
    quantized: Real, original: Real
) -> None:
    """In 8 bits and in 32, by a worker and in sentence-transformers, under any name: with a wide
    margin, and with the same routes."""
    (head,) = HybridRouter().model.heads.values()
    cosines = {}
    for real in (quantized, original):
        vectors = real.embed(PROBE_TEXTS)
        cosines[real.name] = float((vectors * head.probes.vectors).sum(axis=1).min())
    assert cosines["mine"] > 0.999
    assert cosines["model"] > 0.9999
    examples = read_examples(OWN)[::9]
    routers = [HybridRouter(embedder=real) for real in (quantized, original)]
    routes = [[router.route(one.text, SHIPPED) for one in examples] for router in routers]
    notes = [note for found in routes for route in found for note in route.notes]
    assert not any(NO_HEAD in note for note in notes)
    same = [one.agent_id == other.agent_id for one, other in zip(*routes, strict=True)]
    assert sum(same) >= 0.99 * len(same)
    assert [router.embedding_model for router in routers] == ["all-minilm-l6-v2"] * 2
