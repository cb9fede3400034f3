"""The list of models on this machine: the variants of the registry and the files of the cache.

Fetches and removes nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orion_oie.errors import ModelNotFoundError
from orion_oie.models.downloads.cache import (
    CachedFile,
    ModelCache,
)
from orion_oie.models.keys import ModelKey
from orion_oie.models.registry import ModelRegistry
from orion_oie.models.specs import (
    SourceSpec,
    VariantSpec,
)


@dataclass(frozen=True, slots=True)
class InventoryEntry:
    """A variant of the registry (`MODEL@VARIANT`), or a leftover: a fetched file of no variant.

    `arrived_bytes` of about `size_bytes` are on this machine. `last_used` is in seconds since the
    epoch.
    """

    name: str
    state: Literal["here", "not here", "downloaded", "partial", "not downloaded", "of no model"]
    size_bytes: int
    arrived_bytes: int
    last_used: float | None
    where: str
    is_leftover: bool = False


def inventory(registry: ModelRegistry, cache: ModelCache) -> list[InventoryEntry]:
    """All variants of the registry, then the other files in the cache."""
    files = {file.path: file for file in cache.files()}
    entries = []
    known: set[Path] = set()
    for model_id, model in registry.models.items():
        for variant, spec in model.variants.items():
            key = ModelKey(model_id, variant)
            if spec.source.is_remote:
                paths = cache.paths(spec.source)
                known.update(paths)
                own = [files[path] for path in paths if path in files]
                entries.append(_fetched(key, spec, cache, own))
            else:
                entries.append(_local(key, spec, registry))
    return entries + [_of_no_model(files[path], cache) for path in sorted(files.keys() - known)]


def fetched_files(
    registry: ModelRegistry, cache: ModelCache, names: Sequence[str]
) -> list[tuple[str, tuple[Path, ...]]]:
    """The cache paths of named models, by `MODEL@VARIANT`. A model without a variant stands for all
    its variants, and a leftover file for itself.

    Raises `ModelNotFoundError` for a name without any files that can be fetched.
    """
    leftovers = {
        e.name: (cache.root / e.name,) for e in inventory(registry, cache) if e.is_leftover
    }
    found: dict[str, tuple[Path, ...]] = {}
    for name in names:
        if name in leftovers:
            found[name] = leftovers[name]
            continue
        fetched = {
            key: cache.paths(source)
            for key, source in _variants(registry, name)
            if source.is_remote
        }
        if not fetched:
            raise ModelNotFoundError(f"{name} was not fetched: its files are not the cache's")
        found |= fetched
    return list(found.items())


def _variants(registry: ModelRegistry, name: str) -> Iterator[tuple[str, SourceSpec]]:
    model_id, variant, source = registry.find_source(name)
    if "@" in name:
        yield ModelKey(model_id, variant), source
        return
    for other, spec in registry.model(model_id).variants.items():
        yield ModelKey(model_id, other), spec.source


def _fetched(
    key: str, spec: VariantSpec, cache: ModelCache, files: list[CachedFile]
) -> InventoryEntry:
    arrived, total = cache.arrived(spec.source)
    used = max((file.last_used for file in files), default=None)
    paths = cache.find(spec.source)
    if paths is not None:
        return InventoryEntry(key, "downloaded", total, arrived, used, str(paths[0]))
    size = max(total, spec.size_bytes)  # before the first byte, no total is known
    where = spec.source.url or f"hub:{spec.source.hub}"
    return InventoryEntry(
        key, "partial" if arrived else "not downloaded", size, arrived, used, where
    )


def _local(key: str, spec: VariantSpec, registry: ModelRegistry) -> InventoryEntry:
    try:
        paths = registry.local_files(spec.source, key)
    except ModelNotFoundError:
        where = spec.source.path or f"package {spec.source.package}"
        return InventoryEntry(key, "not here", spec.size_bytes, 0, None, where)
    size = sum(path.stat().st_size for path in paths)
    return InventoryEntry(key, "here", size, size, None, str(paths[0]))


def _of_no_model(file: CachedFile, cache: ModelCache) -> InventoryEntry:
    name = file.path.relative_to(cache.root).as_posix()
    state: Literal["partial", "of no model"] = (
        "partial" if file.state == "partial" else "of no model"
    )
    where = str(file.path)
    return InventoryEntry(name, state, file.size, file.arrived_bytes, file.last_used, where, True)
