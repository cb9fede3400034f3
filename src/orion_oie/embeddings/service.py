"""One embedding model for a whole process: vectors are cached, and texts computed in batches.

The service owns no thread: one of the waiting callers computes for all, and meanwhile the texts of
further callers collect for the next batch. A lone caller computes at once. The service chooses no
model and cuts no text. It imports numpy: import it only when something is to be embedded.
"""

import re
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from orion_oie.backends.base import EmbeddingModel
from orion_oie.cancellation import CancelScope
from orion_oie.embeddings.batching import (
    Call,
    PendingText,
    PendingTexts,
)
from orion_oie.embeddings.cache import LeastUsedCache
from orion_oie.embeddings.vectors import checked, halves, unit_rows
from orion_oie.errors import EngineClosedError, InvalidRequestError, OrionError
from orion_oie.schemas.stats import EmbeddingStats
from orion_oie.schemas.validation import encoded
from orion_oie.threads import Condition

KEY_BYTES = 16
_FLOAT16_BYTES = 2
_FLOAT32_BYTES = 4


class Embedder(EmbeddingModel, Protocol):
    """The model behind a service. Calls of `embed` come one at a time, `close` at any time.

    An `InvalidRequestError` with the index of a text in `details["index"]` concerns that text
    alone; its message calls it "text INDEX".
    """

    def close(self) -> None:
        """Free the model; a running call may fail with `EngineClosedError`. Idempotent."""
        ...


