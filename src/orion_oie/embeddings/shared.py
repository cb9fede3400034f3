"""The embedding service of one engine: made when somebody embeds something, with the model that
the configuration or the registry names.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from orion_oie.backends.base import LoadSpec
from orion_oie.config import EngineConfig
from orion_oie.errors import EngineClosedError, ModelNotFoundError
from orion_oie.models.registry import ModelRegistry
from orion_oie.pool.pool import AgentPool
from orion_oie.pool.variants import Placement

if TYPE_CHECKING:  # with numpy, for who embeds something
    from orion_oie.embeddings.service import EmbeddingService
    from orion_oie.schemas.stats import EmbeddingStats

SENTENCE_TRANSFORMERS = "sentence-transformers:"


class SharedEmbeddings:
    """Makes the service once. Thread-safe."""

    def __init__(
        self, registry: ModelRegistry, config: EngineConfig, placement: Placement, pool: AgentPool
    ) -> None:
        self._registry = registry
        self._config = config
        self._placement = placement
        self._pool = pool
        self._lock = threading.Lock()
        self._service: EmbeddingService | None = None
        self._is_closed = False

    def service(self) -> "EmbeddingService":
        """The service. Raises `ModelNotFoundError` when there is no model to embed with."""
        service = self._service or self._made()  # of two that are made at once one is used
        with self._lock:
            if self._is_closed:
                raise EngineClosedError("the engine was shut down")
            self._service = self._service or service
            return self._service

    @property
    def name(self) -> str:
        """The model's id in the registry, or the last part of the name or folder that
        sentence-transformers is given, in lower case; empty when there is no model."""
        name = self._config.embeddings.model
        if name is None:
            name = next(self._embedding_models(), "")
        return Path(name.removeprefix(SENTENCE_TRANSFORMERS)).name.lower()

    def spec(self) -> LoadSpec | None:
        """How its model is loaded; None for one of sentence-transformers, which no pool holds.

        Raises `ModelNotFoundError` when there is none or it is not on this machine,
        `InvalidRequestError` for a model of another type.
        """
        name = self._config.embeddings.model
        if name is not None and name.startswith(SENTENCE_TRANSFORMERS):
            return None
        return self._spec(name or self._first_model())

    def stats(self) -> "EmbeddingStats | None":
        """What it did; None as long as nobody embedded anything."""
        service = self._service
        return None if service is None else service.stats()

    def close(self) -> None:
        """Embed no more."""
        with self._lock:
            self._is_closed = True
            service = self._service
        if service is not None:
            service.close()

    def _made(self) -> "EmbeddingService":
        # numpy: a mere import of the library should not pay for it.
        from orion_oie.embeddings.pooled import PooledEmbedder
        from orion_oie.embeddings.service import EmbeddingService

        name = self._config.embeddings.model
        entries = self._config.embeddings.cache_entries
        if name is not None and name.startswith(SENTENCE_TRANSFORMERS):
            from orion_oie.embeddings.sentence_transformer import SentenceTransformerEmbedder

            embedder = SentenceTransformerEmbedder(name.removeprefix(SENTENCE_TRANSFORMERS))
            return EmbeddingService(embedder, cache_entries=entries)
        model_id = name or self._first_model()
        self._spec(model_id)  # what is wrong with it is said at once
        return EmbeddingService(
            PooledEmbedder(self._pool, lambda: self._spec(model_id)),
            cache_entries=entries,
            model_bytes=lambda: self._reserved_bytes(model_id),
        )

    def _first_model(self) -> str:
        for model_id in self._embedding_models():
            return model_id
        raise ModelNotFoundError(
            "the registry has no model of type 'embedding': add one, or set "
            f"EngineConfig.embeddings.model to '{SENTENCE_TRANSFORMERS}NAME'"
        )

    def _embedding_models(self) -> Iterator[str]:
        return (i for i, model in self._registry.models.items() if model.type == "embedding")

    def _spec(self, model_id: str) -> LoadSpec:
        return self._placement.embedding_spec(model_id)

    def _reserved_bytes(self, model_id: str) -> int:
        residents = self._pool.residents().values()
        return sum(one.reserved_bytes for one in residents if one.model.model_id == model_id)
