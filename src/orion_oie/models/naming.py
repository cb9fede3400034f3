"""From the one text by which a user names a model to its id and its spec.

A text is, in this order: the id of a model of the registry (or `ID@VARIANT`), an address that names
its kind (`source_names`), a file. Files are checked at once, so that a typo is found where it was
made. Addresses of repositories are resolved over the network, once.
"""

import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from orion_oie.errors import InvalidRequestError, ModelNotFoundError
from orion_oie.models.formats.gguf import GGUFHeader
from orion_oie.models.source_names import (
    HubName,
    LMStudioName,
    OllamaName,
    UrlName,
    parse_source_name,
    source_hint,
)
from orion_oie.models.specs import (
    ONLY_VARIANT,
    PACKAGED,
    ModelSpec,
    PromptFormat,
    SourceSpec,
    VariantSpec,
)
from orion_oie.models.split_files import (
    check_gguf_file,
    close_name,
    gguf_names,
    split_name,
    split_parts,
)
from orion_oie.schemas.validation import did_you_mean

if TYPE_CHECKING:
    from orion_oie.models.downloads.cache import ModelCache

_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9._-]+")
_ID_CHARS = 100
_DIGEST_BYTES = 4
_KNOWN_HEADERS = 32
_MAGIC = b"GGUF"

Source = str | os.PathLike[str]


class Named(NamedTuple):
    """What a text stands for: an id and the name of a variant to suggest, and where the files are.
    What else there is to know is in their headers."""

    model_id: str
    variant: str
    source: SourceSpec
    is_embedding: bool = False
    size_bytes: int | None = None

    def spec(self, prompt_format: PromptFormat | Literal["plain"] | None = None) -> ModelSpec:
        """The spec of the model."""
        size_mb = None if not self.size_bytes else self.size_bytes / 1e6
        return ModelSpec(
            type="embedding" if self.is_embedding else "causal-lm",
            prompt_format=prompt_format,
            variants={self.variant: VariantSpec(source=self.source, size_mb=size_mb)},
        )


def named_source(source: Source, cache: "ModelCache | None" = None) -> Named | None:
    """What a source stands for; None for a text that can be none. What names a repository is looked
    up over the network, once, unless its files are on this machine; `cache` remembers the answer.

    Raises `InvalidRequestError` for a misspelled address, `ModelNotFoundError`, `ModelCorruptError`
    and `ModelError` for what cannot be loaded, `DownloadError`.
    """
    if not isinstance(source, str) or source.startswith("file:"):
        return named_file(source)
    name = parse_source_name(source)
    match name:
        case OllamaName():
            # A program that names no such model need not pay for these imports.
            from orion_oie.models.local.ollama import find_ollama

            return _named_files(find_ollama(name), name.model_id)
        case LMStudioName():
            from orion_oie.models.local.lm_studio import find_lm_studio

            return _named_files(find_lm_studio(name), name.model_id)
        case UrlName():
            from orion_oie.models.downloads.sources import url_source
            from orion_oie.models.quant_choice import quantization_of

            variant = identifier((quantization_of(name.file) or ONLY_VARIANT).lower())
            return Named(name.model_id, variant, url_source(name))
        case HubName():
            return _named_repository(name, cache)
    if not looks_like_a_file(source):
        return None
    if source.lower().endswith(".json"):
        raise InvalidRequestError(
            f"{source}: this is no model; a registry is passed as OrionInferenceEngine('{source}')"
        )
    try:
        return named_file(source)
    except ModelNotFoundError as error:
        hint = source_hint(source)
        if not hint:
            raise
        raise ModelNotFoundError(f"{error.message}{hint}", **error.details) from error


def _named_repository(name: HubName, cache: "ModelCache | None") -> Named:
    # Slow to import, and needed for the network only.
    from orion_oie.models.downloads.cache import ModelCache
    from orion_oie.models.downloads.listing import resolve_hub

    found = resolve_hub(name, cache or ModelCache())
    if found.paths is not None:
        return _named_files(found.paths, name.model_id)
    variant = identifier((found.quantization or ONLY_VARIANT).lower())
    return Named(name.model_id, variant, found.source, size_bytes=found.size_bytes)


