"""Where the files of a source can be fetched from: addresses, headers, digests.

The Hugging Face hub is asked through `huggingface_hub`, so that `HF_HOME`, `HF_ENDPOINT`,
`HF_TOKEN` and `HF_HUB_OFFLINE` mean here what they mean everywhere. Fetches nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from orion_oie.errors import DownloadError
from orion_oie.models.downloads.ranges import RemoteFile
from orion_oie.models.specs import SourceSpec

_SHA256_DIGITS = 64


@dataclass(frozen=True, slots=True)
class Located:
    """The files of a source: those to fetch, and those that the hub's own cache has already."""

    remote: tuple[RemoteFile, ...]
    local: Mapping[Path, Path]  # by where it should be: where it is


def locate(source: SourceSpec, paths: tuple[Path, ...], pinned: str | None = None) -> Located:
    """Where to get the files of a source, of which each should come to its path in `paths`.

    `pinned` is the commit that the first files of the source came from. Raises `DownloadError`.
    """
    if source.url is not None:
        return _at_url(source, source.url, paths)
    if source.hub is not None:
        return _on_hub(source, source.hub, paths, pinned)
    raise DownloadError(f"a '{source.kind}' source cannot be fetched")


def _at_url(source: SourceSpec, url: str, paths: tuple[Path, ...]) -> Located:
    if not url.lower().startswith(("http://", "https://")):
        raise DownloadError(f"{url}: only http and https can be fetched", url=url)
    digests: list[str | None] = [*source.sha256] or [None] * len(paths)
    base = url.rstrip("/")
    remote = tuple(
        RemoteFile(f"{base}/{quote(name)}", path, digest)
        for name, path, digest in zip(source.shards, paths, digests, strict=True)
    )
    return Located(remote, {})


def _on_hub(
    source: SourceSpec, repository: str, paths: tuple[Path, ...], pinned: str | None
) -> Located:
    hub = _hub_library()
    revision = pinned or source.revision  # and from the first file on, its commit
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
    """A file that the hub's own cache has, if it is the right one: it is named by its digest
    there."""
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
        raise DownloadError(
            f"{where} is gated: accept its terms on the hub, then set HF_TOKEN or log in with "
            "'hf auth login'",
            url=url,
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise DownloadError(f"{where} cannot be fetched from the hub: {error}", url=url) from error
    except Exception as error:
        # The hub library lets the errors of its HTTP library through.
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
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
