"""The files of models as they were when last checked, so that a request need not check them.

A check reads the file system, the list of installed packages and the headers of GGUF files. The
memory manager repeats it every two seconds while models are in memory.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orion_oie.backends.base import Footprint, LoadSpec
from orion_oie.callbacks import host_log
from orion_oie.config import EngineConfig
from orion_oie.errors import OrionError, described
from orion_oie.models.choices import VariantState
from orion_oie.models.keys import ModelKey
from orion_oie.models.registry import ModelRegistry
from orion_oie.models.specs import ModelSpec, VariantSpec
from orion_oie.schemas.results import ModelInfo

if TYPE_CHECKING:  # slow to import, and needed for fetching only
    from orion_oie.models.downloads.cache import ModelCache

LOOK_AGAIN_S = 5.0


@dataclass(frozen=True, slots=True)
class VariantFiles:
    """One variant of a model, and its files. `spec` is None when there is nothing to load,
    `estimate` also when its size cannot be estimated: `error` says why. `file_bytes` are on this
    machine."""

    key: ModelKey
    state: VariantState
    spec: LoadSpec | None
    estimate: Footprint | None
    file_bytes: int = 0
    error: OrionError | None = None

    @property
    def is_on_disk(self) -> bool:
        return self.state.files is not None


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """The state of all variants of a model at a time, in seconds of the monotonic clock."""

    model_id: str
    model: ModelSpec
    variants: tuple[VariantFiles, ...]
    at_s: float

    def error_of(self, key: ModelKey) -> OrionError | None:
        """The error that was found in a variant."""
        return next((one.error for one in self.variants if one.key == key), None)

    @property
    def choices(self) -> tuple[tuple[str, VariantSpec, bool], ...]:
        """What there is to choose from. What a variant would take is not among it: that is
        estimated and measured again and again, and is no reason to choose anew."""
        return tuple((one.state.name, one.state.spec, one.is_on_disk) for one in self.variants)


class ModelFiles:
    """The files of the registry's models. `footprint` reads headers; it may raise."""

    def __init__(
        self,
        registry: ModelRegistry,
        config: EngineConfig,
        cache: "ModelCache",
        footprint: Callable[[LoadSpec], Footprint],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._config = config
        self._cache = cache
        self._footprint = footprint
        self._clock = clock
        self._looks: dict[str, Look] = {}
        self._revision = 0
        self._lock = threading.Lock()

    @property
    def revision(self) -> int:
        """A number that grows with every change that is found."""
        return self._revision

    def of(self, model_id: str, max_age_s: float = LOOK_AGAIN_S) -> Look:
        """The variants of a model as they were at most `max_age_s` seconds ago.

        Raises `ModelNotFoundError` for a model that the registry does not have.
        """
        model = self._registry.model(model_id)
        look = self._looks.get(model_id)
        if (
            look is None
            or look.model is not model
            or (max_age_s != math.inf and self._clock() - look.at_s >= max_age_s)
        ):
            look = self._look(model_id, model)
        return look

    def are_recent(self, looks: Iterable[Look]) -> bool:
        """True when the models of these looks were checked a few seconds ago at most."""
        oldest_s = self._clock() - LOOK_AGAIN_S
        latest = (self._looks.get(look.model_id) for look in looks)
        return all(one is not None and one.at_s > oldest_s for one in latest)

    def look_again(self) -> None:
        """Check all models again that were checked before. A file system that fails keeps what was
        seen of a model until the next check."""
        for model_id in list(self._looks):
            try:
                self.of(model_id, max_age_s=0.0)
            except OrionError:  # the registry has it no more
                self._looks.pop(model_id, None)
            except OSError as error:
                text = "the files of %s cannot be checked: %s"
                host_log.log(logging.WARNING, text, model_id, error)

    def _look(self, model_id: str, model: ModelSpec) -> Look:
        at_s = self._clock()
        seen = tuple(
            self._seen(model_id, model, state)
            for state in self._registry.variants(model_id, self._cache)
        )
        with self._lock:
            last = self._looks.get(model_id)
            if last is not None and last.model is model and last.at_s > at_s:
                return last  # another thread looked later, and was faster
            is_news = last is None or last.model is not model or last.variants != seen
            # The same object where nothing is new: comparisons are quick.
            look = Look(model_id, model, seen if last is None or is_news else last.variants, at_s)
            self._looks[model_id] = look
            self._revision += is_news  # after the look: who sees the number sees what is new
        return look

    def _seen(self, model_id: str, model: ModelSpec, state: VariantState) -> VariantFiles:
        key = ModelKey(model_id, state.name)
        spec = self._spec(key, model, state)
        if spec is None:
            return VariantFiles(key, state, None, None)
        file_bytes = _size_of(state.files or ())
        try:
            return VariantFiles(key, state, spec, self._footprint(spec), file_bytes)
        except OrionError as error:
            if state.files is None:  # its size is not known before it arrives
                return VariantFiles(key, state, spec, None, file_bytes)
            # A request that needs it raises it.
            last_seen = self._looks.get(model_id)
            known = None if last_seen is None else last_seen.error_of(key)
            if known is not None and described(known) == described(error):
                error = known  # the same object where nothing is new
            return VariantFiles(key, state, spec, None, file_bytes, error)

    def _spec(self, key: ModelKey, model: ModelSpec, state: VariantState) -> LoadSpec | None:
        """The spec that loads a variant, without the settings of an agent."""
        source = state.spec.source if state.is_fetchable else None
        files: tuple[Path, ...] | None = state.files
        if files is None:
            if source is None:
                return None
            files = self._cache.paths(source)
        info = ModelInfo(
            model_id=key.model_id,
            variant=key.variant,
            name=model.name or "",
            version=model.version,
            license=model.license or "",
            quantization=state.stated.quantization or "",
            size_bytes=state.stated.size_bytes,
            context_length=model.context_length or 0,
        )
        expected_bytes = state.spec.size_bytes
        gpu_layers = (
            None if self._config.serving.gpu_layers == "auto" else self._config.serving.gpu_layers
        )
        spec = LoadSpec(
            info=info,
            files=files,
            threads=self._config.serving.threads,
            gpu_layers=gpu_layers,
            expected_bytes=expected_bytes or None,
            sha256=() if source is not None else tuple(state.spec.source.sha256),
        )
        if model.type == "embedding":
            return replace(spec, is_embedding=True)
        return replace(
            spec,
            source=source,
            slots=self._config.serving.slot_count,
            context_length=self._config.serving.context_length,
            host_cache_bytes=self._config.memory.host_cache_bytes,
            prompt_format=None if model.prompt_format == "plain" else model.prompt_format,
            is_plain=model.prompt_format == "plain",
            sharding=self._config.loading.sharding,
        )


def _size_of(files: Iterable[Path]) -> int:
    size_bytes = 0
    for file in files:
        with contextlib.suppress(OSError):  # it was just removed: its load reports that
            size_bytes += file.stat().st_size
    return size_bytes