class EmbeddingService:
    """An embedder that is shared by many callers, and closed with the service. Thread-safe.

    The vectors of `cache_entries` texts (not the texts) are cached in 16 bits; 0 caches none. The
    least often requested entry is evicted first, among equals the least recently requested one. A
    cached vector has a cosine of at least 0.999 with the exact one. Batches have up to `max_batch`
    texts. `model_bytes()` returns the memory of one loaded model, for the statistics.

    Raises `InvalidRequestError` for sizes out of range.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        cache_entries: int = 200,
        max_batch: int = 64,
        model_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        if cache_entries < 0 or max_batch < 1:
            raise InvalidRequestError(
                f"cache_entries is {cache_entries} and max_batch is {max_batch}, but at least "
                "0 and 1 are needed",
                cache_entries=cache_entries,
                max_batch=max_batch,
            )
        self._embedder = embedder
        self._cache_entries = cache_entries
        self._model_bytes = model_bytes
        self._changed = Condition()
        self._cache: LeastUsedCache[bytes, NDArray[np.float16]] = LeastUsedCache(cache_entries)
        self._pending = PendingTexts(max_batch)
        self._leader: Call | None = None  # the call that computes for all
        self._running: list[PendingText] = []
        self._is_closed = False
        self._dimensions: int | None = None
        self._users: set[str] = set()
        self._requests = self._texts = self._hits = self._misses = 0
        self._batches = self._largest_batch = 0

    def embed(
        self, texts: Sequence[str], scope: CancelScope | None = None, *, user: str = ""
    ) -> NDArray[np.float32]:
        """The unit vectors of texts, in their order, with the shape (texts, dimensions).

        An empty list gives no row, and 0 dimensions before the first text was embedded. `user`
        names the calling part of the program, for the statistics.

        Raises `InvalidRequestError` for anything but a list of texts and for a text that the model
        cannot embed, `ContextOverflowError` for a text that is too long (both with the text's index
        in `details["index"]`), `EngineClosedError`, the embedder's error about texts of this call,
        or the error that `scope` was cancelled with.
        """
        keys = _keys(texts)
        scope = scope or CancelScope()
        call = Call()
        try:
            with self._changed:
                self._check(scope)
                self._look_up(call, keys, texts)
                if user:
                    self._users.add(user)
                if not keys:
                    return np.empty((0, self._dimensions or 0), np.float32)
            if call.waits_for:
                self._see_through(call, scope)
        finally:
            if call.waits_for or self._leader is call:
                self._leave(call)
        return unit_rows([call.vectors[key] for key in keys])

    def _look_up(self, call: Call, keys: Sequence[bytes], texts: Sequence[str]) -> None:
        self._requests += 1
        self._texts += len(keys)
        for index, (key, text) in enumerate(zip(keys, texts, strict=True)):
            if key in self._cache:
                call.vectors[key] = self._cache[key]
                self._hits += 1
            else:
                self._misses += self._pending.join(call, key, text, index)

    # -- waiting and leading

    def _see_through(self, call: Call, scope: CancelScope) -> None:
        """Wait, and compute batches in turn, until the call has all its vectors."""
        undo = scope.on_cancel(self._wake)
        try:
            while batch := self._next_batch(call, scope):
                self._compute(call, batch, scope)
        finally:
            undo()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _check(self, scope: CancelScope) -> None:
        if self._is_closed:
            raise EngineClosedError("the embedding service was closed")
        scope.check()

    def _next_batch(self, call: Call, scope: CancelScope) -> list[PendingText]:
        """Wait until the call has all its vectors (an empty batch), or take the lead and return the
        batch to compute."""
        with self._changed:
            while call.waits_for or call.refusal:
                if call.refusal:
                    raise _in_own_words(*call.refusal)
                self._check(scope)
                if self._leader is None:
                    self._leader = call
                    self._running = self._pending.take(call)
                    return self._running
                self._changed.wait()
            return []

    def _compute(self, call: Call, batch: list[PendingText], scope: CancelScope) -> None:
        """Embed a batch. Raises the errors that concern this call; other calls continue."""
        try:
            given = self._embedder.embed([pending.text for pending in batch], scope)
            rows = checked(given, len(batch), self._dimensions)
        except Exception as error:
            scope.check()
            with self._changed:
                if all(call in pending.callers for pending in batch) and not _names(error, batch):
                    raise
                self._sort_out(batch, error)
            return
        short = halves(rows)
        with self._changed:
            self._batches += 1
            self._largest_batch = max(self._largest_batch, len(batch))
            self._dimensions = rows.shape[1]
            for pending, row, half in zip(batch, rows, short, strict=True):
                self._pending.resolve(pending, row)
                if self._cache_entries:
                    self._cache[pending.key] = half
            self._give_up_lead()

    def _sort_out(self, batch: list[PendingText], error: Exception) -> None:
        """Handle a failed batch: refuse the text that the error names, and queue the others again.
        If the error names no text, each caller tries again with its own texts alone."""
        if isinstance(error, InvalidRequestError) and _names(error, batch):
            guilty = batch.pop(error.details["index"])
            self._pending.refuse(guilty, error)
            self._pending.put_back(batch)
        else:
            self._pending.set_apart(batch)
        self._give_up_lead()

    def _give_up_lead(self) -> None:
        self._leader = None
        self._running = []
        self._changed.notify_all()

    def _leave(self, call: Call) -> None:
        """Remove a call that an error or an interrupt ended; others compute the texts they need."""
        with self._changed:
            self._pending.leave(call)
            if self._leader is call:
                self._pending.put_back(self._running)
                self._give_up_lead()

    # -- statistics and the end

    def stats(self) -> EmbeddingStats:
        """Counts since the start, and the memory that sharing saves."""
        model_bytes = self._model_bytes()
        with self._changed:
            entries, dimensions, users = len(self._cache), self._dimensions or 0, len(self._users)
            numbers = entries * dimensions
            return EmbeddingStats(
                requests=self._requests,
                texts=self._texts,
                hits=self._hits,
                misses=self._misses,
                hit_rate=self._hits / self._texts if self._texts else 0.0,
                coalesced=self._texts - self._hits - self._misses,
                batches=self._batches,
                largest_batch=self._largest_batch,
                entries=entries,
                cache_bytes=numbers * _FLOAT16_BYTES + entries * KEY_BYTES,
                users=users,
                model_bytes=model_bytes,
                saved_bytes=max(users - 1, 0) * model_bytes
                + numbers * (_FLOAT32_BYTES - _FLOAT16_BYTES),
            )

    def close(self) -> None:
        """Close the embedder; waiting and later calls get `EngineClosedError`. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._embedder.close()


def _keys(texts: Sequence[str]) -> list[bytes]:
    """The cache key of each text."""
    if isinstance(texts, str):
        raise InvalidRequestError("texts is one text, not a list of texts; write [text]")
    return [_key(text, index) for index, text in enumerate(texts)]


def _key(text: str, index: int) -> bytes:
    if not isinstance(text, str):
        raise InvalidRequestError(f"text {index} is a {type(text).__name__}, not str", index=index)
    data = encoded(text, f"text {index}", index=index)
    return blake2b(data, digest_size=KEY_BYTES).digest()


def _names(error: Exception, batch: Sequence[PendingText]) -> bool:
    """True when an error concerns one text of the batch."""
    if not isinstance(error, InvalidRequestError):
        return False
    index = error.details.get("index")
    return isinstance(index, int) and 0 <= index < len(batch)


def _in_own_words(error: InvalidRequestError, index: int) -> OrionError:
    """The error about a text of a batch, for a caller that gave the text at `index`."""
    old = error.details["index"]
    message = re.sub(rf"\btext {old}\b", f"text {index}", error.message)
    return type(error)(message, **{**error.details, "index": index})
