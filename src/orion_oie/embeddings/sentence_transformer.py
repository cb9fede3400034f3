"""An embedder inside this process: a model of sentence-transformers on the CPU.

The only importer of `sentence_transformers`, which imports torch: seconds and hundreds of
megabytes, paid when the first text is embedded. It fetches nothing: the model is in a folder, or in
the cache of the Hugging Face hub. It cuts no text and adds no prompt.
"""

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from orion_oie.cancellation import CancelScope
from orion_oie.errors import (
    ContextOverflowError,
    EngineClosedError,
    ModelCorruptError,
    ModelError,
    ModelNotFoundError,
    described,
)
from orion_oie.schemas.validation import encoded

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_STEP_TEXTS = 16  # a cancel takes effect between two steps


class SentenceTransformerEmbedder:
    """An embedder with the model in a folder, or with the one of a name in the hub's cache.

    Thread-safe: calls take turns.
    """

    def __init__(self, name_or_path: str | Path) -> None:
        self._name = str(name_or_path)
        self._lock = threading.Lock()
        self._model: SentenceTransformer | None = None
        self._is_closed = False

    def embed(self, texts: Sequence[str], scope: CancelScope) -> NDArray[np.float32]:
        """Embed as in `EmbeddingModel.embed`. The first call loads the model, even for no text.

        Also raises `ModelError` when the extra is not installed, `ModelNotFoundError`,
        `ModelCorruptError`, and `EngineClosedError` after `close`.
        """
        with self._lock:
            self._check(scope)
            model = self._model = self._model or _load(self._name)
            _check_texts(model, texts)
            rows = []
            for start in range(0, len(texts), _STEP_TEXTS):
                self._check(scope)
                rows.append(_encode(model, texts[start : start + _STEP_TEXTS]))
            return np.concatenate(rows) if rows else _encode(model, [""])[:0]

    def _check(self, scope: CancelScope) -> None:
        if self._is_closed:
            raise EngineClosedError(f"the embedder of {self._name} was closed")
        scope.check()

    def close(self) -> None:
        """Free the model after the running step. Idempotent."""
        self._is_closed = True
        with self._lock:
            self._model = None


def _load(name: str) -> "SentenceTransformer":
    try:
        from sentence_transformers import SentenceTransformer  # seconds, and not always installed
    except ImportError as error:
        raise ModelError(
            "embedding inside the process needs sentence-transformers: "
            "pip install 'orion-oie[embeddings]'",
            extra="embeddings",
        ) from error
    folder = _folder_of(name)
    try:
        with _no_progress_bar():
            return SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    except Exception as error:  # a damaged folder can raise anything
        raise ModelCorruptError(
            f"sentence-transformers cannot load {folder}: {described(error)}",
            path=str(folder),
        ) from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keeps transformers from drawing a bar on the standard error, which is the application's."""
    log = import_module("transformers.utils.logging")
    was_enabled = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            log.enable_progress_bar()


def _folder_of(name: str) -> Path:
    """The folder of a model. The hub's client is not used: it would contact its server even when
    only local files are allowed."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    owned = name if "/" in name else f"sentence-transformers/{name}"
    repository = hub_cache() / f"models--{owned.replace('/', '--')}"
    try:
        commit = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ModelNotFoundError(
            f"the embedding model {name} is not on this machine; give its folder, or fetch it "
            f"first: hf download {owned}",
            name=name,
        ) from error
    return repository / "snapshots" / commit


def hub_cache() -> Path:
    """The folder in which the client of the Hugging Face hub keeps fetched models."""
    cache = os.environ.get("SENTENCE_TRANSFORMERS_HOME") or os.environ.get("HF_HUB_CACHE")
    if cache:
        return Path(cache)
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home, "hub")
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user, "huggingface", "hub")


def _encode(model: "SentenceTransformer", texts: Sequence[str]) -> NDArray[np.float32]:
    vectors = model.encode(
        list(texts),
        prompt="",  # a model may have one of its own
        batch_size=_STEP_TEXTS,
        show_progress_bar=False,
        normalize_embeddings=True,
    )
    return np.asarray(vectors, np.float32)


def _check_texts(model: "SentenceTransformer", texts: Sequence[str]) -> None:
    """Raise for the first text that is longer than the model's limit: it would be cut."""
    for index, text in enumerate(texts):
        encoded(text, f"text {index}", index=index)
    limit = model.max_seq_length
    if limit is None or math.isinf(limit) or not texts:
        return  # nothing is ever cut
    tokens = model.tokenizer(list(texts), truncation=False, padding=False, verbose=False)
    for index, row in enumerate(tokens["input_ids"]):
        if len(row) > limit:
            raise ContextOverflowError(
                f"text {index} has {len(row)} tokens, but the embedding model reads at most "
                f"{limit}; shorten it or split it",
                prompt_tokens=len(row),
                requested_tokens=0,
                limit=limit,
                index=index,
            )
