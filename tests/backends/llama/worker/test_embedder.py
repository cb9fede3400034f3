"""Embedding models: the vectors are right whatever is computed together, and failures are told."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp as lc
import numpy as np
import pytest
import tiny
from contracts import INFO
from gguf import GGUFWriter, PoolingType
from helpers import BOUND_S, Running, wait_until
from internals import pending_of
from minilm import original_minilm, write_minilm
from numpy.typing import NDArray
from tiny import broken_files, write_tiny_llama, write_tiny_recurrent

from orion_oie.backends.base import DEFAULT_CONTEXT_LENGTH, LoadSpec
from orion_oie.backends.llama.host.loader import (
    LlamaBackend,
    LoaderSettings,
)
from orion_oie.backends.llama.worker.embedder import BATCH_TOKENS, Embedder
from orion_oie.backends.llama.worker.text_context import BATCH_TEXTS, SHORT_TOKENS
from orion_oie.backends.llama.worker.thread_choice import ThreadChoice
from orion_oie.cancellation import CancelScope
from orion_oie.errors import (
    ContextOverflowError,
    InvalidRequestError,
    ModelCorruptError,
    ModelError,
    RequestCancelledError,
    WorkerError,
)

Array = NDArray[np.float32]
Open = Callable[..., Embedder]

# Left out, since llama.cpp splits them otherwise than the original: the vowel signs of Indic
# scripts, which it drops, and words of more than 100 letters, which the original gives up on.
TEXTS = [
    "Hello",
    "",
    "   \t\n ",
    "What is the capital of France, and how do I get there by train?",
    "Wie komme ich am schnellsten nach Köln?",
    "naïve café déjà vu Ångström İSTANBUL ẞ",
    "e\u0301 is \u00e9, ﬁ is fi, ½, x²",
    "Привет, мир",
    "مرحبا بالعالم",
    "日本語のテキスト",
    "한국어 문장입니다",
    "tiếng Việt có dấu",
    "👍 well done 🎉",
    "def f(x):\n    return x**2  # a square",
    "$$$ !!! ???",
    "a\x00b \u200b\ufeffc",
    "the quick brown fox jumps over the lazy dog " * 30,
    "red green blue " * 165,
]


@pytest.fixture(scope="module")
def minilm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_minilm(tmp_path_factory.mktemp("minilm") / "minilm.gguf")


@pytest.fixture(scope="module")
def minilm(minilm_file: Path) -> Iterator[Embedder]:
    embedder = opened(minilm_file)
    yield embedder
    embedder.close()


@pytest.fixture(scope="module")
def reference() -> Any:
    return original_minilm()


@pytest.fixture
def open_model() -> Iterator[Open]:
    """Opens embedders that are closed when the test ends."""
    embedders: list[Embedder] = []

    def open_one(*files: Path, **options: Any) -> Embedder:
        embedders.append(opened(*files, **options))
        return embedders[-1]

    yield open_one
    for embedder in embedders:
        embedder.close()


def opened(*files: Path, context_length: int | None = None) -> Embedder:
    return Embedder(
        files,
        threads=ThreadChoice(2),
        context_length=context_length,
        on_progress=lambda fraction: None,
    )


def one_by_one(embedder: Embedder, texts: Sequence[str]) -> Array:
    return np.concatenate([embedder.embed([text]) for text in texts])


def unit(vector: Array) -> Array:
    return vector / np.linalg.norm(vector)


def assert_same(ones: Array, others: Array, cosine: float = 0.9999) -> None:
    assert ones.shape == others.shape
    np.testing.assert_allclose(np.linalg.norm(ones, axis=1), 1, atol=1e-5)
    assert np.sum(ones * others, axis=1).min() > cosine


def write_pooled(path: Path, pooling: PoolingType, patch: pytest.MonkeyPatch) -> Path:
    """A tiny decoder whose file names a pooling."""

    class PoolingWriter(GGUFWriter):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.add_pooling_type(pooling)

    with patch.context() as inner:
        inner.setattr(tiny, "GGUFWriter", PoolingWriter)
        return write_tiny_llama(path)


# -- a real encoder


def test_vectors_are_those_of_the_original(minilm: Embedder, reference: Any) -> None:
    """Each vector points where sentence-transformers' does, in all scripts, short and long."""
    expected = reference.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    cosines = np.sum(minilm.embed(TEXTS) * expected, axis=1)
    wrong = {text[:40]: c for text, c in zip(TEXTS, cosines, strict=True) if c < 0.999}
    assert wrong == {}


