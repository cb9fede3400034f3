"""Fitting: the optimum is reached, old topics are kept, and what cannot be learned is refused."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from routes import ANY_TEXT, Bag

from orion_oie.errors import InvalidRequestError
from orion_oie.routing.linear import regression
from orion_oie.routing.linear.fitting import (
    LEAST_FOR_A_HEAD,
    PULL_OF_BIAS,
    PULL_OF_GRAMS,
    PULL_OF_SIGNALS,
    Embedded,
    Example,
    fitted,
    rarity_of,
    read_examples,
)
from orion_oie.routing.linear.lbfgs import minimum
from orion_oie.routing.linear.model import (
    LinearModel,
    empty_model,
    softmax,
)
from orion_oie.routing.linear.probes import PROBE_TEXTS, Probes
from orion_oie.routing.linear.regression import DenseTable, SparseTable, fitted_weights
from orion_oie.routing.text.ngrams import BUCKETS
from orion_oie.routing.text.prompt import read
from orion_oie.routing.text.signals import SIGNALS

OWN = Path(__file__).parents[3] / "benchmarks" / "routing" / "own.jsonl"
TEA = ["brew green tea", "which tea is best cold", "a pot of tea", "tea leaves in the sink"]
MILK = ["warm the milk", "is oat milk milk", "milk turns sour", "a glass of cold milk"]
PAIRS = [Example(text, "tea") for text in TEA] + [Example(text, "milk") for text in MILK]
MANY = [replace(one, text=f"{one.text}{end}") for one in PAIRS for end in ("", " now", " then")]
TEXTS = ["write a poem", "", "🙂", "2 + 2 = ?", "in a pot:\n```\nx = in\n```", "tea " * 400]


def topic_of(model: LinearModel, text: str) -> str:
    prompt = read(text)
    return model.topics[int(model.logits(prompt.grams, prompt.signals).argmax())]


def vectors_of(rows: Sequence[Example]) -> NDArray[np.float32]:
    return Bag().embed([one.text for one in rows])


def embedded(name: str, vectors: NDArray[np.float32]) -> Embedded:
    """Vectors with the probes of the same model, as wide as they are."""
    probes = Bag().embed(PROBE_TEXTS)[:, : vectors.shape[1]]
    return Embedded(name, vectors, Probes(PROBE_TEXTS, probes))


def distance(one: LinearModel, other: LinearModel) -> float:
    """The distance by which the weights of the first model's topics have moved."""
    width = len(one.topics)
    return float(np.linalg.norm(one.gram_weights - other.gram_weights[:, :width]))


# Examples


def test_what_is_accepted() -> None:
    """The best label is first, and each is there once."""
    assert Example("t", "a").accepted == ("a",)
    assert Example("t", "a", ("b", "a", "c")).accepted == ("a", "b", "c")


