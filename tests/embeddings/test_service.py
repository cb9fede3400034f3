"""The shared embedding service: right vectors for everybody, computed once, and failures that are
told to those they concern."""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from gguf_embedder import GGUFEmbedder
from helpers import BOUND_S, Running, run_all, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from internals import callbacks_of
from minilm import minilm_folder, write_minilm
from numpy.typing import NDArray

from orion_oie.backends.base import LoadSpec
from orion_oie.backends.llama.host.loader import LlamaBackend
from orion_oie.cancellation import CancelScope
from orion_oie.embeddings.batching import BATCH_CHARACTERS
from orion_oie.embeddings.cache import LeastUsedCache
from orion_oie.embeddings.sentence_transformer import SentenceTransformerEmbedder, hub_cache
from orion_oie.embeddings.service import KEY_BYTES, EmbeddingService
from orion_oie.embeddings.vectors import halves, unit_rows
from orion_oie.errors import (
    ContextOverflowError,
    EngineClosedError,
    InvalidRequestError,
    ModelCorruptError,
    ModelError,
    ModelNotFoundError,
    OrionError,
    RequestCancelledError,
    WorkerCrashedError,
    WorkerError,
)
from orion_oie.schemas.results import ModelInfo

Array = NDArray[np.float32]
DIMENSIONS = 24
INFO = ModelInfo(model_id="minilm", variant="f16", name="MiniLM", version="2", license="apache-2.0")
SENTENCES = [
    "What is the capital of France?",
    "Paris is the capital of France.",
    "How do I bake bread from rye flour?",
    "The compiler reports a missing semicolon.",
    "Wie komme ich am schnellsten nach Köln?",
    "naïve café déjà vu",
    "def f(x):\n    return x**2  # a square",
    "Les chats dorment toute la journée.",
]


def vector_of(text: str) -> Array:
    """The vector of a text as the embedder of these tests gives it."""
    seed = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
    row = np.random.default_rng(seed).normal(size=DIMENSIONS)
    return np.asarray(row / np.linalg.norm(row), np.float32)


class Scripted:
    """An embedder that records its batches. With a `gate` it waits there in each call.

    Texts that begin with "long" are too long, and a batch with "poison" crashes. `errors` are
    raised by the next calls, in turn.
    """

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.scopes: list[CancelScope] = []  # of those who computed, for each batch
        self.errors: list[BaseException] = []
        self.gate: threading.Event | None = None
        self.most_at_once = 0
        self.is_closed = False
        self._at_once = 0

    def embed(self, texts: Sequence[str], scope: CancelScope) -> Array:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self.scopes.append(scope)
            self.batches.append(list(texts))
            if self.gate is not None:
                awake = threading.Event()
                undo = scope.on_cancel(awake.set)
                gate = self.gate
                wait_until(lambda: awake.is_set() or gate.is_set())
                undo()
            scope.check()
            if self.is_closed:
                raise EngineClosedError("closed")
            if self.errors:
                raise self.errors.pop(0)
            for index, text in enumerate(texts):
                if text.startswith("long"):
                    raise ContextOverflowError(
                        f"text {index} has 900 tokens", index=index, limit=512
                    )
            if "poison" in texts:
                raise WorkerCrashedError("it died of poison")
            return np.array([vector_of(text) for text in texts])
        finally:
            self._at_once -= 1

    def close(self) -> None:
        self.is_closed = True

    @property
    def asked(self) -> list[str]:
        """All texts of all batches."""
        return [text for batch in self.batches for text in batch]


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture
def held(scripted: Scripted) -> Iterator[Scripted]:
    """One whose calls wait until the gate is opened."""
    scripted.gate = threading.Event()
    yield scripted
    scripted.gate.set()