@pytest.mark.parametrize("pooling", [None, PoolingType.NONE, PoolingType.CLS, PoolingType.LAST])
def test_pooling_is_what_the_file_says(
    pooling: PoolingType | None, reference: Any, open_model: Open, tmp_path: Path
) -> None:
    """First token or last where the file names one of them, the mean where it names nothing."""
    texts = ["A small cat sat on the mat.", "Hello"]
    tokens = reference.encode(texts, output_value="token_embeddings", show_progress_bar=False)
    pools = {PoolingType.CLS: lambda rows: rows[0], PoolingType.LAST: lambda rows: rows[-1]}
    pool = pools.get(pooling, lambda rows: rows.mean(axis=0))  # type: ignore[arg-type]
    expected = np.stack([unit(pool(rows.numpy())) for rows in tokens])
    model = open_model(write_minilm(tmp_path / "pooled.gguf", pooling=pooling))
    assert_same(model.embed(texts), expected, cosine=0.999)


def test_a_reranker_is_refused(tmp_path: Path) -> None:
    """A model that rates pairs of texts gives no embeddings, and is told from one that does."""
    path = write_minilm(tmp_path / "rank.gguf", pooling=PoolingType.RANK)
    with pytest.raises(ModelError, match="is a reranker"):
        opened(path)


def test_a_text_gets_the_same_vector_alone_and_in_company(minilm: Embedder) -> None:
    """What else is asked for, and in which order, changes no vector."""
    together = minilm.embed(TEXTS)
    assert together.dtype == np.float32
    assert together.shape == (len(TEXTS), minilm.dimensions)
    assert_same(together, one_by_one(minilm, TEXTS))
    assert_same(together[::-1], minilm.embed(TEXTS[::-1]))
    np.testing.assert_allclose(together[::-1], minilm.embed(TEXTS[::-1]), atol=1e-3)


def test_short_and_long_texts_take_turns(minilm: Embedder) -> None:
    """Whichever context is there or was there before: on both sides of each size."""
    sizes = [1, SHORT_TOKENS - 1, SHORT_TOKENS, BATCH_TOKENS, BATCH_TOKENS + 1, 400]
    texts = ["cat " * (size - 2) for size in sizes]
    together = minilm.embed(texts)
    assert_same(together, one_by_one(minilm, texts))
    assert_same(together[::-1], one_by_one(minilm, texts[::-1]))


