"""Addresses, headers and digests of the files of a source, and lists of them. Fetches no file.

The Hugging Face hub is asked through `huggingface_hub`, so that `HF_HOME`, `HF_ENDPOINT`,
`HF_TOKEN` and `HF_HUB_OFFLINE` have their usual meaning.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from orion_oie.errors import DownloadError, ModelNotFoundError
from orion_oie.models.downloads.ranges import RemoteFile
from orion_oie.models.quant_choice import ListedFile
from orion_oie.models.queries import without_query
from orion_oie.models.source_names import UrlName
from orion_oie.models.specs import SourceSpec

_SHA256_DIGITS = 64
_LISTING_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Located:
    """The files of a source: those to fetch, and those that the hub's own cache already has."""

    remote: tuple[RemoteFile, ...]
    local: Mapping[Path, Path]  # from the path in our cache to the one in the hub's


def locate(source: SourceSpec, paths: tuple[Path, ...], pinned: str | None = None) -> Located:
    """Locate the files of a source; each belongs to its path in `paths`.

    `pinned` is the commit of the files that were fetched earlier. Raises `DownloadError`.
    """
    if source.url is not None:
        return _at_url(source, source.url, paths)
    if source.hub is not None:
        return _on_hub(source, source.hub, paths, pinned)
    raise DownloadError(f"a '{source.kind}' source cannot be fetched")


@dataclass(frozen=True, slots=True)
class RepositoryListing:
    """The files of a repository at a commit; `repository` is spelled as on the hub."""

    repository: str
    commit: str
    files: tuple[ListedFile, ...]


def list_repository(repository: str, revision: str | None) -> RepositoryListing:
    """Ask the hub for the files of a repository, with one request.

    Raises `ModelNotFoundError` when the hub has no such repository or revision, `DownloadError`
    when it cannot be asked or does not answer.
    """
    hub = _hub_library()
    from huggingface_hub import constants, errors

    where = f"hf:{repository}{f'@{revision}' if revision else ''}"
    if constants.HF_HUB_OFFLINE:
        raise DownloadError(
            f"{where} is not on this machine and HF_HUB_OFFLINE is set: unset it to look for it",
            source=where,
        )
    try:
        info = hub.HfApi().model_info(
            repository, revision=revision, files_metadata=True, timeout=_LISTING_TIMEOUT_S
        )
    except errors.GatedRepoError as error:
        raise DownloadError(_gated(where), source=where) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{where}: there is no such repository on {without_query(constants.ENDPOINT)}, or it "
            "is private: check the spelling; for a private one, set HF_TOKEN or log in with "
            "'hf auth login'",
            source=where,
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"{where}: the repository has no such branch, tag or commit", source=where
        ) from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(f"{where} cannot be on the hub: {error}", source=where) from error
    except Exception as error:
        if isinstance(error, OSError) or _is_of_http_library(error):
            raise DownloadError(f"{where}: {_no_answer(error)}", source=where) from error
        raise
    files = tuple(_listed(one) for one in info.siblings or ())
    return RepositoryListing(info.id or repository, info.sha or revision or "main", files)


def _listed(sibling: Any) -> ListedFile:
    facts = sibling.lfs
    digest = getattr(facts, "sha256", None)
    size = sibling.size if sibling.size is not None else getattr(facts, "size", None)
    return ListedFile(sibling.rfilename, size, digest)


def _gated(where: str) -> str:
    return (
        f"{where} is gated: accept its terms on the hub, then set HF_TOKEN or log in with "
        "'hf auth login'"
    )


def _no_answer(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"the hub answers with status {status}: try again later"
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return f"the hub cannot be reached ({reason}); check the network, HF_ENDPOINT and proxies"


def _is_of_http_library(error: Exception) -> bool:
    """Whether an error is one of the HTTP library, whose errors the hub library lets through."""
    return type(error).__module__.startswith(("httpx", "httpcore", "requests"))


def url_source(name: UrlName) -> SourceSpec:
    """The source of a file at an address; all files of a split model share the query."""
    return SourceSpec(url=name.folder, shards=list(name.files), query=name.query or None)


def _at_url(source: SourceSpec, url: str, paths: tuple[Path, ...]) -> Located:
    if not url.lower().startswith(("http://", "https://")):
        raise DownloadError(f"{url}: only http and https can be fetched", url=url)
    digests: list[str | None] = [*source.sha256] or [None] * len(paths)
    base = url.rstrip("/")
    remote = tuple(
        RemoteFile(f"{base}/{quote(name)}", path, digest, query=source.query or "")
        for name, path, digest in zip(source.shards, paths, digests, strict=True)
    )
    return Located(remote, {})


def _on_hub(
    source: SourceSpec, repository: str, paths: tuple[Path, ...], pinned: str | None
) -> Located:
    hub = _hub_library()
    revision = pinned or source.revision  # replaced by the commit of the first file
    digests: list[str | None] = [*source.sha256] or [None] * len(paths)
    local: dict[Path, Path] = {}
    remote: list[RemoteFile] = []
    for name, path, digest in zip(source.files, paths, digests, strict=True):
        cached = _cached_by_hub(hub, repository, name, revision, digest)
        if cached is not None:
            local[path] = cached
            revision = cached.parts[-1 - len(Path(name).parts)]  # .../snapshots/COMMIT/NAME
        else:
            remote.append(_hub_file(hub, repository, name, revision, path, digest))
            revision = remote[-1].revision
    return Located(tuple(remote), local)


def _cached_by_hub(
    hub: Any, repository: str, name: str, revision: str | None, digest: str | None
) -> Path | None:
    """The path of a file in the hub's own cache, which names files by their digests; None when
    that cache does not have it, or has other content."""
    try:
        cached = hub.try_to_load_from_cache(repository, name, revision=revision)
    except ValueError as error:
        raise DownloadError(f"{repository}/{name} cannot be on the hub: {error}") from error
    if isinstance(cached, str) and digest in (None, Path(cached).resolve().name):
        return Path(cached)
    return None


def _hub_file(
    hub: Any, repository: str, name: str, revision: str | None, path: Path, digest: str | None
) -> RemoteFile:
    from huggingface_hub import constants, errors

    where = f"{repository}/{name} (revision {revision or 'main'})"
    if constants.HF_HUB_OFFLINE:
        raise DownloadError(
            f"{where} is not on this machine and HF_HUB_OFFLINE is set: unset it to fetch the file"
        )
    url = hub.hf_hub_url(repository, name, revision=revision)
    try:
        facts = hub.get_hf_file_metadata(url)
    except errors.GatedRepoError as error:
        raise DownloadError(_gated(where), url=url) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise DownloadError(f"{where} cannot be fetched from the hub: {error}", url=url) from error
    except Exception as error:
        if not _is_of_http_library(error):
            raise
        raise DownloadError(f"{where}: the hub cannot be reached ({error})", url=url) from error
    known = digest or (facts.etag if facts.etag and len(facts.etag) == _SHA256_DIGITS else None)
    commit = facts.commit_hash or revision
    return RemoteFile(
        hub.hf_hub_url(repository, name, revision=commit),
        path,
        known,
        hub.utils.build_hf_headers(),
        commit,
    )


def _hub_library() -> Any:
    try:
        import huggingface_hub.utils
    except ImportError as error:
        raise DownloadError(
            "the Hugging Face hub needs huggingface_hub: pip install 'orion-oie[hub]'", extra="hub"
        ) from error
    return huggingface_hub
