"""One embedding model for everybody in a process: cached, computed once, computed together.

It owns no thread: of the callers that wait at a time, one computes for all, and while it does, the
texts of further callers collect for the next batch. A lone caller computes at once. It chooses no
model and cuts no text. Imports numpy: import it when something is to be embedded.
"""

import re
import threading
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from orion_oie.backends.base import EmbeddingModel
from orion_oie.cancellation import CancelScope
from orion_oie.embeddings.batching import (
    Call,
    Flight,
    Flights,
)
from orion_oie.embeddings.cache import LeastUsedCache
from orion_oie.embeddings.vectors import checked, halves, unit_rows
from orion_oie.errors import EngineClosedError, InvalidRequestError, OrionError
from orion_oie.schemas.stats import EmbeddingStats

KEY_BYTES = 16
_FLOAT16_BYTES = 2
_FLOAT32_BYTES = 4


class Embedder(EmbeddingModel, Protocol):
    """What a service embeds with. Calls of `embed` come one at a time, `close` at any time.

    An `InvalidRequestError` whose `details["index"]` names a text is about that text alone; its
    message calls it "text INDEX".
    """

    def close(self) -> None:
        """Free the model; what still runs may fail with `EngineClosedError`. Idempotent."""
        ...


class EmbeddingService:
    """Shares an embedder, which it closes in the end. Thread-safe.

    Remembers the vectors of `cache_entries` texts (not the texts) in 16 bits; 0 remembers none.
    What was asked least often goes first, and of that what was asked longest ago. A vector from the
    cache has a cosine of at least 0.999 with the exact one. Batches have up to `max_batch` texts.
    `model_bytes()` is asked for statistics: the memory of one loaded model.

    Raises `InvalidRequestError` for sizes that make no sense.
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
        self._changed = threading.Condition()
        self._cache: LeastUsedCache[bytes, NDArray[np.float16]] = LeastUsedCache(cache_entries)
        self._flights = Flights(max_batch)
        self._leader: Call | None = None  # who computes now
        self._running: list[Flight] = []
        self._is_closed = False
        self._dimensions: int | None = None
        self._users: set[str] = set()
        self._requests = self._texts = self._hits = self._misses = 0
        self._batches = self._largest_batch = 0

    def embed(
        self, texts: Sequence[str], scope: CancelScope | None = None, *, user: str = ""
    ) -> NDArray[np.float32]:
        """Unit vectors of texts in their order, shape (texts, dimensions).

        No text gives no row, and no dimensions as long as nothing was embedded. `user` names the
        part of the program that asks, for statistics.

        Raises `InvalidRequestError` for what is no list of texts, or for a text that the model
        cannot embed, `ContextOverflowError` for one that it cannot read whole (both name the text
        by `details["index"]`), `EngineClosedError`, what the embedder raised for texts of this
        call, or the error that `scope` was cancelled with.
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
                self._misses += self._flights.join(call, key, text, index)

    # -- waiting and leading

    def _see_through(self, call: Call, scope: CancelScope) -> None:
        """Return when the call has all its vectors."""
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

    def _next_batch(self, call: Call, scope: CancelScope) -> list[Flight]:
        """Wait until the call has nothing to wait for (no texts), or take the lead (some)."""
        with self._changed:
            while call.waits_for or call.refusal:
                if call.refusal:
                    raise _in_own_words(*call.refusal)
                self._check(scope)
                if self._leader is None:
                    self._leader = call
                    self._running = self._flights.take(call)
                    return self._running
                self._changed.wait()
            return []

    def _compute(self, call: Call, batch: list[Flight], scope: CancelScope) -> None:
        """Embed a batch. Raises what befell this caller; everybody else goes on in any case."""
        try:
            given = self._embedder.embed([flight.text for flight in batch], scope)
            rows = checked(given, len(batch), self._dimensions)
        except Exception as error:
            scope.check()
            with self._changed:
                if all(call in flight.callers for flight in batch) and not _names(error, batch):
                    raise
                self._sort_out(batch, error)
            return
        short = halves(rows)
        with self._changed:
            self._batches += 1
            self._largest_batch = max(self._largest_batch, len(batch))
            self._dimensions = rows.shape[1]
            for flight, row, half in zip(batch, rows, short, strict=True):
                self._flights.land(flight, row)
                if self._cache_entries:
                    self._cache[flight.key] = half
            self._give_up_lead()

    def _sort_out(self, batch: list[Flight], error: Exception) -> None:
        """After a failure: the text it is about is refused, and the others try again. Where nobody
        knows whose fault it is, each caller tries again by itself."""
        if isinstance(error, InvalidRequestError) and _names(error, batch):
            guilty = batch.pop(error.details["index"])
            self._flights.refuse(guilty, error)
            self._flights.put_back(batch)
        else:
            self._flights.set_apart(batch)
        self._give_up_lead()

    def _give_up_lead(self) -> None:
        self._leader = None
        self._running = []
        self._changed.notify_all()

    def _leave(self, call: Call) -> None:
        """An error or an interrupt ended the call in the middle: others take up what they need."""
        with self._changed:
            self._flights.leave(call)
            if self._leader is call:
                self._flights.put_back(self._running)
                self._give_up_lead()

    # -- the whole

    def stats(self) -> EmbeddingStats:
        """Counts since the start, and what sharing saves."""
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
        """Close the embedder; callers and those who wait get `EngineClosedError`. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._embedder.close()


def _keys(texts: Sequence[str]) -> list[bytes]:
    """What stands for each text in the cache."""
    if isinstance(texts, str):
        raise InvalidRequestError("texts is one text, not a list of texts; write [text]")
    return [_key(text, index) for index, text in enumerate(texts)]


def _key(text: str, index: int) -> bytes:
    if not isinstance(text, str):
        raise InvalidRequestError(f"text {index} is a {type(text).__name__}, not str", index=index)
    try:
        return blake2b(text.encode(), digest_size=KEY_BYTES).digest()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"text {index} is not valid Unicode: unpaired surrogate at index {error.start}",
            index=index,
        ) from None


def _names(error: Exception, batch: Sequence[Flight]) -> bool:
    """True when an error is about one text of the batch."""
    if not isinstance(error, InvalidRequestError):
        return False
    index = error.details.get("index")
    return isinstance(index, int) and 0 <= index < len(batch)


def _in_own_words(error: InvalidRequestError, index: int) -> OrionError:
    """The error about a text of a batch, for a caller in whose list it stands at `index`."""
    old = error.details["index"]
    message = re.sub(rf"\btext {old}\b", f"text {index}", error.message)
    return type(error)(message, **{**error.details, "index": index})
