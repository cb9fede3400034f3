"""The one text that names a model by its source, and what it says.

    hf:ORG/REPO[:QUANT][@REVISION]     a repository of the Hugging Face hub
    hf:ORG/REPO/FILE.gguf[@REVISION]   one file of it
    https://HOST/PATH/FILE.gguf[?...]  a file at an address; pages of the hub count as `hf:`
    ollama:NAME[:TAG]                  a model that Ollama has fetched
    lmstudio:PUBLISHER/REPO[:QUANT]    a model that LM Studio has fetched; also .../FILE.gguf

Pure: nothing is looked up. Everything else is a path or the id of a registry's model, which are
not this module's.
"""

import hashlib
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qs, quote, unquote, urlsplit

from orion_oie.errors import InvalidRequestError
from orion_oie.models.queries import (
    lasting_query,
    without_query,
)
from orion_oie.models.split_files import split_name
from orion_oie.schemas.validation import did_you_mean

HUB_EXAMPLE = "hf:bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M"
URL_EXAMPLE = "https://example.org/models/model-Q4_K_M.gguf"
OLLAMA_EXAMPLE = "ollama:llama3.2:1b"
LM_STUDIO_EXAMPLE = "lmstudio:lmstudio-community/Qwen2.5-0.5B-Instruct-GGUF"

OLLAMA_HOST = "registry.ollama.ai"
OLLAMA_NAMESPACE = "library"
DEFAULT_TAG = "latest"

_HUB_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co", "www.hf.co"})
_OLLAMA_HOSTS = frozenset({"ollama.com", "www.ollama.com", "ollama.ai", "www.ollama.ai"})
_HUB_PREFIXES = ("hf", "huggingface", "hub")
_OLLAMA_PREFIXES = ("ollama",)
_LM_STUDIO_PREFIXES = ("lmstudio", "lm-studio", "lm_studio")
_PREFIX = re.compile(r"([A-Za-z][A-Za-z_-]*:|[A-Za-z][A-Za-z0-9+.-]*:/)(?:/+)?(.*)", re.DOTALL)
_BARE_HUB = re.compile(r"(?:www\.)?(?:hf\.co|huggingface\.co)/(.*)", re.IGNORECASE | re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_QUANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]*")
_OLLAMA_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_OLLAMA_HOST_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?::\d+)?")
_LIKE_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?::[\w.-]+)?(?:@[\w.-]+)?", re.ASCII)
_LIKE_OLLAMA = re.compile(r"[A-Za-z0-9][\w.-]*:[\w.-]+", re.ASCII)
_SHOWN_PAGES = ("blob", "resolve", "raw")
_MOST_NAME_CHARS = 96
_MOST_TEXT_CHARS = 16_384
_ID_NAME_CHARS = 80
_ID_DIGITS = 10


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository of the hub, and what of it: a quantization, or a file by its path, or neither.

    `quantization` is in upper case. A `revision` is a branch, a tag or a commit.
    """

    repository: str
    quantization: str | None = None
    file: str | None = None
    revision: str | None = None

    @property
    def text(self) -> str:
        """What to type for it."""
        inside = f"/{_escaped(self.file)}" if self.file else ""
        quantization = f":{self.quantization}" if self.quantization else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.repository}{inside}{quantization}{revision}"

    @property
    def model_id(self) -> str:
        """A short id for the registry; other sources have others."""
        name = self.repository.partition("/")[2]
        return _identifier(_joined(name, self.quantization, self.file), self.text)


@dataclass(frozen=True, slots=True)
class UrlName:
    """A file at an address, or a split model by its first file.

    `folder` is the address without the last name and without the query; `file` that name, decoded.
    `query` may be a signature: it is no part of any message, text or id.
    """

    folder: str
    file: str
    query: str = field(default="", repr=False, compare=False)

    @property
    def text(self) -> str:
        """The address, without what signs it."""
        lasting = lasting_query(self.query, self.file)
        return f"{self.folder}/{quote(self.file)}{'?' if lasting else ''}{lasting}"

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all files, of which a split model has several."""
        split = split_name(self.file)
        return split.parts if split is not None else (self.file,)

    @property
    def model_id(self) -> str:
        """A short id for the registry, the same whatever the signature is."""
        return _identifier(_stem(self.file), self.text)