def test_examples_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    lines = [
        '{"text": "tea?", "label": "tea"}',
        "",
        '{"text": "both\\u2028", "label": "tea", "labels": ["tea", "milk"], "more": [1]}',
        '{"text": "", "label": "eyes", "labels": [], "images": 2}\r',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_examples(str(path)) == [
        Example("tea?", "tea", ("tea",)),
        Example("both\u2028", "tea", ("tea", "milk")),
        Example("", "eyes", ("eyes",), images=2),
    ]
    path.write_text("\n \n")
    assert read_examples(path) == []


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "3",
        "null",
        '"text"',
        '{"text": "a"}',
        '{"label": "a"}',
        '{"text": 3, "label": "a"}',
        '{"text": "a", "label": ""}',
        '{"text": "a", "label": null}',
        '{"text": "a", "label": "b", "labels": "b"}',
        '{"text": "a", "label": "b", "labels": [3]}',
        '{"text": "a", "label": "b", "labels": [""]}',
        '{"text": "a", "label": "b", "images": "two"}',
        "[" * 100_000,
        '{"text": "\\ud8',
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str) -> None:
    """By their number, empty lines included."""
    path = tmp_path / "examples.jsonl"
    path.write_text(f'{{"text": "a", "label": "b"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(InvalidRequestError, match=r"examples\.jsonl, line 3: "):
        read_examples(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_examples(path)
    path.write_bytes(b'{"text": "\xff\xfe"}')
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_examples(path)


@given(st.lists(st.tuples(ANY_TEXT, st.text(min_size=1)), max_size=5))
@settings(deadline=None)
def test_any_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    """Lone surrogates and line separators included."""
    lines = [json.dumps({"text": text, "label": label}) for text, label in pairs]
    path = tmp_path_factory.getbasetemp() / "any_text.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    found = read_examples(path)
    assert [(one.text, one.label) for one in found] == pairs


# Tables


def dense_rows(texts: Sequence[str], dense: NDArray[np.float32]) -> NDArray[np.float64]:
    rows = np.zeros((len(texts), BUCKETS))
    for row, text in zip(rows, texts, strict=True):
        found = read(text).grams
        np.add.at(row, found.buckets, found.values)
    return np.concatenate([rows, dense], axis=1)


@pytest.mark.parametrize("texts", [TEXTS, ["", ""], ["tea"] * 3, [f"{n} tea" for n in range(1100)]])
def test_sparse_products_are_those_of_whole_matrices(texts: list[str]) -> None:
    """With empty rows, rows that are the same, and more rows than one piece of the work holds."""
    chance = np.random.default_rng(1)
    texts = texts if len(texts) < 1000 else [text[:12] for text in texts]
    dense = chance.normal(size=(len(texts), 3)).astype(np.float32)
    table = SparseTable([read(text) for text in texts], dense)
    weights = chance.normal(size=(BUCKETS + 3, 2)).astype(np.float32)
    errors = chance.normal(size=(len(texts), 2)).astype(np.float32)
    times, transposed = table.times(weights), table.transposed_times(errors)
    for start in range(0, len(texts), 300):
        some = slice(start, start + 300)
        rows = dense_rows(texts[some], dense[some])
        assert np.allclose(times[some], rows @ weights, rtol=1e-4, atol=1e-4)
    whole = sum(
        dense_rows(texts[at : at + 300], dense[at : at + 300]).T @ errors[at : at + 300]
        for at in range(0, len(texts), 300)
    )
    assert np.allclose(transposed, whole, rtol=1e-3, atol=1e-3)


def test_how_rare_buckets_are() -> None:
    """0 for what every prompt has, 1 for what none has, by the logarithm between them."""
    prompts = [read(text) for text in ("tea and milk", "tea and jam", "tea and pie")]
    found = rarity_of(prompts)
    bucket = {
        name: place
        for one in prompts
        for name, place in zip(one.grams.names, one.grams.name_buckets.tolist(), strict=True)
    }
    assert found[bucket["tea"]] == 0
    assert found[bucket["jam"]] == pytest.approx(math.log(4 / 2) / math.log(4))
    assert found.max() == 1
    with pytest.raises(InvalidRequestError, match="no prompt"):
        rarity_of([])


# The optimum


def problem(seed: int = 3) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """A small problem with noise: rows, weights of the rows, and classes."""
    chance = np.random.default_rng(seed)
    rows = chance.normal(size=(60, 4)).astype(np.float32)
    classes = (rows @ chance.normal(size=(4, 3)) + chance.normal(size=(60, 3))).argmax(axis=1)
    return rows, chance.uniform(0.5, 2.0, 60).astype(np.float32), classes


def wanted(classes: NDArray[np.int64], count: int = 3) -> NDArray[np.float32]:
    first = np.eye(count, dtype=np.float32)[classes]
    return np.stack([first, np.zeros_like(first)])


class Loss:
    """Catches the loss that `fitted_weights` minimizes, and stays at the start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(regression, "minimum", self.take)

    def take(self, loss: Any, point: NDArray[np.float32], _steps: int) -> NDArray[np.float32]:
        self.at = loss
        return point


def test_the_gradient_is_that_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against differences, with second labels and labels of several topics among the rows."""
    caught = Loss(monkeypatch)
    rows, weights, classes = problem()
    accepted = wanted(classes)
    accepted[1, ::3, 0] = 1.0
    accepted[1, 1::4, 1:] = 1.0
    accepted[0, 5, :2] = 1.0
    pulls = np.array([0.1, 0.2, 0.3, 0.4, 0.5], np.float32)
    start = np.full((4, 3), 0.25, np.float32)
    bias = np.array([0.5, -0.5, 0.0], np.float32)
    fitted_weights(DenseTable(rows), accepted, weights, pulls, start, bias)
    point = np.random.default_rng(5).normal(size=15)
    _, gradient = caught.at(point)
    for place in range(15):
        step = np.zeros(15)
        step[place] = 1e-3
        above, below = caught.at(point + step)[0], caught.at(point - step)[0]
        assert gradient[place] == pytest.approx((above - below) / 2e-3, rel=2e-2, abs=2e-4)


def test_the_optimum_is_that_of_scikit_learn() -> None:
    """Softmax regression with a penalty on the weights and, here, next to none on the bias."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    rows, weights, classes = problem()
    strength = 0.7
    pulls = np.full(5, strength / weights.sum(), np.float32)
    pulls[4] = 1e-9
    end, bias = fitted_weights(
        DenseTable(rows),
        wanted(classes),
        weights,
        pulls,
        np.zeros((4, 3), np.float32),
        np.zeros(3, np.float32),
    )
    peer = linear_model.LogisticRegression(C=1 / strength, tol=1e-10, max_iter=10_000)
    peer.fit(rows, classes, sample_weight=weights)
    assert np.allclose(end.T, peer.coef_, atol=2e-3)
    ours, theirs = bias - bias.mean(), peer.intercept_ - peer.intercept_.mean()
    assert np.allclose(ours, theirs, atol=2e-3)


def test_a_known_optimum() -> None:
    """The descent finds the bottom of a quadratic whose axes differ a hundredfold."""
    steep = np.geomspace(1.0, 100.0, 20).astype(np.float32)
    bottom = np.linspace(-3, 3, 20).astype(np.float32)

    def loss(point: NDArray[np.float32]) -> tuple[float, NDArray[np.float32]]:
        away = point - bottom
        return 0.5 * float((steep * away * away).sum()), steep * away

    assert minimum(loss, np.zeros(20, np.float32)) == pytest.approx(bottom, abs=1e-4)


def test_the_descent_ends_where_it_begins_at_the_bottom() -> None:
    point = np.ones(3, np.float32)
    assert minimum(lambda _point: (0.0, np.zeros(3, np.float32)), point) is point


def test_second_labels_count_a_tenth() -> None:
    """A row that two labels suit ends where nine tenths and one tenth balance."""
    rows = np.ones((1, 1), np.float32)
    accepted = np.zeros((2, 1, 2), np.float32)
    accepted[0, 0, 0] = accepted[1, 0, 1] = 1.0
    pulls = np.array([1e-4, 1e-4], np.float32)
    start, bias = np.zeros((1, 2), np.float32), np.zeros(2, np.float32)
    weights = np.ones(1, np.float32)
    end, moved = fitted_weights(DenseTable(rows), accepted, weights, pulls, start, bias)
    assert softmax(end[0] + moved) == pytest.approx([0.9, 0.1], abs=5e-3)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=6))
@settings(deadline=None)
def test_softmax(logits: list[float]) -> None:
    """Probabilities for any logits, the same for shifted ones."""
    found = softmax(np.array(logits, np.float32))
    assert ((found >= 0) & (found <= 1)).all()
    assert found.sum() == pytest.approx(1, abs=1e-5)
    assert softmax(np.array(logits, np.float32) + 64) == pytest.approx(found, abs=2e-2)


# A model that learns


def test_topics_are_learned_from_examples() -> None:
    """Also for words that no example has as they are."""
    model = fitted(empty_model(("tea", "milk")), PAIRS)
    for text, topic in (("teapots", "tea"), ("milkmaid", "milk"), ("hot tea", "tea")):
        assert topic_of(model, text) == topic
    assert model.topics == ("tea", "milk")


def test_fitting_is_deterministic() -> None:
    one, other = (fitted(empty_model(), PAIRS) for _ in range(2))
    assert np.array_equal(one.gram_weights, other.gram_weights)
    assert np.array_equal(one.signal_weights, other.signal_weights)
    assert np.array_equal(one.bias, other.bias)


def test_the_given_model_stays_as_it_was() -> None:
    model = empty_model(("tea", "milk"))
    fitted(model, PAIRS)
    assert not model.gram_weights.any()
    assert not model.bias.any()


def test_a_label_that_is_no_topic_becomes_one() -> None:
    """The others are kept: their weights move little, what they know they know still."""
    model = fitted(empty_model(("tea", "milk")), PAIRS, pull=0.2)
    jam = [Example(text, "jam") for text in ("jam of plums", "jam on toast", "boil the jam")]
    wider = fitted(model, jam)
    assert wider.topics == ("tea", "milk", "jam")
    assert topic_of(wider, "jam of the plums") == "jam"
    for text, topic in [(text, "tea") for text in TEA] + [(text, "milk") for text in MILK]:
        assert topic_of(wider, text) == topic


@pytest.mark.skipif(not OWN.exists(), reason="needs the labelled prompts of the repository")
@pytest.mark.parametrize("pull", [1.0, 0.1])
def test_a_few_examples_of_one_topic_do_not_draw_all_prompts_there(pull: float) -> None:
    """There is nothing to hold the others but the weights as they were: it has to be enough."""
    from orion_oie.routing.linear.model import shipped_model

    texts = ["the turbine governor hunts", "turbine trips on overspeed", "cold start of a turbine"]
    examples = [Example(text, "turbine") for text in texts]
    model = fitted(shipped_model(), examples, pull=pull)
    assert all(topic_of(model, text) == "turbine" for text in texts)
    prompts = [one.text for one in read_examples(OWN)[::5]]
    before = [topic_of(shipped_model(), text) for text in prompts]
    after = [topic_of(model, text) for text in prompts]
    assert after.count("turbine") <= 0.01 * len(prompts)
    kept = sum(one == other for one, other in zip(before, after, strict=True))
    assert kept >= 0.95 * len(prompts)


def test_a_heavier_pull_changes_less() -> None:
    model = fitted(empty_model(("tea", "milk")), PAIRS)
    moved = [
        distance(model, fitted(model, [Example("plum jam", "milk")], pull=pull))
        for pull in (0.01, 0.1, 1.0, 10.0, 1000.0)
    ]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > 10 * moved[-1]
    assert moved[-1] < 0.05


def test_more_examples_change_more() -> None:
    model = fitted(empty_model(("tea", "milk")), PAIRS)
    jam = Example("plum jam", "milk")
    moved = [distance(model, fitted(model, [jam] * count)) for count in (1, 4, 16)]
    assert moved == sorted(moved)


def test_weights_of_examples_count_as_often() -> None:
    """One of weight 3 is as good as three."""
    three = fitted(empty_model(("tea", "milk")), [*PAIRS, PAIRS[0], PAIRS[0]])
    heavy = fitted(empty_model(("tea", "milk")), [replace(PAIRS[0], weight=3.0), *PAIRS[1:]])
    assert heavy.gram_weights == pytest.approx(three.gram_weights, abs=2e-2)
    ignored = fitted(
        empty_model(("tea", "milk")), [*PAIRS, Example("cold milk", "tea", weight=0.0)]
    )
    plain = fitted(empty_model(("tea", "milk")), PAIRS)
    assert ignored.gram_weights == pytest.approx(plain.gram_weights, abs=2e-2)


def test_labels_may_stand_for_topics() -> None:
    """Of several topics a label may mean any: the model keeps what it thinks of them."""
    names = {"drinks": ("tea", "milk"), "rest": ("other",)}
    model = fitted(empty_model(("tea", "milk")), PAIRS)
    rows = [
        Example("cold tea", "drinks"),
        Example("a chair", "rest"),
        Example("milk jug", "drinks"),
    ]
    found = fitted(model, rows * 4, topics_of=names, pull=0.1)
    assert found.topics == ("tea", "milk", "other")
    assert [topic_of(found, text) for text in ("cold tea", "milk jug", "a chair")] == [
        "tea",
        "milk",
        "other",
    ]


def test_vectors_get_a_head() -> None:
    """Of the name that is given, with the probes; fitted on from where it is if these agree, anew
    for a model of another length or with other probes."""
    size, vectors = Bag.dimensions, vectors_of(MANY)
    model = fitted(empty_model(("tea", "milk")), MANY, vectors=embedded("bag", vectors))
    head = model.heads["bag"]
    assert head.weights.shape == (size + len(SIGNALS), 2)
    for vector, pair in zip(vectors, MANY, strict=True):
        found = model.vector_logits("bag", vector, read(pair.text).signals)
        assert found is not None
        assert model.topics[int(found.argmax())] == pair.label
    held = fitted(model, PAIRS[:1], vectors=embedded("bag", vectors[:1]), pull=1e4)
    assert held.heads["bag"].weights == pytest.approx(head.weights, abs=1e-2)
    shorter = fitted(model, MANY, vectors=embedded("bag", vectors[:, :100]))
    assert shorter.heads["bag"].weights.shape == (100 + len(SIGNALS), 2)
    other = fitted(model, MANY, vectors=embedded("other", vectors))
    assert set(other.heads) == {"bag", "other"}
    assert other.heads["bag"] is head
    wider = fitted(model, [Example("jam", "jam")], vectors=embedded("bag", vectors[:1]))
    assert wider.heads["bag"].weights.shape == (size + len(SIGNALS), 3)
    assert wider.heads["bag"].unseen == ()
    assert wider.heads["bag"].probes is head.probes
    namesake = Embedded("bag", vectors, Probes(PROBE_TEXTS, -head.probes.vectors))
    anew = fitted(model, MANY, vectors=namesake)
    assert anew.heads["bag"].probes is namesake.probes
    assert anew.heads["bag"].weights == pytest.approx(head.weights, abs=1e-4)
    further = fitted(model, MANY, vectors=embedded("bag", vectors))
    assert np.abs(further.heads["bag"].weights - head.weights).max() > 0.01
    assert fitted(model, PAIRS[:1], vectors=namesake._replace(vectors=vectors[:1])).heads == {}


def test_a_first_head_takes_ten_examples_of_every_topic() -> None:
    """One too few of any topic, or of the given width, and there is none of that name; those of
    weight 0 and acceptable labels that are not the best do not count."""
    empty = empty_model(("tea", "milk"))
    enough = [one for label in ("tea", "milk") for one in MANY if one.label == label]
    enough = enough[:LEAST_FOR_A_HEAD] + enough[-LEAST_FOR_A_HEAD:]
    vectors = vectors_of(enough)
    known = fitted(empty, enough, vectors=embedded("bag", vectors))
    assert set(known.heads) == {"bag"}
    fewer, less = enough[1:], vectors[1:]
    spare = Example("milk tea", "milk", ("milk", "tea"))
    light = Example("green tea", "tea", weight=0.0)
    for rows in (fewer, [*fewer, spare], [*fewer, light]):
        found = fitted(empty, rows, vectors=embedded("bag", vectors_of(rows)))
        assert found.heads == {}
        assert topic_of(found, "a pot of tea") == "tea"
    assert (
        fitted(empty_model(("tea", "milk", "jam")), enough, vectors=embedded("bag", vectors)).heads
        == {}
    )
    assert fitted(known, fewer, vectors=embedded("bag", less[:, :100])).heads == {}
    assert set(fitted(known, fewer, vectors=embedded("other", less)).heads) == {"bag"}
    assert set(fitted(known, fewer[:1], vectors=embedded("bag", less[:1])).heads) == {"bag"}


def test_a_topic_that_a_head_never_saw_stays_blank() -> None:
    """As long as only others have examples with vectors; with one of its own it is learned."""
    model = fitted(empty_model(("tea", "milk")), MANY, vectors=embedded("bag", vectors_of(MANY)))
    model = fitted(model, [Example("plum jam", "jam"), Example("sour rye", "rye")])
    assert model.heads["bag"].unseen == (2, 3)
    before = model.heads["bag"]
    model = fitted(model, PAIRS, vectors=embedded("bag", vectors_of(PAIRS)))
    assert model.heads["bag"].unseen == (2, 3)
    assert not np.array_equal(model.heads["bag"].weights, before.weights)
    either = Example("rye with jam", "jam", ("jam", "rye"))
    model = fitted(model, [either], vectors=embedded("bag", vectors_of([either])))
    assert model.heads["bag"].unseen == ()


def test_the_pulls_that_the_weights_are_held_by() -> None:
    """Rare n-grams may move most; what every prompt has moves least."""
    assert PULL_OF_GRAMS < PULL_OF_BIAS <= PULL_OF_SIGNALS


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([], {}, "no example"),
        ([Example(3, "tea")], {}, "example 0"),  # type: ignore[arg-type]
        ([PAIRS[0], Example("tea", "")], {}, "example 1"),
        ([Example("tea", "tea", ("",))], {}, "example 0"),
        ([Example("tea", "tea", weight=-1)], {}, "weight is -1"),
        ([Example("tea", "tea", weight=math.nan)], {}, "weight is nan"),
        ([Example("tea", "tea", weight=math.inf)], {}, "weight is inf"),
        ([Example("tea", "tea", weight=0)], {}, "weight 0"),
        (PAIRS, {"pull": -1}, "pull is -1"),
        (PAIRS, {"pull": math.nan}, "pull is nan"),
        (PAIRS, {"topics_of": {"tea": ()}}, "tea: no topic"),
        (
            PAIRS,
            {"vectors": embedded("bag", np.zeros((2, 4), np.float32))},
            "2 vectors for 8 examples",
        ),
    ],
)
def test_what_cannot_be_learned(rows: list[Example], more: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        fitted(empty_model(("tea", "milk")), rows, **more)


@given(st.lists(st.tuples(ANY_TEXT, st.sampled_from(["tea", "milk", "jam"])), min_size=1))
@settings(deadline=None, max_examples=6)
def test_any_text_can_be_learned_from(pairs: list[tuple[str, str]]) -> None:
    """The weights are numbers, whatever the texts."""
    model = fitted(empty_model(("tea", "milk")), [Example(*pair) for pair in pairs])
    for array in (model.gram_weights, model.signal_weights, model.bias):
        assert np.isfinite(array).all()
