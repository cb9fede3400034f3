"""Registry files that build on another one: what they change is merged into it.

The rules are those of JSON Merge Patch (RFC 7396): objects are merged key by key, everything else
is replaced, and null removes a key. Some objects are replaced as a whole, because their parts
belong together: the `source` of a variant, the `models` of an agent (a fallback for one primary
model is none for another) and a `prompt_format`. Pure: reads no file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WHOLE = frozenset({"source", "models", "prompt_format"})
_SECTIONS = frozenset({"models", "custom_models"})

Raw = Mapping[str, Any]


def merged(base: Raw, changes: Raw, *, _is_top: bool = True) -> dict[str, Any]:
    """The registry, or a part of it, that `changes` make of `base`."""
    found = dict(base)
    if "source" in changes and "variants" in found and "variants" not in changes:
        found.pop("variants")  # a model that is given by its source alone has one variant
    for key, value in changes.items():
        before = found.get(key)
        if value is None:
            found.pop(key, None)
        elif isinstance(value, Mapping) and not (key in _WHOLE and not _is_top):
            inner = before if isinstance(before, Mapping) else {}
            found[key] = merged(inner, value, _is_top=False)
        else:
            found[key] = value
    return found


def changes_between(base: Raw, after: Raw, *, _is_top: bool = True) -> dict[str, Any]:
    """The changes that make `after` of `base`: `merged(base, changes)` equals `after`."""
    found: dict[str, Any] = {key: None for key in base if key not in after}
    for key, value in after.items():
        before = base.get(key)
        if key in base and before == value:
            continue
        is_whole = key in _WHOLE and not _is_top
        if isinstance(value, Mapping) and isinstance(before, Mapping) and not is_whole:
            found[key] = changes_between(before, value, _is_top=False)
        else:
            found[key] = value
    return found


def with_absolute_paths(raw: Raw, folder: Path) -> dict[str, Any]:
    """A valid registry with the paths of its files made absolute; see `absolute_path`."""

    def of_variant(variant: Raw) -> Raw:
        path = variant["source"].get("path")
        if path is None:
            return variant
        source = {**variant["source"], "path": str(absolute_path(path, folder))}
        return {**variant, "source": source}

    found = dict(raw)
    for section in _SECTIONS & found.keys():
        found[section] = {
            name: {
                **model,
                "variants": {key: of_variant(one) for key, one in model["variants"].items()},
            }
            for name, model in found[section].items()
        }
    return found


def absolute_path(path: str, folder: Path) -> Path:
    """A path without `~`; a relative one starts at `folder`."""
    try:
        expanded = Path(path).expanduser()
    except RuntimeError:  # "~someone" whose home is unknown
        expanded = Path(path)
    return folder / expanded
