"""The linear model: scores, reasons, likeness, new topics, and files that are none."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from routes import ANY_TEXT, knowing

from orion_oie.errors import InvalidRequestError
from orion_oie.routing.linear.model import (
    TOPICS,
    Calibration,
    Head,
    LinearModel,
    empty_model,
    load_model,
    shipped_model,
)
from orion_oie.routing.linear.probes import PROBE_TEXTS, Probes
from orion_oie.routing.text.ngrams import (
    BUCKETS,
    grams,
)
from orion_oie.routing.text.prompt import read
from orion_oie.routing.text.signals import SIGNALS

PROBES = Probes(("one", "two"), np.eye(2, 5, dtype=np.float32))
NO_SIGNALS = np.zeros(len(SIGNALS), np.float32)


def some_model(topics: tuple[str, ...] = ("tea", "milk", "rest")) -> LinearModel:
    """A model of random weights with a head and a calibration of its own."""
    chance = np.random.default_rng(7)

    def numbers(*shape: int) -> NDArray[np.float32]:
        return chance.normal(size=shape).astype(np.float32)

    return LinearModel(
        topics,
        numbers(BUCKETS, len(topics)),
        numbers(len(SIGNALS), len(topics)),
        numbers(len(topics)),
        np.abs(numbers(BUCKETS)),
        {"bag": Head(numbers(5 + len(SIGNALS), len(topics)), numbers(len(topics)), PROBES)},
        Calibration(0.5, 0.25, 0.125, (2.0, -1.0), (3.0, 0.5)),
        {"prompts": 3},
    )


def with_head() -> LinearModel:
    """A model that knows nothing, with a head; its file is small."""
    head = Head(np.ones((30, 2), np.float32), np.ones(2, np.float32), PROBES)
    return replace(empty_model(("a", "b")), heads={"bag": head})


# Scores


def test_scores_are_sums() -> None:
    """Of n-grams times their values, signals, and the bias, as plain sums say."""
    model, prompt = some_model(), read("Brew 2 cups of green tea?")
    expected = model.bias.astype(np.float64)
    for bucket, value in zip(prompt.grams.buckets, prompt.grams.values, strict=True):
        expected = expected + float(value) * model.gram_weights[bucket]
    for row, value in zip(model.signal_weights, prompt.signals, strict=True):
        expected = expected + float(value) * row
    assert model.logits(prompt.grams, prompt.signals) == pytest.approx(expected, rel=1e-4)


def test_scores_of_vectors() -> None:
    """From the head of that model; None without one, or for vectors of another length."""
    model, vector = some_model(), np.ones(5, np.float32)
    head = model.heads["bag"]
    found = model.vector_logits("bag", vector, NO_SIGNALS)
    assert found == pytest.approx(head.weights[:5].sum(axis=0) + head.bias, rel=1e-5)
    assert model.vector_logits("other", vector, NO_SIGNALS) is None
    assert model.vector_logits("bag", vector[:4], NO_SIGNALS) is None


def test_an_empty_model_knows_nothing() -> None:
    assert empty_model().topics == TOPICS
    assert not empty_model().logits(grams("write a poem"), NO_SIGNALS).any()


# Reasons


def test_reasons_are_what_counts_most() -> None:
    """Words and signals with their share of the difference, the largest first, none against it."""
    model = knowing({"tea": "data", "milk": "code"})
    model.signal_weights[SIGNALS.index("question"), TOPICS.index("data")] = 2.0
    model.signal_weights[SIGNALS.index("length"), TOPICS.index("data")] = 1.0
    prompt = read("is there tea with milk?")
    data, code, logic = map(TOPICS.index, ("data", "code", "logic"))
    found = model.reasons(prompt.grams, prompt.signals, data, code)
    value = prompt.grams.name_values[prompt.grams.names.index("tea")]
    assert found == {"tea": pytest.approx(40 * value, abs=1e-3), "shape: question": 2.0}
    assert list(found) == ["tea", "shape: question"]
    assert list(model.reasons(prompt.grams, prompt.signals, code, logic)) == ["milk"]
    assert list(model.reasons(prompt.grams, prompt.signals, data, code, most=1)) == ["tea"]
    assert model.reasons(prompt.grams, prompt.signals, data, data) == {}


@given(ANY_TEXT)
@settings(deadline=None)
def test_reasons_can_be_shown(text: str) -> None:
    """No control characters, no lone surrogates, no signs without a letter."""
    model, prompt = some_model(), read(text)
    for name in model.reasons(prompt.grams, prompt.signals, 0, 1, most=50):
        assert name.isprintable()
        assert any(map(str.isalpha, name))
        name.encode()


# Likeness


@given(ANY_TEXT, ANY_TEXT)
@settings(deadline=None)
def test_likeness(one: str, other: str) -> None:
    """In [0, 1], the same both ways, and 1 for the same words."""
    model, first, second = some_model(), read(one).grams, read(other).grams
    found = model.similarity(first, second)
    assert -1e-5 <= found <= 1 + 1e-5
    assert found == pytest.approx(model.similarity(second, first), abs=1e-5)
    if len(first.buckets):
        assert model.similarity(first, first) == pytest.approx(1, abs=1e-4)


def test_rare_words_make_texts_alike() -> None:
    """N-grams that every text has do not count."""
    model = empty_model()
    model.rarity[grams("the").buckets] = 0.0
    assert model.similarity(grams("the"), grams("the")) == 0
    plain = empty_model().similarity(grams("the jib"), grams("the cleat"))
    assert model.similarity(grams("the jib"), grams("the cleat")) < plain
    assert model.similarity(grams("jib"), grams("cleat")) < 0.2


def test_likeness_of_a_payload_that_repeats_the_instruction() -> None:
    """Both fall into the same buckets there."""
    text = read("What is in here and in there?\n```\nhere = there\nthere = here\n```").grams
    assert empty_model().similarity(text, grams("in")) <= 1
    assert empty_model().similarity(text, text) == pytest.approx(1, abs=1e-5)


# New topics


def test_new_topics_change_no_old_score() -> None:
    """They start without evidence and well behind the others; the given model stays as it was."""
    model, prompt = some_model(), read("Brew green tea")
    wider = model.with_topics(("law", "tea", "law", "farm"))
    assert wider.topics == ("tea", "milk", "rest", "law", "farm")
    assert model.topics == ("tea", "milk", "rest")
    before = model.logits(prompt.grams, prompt.signals)
    after = wider.logits(prompt.grams, prompt.signals)
    assert after[:3] == pytest.approx(before, abs=1e-5)
    assert after[3] == after[4] < -3
    vector = np.ones(5, np.float32)
    head = wider.vector_logits("bag", vector, prompt.signals)
    assert head is not None
    assert head[3] == head[4] < -3
    assert model.with_topics(("tea", "rest")) is model


def test_a_head_knows_which_topics_it_never_saw(tmp_path: Path) -> None:
    """Those that were added, also after a file; not one that has a weight or another bias."""
    assert some_model().heads["bag"].unseen == ()
    model = some_model().with_topics(("law", "farm", "jam"))
    head = model.heads["bag"]
    assert head.unseen == (3, 4, 5)
    assert head.unseen is head.unseen
    assert load_model(model.save(tmp_path / "w.npz")).heads["bag"].unseen == (3, 4, 5)
    weights, bias = head.weights.copy(), head.bias.copy()
    weights[2, 3] = 0.01
    bias[5] -= 0.01
    assert Head(weights, bias).unseen == (4,)
    assert Head(np.zeros((2, 1), np.float32), np.zeros(1, np.float32)).unseen == ()


# Files


def assert_equal(one: LinearModel, other: LinearModel) -> None:
    """Equal up to the 16 bits in which weights are kept."""
    assert (one.topics, one.calibration, one.about) == (
        other.topics,
        other.calibration,
        other.about,
    )
    assert list(one.heads) == list(other.heads)
    pairs = [(getattr(one, n), getattr(other, n)) for n in ("gram_weights", "rarity")]
    pairs += [(one.heads[n].weights, other.heads[n].weights) for n in one.heads]
    for first, second in pairs:
        assert first.dtype == second.dtype == np.float32
        assert np.allclose(first, second, rtol=2**-11, atol=2**-24)
    exact = [(one.signal_weights, other.signal_weights), (one.bias, other.bias)]
    exact += [(one.heads[n].bias, other.heads[n].bias) for n in one.heads]
    for name in one.heads:
        assert one.heads[name].probes.agree_with(other.heads[name].probes)
    assert all(np.array_equal(first, second) for first, second in exact)


def test_a_model_comes_back_from_its_file(tmp_path: Path) -> None:
    """Without pickles, and a file that was there is replaced as a whole."""
    path = tmp_path / "weights.npz"
    path.write_text("old")
    model = some_model()
    assert model.save(str(path)) == path
    found = load_model(path)
    assert_equal(found, model)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.npz"]
    again = load_model(found.save(tmp_path / "again.npz"))
    assert np.array_equal(again.gram_weights, found.gram_weights)
    with np.load(path, allow_pickle=False) as arrays:
        assert {arrays[name].dtype.kind for name in arrays.files} <= {"u", "f", "b"}


def test_a_path_may_begin_at_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`~` is read as everywhere else, when a file is written and when it is read."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert with_head().save("~/weights.npz") == tmp_path / "weights.npz"
    assert load_model("~/weights.npz").topics == ("a", "b")


def test_what_cannot_be_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    """And nothing of it stays behind."""
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "w.npz", tmp_path / "folder"):
        with pytest.raises(OSError, match=path.name):
            with_head().save(path)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_files_that_are_cut_short(tmp_path: Path) -> None:
    """Each length of a file but the whole is refused with a typed error."""
    content = empty_model(("a", "b")).save(tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "cut.npz"
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(InvalidRequestError, match=r"cut\.npz holds"):
            load_model(path)


def test_files_that_were_changed(tmp_path: Path) -> None:
    """Whatever bytes are wrong: a typed error, or the model as it was."""
    model = with_head()
    content = model.save(tmp_path / "whole.npz").read_bytes()
    path, chance, refused = tmp_path / "changed.npz", random.Random(3), 0
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        path.write_bytes(changed)
        try:
            assert_equal(load_model(path), model)
        except InvalidRequestError:
            refused += 1
    assert refused > 200


def test_no_file_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        load_model(tmp_path / "missing.npz")
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        load_model(tmp_path)
    foreign: dict[str, bytes] = {
        "empty": b"",
        "text": b"not weights at all",
        "gguf": b"GGUF\x03\x00\x00\x00" * 20,
        "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x04evil\x94.",
        "array": _saved(lambda file: np.save(file, np.zeros(3))),
        "archive": _saved(lambda file: np.savez(file, other=np.zeros(3))),
        "objects": _saved(lambda file: np.savez(file, facts=np.array([{}], object))),
    }
    for name, content in foreign.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InvalidRequestError, match="no weights of a router"):
            load_model(path)


def _saved(write: Callable[[BytesIO], Any]) -> bytes:
    buffer = BytesIO()
    write(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "another version"),
        ({"format": 3}, "another version"),
        ({"signals": ["length"]}, "another version"),
        ({"topics": ["a"]}, "shapes"),
        ({"topics": []}, "topics"),
        ({"topics": ["a", "a"]}, "topics"),
        ({"topics": [["a"], "b"]}, "topics"),
        ({"heads": ["one", "two"]}, "no weights of a router"),
        ({"heads": [{"name": "one"}]}, "no weights of a router"),
        ({"heads": 3}, "no weights of a router"),
        ({"calibration": {}}, "no weights of a router"),
        ({"calibration": {"alone": "x"}}, "no weights of a router"),
        ({"about": None}, None),
    ],
)
def test_facts_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """A file of our form with wrong contents says what is wrong."""
    path = empty_model(("a", "b")).save(tmp_path / "weights.npz")
    with np.load(path) as file:
        arrays = dict(file)
    facts = json.loads(arrays["facts"].tobytes()) | changes
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    np.savez(path, **arrays)
    if message is None:
        assert load_model(path).topics == ("a", "b")
        return
    with pytest.raises(InvalidRequestError, match=message):
        load_model(path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("grams", np.zeros((BUCKETS, 3)), "shapes"),
        ("grams", np.zeros((7, 2)), "shapes"),
        ("signals", np.zeros((3, 2)), "shapes"),
        ("bias", np.zeros(1), "shapes"),
        ("rarity", np.zeros(9), "shapes"),
        ("head0", np.zeros((30, 3)), "another shape"),
        ("head0_bias", np.zeros((2, 2)), "another shape"),
        ("head0_probes", np.zeros((3, 5)), "another shape"),
        ("head0_probes", np.zeros(2), "another shape"),
        ("head0_probes", np.full((2, 5), np.nan), "no finite numbers"),
        ("bias", np.array([np.nan, 0]), "no finite numbers"),
        ("head0", np.full((30, 2), np.inf), "no finite numbers"),
        ("bias", np.array(["a", "b"]), "no weights of a router"),
    ],
)
def test_arrays_that_do_not_fit(
    tmp_path: Path, name: str, array: NDArray[Any], message: str
) -> None:
    """They are refused when the file is read, not when a question comes."""
    model = with_head()
    path = model.save(tmp_path / "weights.npz")
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, name: array})
    with pytest.raises(InvalidRequestError, match=message):
        load_model(path)


# The weights of the package


def test_the_weights_of_the_package() -> None:
    """They are loaded once, know the eight topics, and are small."""
    model = shipped_model()
    assert shipped_model() is model
    assert model.topics == TOPICS
    assert "all-minilm-l6-v2" in model.heads
    head = model.heads["all-minilm-l6-v2"]
    assert head.weights.shape == (384 + len(SIGNALS), len(TOPICS))
    assert head.probes.texts == PROBE_TEXTS
    assert head.probes.vectors.shape == (len(PROBE_TEXTS), 384)
    assert ((model.rarity >= 0) & (model.rarity <= 1)).all()
    assert model.about["prompts"] > 1000
    assert np.abs(model.gram_weights).max() > 0.1


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(max_size=8), min_size=1, max_size=4, unique=True).map(tuple))
def test_topics_of_any_name(tmp_path_factory: pytest.TempPathFactory, topics: Any) -> None:
    """They come back from a file as they were."""
    path = tmp_path_factory.mktemp("topics") / "weights.npz"
    assert load_model(empty_model(topics).save(path)).topics == topics
