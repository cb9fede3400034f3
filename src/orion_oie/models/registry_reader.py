"""Reading of registry files, and of the files that they extend."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orion_oie.errors import RegistryError
from orion_oie.models.layers import Raw, absolute_path, merged, with_absolute_paths
from orion_oie.models.naming import is_model_file
from orion_oie.models.registry_check import checked_registry, unique_keys
from orion_oie.models.specs import PACKAGED, AgentSpec, RegistryFile
from orion_oie.models.split_files import names_in
from orion_oie.models.user_folders import registry_file
from orion_oie.schemas.validation import did_you_mean


@dataclass(frozen=True, slots=True)
class ReadRegistry:
    """A registry as it was read.

    base: the folder at which its relative paths start. beneath: the registry that it extends, as
    JSON with absolute paths. packaged: the packaged agents, if it is the packaged registry or
    builds on it.
    """

    data: RegistryFile
    base: Path
    beneath: Raw | None = None
    packaged: Mapping[str, AgentSpec] = field(default_factory=dict)


def read_registry(path: Path, above: tuple[Path, ...] = ()) -> ReadRegistry:
    """Read and check a file; `above` are the files that extend it. Raises `RegistryError` with
    every problem found."""
    if is_model_file(path):
        raise RegistryError(
            f"{path} is a model, not a registry: OrionInferenceEngine(model='{path.name}') answers "
            "with it"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        where = Path(os.path.abspath(path))
        hint = did_you_mean(
            path.name, [name for name in names_in(where.parent) if name.endswith(".json")]
        )
        raise RegistryError(f"there is no registry {where}{hint}") from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise RegistryError(f"cannot read the registry {path}: {error}") from error
    return read_text(text, path.parent, str(path), (*above, Path(os.path.abspath(path))))


def read_packaged() -> ReadRegistry:
    """The registry that comes with the library."""
    read = read_registry(_packaged_file("models.json"))
    return ReadRegistry(read.data, read.base, packaged=read.data.agents)


def read_default() -> ReadRegistry:
    """The registry of a program that names none: see `ModelRegistry.default`."""
    named = os.environ.get("ORION_REGISTRY")
    if not named:
        own = registry_file()
        return read_registry(own) if own.exists() else read_packaged()
    try:
        return read_registry(Path(named).expanduser())
    except RegistryError as error:
        raise RegistryError(f"ORION_REGISTRY: {error.message}", error.problems) from error


def read_text(
    text: str, base: Path, name: str = "registry", above: tuple[Path, ...] = ()
) -> ReadRegistry:
    """Check the text of a registry. Raises like `read_registry`."""
    duplicates: list[str] = []
    try:
        raw = json.loads(text, object_pairs_hook=lambda pairs: unique_keys(pairs, duplicates))
    except json.JSONDecodeError as error:
        raise RegistryError(
            f"{name} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RegistryError(f"{name} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("extends"), str):
        return ReadRegistry(checked_registry(raw, name, duplicates), base)
    extended = _extended(raw["extends"], base, name, above)
    beneath = standalone(extended.data, extended.base)
    data = checked_registry(merged(beneath, raw), name, duplicates)
    return ReadRegistry(data, base, beneath, extended.packaged)


def as_json(data: RegistryFile) -> dict[str, Any]:
    """A registry as JSON."""
    return {"version": data.version, **data.model_dump(mode="json", exclude_defaults=True)}


def standalone(data: RegistryFile, base: Path) -> dict[str, Any]:
    """A registry as JSON that extends no other one, with absolute paths."""
    raw = as_json(data)
    raw.pop("extends", None)
    return with_absolute_paths(raw, Path(os.path.abspath(base)))


def _extended(extends: str, base: Path, name: str, above: tuple[Path, ...]) -> ReadRegistry:
    """The registry that another one extends."""
    if extends == PACKAGED:
        return read_packaged()
    path = Path(os.path.abspath(absolute_path(extends, base)))
    if path in above:
        circle = " -> ".join(map(str, (*above, path)))
        raise RegistryError(f"registries extend one another in a circle: {circle}")
    try:
        return read_registry(path, above)
    except RegistryError as error:
        raise RegistryError(
            f"{name} extends '{extends}' (\"{PACKAGED}\" is the registry of the library): "
            f"{error.message}",
            error.problems,
        ) from error


def _packaged_file(name: str) -> Path:
    inside = Path(__file__).resolve().parents[1] / name
    # The wheel carries the file in the package; a source checkout keeps it at its top level.
    return inside if inside.exists() else inside.parents[2] / name
