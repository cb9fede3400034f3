"""The files of a source on this machine, and the facts in their headers.

Fetches nothing and imports no package. A file that is not there is no error here: requests for a
model say why it cannot be had.
"""

import importlib.util
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from orion_oie.errors import ModelError, ModelNotFoundError
from orion_oie.models.formats.gguf import read_header
from orion_oie.models.layers import absolute_path
from orion_oie.models.specs import SourceSpec, VariantSpec
from orion_oie.models.split_files import check_gguf_file, split_parts

if TYPE_CHECKING:
    from orion_oie.models.downloads.cache import ModelCache

_KNOWN_FACTS = 256
_BYTES_PER_MB = 10**6
_BYTES_PER_GB = 10**9
_MORE_MEMORY_GB = 0.15  # that a small model takes beside its weights


def locate(
    source: SourceSpec, base: Path, cache: "ModelCache | None"
) -> tuple[tuple[Path, ...] | None, str]:
    """The files of a source on this machine, or None and the reason that there are none. A
    relative path starts at `base`."""
    if source.path is not None:
        return _locate_path(absolute_path(source.path, base))
    if source.package is not None and source.file is not None:
        return _locate_in_package(source.package, source.file)
    files = cache.find(source) if cache is not None else None
    return files, f"not downloaded from {source.hub or source.url}"


def _locate_path(path: Path) -> tuple[tuple[Path, ...] | None, str]:
    try:
        parts = split_parts(path)
        is_here = os.path.exists(path) and not os.path.isdir(path)
    except ModelNotFoundError as error:
        return None, error.message
    except (OSError, ValueError) as error:  # what it names cannot exist
        return None, f"{path}: {error}"
    if is_here:
        return parts, ""
    try:
        check_gguf_file(path)  # says what is there instead
    except ModelError as error:
        return None, error.message
    return parts, ""  # it has come just now


def _locate_in_package(package: str, file: str) -> tuple[tuple[Path, ...] | None, str]:
    # find_spec does not import the package: importing it could load llama.cpp into this process.
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module of that name was made by hand and has no spec
        spec = None
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or []:
        path = Path(folder) / file
        if path.exists():
            return (path,), ""
    if spec is None:
        return None, f"the package {package} is not installed"
    return None, f"the package {package} has no file {file}"


class HeaderFacts(NamedTuple):
    """What the header of a model says. A fact that it does not state is None."""

    name: str | None
    license: str | None
    context_length: int | None
    quantization: str | None
    size_bytes: int


def header_facts(files: tuple[Path, ...]) -> HeaderFacts | None:
    """The facts in the headers of a model's files, read once for each version of the files; None
    for files that cannot be read: their load says why."""
    try:
        identities = tuple((path, *_version(path)) for path in files)
        return _facts_of(identities)
    except (ModelError, OSError, ValueError):
        return None


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@lru_cache(_KNOWN_FACTS)
def _facts_of(files: tuple[tuple[Path, int, int], ...]) -> HeaderFacts:
    header = read_header(files[0][0])
    return HeaderFacts(
        header.name or None,
        header.license or None,
        header.context_length or None,
        header.quantization or None,
        sum(size for _, _, size in files),
    )


def completed(variant: VariantSpec, files: tuple[Path, ...]) -> VariantSpec:
    """The variant with what the registry does not state filled in from its files."""
    if None not in (variant.quantization, variant.size_mb, variant.min_ram_gb):
        return variant
    facts = header_facts(files)
    if facts is None:
        return variant
    size_gb = facts.size_bytes / _BYTES_PER_GB
    found = {
        "quantization": facts.quantization,
        "size_mb": facts.size_bytes / _BYTES_PER_MB or None,
        "min_ram_gb": round(size_gb + _MORE_MEMORY_GB, 1),
    }
    missing = {name: value for name, value in found.items() if getattr(variant, name) is None}
    return variant.model_copy(update=missing)
