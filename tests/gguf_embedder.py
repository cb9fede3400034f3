"""An embedder on one model of a backend, for tests, benchmarks and scripts: without an engine.

Loads the model when it is first needed and again when its worker has died. It caches nothing and
computes nothing itself.
"""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, cast

from orion_oie.backends.base import (
    EmbeddingModel,
    LoadSpec,
    LocalModel,
)
from orion_oie.cancellation import CancelScope
from orion_oie.errors import EngineClosedError, InvalidRequestError, WorkerCrashedError
from orion_oie.schemas.loading import OnProgress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Load = Callable[[LoadSpec, CancelScope, OnProgress], LocalModel]


class _LoadedEmbeddingModel(LocalModel, EmbeddingModel, Protocol):
    """What `load` gives for a spec with `is_embedding`."""


class GGUFEmbedder:
    """Embeds with the model of `spec`, which must have `is_embedding`.

    `load` is a backend's, or one that guards it; `on_progress` is told of every load. Loads happen
    in `embed`, also of no text at all. Calls of `embed` should come one at a time: two of them may
    load the model twice, and then give one back.

    Raises `InvalidRequestError` for a spec of another kind.
    """

    def __init__(
        self, load: Load, spec: LoadSpec, on_progress: OnProgress = lambda _progress: None
    ) -> None:
        if not spec.is_embedding:
            raise InvalidRequestError(f"the spec of {spec.key} is not for embedding")
        self._load = load
        self._spec = spec
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._model: _LoadedEmbeddingModel | None = None
        self._closing = CancelScope()

    @property
    def pid(self) -> int | None:
        """The process that holds the model; None when it is not loaded, or has no process."""
        model = self._model
        return model.pid if model is not None and model.is_alive() else None

    def embed(self, texts: Sequence[str], scope: CancelScope) -> "NDArray[np.float32]":
        """See `EmbeddingModel.embed`. When the worker dies, a new one gets the same texts, once.

        Raises what the load raises, too, and `EngineClosedError` after `close`.
        """
        model = self._alive(scope)
        try:
            return model.embed(texts, scope)
        except WorkerCrashedError:
            return self._alive(scope).embed(texts, scope)

    def _alive(self, scope: CancelScope) -> _LoadedEmbeddingModel:
        """The model, loaded again if need be."""
        self._closing.check()
        model = self._model
        if model is not None and model.is_alive():
            return model
        loaded = self._loaded(scope)
        with self._lock:
            former = self._model
            is_wanted = self._closing.error is None and not (former and former.is_alive())
            if is_wanted:
                self._model = loaded
        if not is_wanted:
            loaded.close(0.0)
        elif former is not None:
            former.close(0.0)
        self._closing.check()
        return loaded if former is None or is_wanted else former

    def _loaded(self, scope: CancelScope) -> _LoadedEmbeddingModel:
        """Load, until the caller or `close` ends it."""
        loading = CancelScope()

        def end_load() -> None:
            loading.cancel(scope.error or EngineClosedError("the embedder was closed"))

        undo = [scope.on_cancel(end_load), self._closing.on_cancel(end_load)]
        try:
            model = self._load(self._spec, loading, self._on_progress)
        finally:
            for forget in undo:
                forget()
        return cast(_LoadedEmbeddingModel, model)

    def close(self) -> None:
        """Free the model; what still runs fails with `EngineClosedError`. Idempotent."""
        self._closing.cancel(EngineClosedError(f"the embedder of {self._spec.key} was closed"))
        with self._lock:
            model = self._model
        if model is not None:
            model.close()