def named_file(path: Source) -> Named:
    """The model in a local file; a relative path starts at the working directory. Its facts are in
    its header.

    Raises `ModelNotFoundError`, `ModelCorruptError` and `ModelError` for what cannot be loaded.
    """
    parts = split_parts(_without_scheme(path))
    split = split_name(parts[0].name)
    return _named_files(parts, identifier(parts[0].stem if split is None else split.stem))


def _header_of(file: Path) -> GGUFHeader:
    """The header of a file that can be loaded, read once for each version of the file: a program
    may name it with every request."""
    try:
        status = file.stat()
    except (OSError, ValueError):
        return check_gguf_file(file)  # says what is there instead
    return _header_of_version(file, status.st_mtime_ns, status.st_size, status.st_ino)


@lru_cache(_KNOWN_HEADERS)
def _header_of_version(file: Path, _mtime_ns: int, _size: int, _inode: int) -> GGUFHeader:
    return check_gguf_file(file)


def _named_files(files: Sequence[Path], model_id: str) -> Named:
    header, *_ = [_header_of(file) for file in files]
    variant = identifier(header.quantization.lower() or ONLY_VARIANT)
    return Named(model_id, variant, SourceSpec(path=str(files[0])), header.is_embedding_model)


def entry_of(path: Source) -> dict[str, Any]:
    """A whole registry file, as JSON, that adds a local model to the packaged registry. Raises like
    `named_file`."""
    named = named_file(path)
    spec = named.spec().model_dump(mode="json", exclude_defaults=True)
    variants = spec.pop("variants")
    entry = {**spec, "source": variants[named.variant]["source"]}
    return {"extends": PACKAGED, "models": {named.model_id: entry}}


def is_source(text: str) -> bool:
    """True for a text that can be meant as an address or as a file."""
    return looks_like_a_file(text) or parse_source_name(text) is not None


def is_model_file(path: Path) -> bool:
    """True for a file that begins like a GGUF file, or that is called like one."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                return file.read(len(_MAGIC)) == _MAGIC
    except (OSError, ValueError):
        return False
    return path.name.lower().endswith(".gguf")


def looks_like_a_file(text: str) -> bool:
    """True for a text that can only be meant as a path, or that is one."""
    return (
        text.lower().endswith(".gguf")
        or text.startswith(("~", ".", "file:"))
        or os.sep in text
        or "\\" in text
        or os.path.exists(text)
    )


def not_found(
    text: str, models: Mapping[str, object], agents: Mapping[str, object]
) -> ModelNotFoundError:
    """The error for a text that names nothing."""
    if text in agents:
        return ModelNotFoundError(
            f"'{text}' is an agent, not a model: pass agent='{text}' instead", name=text
        )
    where = Path(os.path.abspath(text))
    stem = text.rpartition(".")[0] or text
    here = close_name(stem, gguf_names(where.parent))
    hint = here or did_you_mean(text, models) or source_hint(text)
    if not hint:
        hint = did_you_mean(text, agents).replace("did you mean", "did you mean agent")
    return ModelNotFoundError(
        f"there is no model '{text}'{hint} and no file {where}; a model is "
        "named by an id of the registry, a GGUF file, 'hf:org/repo:Q4_K_M', 'ollama:name' or an "
        "https address",
        name=text,
    )


def identifier(text: str) -> str:
    """A valid model id that reads like the text."""
    cleaned = _NOT_IN_IDS.sub("-", text).strip("._-")[:_ID_CHARS]
    return cleaned or "model"


def distinct(model_id: str, source: SourceSpec) -> str:
    """Another id for a model whose usual one is taken; the same for the same source."""
    text = source.model_dump_json(exclude_defaults=True)
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).hexdigest()
    return f"{model_id}-{digest}"


def _without_scheme(path: Source) -> Source:
    if not isinstance(path, str) or not path.startswith("file:"):
        return path
    parts = urlsplit(path)
    if parts.netloc not in ("", "localhost"):
        raise InvalidRequestError(f"{path}: a file: address names a file of this machine")
    return unquote(parts.path)