@dataclass(frozen=True, slots=True)
class OllamaName:
    """A model of Ollama, with everything that `ollama pull` leaves out."""

    name: str
    tag: str = DEFAULT_TAG
    namespace: str = OLLAMA_NAMESPACE
    host: str = OLLAMA_HOST

    @property
    def short(self) -> str:
        """The name as Ollama shows it."""
        place = "" if self.namespace == OLLAMA_NAMESPACE else f"{self.namespace}/"
        if self.host != OLLAMA_HOST:
            place = f"{self.host}/{self.namespace}/"
        return f"{place}{self.name}:{self.tag}"

    @property
    def text(self) -> str:
        """What to type for it."""
        return f"ollama:{self.short}"

    @property
    def model_id(self) -> str:
        """A short id for the registry."""
        return _identifier(f"{self.name}-{self.tag}", self.text)


@dataclass(frozen=True, slots=True)
class LMStudioName:
    """A model of LM Studio: its folder, and a quantization or a file of it, or neither."""

    publisher: str
    repository: str
    quantization: str | None = None
    file: str | None = None

    @property
    def text(self) -> str:
        """What to type for it."""
        inside = f"/{self.file}" if self.file else ""
        quantization = f":{self.quantization}" if self.quantization else ""
        return f"lmstudio:{self.publisher}/{self.repository}{inside}{quantization}"

    @property
    def model_id(self) -> str:
        """A short id for the registry."""
        name = _joined(self.repository, self.quantization, self.file)
        return _identifier(name, self.text)


SourceName = HubName | UrlName | OllamaName | LMStudioName


def parse_source_name(text: str) -> SourceName | None:
    """What a text names; None for a path, and for the id of a registry's model.

    Raises `InvalidRequestError` with an example for a text that begins like one of the forms and
    is none. No message repeats a query.
    """
    text = text.strip()
    if len(text) > _MOST_TEXT_CHARS:
        raise InvalidRequestError(
            f"the name of the model has {len(text)} characters, and {_MOST_TEXT_CHARS} is the most"
        )
    if bare := _BARE_HUB.fullmatch(text):
        return _parse_hub(bare[1], text)
    found = _PREFIX.fullmatch(text)
    if found is None:
        return None
    prefix, rest = found[1].rstrip(":/").lower(), found[2]
    if prefix in ("http", "https"):
        return _parse_address(text)
    if prefix in _HUB_PREFIXES:
        inner = _BARE_HUB.fullmatch(rest)
        return _parse_hub(inner[1] if inner else rest, text)
    if prefix in _OLLAMA_PREFIXES:
        return _parse_ollama(rest, text)
    if prefix in _LM_STUDIO_PREFIXES:
        return _parse_lm_studio(rest, text)
    _refuse_other(text, prefix)
    return None


def source_hint(text: str) -> str:
    """The text " (did you mean 'hf:...'?)" for what is no source, but looks like the name of a
    repository or of a model of Ollama; else an empty string."""
    if _LIKE_REPOSITORY.fullmatch(text) and not text.lower().endswith(".gguf"):
        return f" (did you mean 'hf:{text}'?)"
    if _LIKE_OLLAMA.fullmatch(text):
        return f" (did you mean 'ollama:{text}'?)"
    return ""


def _refuse_other(text: str, prefix: str) -> None:
    """Raise for another protocol and for a misspelled prefix; what is left may be a path."""
    shown = without_query(text)
    if "://" in text:
        if prefix == "file":
            raise InvalidRequestError(
                f"{shown}: give the path itself, {unquote(urlsplit(text).path)}", source=shown
            )
        raise InvalidRequestError(
            f"{shown}: '{prefix}' addresses cannot be fetched, only http and https can: for "
            f"example {URL_EXAMPLE}",
            source=shown,
        )
    hint = did_you_mean(prefix, ("hf", "huggingface", "ollama", "lmstudio", "https"))
    if hint and not text.lower().endswith(".gguf"):
        raise InvalidRequestError(
            f"{shown}: there is no kind of source '{prefix}:'{hint}; known are 'hf:', 'ollama:', "
            "'lmstudio:', https addresses, and paths",
            source=shown,
        )


# -- the hub


