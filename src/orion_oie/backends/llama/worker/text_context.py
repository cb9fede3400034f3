"""A context of llama.cpp in which texts are embedded, and its batch. Runs in a worker only.

It computes one batch at a time, each text as a sequence of its own. It knows tokens, not texts, and
does not choose its size.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp as lc
import numpy as np
from numpy.typing import NDArray

from orion_oie.errors import WorkerError

BATCH_TEXTS = 16
SHORT_TOKENS = 64

_BATCH_OK = 0


class TextContext:
    """A context for batches of up to `capacity` tokens and `BATCH_TEXTS` texts.

    llama.cpp's flash attention takes tiles of 64 tokens; with fewer, it takes up to half as long
    again as attention without it. So a context of `SHORT_TOKENS` has none, and is for batches of
    fewer tokens. In a longer one, llama.cpp decides.

    Raises `WorkerError` when llama.cpp cannot make it.
    """

    def __init__(self, model: Any, capacity: int, *, pooling: int, threads: int) -> None:
        params = lc.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = capacity
        params.n_seq_max = BATCH_TEXTS
        params.n_threads = params.n_threads_batch = threads
        params.embeddings = True
        params.pooling_type = pooling
        # One text may fill the whole cache; otherwise each would get an equal part of it.
        params.kv_unified = True
        if capacity <= SHORT_TOKENS:
            params.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = lc.llama_init_from_model(model, params)
        if not self._context:
            raise WorkerError(
                f"llama.cpp cannot make a context for texts of {capacity} tokens; "
                "its reasons are in the worker's log"
            )
        self.capacity = capacity
        self._threads = threads
        self._batch = lc.llama_batch_init(capacity, 0, 1)
        self._memory = lc.llama_get_memory(self._context)
        self._dimensions = int(lc.llama_model_n_embd_out(model))
        # llama_encode crashes on a decoder. llama.cpp reports BERT as a decoder without an encoder;
        # it is recognized by its missing memory.
        self._is_encoder = self._memory is None or bool(lc.llama_model_has_encoder(model))

    @property
    def has_memory(self) -> bool:
        """False for encoders like BERT, which keep no tokens."""
        return self._memory is not None

    def use_threads(self, threads: int) -> None:
        """Use this many threads from the next batch on."""
        if threads != self._threads:
            self._threads = threads
            lc.llama_set_n_threads(self._context, threads, threads)

    def pooled(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """What the model makes of each row of tokens: vectors of any length.

        Raises `WorkerError`; afterwards the state of the context is unknown.
        """
        self._fill(rows)
        if self._memory is not None:
            lc.llama_memory_clear(self._memory, False)
        compute = lc.llama_encode if self._is_encoder else lc.llama_decode
        code = compute(self._context, self._batch)
        if code != _BATCH_OK:
            raise WorkerError(
                f"llama.cpp failed to embed a batch of {len(rows)} texts (code {code}); "
                "its reasons are in the worker's log",
                code=code,
            )
        data = b"".join(self._vector(index) for index in range(len(rows)))
        return np.frombuffer(data, np.float32).reshape(len(rows), self._dimensions)

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

    def _vector(self, sequence: int) -> bytes:
        pooled = lc.llama_get_embeddings_seq(self._context, sequence)
        if not pooled:
            raise WorkerError(f"llama.cpp has no embedding for text {sequence} of the batch")
        return ctypes.string_at(pooled, self._dimensions * 4)

    def free(self) -> None:
        """Free it; call this once."""
        lc.llama_batch_free(self._batch)
        lc.llama_free(self._context)
