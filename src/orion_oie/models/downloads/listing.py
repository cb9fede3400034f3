"""Which files of the hub a name stands for: asked once, remembered, and known offline.

    ROOT/listings/ORG--REPO--DIGEST.json    the files of a repository at a commit

Nothing is asked when the answer cannot change or would change nothing: when a commit is named and
its listing is known, and when the files are on this machine. Fetches no file.
"""

import contextlib
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from orion_oie.errors import DownloadError, ModelNotFoundError
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.models.downloads.sources import (
    RepositoryListing,
    list_repository,
)
from orion_oie.models.files import atomic_write
from orion_oie.models.local.hub_cache import (
    CachedFiles,
    cached_files,
)
from orion_oie.models.quant_choice import (
    PREFERRED,
    FileSet,
    ListedFile,
    choose_files,
)
from orion_oie.models.source_names import HubName
from orion_oie.models.specs import SourceSpec

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
# Enough to choose from, and to say what there is instead.
_REMEMBERED = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".onnx")


@dataclass(frozen=True, slots=True)
class ResolvedHub:
    """The files that a name of the hub stands for.

    `source` has them with their commit, and with their digests if all are known. `sizes` are in
    bytes, None where unknown. `paths` are the files in the cache of the hub's own library, which
    can be read there; None when they are not in it.
    """

    source: SourceSpec
    sizes: tuple[int | None, ...]
    quantization: str | None
    paths: tuple[Path, ...] | None = None

    @property
    def size_bytes(self) -> int | None:
        """The size of all files; None if one is unknown."""
        known = [size for size in self.sizes if size is not None]
        return sum(known) if len(known) == len(self.sizes) else None


def resolve_hub(name: HubName, cache: ModelCache, *, refresh: bool = False) -> ResolvedHub:
    """Find the files that a name stands for: on this machine, else by asking the hub.

    `refresh` asks in any case, so that a branch which has moved on is followed. Without a network,
    what is on this machine or was known before is the answer, also then.

    Raises `ModelNotFoundError` for a repository, a revision, a quantization or a file that does
    not exist, and `DownloadError` when the hub would have to be asked and cannot be.
    """
    if not refresh:
        known = _known(name, cache)
        if known is not None:
            return known
    try:
        listing = list_repository(name.repository, name.revision)
    except DownloadError as error:
        offline = _offline(name, cache)
        if offline is None:
            raise
        if isinstance(offline, ModelNotFoundError):
            raise offline from error
        return offline
    _remember(name, cache, listing)
    return _resolved(listing, _choose(listing, name))


def _known(name: HubName, cache: ModelCache) -> ResolvedHub | None:
    """The answer that needs no request, or None."""
    found = _recalled(name, cache)
    cached = _in_hub_cache(name)
    if cached is not None:
        is_named = name.quantization is not None or name.file is not None
        # Without a name, another quantization may be the better one, except than the best.
        is_best = cached.chosen.quantization == PREFERRED[0]
        in_place = _resolved_in_place(cached)
        if is_named or is_best or (found is not None and _is_same(in_place, found)):
            return in_place
    if found is None:
        return None
    is_pinned = name.revision is not None and _COMMIT.fullmatch(name.revision) is not None
    return found if is_pinned or cache.find(found.source) is not None else None


def _is_same(one: ResolvedHub, other: ResolvedHub) -> bool:
    return (one.source.revision, one.source.files) == (other.source.revision, other.source.files)


def _recalled(name: HubName, cache: ModelCache) -> ResolvedHub | None:
    """The answer by the listing that was written down; None if it has none by now."""
    listing = _recall(name, cache)
    if listing is None:
        return None
    try:
        return _resolved(listing, _choose(listing, name))
    except ModelNotFoundError:
        return None


def _offline(name: HubName, cache: ModelCache) -> ResolvedHub | ModelNotFoundError | None:
    """The best answer without the hub: files on this machine, else what was known of the
    repository, else None. An error says that the known repository has no such files."""
    cached = _in_hub_cache(name)
    listing = _recall(name, cache)
    if listing is None:
        return _resolved_in_place(cached) if cached is not None else None
    try:
        found = _resolved(listing, _choose(listing, name))
    except ModelNotFoundError as error:
        return _resolved_in_place(cached) if cached is not None else error
    is_here = cache.find(found.source) is not None
    return found if is_here or cached is None else _resolved_in_place(cached)


def _in_hub_cache(name: HubName) -> CachedFiles | None:
    try:
        return cached_files(name)
    except ModelNotFoundError:
        return None


def _choose(listing: RepositoryListing, name: HubName) -> FileSet:
    source = HubName(listing.repository, revision=name.revision).text
    return choose_files(listing.files, source, quantization=name.quantization, file=name.file)


def _resolved(listing: RepositoryListing, chosen: FileSet) -> ResolvedHub:
    source = _source(listing.repository, listing.commit, chosen)
    return ResolvedHub(source, tuple(file.size for file in chosen.files), chosen.quantization)


def _resolved_in_place(cached: CachedFiles) -> ResolvedHub:
    source = _source(cached.repository, cached.commit, cached.chosen)
    sizes = tuple(file.size for file in cached.chosen.files)
    return ResolvedHub(source, sizes, cached.chosen.quantization, cached.paths)


def _source(repository: str, commit: str, chosen: FileSet) -> SourceSpec:
    digests = [file.sha256 for file in chosen.files if file.sha256 is not None]
    return SourceSpec(
        hub=repository,
        files=list(chosen.names),
        revision=commit,
        sha256=digests if len(digests) == len(chosen.files) else [],
    )


# -- memory


def _listing_path(name: HubName, cache: ModelCache) -> Path:
    endpoint = os.environ.get("HF_ENDPOINT", "")  # another hub has other repositories
    identity = "\0".join((name.repository.lower(), name.revision or "", endpoint))
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    readable = _UNSAFE.sub("-", name.repository.replace("/", "--"))
    return cache.root / "listings" / f"{readable}--{digest}.json"


def _remember(name: HubName, cache: ModelCache, listing: RepositoryListing) -> None:
    """Write the listing down. A disk that cannot be written to is no reason to fail."""
    files = [asdict(file) for file in listing.files if file.name.lower().endswith(_REMEMBERED)]
    content = {"repository": listing.repository, "commit": listing.commit, "files": files}
    path = _listing_path(name, cache)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(content, indent=1) + "\n")


def _recall(name: HubName, cache: ModelCache) -> RepositoryListing | None:
    """The listing that was written down; None without one, and for a damaged one."""
    try:
        raw = json.loads(_listing_path(name, cache).read_text(encoding="utf-8"))
        files = tuple(_checked(ListedFile(**file)) for file in raw["files"])
        return RepositoryListing(str(raw["repository"]), str(raw["commit"]), files)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _checked(file: ListedFile) -> ListedFile:
    is_right = isinstance(file.name, str) and isinstance(file.size, int | None)
    if not is_right or (file.sha256 is not None and not _SHA256.fullmatch(file.sha256)):
        raise ValueError("no file of a repository")
    return file