def _parse_hub(rest: str, text: str) -> HubName:
    """Parse `ORG/REPO` with what follows, a page's path included."""
    rest, _, query = rest.partition("?")
    parts = rest.partition("#")[0].strip("/").split("/")
    if len(parts) > 2 and parts[2] in (*_SHOWN_PAGES, "tree") and len(parts) > 3:
        return _parse_page([unquote(part) for part in parts], text)
    if shown := parse_qs(query).get("show_file_info"):
        parts = [*parts[:2], _escaped(shown[0])]
    main, quantization, revision = _taken_apart("/".join(parts), text)
    if revision is not None and revision.lower().endswith(".gguf"):
        raise _hub_error(text, "the revision comes last, after the file")
    parts = main.split("/")
    repository = _repository(parts[:2], text)
    file = unquote("/".join(parts[2:])) or None
    if quantization is not None and quantization.lower().endswith(".gguf"):
        file, quantization = file or quantization, None
    if file is not None:
        _check_file(file, text)
        if quantization is not None:
            raise _hub_error(text, "it names a file and a quantization: leave one of them out")
    return HubName(repository, _quantization(quantization, text), file, _revision(revision, text))


def _escaped(file: str) -> str:
    """A file name without the characters that separate the parts of a source."""
    return re.sub("[%:@?#]", lambda found: f"%{ord(found[0]):02X}", file)


def _taken_apart(rest: str, text: str) -> tuple[str, str | None, str | None]:
    """Split off `:QUANT` and `@REVISION`, which may come in either order."""
    found = re.fullmatch(
        r"([^:@]*)(?::(?P<q1>[^:@]*))?(?:@(?P<r>[^:@]*))?(?::(?P<q2>[^:@]*))?", rest, re.DOTALL
    )
    if found is None or (found["q1"] is not None and found["q2"] is not None):
        raise _hub_error(text, "it has too many ':' or '@'")
    quantization = found["q1"] if found["q1"] is not None else found["q2"]
    return found[1], quantization, found["r"]


def _parse_page(parts: list[str], text: str) -> HubName:
    """Parse the path of a page of the hub: ORG, REPO, the kind of page, the revision, a path."""
    repository = _repository(parts[:2], text)
    after = parts[3:]
    # `refs/pr/1` is one revision, though its slashes are not always escaped.
    size = 3 if after[0] == "refs" and len(after) > 2 else 1
    revision, inside = "/".join(after[:size]), "/".join(after[size:])
    if parts[2] != "tree":
        _check_file(inside, text)
        return HubName(repository, None, inside, _revision(revision, text))
    quantization = after[-1] if inside else None
    return HubName(repository, _quantization(quantization, text), None, _revision(revision, text))


def _repository(parts: list[str], text: str) -> str:
    if parts[0] in ("datasets", "spaces", "collections", "models", "docs", "papers"):
        raise _hub_error(text, "this is no repository of a model")
    if len(parts) != 2 or not all(parts):
        raise _hub_error(text, "a repository is ORG/NAME")
    name = parts[1].removesuffix(".git")
    for part in (parts[0], name):
        is_name = _NAME.fullmatch(part) and "--" not in part and ".." not in part
        if not is_name or len(part) > _MOST_NAME_CHARS:
            raise _hub_error(text, f"{part!r} cannot be part of a repository's name")
    return f"{parts[0]}/{name}"


def _check_file(file: str, text: str) -> None:
    parts = file.split("/")
    if not file.lower().endswith(".gguf"):
        if _QUANT.fullmatch(file):
            raise _hub_error(
                text, f"'{file}' is no GGUF file: put ':' before a quantization, not '/'"
            )
        raise _hub_error(text, f"'{file}' is no GGUF file")
    if "" in parts or ".." in parts or "." in parts or "\\" in file or not file.isprintable():
        raise _hub_error(text, "this cannot be a file of a repository")


def _quantization(said: str | None, text: str) -> str | None:
    if said is None or said.lower() == DEFAULT_TAG:
        return None
    if not _QUANT.fullmatch(said) or len(said) > _MOST_NAME_CHARS:
        raise _hub_error(text, f"{said!r} cannot be a quantization")
    return said.upper()


def _revision(said: str | None, text: str) -> str | None:
    if said is None:
        return None
    if not _REVISION.fullmatch(said) or ".." in said or len(said) > _MOST_NAME_CHARS:
        raise _hub_error(text, f"{said!r} cannot be a revision (a branch, a tag or a commit)")
    return None if said == "main" else said