def assert_right(vectors: Array, texts: Sequence[str], cosine: float = 0.999) -> None:
    assert vectors.shape == (len(texts), DIMENSIONS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    expected = np.array([vector_of(text) for text in texts])
    assert np.sum(vectors * expected, axis=1).min() >= cosine


def started(service: EmbeddingService, *texts: str, scope: CancelScope | None = None) -> Running:
    """A call on a thread of its own that has been counted, so that it waits or computes."""
    before = service.stats().requests
    run = Running(service.embed, texts, scope)
    wait_until(lambda: service.stats().requests > before)
    return run


def leading(service: EmbeddingService, embedder: Scripted, *texts: str, **options: Any) -> Running:
    """A call that is computing."""
    before = len(embedder.batches)
    run = started(service, *texts, **options)
    wait_until(lambda: len(embedder.batches) > before)
    return run


def idle(service: EmbeddingService) -> bool:
    """True when nothing is left of any call: what stays behind shows in no result."""
    return len(service._pending) == 0 and service._leader is None


# -- the cache


class PlainCache:
    """What the cache should do, in the plainest way."""

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self.values: dict[str, int] = {}
        self.uses: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self.now = 0

    def use(self, key: str) -> None:
        self.now += 1
        self.uses[key] = self.uses.get(key, 0) + 1
        self.last[key] = self.now

    def victim(self) -> str:
        return min(self.values, key=lambda key: (self.uses[key], self.last[key]))

    def remove(self, key: str) -> int:
        del self.uses[key], self.last[key]
        return self.values.pop(key)

    def put(self, key: str, value: int) -> None:
        if key not in self.values and len(self.values) == self.entries:
            self.remove(self.victim())
        self.values[key] = value
        self.use(key)


ACTIONS = st.tuples(
    st.sampled_from(["put", "put", "put", "get", "get", "get", "miss", "del", "pop", "clear"]),
    st.sampled_from("abcdefg"),
)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5), st.lists(ACTIONS, max_size=60))
def test_the_least_used_goes_first(entries: int, actions: list[tuple[str, str]]) -> None:
    """After any use, overwriting, removal and clearing, the cache holds what the plain one holds,
    and gives up the same entry next."""
    cache: LeastUsedCache[str, int] = LeastUsedCache(entries)
    plain = PlainCache(entries)
    for number, (action, key) in enumerate(actions):
        if action == "put":
            cache[key] = number
            plain.put(key, number)
        elif action == "get" and key in plain.values:
            assert cache[key] == plain.values[key]
            plain.use(key)
        elif action == "miss" and key not in plain.values:
            assert cache.get(key) is None
            with pytest.raises(KeyError):
                cache[key]
        elif action == "del" and key in plain.values:
            del cache[key]
            plain.remove(key)
        elif action == "pop":
            if plain.values:
                victim = plain.victim()
                assert cache.popitem() == (victim, plain.remove(victim))
            else:
                with pytest.raises(KeyError):
                    cache.popitem()
        elif action == "clear":
            cache.clear()
            plain = PlainCache(entries)
        assert {key: key in cache for key in "abcdefg"} == {k: k in plain.values for k in "abcdefg"}
        assert len(cache) == len(plain.values)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 4), st.lists(st.sampled_from("abcdefg"), max_size=40))
def test_what_is_in_the_cache_is_not_computed(entries: int, texts: list[str]) -> None:
    """One text a call: the embedder sees those that an LFU cache would not have, and no other."""
    embedder = Scripted()
    service = EmbeddingService(embedder, cache_entries=entries)
    plain = PlainCache(entries)
    missed = []
    for text in texts:
        assert_right(service.embed([text]), [text])
        if text in plain.values:
            plain.use(text)
        else:
            missed.append(text)
            if entries:
                plain.put(text, 0)
    assert embedder.asked == missed
    stats = service.stats()
    assert (stats.texts, stats.misses) == (len(texts), len(missed))
    assert stats.hits == len(texts) - len(missed)
    assert stats.entries == len(plain.values)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4096), st.integers(0, 2**32 - 1), st.floats(0.2, 20))
def test_sixteen_bits_are_enough(dimensions: int, seed: int, tail: float) -> None:
    """Of any unit vector, even or dominated by few numbers, the cosine error is at most 1e-3."""
    noise = np.random.default_rng(seed).standard_normal(dimensions)
    exact = unit_rows(np.sign(noise)[None] * np.abs(noise)[None] ** tail)
    again = unit_rows(halves(exact))
    assert again.dtype == np.float32
    assert abs(np.linalg.norm(again) - 1) < 1e-6
    assert 1 - float(exact[0].astype(np.float64) @ again[0]) <= 1e-3


def test_a_cached_vector_is_nobodys_to_change(scripted: Scripted) -> None:
    """Who writes into the array it got changes nothing for the next one."""
    service = EmbeddingService(scripted)
    service.embed(["a"])[:] = 7
    service.embed(["a"])[:] = 7
    assert_right(service.embed(["a"]), ["a"])
    assert len(scripted.batches) == 1


# -- one caller


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcdefghij"), max_size=12), max_size=5),
    st.integers(0, 5),
    st.integers(1, 4),
)
def test_rows_come_in_the_order_of_the_texts(
    calls: list[list[str]], entries: int, max_batch: int
) -> None:
    """Whatever repeats, is cached or needs several batches, row n is the vector of text n; within a
    call no text is computed twice, and no batch is too large."""
    embedder = Scripted()
    service = EmbeddingService(embedder, cache_entries=entries, max_batch=max_batch)
    for texts in calls:
        before = len(embedder.asked)
        vectors = service.embed(texts)
        if texts:
            assert_right(vectors, texts)
        asked = embedder.asked[before:]
        assert len(asked) == len(set(asked))
        assert set(asked) <= set(texts)
    assert all(1 <= len(batch) <= max_batch for batch in embedder.batches)
    stats = service.stats()
    assert stats.texts == sum(map(len, calls)) == stats.hits + stats.misses + stats.coalesced
    assert stats.misses == len(embedder.asked)
    assert stats.batches == len(embedder.batches)
    assert stats.largest_batch == max(map(len, embedder.batches), default=0)
    assert idle(service)


