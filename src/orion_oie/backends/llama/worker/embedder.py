"""Unit vectors of texts, from an embedding model. Runs in a worker only.

One `Embedder` is weights plus one context, for encoders (BERT and its like) and for decoders that
were trained to embed. One thread owns it and makes all calls. It embeds whole texts: it truncates
none, adds no instruction, and caches nothing.
"""

import ctypes
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp as lc
import numpy as np
from numpy.typing import NDArray

from orion_oie.backends.base import DEFAULT_CONTEXT_LENGTH
from orion_oie.backends.llama.worker.native import load_weights
from orion_oie.backends.llama.worker.thread_choice import ThreadChoice
from orion_oie.errors import (
    ContextOverflowError,
    InvalidRequestError,
    ModelError,
    WorkerError,
)
from orion_oie.schemas.validation import encoded

# Attention reads all tokens of a batch, those of other texts included, so larger batches are no
# faster. llama.cpp reserves memory for the logits of each token, wanted or not: the cost of a batch
# grows with its length times the vocabulary, and that of a context with its texts times that.
BATCH_TOKENS = 128
BATCH_TEXTS = 16

_BATCH_OK = 0
_META_LENGTH = 256


class Embedder:
    """A loaded embedding model.

    `dimensions` is the length of a vector; `max_tokens` that of the longest text, special tokens
    included. `context_length` None takes the model's own, at most `DEFAULT_CONTEXT_LENGTH`; the
    length that the model was trained for is never exceeded. `on_progress` gets the fraction that
    is loaded.

    Raises `ModelCorruptError` when llama.cpp cannot load the files, `ModelError` for a reranker.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        threads: ThreadChoice,
        context_length: int | None,
        on_progress: Callable[[float], None],
        gpu_layers: int = 0,
    ) -> None:
        lc.llama_backend_init()
        self.threads = threads
        self._context_threads = 0
        self._context: Any = None
        self._batch: Any = None
        self._capacity = 0
        self._model = load_weights(files, on_progress, gpu_layers)
        try:
            self._pooling = self._choose_pooling(files[0])
            self._vocab = lc.llama_model_get_vocab(self._model)
            self._is_wordpiece = lc.llama_vocab_type(self._vocab) == lc.LLAMA_VOCAB_TYPE_WPM
            self.dimensions = int(lc.llama_model_n_embd_out(self._model))
            self.max_tokens = min(
                context_length or DEFAULT_CONTEXT_LENGTH,
                int(lc.llama_model_n_ctx_train(self._model)),
            )
            self._reserve(1)
        except BaseException:
            self.close()
            raise

    def _choose_pooling(self, file: Path) -> int:
        """The pooling type: the model's own, or MEAN when it names none."""
        architecture = self._metadata("general.architecture")
        named = int(self._metadata(f"{architecture}.pooling_type") or lc.LLAMA_POOLING_TYPE_NONE)
        if named == lc.LLAMA_POOLING_TYPE_RANK:
            raise ModelError(
                f"{file} is a reranker: it rates pairs of texts and gives no embeddings; "
                "use an embedding model"
            )
        if named in (lc.LLAMA_POOLING_TYPE_NONE, lc.LLAMA_POOLING_TYPE_UNSPECIFIED):
            return int(lc.LLAMA_POOLING_TYPE_MEAN)
        return named

    def _metadata(self, key: str) -> str:
        """The value of a metadata key as text, empty when it is missing."""
        buffer = ctypes.create_string_buffer(_META_LENGTH)
        length = lc.llama_model_meta_val_str(self._model, key.encode(), buffer, _META_LENGTH)
        return buffer.value.decode("utf-8", "replace") if length > 0 else ""

    # -- the context, as large as the longest text that is being embedded

    def _reserve(self, tokens: int) -> None:
        """Make sure that the context takes a text of this many tokens in one batch.

        A text cannot be split over several batches: its attention is bidirectional, and pooling
        covers one batch. A context for the longest text would cost gigabytes with some models, so
        it is made for such a text and freed after it: making a context takes milliseconds.
        """
        wanted = BATCH_TOKENS
        while wanted < tokens:
            wanted *= 2
        capacity = max(BATCH_TOKENS, min(wanted, self.max_tokens))
        if self._context and capacity <= self._capacity:
            return
        self._free_context()
        params = lc.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = capacity
        params.n_seq_max = BATCH_TEXTS
        self._context_threads = self.threads.most
        params.n_threads = params.n_threads_batch = self._context_threads
        params.embeddings = True
        params.pooling_type = self._pooling
        # One text may fill the whole cache; otherwise each would get an equal part of it.
        params.kv_unified = True
        self._context = lc.llama_init_from_model(self._model, params)
        if not self._context:
            raise WorkerError(
                f"llama.cpp cannot make a context for texts of {tokens} tokens; "
                "its reasons are in the worker's log"
            )
        self._capacity = capacity
        self._batch = lc.llama_batch_init(capacity, 0, 1)
        self._memory = lc.llama_get_memory(self._context)
        # llama_encode crashes on a decoder. llama.cpp reports BERT as a decoder without an encoder;
        # it is recognized by its missing memory.
        is_encoder = self._memory is None or lc.llama_model_has_encoder(self._model)
        self._compute = lc.llama_encode if is_encoder else lc.llama_decode

    def _free_context(self) -> None:
        if self._batch is not None:
            lc.llama_batch_free(self._batch)
            self._batch = None
        if self._context:
            lc.llama_free(self._context)
            self._context = None

    # -- embedding

    def embed(
        self, texts: Sequence[str], is_cancelled: Callable[[], bool] = lambda: False
    ) -> NDArray[np.float32] | None:
        """One row of unit length for each text, in their order. None when `is_cancelled` returns
        True between two batches.

        Raises `ContextOverflowError` for a text longer than `max_tokens`, `InvalidRequestError`
        for one without a token; both are raised before anything is computed, and give the index of
        the text in `details["index"]`.
        """
        if not self._model:
            raise WorkerError("the embedding model was closed")
        rows = [self._tokens(text, index) for index, text in enumerate(texts)]
        vectors = np.zeros((len(rows), self.dimensions), np.float32)
        if rows:
            self._reserve(max(map(len, rows)))
        try:
            for chosen in _batches([len(row) for row in rows]):
                if is_cancelled():
                    return None
                vectors[chosen] = self._run([rows[index] for index in chosen])
        finally:
            if self._capacity > BATCH_TOKENS:
                self._free_context()
        return vectors

    def _tokens(self, text: str, index: int) -> list[int]:
        """The tokens of a text, with the special tokens that the model expects around it. The text
        itself yields no special token."""
        data = encoded(text, f"text {index}", index=index)
        if self._is_wordpiece:
            # llama.cpp strips accents, and with them the final consonants of Korean syllables; it
            # keeps all letters of a text that is decomposed already.
            data = unicodedata.normalize("NFD", text).encode()
        capacity = len(data) + 8
        while True:
            buffer = (lc.llama_token * capacity)()
            count = lc.llama_tokenize(self._vocab, data, len(data), buffer, capacity, True, False)
            if count >= 0:
                break
            capacity = -count
        if count == 0:
            raise InvalidRequestError(
                f"text {index} yields no token with this model: there is nothing to embed",
                index=index,
            )
        if count > self.max_tokens:
            raise ContextOverflowError(
                f"text {index} has {count} tokens, but the embedding model reads at most "
                f"{self.max_tokens}; shorten it or split it",
                prompt_tokens=count,
                requested_tokens=0,
                limit=self.max_tokens,
                index=index,
            )
        return list(buffer[:count])

    def _run(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The vectors of one batch; each text is a separate sequence."""
        self._fill(rows)
        if self._memory is not None:
            lc.llama_memory_clear(self._memory, False)
        tokens = sum(map(len, rows))
        threads = self.threads.number("embed", tokens)
        if threads != self._context_threads:
            self._context_threads = threads
            lc.llama_set_n_threads(self._context, threads, threads)
        started = time.perf_counter()
        code = self._compute(self._context, self._batch)
        if code != _BATCH_OK:
            self._free_context()  # its state is unknown; the next call makes a new one
            raise WorkerError(
                f"llama.cpp failed to embed a batch of {len(rows)} texts (code {code}); "
                "its reasons are in the worker's log",
                code=code,
            )
        self.threads.note("embed", tokens, time.perf_counter() - started)
        # In double precision: the square of a large value exceeds the range of single.
        vectors = np.array([self._vector(index) for index in range(len(rows))], np.float64)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not (np.isfinite(lengths).all() and lengths.all()):
            self._free_context()  # a NaN stays in the memory and spreads
            raise WorkerError(
                "the model's answer has no direction: it is zero, or not a number; "
                "its file may be damaged"
            )
        return np.asarray(vectors / lengths, np.float32)

    def _fill(self, rows: Sequence[Sequence[int]]) -> None:
        batch = self._batch
        index = 0
        for sequence, row in enumerate(rows):
            for position, token in enumerate(row):
                batch.token[index] = token
                batch.pos[index] = position
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = True  # pooling wants all of them
                index += 1
        batch.n_tokens = index

    def _vector(self, sequence: int) -> NDArray[np.float32]:
        pooled = lc.llama_get_embeddings_seq(self._context, sequence)
        if not pooled:
            raise WorkerError(f"llama.cpp has no embedding for text {sequence} of the batch")
        return np.array(np.ctypeslib.as_array(pooled, (self.dimensions,)), np.float32)

    def close(self) -> None:
        """Free the model. Idempotent."""
        self._free_context()
        if self._model:
            lc.llama_model_free(self._model)
            self._model = None


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices grouped into batches, short texts with short ones.

    A batch stays within `BATCH_TEXTS` and `BATCH_TOKENS`; a longer text gets its own batch.
    """
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == BATCH_TEXTS or tokens + lengths[index] > BATCH_TOKENS):
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += lengths[index]
    if batch:
        yield batch
