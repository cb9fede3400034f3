"""The models of Ollama, found in its store without Ollama.

    STORE/manifests/HOST/NAMESPACE/NAME/TAG    JSON: the layers of a model, by digest
    STORE/blobs/sha256-DIGEST                  their contents; the model's is a GGUF file

The layout is that of https://github.com/ollama/ollama (docs/faq, server/internal/manifest).
Templates, parameters and projectors of a manifest are left aside: the GGUF file says what is
needed to answer in text.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orion_oie.errors import ModelCorruptError, ModelError, ModelNotFoundError
from orion_oie.models.local.found import (
    Found,
    LocalModel,
    Unusable,
)
from orion_oie.models.local.walk import (
    Walk,
    is_forbidden,
    read_small,
)
from orion_oie.models.source_names import OllamaName
from orion_oie.models.split_files import shortened
from orion_oie.schemas.validation import did_you_mean

SYSTEM_STORES = (
    "/usr/share/ollama/.ollama/models",
    "/var/lib/ollama/.ollama/models",
    "/var/lib/ollama/models",
    "/var/snap/ollama/common/models",
)
"""Where Ollama keeps its models when it runs as a service."""

_LAYER = "application/vnd.ollama.image."
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_MANIFEST_DEPTH = 3  # folders below `manifests`: host, namespace, name
_JOIN = "Ollama runs as another user: add yours to its group ('sudo usermod -aG ollama $USER')"


@dataclass(frozen=True, slots=True)
class _Model:
    paths: tuple[Path, ...]
    size_bytes: int
    quantization: str | None


def ollama_stores() -> list[Path]:
    """The folders in which Ollama may keep models, existing or not: that of `OLLAMA_MODELS`, the
    user's, the system's."""
    named = os.environ.get("OLLAMA_MODELS")
    candidates = [named] if named else []
    candidates += ["~/.ollama/models", *SYSTEM_STORES]
    return list(dict.fromkeys(Path(os.path.expanduser(path)) for path in candidates))


def ollama_models() -> Found:
    """All models in Ollama's stores. Raises nothing."""
    return Found.together(map(_in_store, ollama_stores()))


def find_ollama(name: OllamaName) -> tuple[Path, ...]:
    """The GGUF files of a model that Ollama has fetched; upper and lower case are the same.

    Raises `ModelNotFoundError` when it is not there or its files are incomplete,
    `ModelCorruptError` when its manifest is broken, and `ModelError` when it has no GGUF file of
    its own: models in safetensors, with an adapter, or in the cloud.
    """
    stores = ollama_stores()
    wanted = name.short.lower()
    known: list[OllamaName] = []
    for store in stores:
        exact = _manifest_path(store, name)
        if os.path.exists(exact):
            return _read(store, exact, name).paths
        for path, other in _manifests(Walk(store / "manifests", _MANIFEST_DEPTH)):
            known.append(other)
            if other.short.lower() == wanted:
                return _read(store, path, other).paths
    raise _not_found(name, known, stores)


def _in_store(store: Path) -> Found:
    folder = store / "manifests"
    if is_forbidden(folder):
        return Found(
            unusable=(
                Unusable(str(store), f"it cannot be read (Permission denied): {_JOIN}", "ollama"),
            )
        )
    if not folder.is_dir():
        return Found()
    walk = Walk(folder, _MANIFEST_DEPTH)
    models: list[LocalModel] = []
    unusable = [Unusable(str(folder / name), why, "ollama") for name, why in walk.problems]
    for path, name in _manifests(walk):
        try:
            found = _read(store, path, name)
        except ModelError as error:
            unusable.append(Unusable(name.text, error.message, "ollama"))
            continue
        models.append(
            LocalModel(
                name.text, name.short, found.paths, found.size_bytes, "ollama", found.quantization
            )
        )
    return Found(tuple(models), tuple(unusable))


def _manifests(walk: Walk) -> Iterator[tuple[Path, OllamaName]]:
    for file in walk.files:
        parts = file.name.split("/")
        if len(parts) == _MANIFEST_DEPTH + 1:
            host, namespace, name, tag = parts
            yield file.path, OllamaName(name, tag, namespace, host.lower())


def _manifest_path(store: Path, name: OllamaName) -> Path:
    return store / "manifests" / name.host / name.namespace / name.name / name.tag


def _read(store: Path, path: Path, name: OllamaName) -> _Model:
    """The files of the model of a manifest; raises the errors of `find_ollama`."""
    layers, config = _layers(path, name)
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        kind = str(layer.get("mediaType", "")).partition(";")[0].removeprefix(_LAYER)
        by_kind.setdefault(kind, []).append(layer)
    details = {"source": name.text, "path": str(path)}
    if not by_kind.get("model"):
        if by_kind.get("tensor"):
            raise ModelError(
                f"{name.text}: Ollama keeps this model as safetensors, not as a GGUF file: use a "
                "GGUF of it, for example from the Hugging Face hub ('hf:ORG/REPO')",
                **details,
            )
        raise ModelError(
            f"{name.text}: this model has no file on this machine (Ollama runs it in the cloud, or "
            "it is a list of settings alone)",
            **details,
        )
    if by_kind.get("adapter"):
        raise ModelError(
            f"{name.text}: this model is another one changed by an adapter (LoRA), which would be "
            "left out: merge the adapter into the model, or use the other model",
            **details,
        )
    blobs = [_blob(store, layer, name) for layer in by_kind["model"]]
    size = sum(blob.stat().st_size for blob in blobs)
    return _Model(tuple(blobs), size, _quantization(store, config))


