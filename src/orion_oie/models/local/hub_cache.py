"""The cache of the Hugging Face hub's library, read by hand: `huggingface_hub` is not needed.

    CACHE/models--ORG--REPO/refs/REVISION              the commit of a branch or a tag
    CACHE/models--ORG--REPO/snapshots/COMMIT/FILE      a link to the file's content

The layout is that of https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orion_oie.errors import ModelError, ModelNotFoundError
from orion_oie.models.local.found import (
    Found,
    LocalModel,
    Unusable,
)
from orion_oie.models.local.walk import (
    SeenFile,
    Walk,
    is_forbidden,
    read_small,
)
from orion_oie.models.quant_choice import (
    FileSet,
    ListedFile,
    choose_files,
    file_sets,
)
from orion_oie.models.source_names import HubName
from orion_oie.schemas.validation import did_you_mean

_PREFIX = "models--"
_DEPTH = 3  # folders below a snapshot
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHORT_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_ENTRIES = 5_000


@dataclass(frozen=True, slots=True)
class CachedFiles:
    """The files of a model in the hub's cache, the repository as it is spelled there, and the
    commit that they are of."""

    repository: str
    commit: str
    chosen: FileSet
    paths: tuple[Path, ...]


def hub_cache_folders() -> list[Path]:
    """The cache of the hub's library, by `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, `HF_HOME` or
    `XDG_CACHE_HOME` as that library reads them; existing or not."""
    env = os.environ
    home = env.get("HF_HOME") or f"{env.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    named = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return [Path(os.path.expandvars(os.path.expanduser(named)))]


def hub_cache_models() -> Found:
    """All models with a GGUF file in the hub's cache, of each repository those of its newest
    commit. Raises nothing."""
    return Found.together(map(_in_folder, hub_cache_folders()))


def find_in_hub_cache(name: HubName) -> tuple[Path, ...]:
    """The files of a model in the hub's cache, chosen as on the hub.

    Raises `ModelNotFoundError`.
    """
    return cached_files(name).paths


def cached_files(name: HubName) -> CachedFiles:
    """The same as `find_in_hub_cache`, with what else is known of the files."""
    error: ModelNotFoundError | None = None
    known: list[str] = []
    for cache in hub_cache_folders():
        for repository, folder in _repositories(cache):
            known.append(repository)
            if repository.lower() != name.repository.lower():
                continue
            for commit in _commits(folder, name.revision):
                walk = Walk(folder / "snapshots" / commit, _DEPTH)
                try:
                    return _choose(name, repository, commit, walk)
                except ModelNotFoundError as caught:
                    error = error or caught
    if error is not None:
        raise error
    where = ", ".join(map(str, hub_cache_folders()))
    raise ModelNotFoundError(
        f"{name.text} is not in the hub's cache {where}{did_you_mean(name.repository, known)}",
        source=name.text,
        choices=known,
    )


def _choose(name: HubName, repository: str, commit: str, walk: Walk) -> CachedFiles:
    chosen = choose_files(
        _listing(walk), f"hf:{repository}", quantization=name.quantization, file=name.file
    )
    files = {file.name: file.path for file in walk.files}
    return CachedFiles(repository, commit, chosen, tuple(files[part] for part in chosen.names))


def _listing(walk: Walk) -> list[ListedFile]:
    return [ListedFile(file.name, file.size, _digest(file)) for file in walk.files]


def _digest(file: SeenFile) -> str | None:
    """The SHA-256 of a file: large ones lie under it in the cache."""
    blob = os.path.basename(os.path.realpath(file.path))
    return blob if _SHA256.fullmatch(blob) else None


def _in_folder(cache: Path) -> Found:
    if is_forbidden(cache):
        return Found(
            unusable=(Unusable(str(cache), "it cannot be read (Permission denied)", "hub"),)
        )
    return Found.together(
        _in_repository(repository, folder) for repository, folder in _repositories(cache)
    )


def _in_repository(repository: str, folder: Path) -> Found:
    commits = _commits(folder, None)
    models: list[LocalModel] = []
    unusable: list[Unusable] = []
    if not commits:
        return Found()
    # Older commits are left out: whoever wants one names it.
    walk = Walk(folder / "snapshots" / commits[0], _DEPTH)
    files = {file.name: file.path for file in walk.files}
    sets = file_sets(_listing(walk))
    for below, why in walk.problems:
        if below.lower().endswith(".gguf") or below == ".":
            unusable.append(Unusable(f"{repository}/{below}", why, "hub"))
    for one in sets:
        name = _named(repository, one, sets)
        if one.missing:
            reason = f"{len(one.missing)} of its parts have not been fetched"
            unusable.append(Unusable(name.text, reason, "hub"))
            continue
        models.append(
            LocalModel(
                name.text,
                repository,
                tuple(files[part] for part in one.names),
                one.size_bytes or 0,
                "hub",
                one.quantization,
            )
        )
    return Found(tuple(models), tuple(unusable))


def _named(repository: str, one: FileSet, sets: list[FileSet]) -> HubName:
    """The shortest name of a set among those of its repository."""
    if one.quantization is not None:
        by_label = HubName(repository, one.quantization)
        try:
            listing = [file for each in sets for file in each.files]
            if choose_files(listing, "", quantization=one.quantization) == one:
                return by_label
        except ModelError:
            pass
    return HubName(repository, file=one.shown)


def _repositories(cache: Path) -> Iterator[tuple[str, Path]]:
    """The repositories of models in a cache, ORG/REPO and folder, sorted."""
    try:
        with os.scandir(cache) as entries:
            names = sorted(
                entry.name
                for _, entry in zip(range(_MOST_ENTRIES), entries, strict=False)
                if entry.name.startswith(_PREFIX)
            )
    except OSError:
        return
    for name in names:
        repository = name.removeprefix(_PREFIX).replace("--", "/")
        if repository.count("/") == 1:
            yield repository, cache / name


def _commits(folder: Path, revision: str | None) -> list[str]:
    """The commits of a repository that have files here and are meant, the best first: those of the
    revision, by default of `main` and then the newest."""
    try:
        with os.scandir(folder / "snapshots") as entries:
            snapshots = [
                (entry.stat().st_mtime, entry.name)
                for _, entry in zip(range(_MOST_ENTRIES), entries, strict=False)
                if entry.is_dir()
            ]
    except OSError:
        return []
    newest = [name for _, name in sorted(snapshots, reverse=True)]
    if revision is not None and _SHORT_COMMIT.fullmatch(revision):
        matches = [commit for commit in newest if commit.startswith(revision)]
        if matches or _COMMIT.fullmatch(revision):
            return matches
    try:
        meant = read_small(folder / "refs" / (revision or "main")).strip()
    except (OSError, ValueError):
        meant = ""
    first = [meant] if meant in newest else []
    if revision is not None:
        return first
    return first + [commit for commit in newest if commit != meant]