def _hub_error(text: str, what: str) -> InvalidRequestError:
    shown = without_query(text)
    return InvalidRequestError(f"{shown}: {what}; for example {HUB_EXAMPLE}", source=shown)


# -- addresses


def _parse_address(text: str) -> SourceName:
    shown = without_query(text)
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise _url_error(shown, "this is no address") from error
    if not host or any(character.isspace() for character in text):
        raise _url_error(shown, "this is no address (a space in it is written %20)")
    if "@" in parts.netloc:
        raise _url_error(
            shown,
            "the address has a user or a password in it, which would end up in logs: leave them out"
            " (the hub takes its token from HF_TOKEN)",
        )
    host = host.lower()
    if host in _HUB_HOSTS:
        path = parts.path.removeprefix("/")
        return _parse_hub(f"{path}?{parts.query}" if parts.query else path, text)
    if host in _OLLAMA_HOSTS:
        return _parse_ollama(parts.path.strip("/"), text)
    path = parts.path.rstrip("/")
    folder, _, last = path.rpartition("/")
    file = unquote(last)
    if not file or file in (".", "..") or "/" in file or "\0" in file or not file.isprintable():
        raise _url_error(shown, "the address names no file")
    split = split_name(file)
    if split is not None and split.number != 1:
        raise _url_error(
            shown,
            f"this is part {split.number} of {split.count} of a split model: name the first, "
            f"{split.part(1)}",
        )
    netloc = parts.netloc.lower()
    return UrlName(f"{parts.scheme.lower()}://{netloc}{folder}", file, parts.query)


def _url_error(shown: str, what: str) -> InvalidRequestError:
    return InvalidRequestError(f"{shown}: {what}; for example {URL_EXAMPLE}", source=shown)


# -- other programs


def _parse_ollama(rest: str, text: str) -> OllamaName:
    place, _, last = rest.strip("/").rpartition("/")
    name, colon, tag = last.partition(":")
    tag = tag if colon else DEFAULT_TAG
    parts = [part for part in place.split("/") if place]
    host, namespace = OLLAMA_HOST, OLLAMA_NAMESPACE
    if len(parts) == 2:
        host, namespace = parts
    elif len(parts) == 1:
        namespace = parts[0]
    are_right = all(_OLLAMA_PART.fullmatch(part) for part in (name, tag, namespace))
    if not are_right or not _OLLAMA_HOST_PART.fullmatch(host) or len(parts) > 2 or ".." in rest:
        shown = without_query(text)
        raise InvalidRequestError(
            f"{shown}: a model of Ollama is NAME or NAME:TAG, as 'ollama list' shows it; for "
            f"example {OLLAMA_EXAMPLE}",
            source=shown,
        )
    return OllamaName(name, tag, namespace, host.lower())


def _parse_lm_studio(rest: str, text: str) -> LMStudioName:
    shown = without_query(text)
    main, colon, quantization = rest.strip("/").partition(":")
    parts = main.split("/")
    is_right = len(parts) >= 2 and all(
        part and part not in (".", "..") and "\\" not in part and part.isprintable()
        for part in parts
    )
    file = "/".join(parts[2:]) or None
    if colon and (file is not None or not _QUANT.fullmatch(quantization)):
        is_right = False
    if not is_right:
        raise InvalidRequestError(
            f"{shown}: a model of LM Studio is PUBLISHER/REPO, with :QUANT or /FILE.gguf if it has "
            f"several; for example {LM_STUDIO_EXAMPLE}",
            source=shown,
        )
    return LMStudioName(parts[0], parts[1], quantization.upper() or None, file)


# -- ids


def _joined(name: str, quantization: str | None, file: str | None) -> str:
    if file:
        return _stem(file)
    return f"{name}-{quantization}" if quantization else name


def _stem(file: str) -> str:
    split = split_name(file)
    stem = split.stem if split is not None else file
    name = stem.rpartition("/")[2]
    return name[:-5] if name.lower().endswith(".gguf") else name


def _identifier(readable: str, identity: str) -> str:
    """A valid id: a readable name, and digits of a digest that tell sources apart."""
    digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:_ID_DIGITS]
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", readable).strip("-._")[:_ID_NAME_CHARS]
    return f"{safe or 'model'}-{digest}"