def _layers(path: Path, name: OllamaName) -> tuple[list[dict[str, Any]], object]:
    try:
        manifest = json.loads(read_small(path))
        layers = [dict(layer) for layer in manifest["layers"]]
    except PermissionError as error:
        raise ModelNotFoundError(
            f"{name.text}: its manifest {path} cannot be read (Permission denied): {_JOIN}",
            path=str(path),
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelCorruptError(
            f"{name.text}: its manifest {path} is broken ({type(error).__name__}): fetch the model "
            f"again with 'ollama pull {name.short}'",
            path=str(path),
        ) from error
    return layers, manifest.get("config")


def _blob(store: Path, layer: dict[str, Any], name: OllamaName) -> Path:
    """The file of a layer, complete by its size and a GGUF file by its first bytes."""
    again = f"fetch it again with 'ollama pull {name.short}'"
    found = _DIGEST.fullmatch(str(layer.get("digest")))
    if found is None:
        raise ModelCorruptError(
            f"{name.text}: its manifest names no digest of the model's file: {again}",
            source=name.text,
        )
    path = next(iter(_existing(store, found[1])), None)
    if path is None:
        expected = store / "blobs" / f"sha256-{found[1]}"
        if is_forbidden(expected):
            raise ModelNotFoundError(
                f"{name.text}: its file {expected} cannot be read (Permission denied): {_JOIN}",
                path=str(expected),
            )
        partial = os.path.exists(f"{expected}-partial")
        why = "its download has not finished" if partial else f"its file {expected} is missing"
        raise ModelNotFoundError(f"{name.text}: {why}: {again}", path=str(expected))
    size, stated = path.stat().st_size, layer.get("size")
    if isinstance(stated, int) and stated != size:
        raise ModelNotFoundError(
            f"{name.text}: its file {path} has {size} bytes instead of {stated}: {again}",
            path=str(path),
        )
    _check_magic(path, name)
    return path


def _existing(store: Path, digest: str) -> Iterable[Path]:
    for separator in ("-", ":"):  # the second one in old stores
        path = store / "blobs" / f"sha256{separator}{digest}"
        if path.is_file():
            yield path


def _check_magic(path: Path, name: OllamaName) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise ModelNotFoundError(
            f"{name.text}: its file {path} cannot be read ({error.strerror}): {_JOIN}",
            path=str(path),
        ) from error
    if start != b"GGUF":
        raise ModelError(
            f"{name.text}: Ollama keeps this model in another format than GGUF ({path} starts with "
            f"{start!r})",
            path=str(path),
        )


def _quantization(store: Path, config: object) -> str | None:
    """The quantization by the settings of the model; None if they do not tell."""
    digest = config.get("digest") if isinstance(config, dict) else None
    found = _DIGEST.fullmatch(str(digest))
    try:
        path = next(iter(_existing(store, found[1])), None) if found else None
        settings = json.loads(read_small(path)) if path is not None else {}
        said = settings.get("file_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return said.upper() if isinstance(said, str) and said not in ("", "unknown") else None


def _not_found(name: OllamaName, known: list[OllamaName], stores: list[Path]) -> ModelNotFoundError:
    fetch = f"'ollama pull {name.short}' fetches it"
    details = {"source": name.text, "choices": [other.short for other in known]}
    forbidden = [str(store) for store in stores if is_forbidden(store / "manifests")]
    if forbidden:
        return ModelNotFoundError(
            f"{name.text}: {forbidden[0]} cannot be read (Permission denied): {_JOIN}", **details
        )
    if not known:
        return ModelNotFoundError(
            f"{name.text}: Ollama has no models on this machine; {fetch}. Looked in "
            f"{', '.join(map(str, stores))}; OLLAMA_MODELS names another folder",
            **details,
        )
    same = [other.tag for other in known
            if (other.host, other.namespace, other.name.lower())
            == (name.host, name.namespace, name.name.lower())]  # fmt: skip
    if same:
        return ModelNotFoundError(
            f"{name.text}: Ollama has no tag '{name.tag}' of it here, only {shortened(same)}; "
            f"{fetch}",
            **details,
        )
    names = [other.short for other in known]
    hint = did_you_mean(name.short, names) or f"; it has {shortened(names)}"
    return ModelNotFoundError(
        f"{name.text}: Ollama has no such model on this machine{hint}; {fetch}", **details
    )
