"""Unit vectors of texts, from an embedding model. Runs in a worker only.

One `Embedder` is weights plus contexts, for encoders (BERT and its like) and for decoders that
were trained to embed. One thread owns it and makes all calls. It embeds whole texts: it truncates
none, adds no instruction, and caches nothing.
"""

import ctypes
import math
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import llama_cpp as lc
import numpy as np
from numpy.typing import NDArray

from orion_oie.backends.base import DEFAULT_CONTEXT_LENGTH
from orion_oie.backends.llama.worker.native import device, load_weights
from orion_oie.backends.llama.worker.text_context import (
    BATCH_TEXTS,
    SHORT_TOKENS,
    TextContext,
)
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

_META_LENGTH = 256


class Embedder:
    """A loaded embedding model.

    `dimensions` is the length of a vector; `max_tokens` that of the longest text, special tokens
    included. `context_length` None takes the model's own, at most `DEFAULT_CONTEXT_LENGTH`; the
    length that the model was trained for is never exceeded. `threads` chooses the number of threads
    for each batch; `on_progress` gets the fraction that is loaded.

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
        self._contexts: dict[int, TextContext] = {}  # by capacity: a short one and another one
        self._has_short = False
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
            # Others than encoders may compute logits, for which each context reserves memory.
            is_on_gpu = gpu_layers > 0 and device() == "gpu"
            self._has_short = not (self._context_for(1).has_memory or is_on_gpu)
            self._context_for(1)
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

    # -- contexts, as large as the longest text that is being embedded

    def _context_for(self, tokens: int) -> TextContext:
        """A context that takes this many tokens in one batch.

        A text cannot be split over several batches: its attention is bidirectional, and pooling
        covers one batch. A context for the longest text would cost gigabytes with some models, so
        it is made for such a text and freed after it: making a context takes milliseconds.
        """
        if tokens < SHORT_TOKENS and self._has_short:
            capacity = SHORT_TOKENS
        else:
            wanted = BATCH_TOKENS
            while wanted < tokens:
                wanted *= 2
            capacity = max(BATCH_TOKENS, min(wanted, self.max_tokens))
        context = self._contexts.get(capacity)
        if context is None:
            if capacity > SHORT_TOKENS:
                self._free_contexts(SHORT_TOKENS)
            context = self._contexts[capacity] = TextContext(
                self._model, capacity, pooling=self._pooling, threads=self.threads.most
            )
        return context

    def _free_contexts(self, longest: int = 0) -> None:
        """Free the contexts for more than `longest` tokens."""
        for capacity in [capacity for capacity in self._contexts if capacity > longest]:
            self._contexts.pop(capacity).free()

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
        try:
            for chosen in _batches([len(row) for row in rows]):
                if is_cancelled():
                    return None
                vectors[chosen] = self._run([rows[index] for index in chosen])
        finally:
            self._free_contexts(BATCH_TOKENS)
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
        tokens = sum(map(len, rows))
        context = self._context_for(tokens)
        context.use_threads(self.threads.number("embed", tokens))
        started = time.perf_counter()
        try:
            pooled = context.pooled(rows)
            self.threads.note("embed", tokens, time.perf_counter() - started)
            return _unit(pooled)
        except WorkerError:
            # Its state is unknown: a NaN stays in the memory and spreads.
            self._contexts.pop(context.capacity).free()
            raise

    def close(self) -> None:
        """Free the model. Idempotent."""
        self._free_contexts()
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


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rows with unit length. Raises `WorkerError` for one without a direction."""
    # In double precision: the square of a large value exceeds the range of single. After a batch,
    # no code is in the processor's cache: numpy's norm would cost 0.1 ms.
    wide = vectors.astype(np.float64)
    for row in wide:
        length = math.hypot(*row.tolist())
        if not 0 < length < math.inf:
            raise WorkerError(
                "the model's answer has no direction: it is zero, or not a number; "
                "its file may be damaged"
            )
        row /= length
    return wide.astype(np.float32)