@pytest.mark.parametrize("words", [3, 30])
def test_batches_of_fewer_tokens_than_a_tile_do_without_flash_attention(
    words: int, minilm: Embedder, minilm_file: Path, open_model: Open,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A vector is that of exact attention; flash attention rounds to 16 bits."""
    init = lc.llama_init_from_model

    def exact(model: Any, params: Any) -> Any:
        params.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return init(model, params)

    monkeypatch.setattr(lc, "llama_init_from_model", exact)
    text = "red green " * words
    np.testing.assert_array_equal(minilm.embed([text]), open_model(minilm_file).embed([text]))


def test_no_text_gives_no_row(minilm: Embedder) -> None:
    """An empty list is a list."""
    assert minilm.embed([]).shape == (0, 384)


def test_the_longest_text_fits_and_a_longer_one_is_refused(minilm: Embedder) -> None:
    """The limit is the model's, special tokens included; nothing is cut in silence."""
    longest = "cat " * (minilm.max_tokens - 2)
    assert np.isfinite(minilm.embed([longest])).all()
    with pytest.raises(ContextOverflowError, match="text 1 has 513 tokens") as caught:
        minilm.embed(["short", longest + "cat"])
    assert caught.value.details == {
        "prompt_tokens": 513,
        "requested_tokens": 0,
        "limit": 512,
        "index": 1,
    }


def test_the_context_can_be_made_shorter_but_not_longer(
    minilm_file: Path, open_model: Open
) -> None:
    """A smaller limit is kept, with batches as full as ever; positions end with the training."""
    short = open_model(minilm_file, context_length=20)
    assert short.max_tokens == 20
    assert_same(short.embed(["cat " * 18] * 40), np.repeat(short.embed(["cat " * 18]), 40, axis=0))
    with pytest.raises(ContextOverflowError):
        short.embed(["cat " * 19])
    assert open_model(minilm_file, context_length=4096).max_tokens == 512


def test_text_never_becomes_a_control_token(minilm: Embedder) -> None:
    """The names of control tokens are words like others."""
    assert_same(minilm.embed(["a [SEP] b"]), minilm.embed(["a [ SEP ] b"]))


def test_an_unpaired_surrogate_is_refused(minilm: Embedder) -> None:
    """What has no UTF-8 form is named, and is no bug of ours."""
    with pytest.raises(InvalidRequestError, match=r"text 1 .* surrogate at index 2"):
        minilm.embed(["fine", "ab\ud800"])


# -- decoders

WRITERS = {
    "decoder": write_tiny_llama,
    "decoder, spm": lambda path, **options: write_tiny_llama(path, vocab="spm", **options),
    "recurrent": write_tiny_recurrent,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_decoder_embeds(kind: str, open_model: Open, tmp_path: Path) -> None:
    """Many texts through a model with a memory: each as if alone, call after call."""
    model = open_model(WRITERS[kind](tmp_path / "model.gguf"))
    texts = [f"{'hello world ' * (n % 7)}number {n}" for n in range(300)]
    vectors = model.embed(texts)
    assert vectors.shape == (300, 64)
    assert_same(vectors, model.embed(texts))
    assert_same(vectors[::25], one_by_one(model, texts[::25]))
    np.testing.assert_allclose(vectors[::25], one_by_one(model, texts[::25]), atol=1e-3)


def test_texts_longer_than_a_batch(open_model: Open, tmp_path: Path) -> None:
    """A long text among short ones is computed whole; the model's limit holds as before."""
    model = open_model(write_tiny_llama(tmp_path / "tiny.gguf", context_length=2048))
    long = "".join(chr(ord("A") + n % 26) for n in range(2048))
    texts = ["short", long[:600], long, "another", long[:1500]]
    vectors = model.embed(texts)
    assert_same(vectors, one_by_one(model, texts))
    assert len({row.tobytes() for row in vectors}) == len(texts)
    with pytest.raises(ContextOverflowError):
        model.embed([long + "A"])


def test_a_long_context_is_used_in_part(open_model: Open, tmp_path: Path) -> None:
    """Nobody pays for a context of a million tokens without asking for it."""
    path = write_tiny_llama(tmp_path / "tiny.gguf", context_length=1 << 20)
    assert open_model(path).max_tokens == DEFAULT_CONTEXT_LENGTH
    assert open_model(path, context_length=5000).max_tokens == 5000


def test_last_token_pooling_of_a_decoder(
    open_model: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the mean's vector for a text of one token, not for a longer one."""
    last = open_model(write_pooled(tmp_path / "last.gguf", PoolingType.LAST, monkeypatch))
    mean = open_model(write_tiny_llama(tmp_path / "mean.gguf"))
    texts = ["A", "ABC", "B", "BCD"]
    cosines = np.sum(last.embed(texts) * mean.embed(texts), axis=1)
    assert (cosines > 0.9999).tolist() == [True, False, True, False]
    assert_same(last.embed(texts), one_by_one(last, texts))


def test_an_empty_text_needs_a_token(open_model: Open, tmp_path: Path) -> None:
    """It embeds where the model adds a token of its own, and is refused where there is none."""
    with_bos = open_model(write_tiny_llama(tmp_path / "spm.gguf", vocab="spm"))
    assert np.linalg.norm(with_bos.embed([""])) == pytest.approx(1)
    without = open_model(write_tiny_llama(tmp_path / "bytes.gguf"))
    with pytest.raises(InvalidRequestError, match="text 1 yields no token"):
        without.embed(["fine", ""])


# -- steps and failures


def test_texts_share_steps(
    open_model: Open, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short texts are computed together, as many as one step takes, and no more."""
    decode = lc.llama_decode
    sizes: list[int] = []

    def counting(context: Any, batch: Any) -> int:
        sizes.append(batch.n_tokens)
        return int(decode(context, batch))

    monkeypatch.setattr(lc, "llama_decode", counting)
    model = open_model(tiny_model)
    half = BATCH_TOKENS // 2
    model.embed(["A"] * BATCH_TEXTS + ["B" * half] * 5 + ["C" * (BATCH_TOKENS + 1)])
    assert sizes == [BATCH_TEXTS, 2 * half, 2 * half, half, BATCH_TOKENS + 1]


def fail_steps(patch: pytest.MonkeyPatch, code: int) -> None:
    """Have llama.cpp's calls fail with a code: no input makes them."""
    for call in ("llama_decode", "llama_encode"):
        patch.setattr(lc, call, lambda context, batch: code)


@pytest.mark.parametrize("text", ["hello", "hello " * 100])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_failed_step_is_an_error_and_no_end(
    kind: str, text: str, open_model: Open, minilm_file: Path, tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The code of llama.cpp is told; afterwards the model embeds as before."""
    model = open_model(minilm_file if kind == "encoder" else tiny_model)
    before = model.embed([text])
    with monkeypatch.context() as patch:
        fail_steps(patch, -3)
        with pytest.raises(WorkerError, match="code -3") as caught:
            model.embed([text])
    assert caught.value.details == {"code": -3}
    assert_same(model.embed([text]), before)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_vector_without_direction_never_comes_out(
    value: float, open_model: Open, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what is not a number nor zero; afterwards the model embeds as before."""
    model = open_model(tiny_model)
    bad = np.full(model.dimensions, value, np.float32)
    pointer = np.ctypeslib.as_ctypes(bad)
    with monkeypatch.context() as patch:
        patch.setattr(lc, "llama_get_embeddings_seq", lambda context, sequence: pointer)
        with pytest.raises(WorkerError, match="no direction"):
            model.embed(["hello"])
    assert np.linalg.norm(model.embed(["hello"])) == pytest.approx(1)


def test_very_large_values_are_no_overflow(
    open_model: Open, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vector whose squares leave the range of floats has a direction all the same."""
    model = open_model(tiny_model)
    pointer = np.ctypeslib.as_ctypes(np.full(model.dimensions, 1e30, np.float32))
    monkeypatch.setattr(lc, "llama_get_embeddings_seq", lambda context, sequence: pointer)
    np.testing.assert_allclose(model.embed(["hello"]), 1 / 8)


def test_a_missing_vector_is_an_error(
    open_model: Open, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A null pointer is not followed."""
    model = open_model(tiny_model)
    monkeypatch.setattr(lc, "llama_get_embeddings_seq", lambda context, sequence: None)
    with pytest.raises(WorkerError, match="no embedding for text 0"):
        model.embed(["hello"])


def test_a_context_that_cannot_be_made_is_an_error(
    open_model: Open, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little memory for a long text loses that text, not the model."""
    model = open_model(tiny_model)
    with monkeypatch.context() as patch:
        patch.setattr(lc, "llama_init_from_model", lambda model, params: None)
        with pytest.raises(WorkerError, match="texts of 1024 tokens"):
            model.embed(["A" * 1000])
    assert model.embed(["A"]).shape == (1, 64)


@pytest.mark.parametrize("fault", ["empty", "truncated header", "truncated data", "web page"])
def test_a_broken_file_is_told(fault: str, tiny_model: Path, tmp_path: Path) -> None:
    """What llama.cpp cannot load is an error that names the file."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(broken_files(tiny_model.read_bytes())[fault])
    with pytest.raises(ModelCorruptError, match=r"broken\.gguf"):
        opened(path)


def test_a_model_of_several_files_loads(open_model: Open, tmp_path: Path) -> None:
    """Split files give the vectors of the whole."""
    whole = open_model(write_tiny_llama(tmp_path / "whole.gguf"))
    write_tiny_llama(tmp_path / "split.gguf", tensors_per_file=8)
    parts = open_model(*sorted(tmp_path.glob("split-*.gguf")))
    assert_same(parts.embed(["hello", "world"]), whole.embed(["hello", "world"]))


def test_loading_reports_progress(tiny_model: Path) -> None:
    """Fractions grow, up to the whole."""
    seen: list[float] = []
    embedder = Embedder(
        [tiny_model], threads=ThreadChoice(1), context_length=None, on_progress=seen.append
    )
    embedder.close()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_closing_twice_is_closing(tiny_model: Path) -> None:
    """A closed model refuses work instead of reading freed memory."""
    embedder = opened(tiny_model)
    embedder.close()
    embedder.close()
    with pytest.raises(WorkerError, match="was closed"):
        embedder.embed(["hello"])


def test_a_cancel_ends_a_long_list_between_two_batches(minilm_file: Path) -> None:
    """Who cancels does not wait for thousands of texts, and the worker goes on with others."""
    spec = LoadSpec(INFO, (minilm_file,), is_embedding=True)
    model = LlamaBackend(LoaderSettings(cancel_grace_s=BOUND_S)).load(
        spec, CancelScope(), lambda _progress: None
    )
    try:
        scope = CancelScope()
        long = Running(
            lambda: model.embed([f"text number {n} of many" for n in range(20_000)], scope)
        )
        wait_until(lambda: bool(pending_of(model)))
        scope.cancel(RequestCancelledError("enough"))
        with pytest.raises(RequestCancelledError):
            long.join()
        assert model.is_alive()  # one that goes on too long would have been ended
        assert model.embed(["short"], CancelScope()).shape == (1, 384)
    finally:
        model.close()