def test_a_lone_caller_computes_on_its_own_thread(scripted: Scripted) -> None:
    """Nobody waits for anybody: a call is one batch, and no thread is started for it."""
    threads = threading.active_count()
    service = EmbeddingService(scripted)
    scope = CancelScope()
    assert_right(service.embed(["a", "b"], scope), ["a", "b"], cosine=0.9999999)
    assert not callbacks_of(scope)
    assert scripted.batches == [["a", "b"]]
    assert threading.active_count() == threads


def test_no_text_gives_no_row(scripted: Scripted) -> None:
    """An empty list is answered without the embedder; the dimensions are known after a vector."""
    service = EmbeddingService(scripted)
    assert service.embed([]).shape == (0, 0)
    service.embed(["a"])
    assert service.embed([]).shape == (0, DIMENSIONS)
    assert len(scripted.batches) == 1


def test_long_texts_go_in_small_batches(scripted: Scripted) -> None:
    """A batch ends where its characters are enough; one text may be longer than that."""
    service = EmbeddingService(scripted)
    half, huge = "h" * (BATCH_CHARACTERS // 2), "x" * (3 * BATCH_CHARACTERS)
    texts = [half, half + "1", half + "2", huge, "a", "b"]
    assert_right(service.embed(texts), texts)
    assert [len(batch) for batch in scripted.batches] == [1, 1, 1, 1, 2]
    assert scripted.asked == texts


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", r"write \[text\]"),
        (["fine", 3], "text 1 is a int"),
        (["fine", b"bytes"], "text 1 is a bytes"),
        (["fine", "fine", "\ud800"], "text 2 is not valid Unicode"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(texts: Any, message: str, scripted: Scripted) -> None:
    """It is found before anything is computed."""
    with pytest.raises(InvalidRequestError, match=message):
        EmbeddingService(scripted).embed(texts)
    assert scripted.batches == []


@pytest.mark.parametrize("sizes", [{"cache_entries": -1}, {"max_batch": 0}])
def test_sizes_that_make_no_sense_are_refused(sizes: dict[str, int], scripted: Scripted) -> None:
    """The error has the numbers."""
    with pytest.raises(InvalidRequestError) as caught:
        EmbeddingService(scripted, **sizes)
    assert sizes.items() <= caught.value.details.items()


@pytest.mark.parametrize(
    "given_rows",
    [
        np.zeros((1, 4)),
        np.full((1, 4), np.nan),
        np.full((1, 4), np.inf),
        np.ones((2, 4)),
        np.ones(4),
        np.ones((1, 0)),
    ],
    ids=["zero", "nan", "inf", "two rows", "no matrix", "no dimension"],
)
def test_what_is_no_vector_never_comes_out(given_rows: Any, scripted: Scripted) -> None:
    """Rows without direction and arrays of another shape are errors, and are not remembered."""
    service = EmbeddingService(scripted)
    scripted.embed = lambda texts, scope: given_rows  # type: ignore[method-assign]
    with pytest.raises(WorkerError, match="the embedder gave"):
        service.embed(["a"])
    assert service.stats().entries == 0


def test_vectors_of_two_models_are_not_mixed(scripted: Scripted) -> None:
    """An embedder whose vectors change their length is an error."""
    service = EmbeddingService(scripted)
    service.embed(["a"])
    scripted.embed = lambda texts, scope: np.ones((1, 4))  # type: ignore[method-assign]
    with pytest.raises(WorkerError, match="4 dimensions after some of 24"):
        service.embed(["b"])


def test_vectors_of_any_length_become_unit_vectors(scripted: Scripted) -> None:
    """Also those whose squares leave the range of floats."""
    scripted.embed = lambda texts, scope: np.full((1, 4), 1e30, np.float32)  # type: ignore
    np.testing.assert_allclose(EmbeddingService(scripted).embed(["a"]), 0.5)


# -- many callers


def test_one_text_is_computed_once_for_all(held: Scripted) -> None:
    """While a text is computed, nobody else computes it; all get the same vector."""
    service = EmbeddingService(held)
    runs = [leading(service, held, "a"), *(started(service, "a", "a") for _ in range(5))]
    assert service.stats().coalesced == 10
    held.gate.set()  # type: ignore[union-attr]
    vectors = [run.join() for run in runs]
    assert held.batches == [["a"]]
    for vector in vectors[1:]:
        np.testing.assert_array_equal(vector, np.repeat(vectors[0], 2, axis=0))
    assert service.stats().hits == 0


@pytest.mark.parametrize(("max_batch", "sizes"), [(64, [1, 10]), (4, [1, 4, 4, 2])])
def test_what_comes_meanwhile_goes_together(
    max_batch: int, sizes: list[int], held: Scripted
) -> None:
    """Calls that come while a batch is computed are the next batch, as far as it has room."""
    service = EmbeddingService(held, max_batch=max_batch)
    runs = [leading(service, held, "first"), *(started(service, str(n)) for n in range(10))]
    held.gate.set()  # type: ignore[union-attr]
    for run, text in zip(runs, ["first", *map(str, range(10))], strict=True):
        assert_right(run.join(), [text])
    assert [len(batch) for batch in held.batches] == sizes
    assert held.asked == ["first", *map(str, range(10))]
    assert held.most_at_once == 1
    assert service.stats().largest_batch == max(sizes)


def test_a_long_list_lets_others_in(held: Scripted) -> None:
    """Who comes with one text waits for about one batch of a caller with twenty."""
    service = EmbeddingService(held, max_batch=5)
    many = [f"bulk {n}" for n in range(100)]
    bulk = leading(service, held, *many)
    single = started(service, "single")
    held.gate.set()  # type: ignore[union-attr]
    assert_right(single.join(), ["single"])
    assert_right(bulk.join(), many)
    assert any("single" in batch for batch in held.batches[:4])
    assert len(held.batches) == 21


# -- failures


def test_a_bad_text_fails_its_callers_only(held: Scripted) -> None:
    """Each caller of a text that is too long is told where it stands in its own list; the others of
    the same batch get their vectors."""
    service = EmbeddingService(held)
    runs = [
        leading(service, held, "first"),
        started(service, "a", "b"),
        started(service, "c", "long", "d"),
        started(service, "e"),
        started(service, "f", "g", "h", "long"),
        started(service, "long 2"),
    ]
    held.gate.set()  # type: ignore[union-attr]
    for run, texts in ((runs[0], ["first"]), (runs[1], ["a", "b"]), (runs[3], ["e"])):
        assert_right(run.join(), texts)
    for run, index in ((runs[2], 1), (runs[4], 3), (runs[5], 0)):
        with pytest.raises(ContextOverflowError) as caught:
            run.join()
        assert caught.value.details == {"index": index, "limit": 512}
        assert caught.value.message == f"text {index} has 900 tokens"
    assert idle(service)
    assert_right(service.embed(["c", "d"]), ["c", "d"])


def test_a_refused_text_is_not_remembered(scripted: Scripted) -> None:
    """Asked again, it is refused again, and what stood beside it is computed."""
    service = EmbeddingService(scripted)
    for _ in range(2):
        with pytest.raises(ContextOverflowError):
            service.embed(["a", "long"])
    assert service.stats().entries == 0
    assert_right(service.embed(["a"]), ["a"])


def test_a_fault_of_unknown_cause_fails_the_guilty_only(held: Scripted) -> None:
    """A batch that kills the worker is tried again caller by caller: only whose texts kill it
    again fails."""
    service = EmbeddingService(held)
    runs = [
        leading(service, held, "first"),
        started(service, "a", "b"),
        started(service, "c", "poison"),
        started(service, "d", "c"),
    ]
    held.gate.set()  # type: ignore[union-attr]
    for run, texts in ((runs[0], ["first"]), (runs[1], ["a", "b"]), (runs[3], ["d", "c"])):
        assert_right(run.join(), texts)
    with pytest.raises(WorkerCrashedError):
        runs[2].join()
    assert held.batches[1] == ["a", "b", "c", "poison", "d"]
    own = [{"a", "b"}, {"c", "poison"}, {"d", "c"}]
    assert all(any(set(batch) <= texts for texts in own) for batch in held.batches[2:])
    assert idle(service)


def test_a_broken_embedder_fails_everybody(scripted: Scripted) -> None:
    """No caller waits forever, and each gets the error; afterwards all is as before."""
    scripted.gate = threading.Event()
    service = EmbeddingService(scripted)
    runs = [leading(service, scripted, "0"), *(started(service, str(n)) for n in range(1, 5))]
    scripted.errors = [WorkerError("broken") for _ in range(6)]
    scripted.gate.set()
    for run in runs:
        with pytest.raises(WorkerError, match="broken"):
            run.join()
    assert scripted.errors == []
    assert idle(service)
    assert_right(service.embed(["0"]), ["0"])


def test_an_index_that_names_no_text_blames_nobody(scripted: Scripted) -> None:
    """An error about a text that does not exist is the caller's as it is."""
    service = EmbeddingService(scripted)
    scripted.errors = [InvalidRequestError("nonsense", index=7)]
    with pytest.raises(InvalidRequestError, match="nonsense"):
        service.embed(["a"])
    assert_right(service.embed(["a"]), ["a"])


# -- cancelling


def test_a_cancelled_follower_leaves_alone(held: Scripted) -> None:
    """It ends while the others' batch is still being computed; its text is not computed."""
    service = EmbeddingService(held)
    leader = leading(service, held, "a")
    scope = CancelScope()
    follower, other = started(service, "b", "c", scope=scope), started(service, "c")
    scope.cancel(RequestCancelledError("enough"))
    with pytest.raises(RequestCancelledError, match="enough"):
        follower.join()
    assert leader.is_running
    held.gate.set()  # type: ignore[union-attr]
    assert_right(leader.join(), ["a"])
    assert_right(other.join(), ["c"])
    assert held.batches == [["a"], ["c"]]
    assert not callbacks_of(scope)


def test_a_cancelled_leader_hands_over(held: Scripted) -> None:
    """Those who waited for its batch go on, in one batch; what only the leader wanted is not
    computed again."""
    service = EmbeddingService(held)
    scope = CancelScope()
    leader = leading(service, held, "x", "y", scope=scope)
    followers = [started(service, "y"), started(service, "z")]
    scope.cancel(RequestCancelledError("enough"))
    with pytest.raises(RequestCancelledError, match="enough"):
        leader.join()
    held.gate.set()  # type: ignore[union-attr]
    for run, text in zip(followers, "yz", strict=True):
        assert_right(run.join(), [text])
    assert held.batches == [["x", "y"], ["y", "z"]]
    assert idle(service)


def test_a_cancelled_leader_blames_nobody(held: Scripted) -> None:
    """The texts of others that were in its batch stay together in the next one."""
    service = EmbeddingService(held)
    first = leading(service, held, "first")
    scopes = [CancelScope() for _ in range(3)]
    runs = [started(service, text, scope=scope) for text, scope in zip("abc", scopes, strict=True)]
    gate, held.gate = held.gate, threading.Event()
    gate.set()  # type: ignore[union-attr]
    wait_until(lambda: len(held.batches) == 2)
    assert_right(first.join(), ["first"])
    held.scopes[1].cancel(RequestCancelledError("enough"))
    leader = scopes.index(held.scopes[1])
    with pytest.raises(RequestCancelledError):
        runs.pop(leader).join()
    left = "abc".replace("abc"[leader], "")
    held.gate.set()
    for run, text in zip(runs, left, strict=True):
        assert_right(run.join(), [text])
    assert held.batches == [["first"], ["a", "b", "c"], list(left)]


def test_an_interrupted_leader_hands_over(held: Scripted) -> None:
    """Ctrl-C ends the call that computes, and nobody else's."""
    service = EmbeddingService(held)
    leader = leading(service, held, "a")
    follower = started(service, "a", "b")
    held.errors = [KeyboardInterrupt()]
    held.gate.set()  # type: ignore[union-attr]
    with pytest.raises(KeyboardInterrupt):
        leader.join()
    assert_right(follower.join(), ["a", "b"])
    assert idle(service)


def test_a_cancelled_scope_computes_nothing(scripted: Scripted) -> None:
    """Not even when the vector is there."""
    service = EmbeddingService(scripted)
    service.embed(["a"])
    scope = CancelScope()
    scope.cancel(RequestCancelledError("before"))
    for text in "ab":
        with pytest.raises(RequestCancelledError, match="before"):
            service.embed([text], scope)
    assert scripted.asked == ["a"]


def test_closing_ends_every_call(held: Scripted) -> None:
    """Who computes, who waits and who comes later gets EngineClosedError."""
    service = EmbeddingService(held)
    leader, follower = leading(service, held, "a"), started(service, "a", "b")
    service.close()
    service.close()
    with pytest.raises(EngineClosedError):
        follower.join()
    held.gate.set()  # type: ignore[union-attr]
    with pytest.raises(EngineClosedError):
        leader.join()
    with pytest.raises(EngineClosedError):
        service.embed(["a"])
    assert held.is_closed
    assert idle(service)


# -- everything at once


def check_refusal(error: ContextOverflowError, texts: Sequence[str]) -> None:
    """It names a text of this list that is too long."""
    index = error.details["index"]
    assert texts[index].startswith("long")
    assert f"text {index} " in error.message


@pytest.mark.parametrize("seed", range(6))
def test_many_threads_get_what_they_asked_for(seed: int) -> None:
    """With repeats, bad texts, crashes, cancels and a small cache at once, every call ends with
    the right rows or with an error of its own making, and nothing is left behind."""
    embedder = Scripted()
    service = EmbeddingService(embedder, cache_entries=8 * (seed % 3), max_batch=1 + 3 * (seed % 2))
    served = [0] * 8

    def work(worker: int) -> None:
        dice = Random(seed * 100 + worker)
        for _ in range(60):
            texts = [dice.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(dice.randrange(6))]
            if dice.random() < 0.15:
                texts.append(dice.choice(["long", "long 2", "poison"]))
                dice.shuffle(texts)
            scope = CancelScope()
            if is_cancelled := dice.random() < 0.2:
                error = RequestCancelledError("enough")
                timer = threading.Timer(dice.random() / 500, scope.cancel, [error])
                timer.start()
            try:
                vectors = service.embed(texts, scope)
                assert not {"long", "long 2", "poison"} & set(texts)
                if texts:
                    assert_right(vectors, texts)
                served[worker] += 1
            except ContextOverflowError as error:
                check_refusal(error, texts)
            except WorkerCrashedError:
                assert "poison" in texts
            except RequestCancelledError:
                assert is_cancelled
            if is_cancelled:
                timer.join(BOUND_S)

    for run in run_all([lambda n=n: work(n) for n in range(8)]):
        run.join()
    assert min(served) > 20
    assert embedder.most_at_once == 1
    assert idle(service)
    stats = service.stats()
    assert stats.entries <= 8 * (seed % 3)
    assert stats.texts == stats.hits + stats.misses + stats.coalesced


# -- statistics


def test_what_sharing_saves(scripted: Scripted) -> None:
    """The models that were not loaded for the other users, and half of each cached vector."""
    service = EmbeddingService(scripted, model_bytes=lambda: 1_000_000)
    service.embed(["a", "b", "a"])
    assert service.stats().saved_bytes == 2 * DIMENSIONS * 2
    for user in ("router", "memory", "router", "application"):
        service.embed(["a"], user=user)
    stats = service.stats()
    assert stats.model_dump() == {
        "requests": 5,
        "texts": 7,
        "hits": 4,
        "misses": 2,
        "hit_rate": 4 / 7,
        "coalesced": 1,
        "batches": 1,
        "largest_batch": 2,
        "entries": 2,
        "cache_bytes": 2 * (DIMENSIONS * 2 + KEY_BYTES),
        "users": 3,
        "model_bytes": 1_000_000,
        "saved_bytes": 2 * 1_000_000 + 2 * DIMENSIONS * 2,
    }


def test_an_unused_service_has_plain_statistics(scripted: Scripted) -> None:
    """Nothing is divided by zero, and nothing is saved."""
    stats = EmbeddingService(scripted).stats()
    assert set(stats.model_dump().values()) == {0}


def test_importing_the_library_brings_no_heavy_package() -> None:
    """Neither the front door nor the shapes of the statistics import what computes."""
    script = (
        "import sys, orion_oie, orion_oie.schemas.stats; "
        "print(*({'numpy', 'torch', 'sentence_transformers', 'cachetools'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == ""


# -- a model in a worker


class FakeWorker:
    """A loaded embedding model that dies when it is told to."""

    def __init__(self, pid: int, dies: int = 0) -> None:
        self.pid = pid
        self.dies = dies
        self.is_dead = False
        self.is_closed = False

    def is_alive(self) -> bool:
        return not self.is_dead and not self.is_closed

    def embed(self, texts: Sequence[str], scope: CancelScope) -> Array:
        scope.check()
        if self.is_closed:
            raise EngineClosedError("unloaded")
        if self.dies or self.is_dead:
            self.is_dead = True
            raise WorkerCrashedError("it died")
        return np.array([vector_of(text) for text in texts])

    def close(self, timeout_s: float = 10.0) -> None:
        self.is_closed = True


SPEC = LoadSpec(INFO, (), is_embedding=True)


def fakes(*workers: FakeWorker) -> tuple[GGUFEmbedder, Callable[[], int]]:
    """An embedder whose loads give these workers in turn, and how many it has loaded."""
    left = list(workers)
    embedder = GGUFEmbedder(lambda spec, scope, on_progress: left.pop(0), SPEC)  # type: ignore
    return embedder, lambda: len(workers) - len(left)


def test_the_model_is_loaded_when_it_is_needed() -> None:
    """Once, by the first call."""
    embedder, loaded = fakes(FakeWorker(1))
    assert (loaded(), embedder.pid) == (0, None)
    for _ in range(2):
        embedder.embed(["a"], CancelScope())
    assert (loaded(), embedder.pid) == (1, 1)


def test_a_dead_worker_is_replaced_once() -> None:
    """The texts that were with it are computed by the next worker; if that one dies of them too,
    the caller is told."""
    embedder, loaded = fakes(FakeWorker(1, dies=1), FakeWorker(2))
    assert_right(embedder.embed(["a"], CancelScope()), ["a"])
    assert (loaded(), embedder.pid) == (2, 2)
    embedder, loaded = fakes(FakeWorker(1, dies=1), FakeWorker(2, dies=1), FakeWorker(3))
    with pytest.raises(WorkerCrashedError):
        embedder.embed(["a"], CancelScope())
    assert loaded() == 2
    assert_right(embedder.embed(["b"], CancelScope()), ["b"])


def test_a_worker_that_died_while_idle_is_replaced() -> None:
    """It costs no failed call, and is given back."""
    idle_worker = FakeWorker(1)
    embedder, loaded = fakes(idle_worker, FakeWorker(2))
    embedder.embed(["a"], CancelScope())
    idle_worker.is_dead = True
    assert embedder.pid is None
    embedder.embed(["a"], CancelScope())
    assert (loaded(), embedder.pid) == (2, 2)
    assert idle_worker.is_closed


@pytest.mark.parametrize("ending", ["cancel", "close"])
def test_a_load_can_be_ended(ending: str) -> None:
    """A cancel of the caller and the close of the embedder reach the load."""
    begun = threading.Event()

    def load(spec: LoadSpec, scope: CancelScope, on_progress: object) -> None:
        awake = threading.Event()
        scope.on_cancel(awake.set)
        begun.set()
        assert awake.wait(BOUND_S)
        scope.check()

    embedder = GGUFEmbedder(load, SPEC)  # type: ignore[arg-type]
    scope = CancelScope()
    run = Running(embedder.embed, ["a"], scope)
    assert begun.wait(BOUND_S)
    expected: type[OrionError]
    if ending == "cancel":
        scope.cancel(RequestCancelledError("enough"))
        expected = RequestCancelledError
    else:
        embedder.close()
        expected = EngineClosedError
    with pytest.raises(expected):
        run.join()


def test_a_load_that_outlives_the_embedder_is_given_back() -> None:
    """A model that is loaded although the embedder was closed meanwhile is freed."""
    begun, let_go, worker = threading.Event(), threading.Event(), FakeWorker(1)

    def load(spec: LoadSpec, scope: CancelScope, on_progress: object) -> FakeWorker:
        begun.set()
        assert let_go.wait(BOUND_S)
        return worker

    embedder = GGUFEmbedder(load, SPEC)  # type: ignore[arg-type, return-value]
    run = Running(embedder.embed, ["a"], CancelScope())
    assert begun.wait(BOUND_S)
    embedder.close()
    let_go.set()
    with pytest.raises(EngineClosedError):
        run.join()
    assert worker.is_closed


def test_two_loads_at_once_leave_one_model() -> None:
    """Calls that do not take turns may both load; one model is used, the other given back."""
    both = threading.Barrier(2)
    workers = [FakeWorker(1), FakeWorker(2)]
    left = list(workers)

    def load(spec: LoadSpec, scope: CancelScope, on_progress: object) -> FakeWorker:
        both.wait(BOUND_S)
        return left.pop()

    embedder = GGUFEmbedder(load, SPEC)  # type: ignore[arg-type, return-value]
    for run in run_all([lambda: embedder.embed(["a"], CancelScope())] * 2):
        assert_right(run.join(), ["a"])
    assert sorted(worker.is_closed for worker in workers) == [False, True]


def test_a_spec_for_writing_is_refused() -> None:
    """Before anything is loaded."""
    with pytest.raises(InvalidRequestError, match="not for embedding"):
        GGUFEmbedder(lambda *_: None, LoadSpec(INFO, ()))  # type: ignore[arg-type, return-value]


# -- the real model, twice


@pytest.fixture(scope="module")
def in_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GGUFEmbedder]:
    file = write_minilm(tmp_path_factory.mktemp("minilm") / "minilm.gguf")
    embedder = GGUFEmbedder(LlamaBackend().load, LoadSpec(INFO, (file,), is_embedding=True))
    yield embedder
    embedder.close()


@pytest.fixture(scope="module")
def in_process() -> Iterator[SentenceTransformerEmbedder]:
    pytest.importorskip("sentence_transformers")
    embedder = SentenceTransformerEmbedder(minilm_folder())
    yield embedder
    embedder.close()


def test_both_embedders_agree(
    in_worker: GGUFEmbedder, in_process: SentenceTransformerEmbedder
) -> None:
    """The same model gives the same vectors in a worker and in sentence-transformers, in batches
    and alone."""
    ones = EmbeddingService(in_worker).embed(SENTENCES)
    others = EmbeddingService(in_process).embed(SENTENCES * 3)[: len(SENTENCES)]
    assert ones.shape == others.shape == (len(SENTENCES), 384)
    assert np.sum(ones * others, axis=1).min() >= 0.99
    alone = np.concatenate([in_process.embed([text], CancelScope()) for text in SENTENCES])
    assert np.sum(others * alone, axis=1).min() >= 0.9999
    nearest = np.argsort(-(ones @ ones.T), axis=1)
    assert nearest[0, 1] == 1


def test_cached_vectors_of_a_real_model(in_worker: GGUFEmbedder) -> None:
    """The second answer comes from the cache, and its cosine error is at most 1e-3."""
    service = EmbeddingService(in_worker)
    exact = service.embed(SENTENCES).astype(np.float64)
    again = service.embed(SENTENCES)
    assert service.stats().hits == len(SENTENCES)
    assert 0 <= (1 - np.sum(exact * again, axis=1)).max() <= 1e-3


def test_a_real_worker_is_replaced(in_worker: GGUFEmbedder) -> None:
    """Killed between two calls, it is loaded again, and the texts get their vectors."""
    service = EmbeddingService(in_worker, cache_entries=0)
    before = service.embed(SENTENCES[:2])
    pid = in_worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    after = service.embed(SENTENCES[:2])
    np.testing.assert_allclose(before, after, atol=1e-5)
    assert in_worker.pid not in (None, pid)


@pytest.mark.parametrize("embedder", ["in_worker", "in_process"])
def test_real_texts_that_are_too_long(embedder: str, request: pytest.FixtureRequest) -> None:
    """They are refused by their place in the list, not cut; callers beside them are served."""
    service = EmbeddingService(request.getfixturevalue(embedder))
    too_long = "word " * 3000

    def refused() -> None:
        with pytest.raises(ContextOverflowError) as caught:
            service.embed(["fine", too_long])
        assert caught.value.details["index"] == 1
        assert caught.value.details["prompt_tokens"] > caught.value.details["limit"] >= 256

    def served() -> None:
        assert service.embed(["fine", "good", ""]).shape == (3, 384)

    for run in run_all([refused, served, refused, served]):
        run.join()
    with pytest.raises(InvalidRequestError, match="text 1 is not valid Unicode"):
        request.getfixturevalue(embedder).embed(["fine", "\udfff"], CancelScope())


def set_prompt(
    monkeypatch: pytest.MonkeyPatch, embedder: SentenceTransformerEmbedder, prompt: str
) -> None:
    """Give the model of an embedder a prompt of its own; the small one of the tests has none."""
    monkeypatch.setattr(embedder._model, "prompts", {"query": prompt})
    monkeypatch.setattr(embedder._model, "default_prompt_name", "query")


def test_no_prompt_is_added(
    in_process: SentenceTransformerEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that would put a prompt before each text gets the text alone."""
    before = in_process.embed(["a cat"], CancelScope())
    set_prompt(monkeypatch, in_process, "find what is about: ")
    np.testing.assert_allclose(in_process.embed(["a cat"], CancelScope()), before, atol=1e-6)


def test_no_text_loads_the_model(
    in_worker: GGUFEmbedder, in_process: SentenceTransformerEmbedder
) -> None:
    """An embedder that is asked for nothing is ready afterwards, and tells its dimensions."""
    for embedder in (in_worker, in_process):
        assert embedder.embed([], CancelScope()).shape == (0, 384)


# -- sentence-transformers


def test_the_extra_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, the error says what to install."""
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'orion-oie\[embeddings\]'"):
        SentenceTransformerEmbedder("any").embed(["a"], CancelScope())


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Addresses that were wanted while the hub's client believes that there is a network."""
    pytest.importorskip("sentence_transformers")
    from huggingface_hub import constants

    wanted: list[object] = []

    def refuse(*args: object, **_: object) -> None:
        wanted.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return wanted


@pytest.mark.parametrize("name", ["nobody/has-this-model", "no-such-model", "/no/such/folder"])
def test_nothing_is_fetched(name: str, looked_up: list[object]) -> None:
    """A model that is not here is an error, and no address is looked up for it."""
    with pytest.raises(ModelNotFoundError, match=name):
        SentenceTransformerEmbedder(name).embed(["a"], CancelScope())
    assert looked_up == []


@pytest.mark.parametrize("name", ["all-mini", "sentence-transformers/all-mini"])
def test_a_name_is_found_in_the_hubs_cache(
    name: str, looked_up: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its client would have put it, with and without the name of its owner."""
    repository = tmp_path / "models--sentence-transformers--all-mini"
    for folder in ("refs", "snapshots"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots" / "c0ffee").symlink_to(minilm_folder())
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    embedder = SentenceTransformerEmbedder(name)
    assert embedder.embed(["a"], CancelScope()).shape == (1, 384)
    assert looked_up == []
    embedder.close()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"SENTENCE_TRANSFORMERS_HOME": "/d", "HF_HUB_CACHE": "/a"}, "/d"),
        ({"HOME": "/e"}, "/e/.cache/huggingface/hub"),
    ],
)
def test_where_the_hubs_cache_is(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variables of sentence-transformers and of the hub's client say so."""
    for name in ("SENTENCE_TRANSFORMERS_HOME", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub_cache() == Path(expected)


def test_a_damaged_folder_is_told(tmp_path: Path) -> None:
    """What sentence-transformers cannot load is an error with the path and its reason."""
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ModelCorruptError) as caught:
        SentenceTransformerEmbedder(tmp_path).embed(["a"], CancelScope())
    assert caught.value.details == {"path": str(tmp_path)}


def test_a_closed_embedder_embeds_nothing() -> None:
    """Nor does it load a model; a cancelled scope neither."""
    embedder = SentenceTransformerEmbedder("any")
    scope = CancelScope()
    scope.cancel(RequestCancelledError("before"))
    with pytest.raises(RequestCancelledError):
        embedder.embed(["a"], scope)
    embedder.close()
    embedder.close()
    with pytest.raises(EngineClosedError):
        embedder.embed(["a"], CancelScope())


def check_lengths(model: Any, texts: list[str]) -> None:
    """The check of an embedder in this process, for a model that is not installed."""
    from orion_oie.embeddings.sentence_transformer import _check_texts

    _check_texts(model, texts)


def test_texts_without_limit_are_not_counted() -> None:
    """A model that reads texts of any length needs no tokenizer."""

    class Endless:
        max_seq_length = math.inf

    check_lengths(Endless(), ["word " * 10_000])
