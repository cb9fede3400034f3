"""The cache of fetched model files, with their digests and their locks.

    ROOT/models/KIND--NAME/FILE            complete, with the right digest
    ROOT/models/KIND--NAME/FILE.part       arriving; .part.map has its blocks, .lock is its lock
    ROOT/models.lock.json                  the digest of each file, as expected or as first seen
    ROOT/listings/                         lists of the hub's files, kept by `listing`
    ROOT/snapshots/                        states of system prompts, kept by the workers

Processes share one cache: the holder of a file's lock fetches it, and the others wait for it. The
access time of a file is the time of its last use. The cache knows sources, but neither agents nor
variants.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from orion_oie.cancellation import CancelScope
from orion_oie.config import DownloadConfig
from orion_oie.errors import DigestMismatchError, DownloadError, RegistryError
from orion_oie.models.downloads.arrival import ArrivalMap
from orion_oie.models.downloads.fetch import (
    Download,
    Fetched,
)
from orion_oie.models.downloads.locks import (
    lock_path,
    locked,
    try_lock,
)
from orion_oie.models.downloads.parts import (
    map_path,
    part_path,
    remove_part,
)
from orion_oie.models.downloads.ranges import RemoteFile
from orion_oie.models.downloads.sources import locate
from orion_oie.models.files import (
    TEMPORARY_SUFFIX,
    atomic_write,
    replacing,
)
from orion_oie.models.specs import SourceSpec
from orion_oie.models.user_folders import cache_folder

_HASH_BYTES = 1 << 20
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_HELPERS = (".lock", ".part.map", TEMPORARY_SUFFIX)  # files that serve others


@dataclass(frozen=True, slots=True)
class FileRecord:
    """The facts about a file that was complete once. `is_expected`: the digest is the one that the
    registry or the hub named, and not merely the first one seen."""

    sha256: str
    size: int
    url: str
    revision: str | None
    is_expected: bool
    first_seen: str


@dataclass(frozen=True, slots=True)
class CachedFile:
    """A file of the cache. `arrived_bytes` of its `size` have arrived; `last_used` is in seconds
    since the epoch."""

    path: Path
    state: Literal["complete", "partial", "linked"]
    size: int
    arrived_bytes: int
    last_used: float
    record: FileRecord | None


@dataclass(frozen=True, slots=True)
class Verified:
    """The result of hashing a file again; `expected` is None when the file has no record."""

    path: Path
    sha256: str
    expected: str | None

    @property
    def is_right(self) -> bool:
        return self.expected is None or self.sha256 == self.expected


def default_root() -> Path:
    """`ORION_CACHE_DIR`, or `orion-oie` in the user's folder for caches."""
    if named := os.environ.get("ORION_CACHE_DIR"):
        return Path(named).expanduser()
    return cache_folder()


class ModelCache:
    """The cache under `root`, by default under `default_root()`."""

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = Path(root).expanduser() if root is not None else default_root()
        self.snapshots = self.root / "snapshots"
        self._models = self.root / "models"
        self._records = self.root / "models.lock.json"
        self._read_records: tuple[tuple[int, int], dict[str, FileRecord]] = (0, 0), {}

    # -- paths

    def paths(self, source: SourceSpec) -> tuple[Path, ...]:
        """The paths of the files of a `url` or `hub` source, fetched or not.

        Raises `RegistryError` for a file name that leaves its folder.
        """
        folder = self._models / _folder_name(source)
        names = source.shards if source.url is not None else source.files
        for name in names:
            parts = Path(name).parts
            if Path(name).is_absolute() or ".." in parts or not parts:
                raise RegistryError(f"a source's file name must not leave its folder: {name!r}")
        return tuple(folder / name for name in names)

    def find(self, source: SourceSpec) -> tuple[Path, ...] | None:
        """The files of a source, or None unless all are in the cache with the digests that the
        source names. Compares recorded digests; `verify` hashes the files."""
        paths = self.paths(source)
        digests: list[str | None] = [*source.sha256] or [None] * len(paths)
        are_here = all(map(self._is_here, paths, digests))
        return paths if are_here else None

    def _is_here(self, path: Path, digest: str | None) -> bool:
        # Unlike `Path.exists`, this is False where permission is missing.
        if not os.path.exists(path):
            return False
        if digest is None:
            return True
        with contextlib.suppress(DownloadError):  # unreadable records count as none
            record = self._known().get(self._key(path))
            return record is None or record.sha256 == digest
        return True

    def note_use(self, paths: Sequence[Path]) -> None:
        """Set the time of last use of files to now; files of other folders are left alone."""
        for path in paths:
            if path.is_relative_to(self._models):
                with contextlib.suppress(OSError):
                    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))

    # -- fetching

    def pull(
        self,
        source: SourceSpec,
        config: DownloadConfig,
        scope: CancelScope,
        on_progress: Callable[["Download | None"], None] = lambda _download: None,
    ) -> tuple[Path, ...]:
        """Fetch the missing files of a source; return all its files.

        `on_progress` is called at short intervals, with None while another process fetches. Raises
        `DownloadError`, `DigestMismatchError`, or the error that `scope` was cancelled with.
        """
        download = self.open_download(source, config, scope, lambda: on_progress(None))
        if download is not None:
            download.start()
            download.wait(lambda: on_progress(download))
        return self.paths(source)

    def open_download(
        self,
        source: SourceSpec,
        config: DownloadConfig,
        scope: CancelScope,
        on_wait: Callable[[], None] = lambda: None,
    ) -> Download | None:
        """A prepared download of the missing files of a source, or None when none is missing.

        Waits while another process fetches, and calls `on_wait` at short intervals meanwhile.
        Raises the same errors as `pull`.
        """
        paths = self.paths(source)
        if self.find(source) is not None:
            return None
        locks = contextlib.ExitStack()
        with contextlib.ExitStack() as on_error:
            on_error.callback(locks.close)
            for path in sorted(paths):
                locks.enter_context(locked(path, scope, on_wait))
            if self.find(source) is not None:  # another process fetched it meanwhile
                return None
            located = locate(source, paths, self._pinned(paths))
            for path, there in located.local.items():
                _link(path, there)
            missing = [f for f in located.remote if not self._is_here(f.path, f.sha256)]
            if not missing:
                return None
            download = Download(missing, config, scope, self._check_record, locks.close)
            download.prepare()
            on_error.pop_all()
        return download

    def arrived(self, source: SourceSpec) -> tuple[int, int]:
        """The number of bytes of a source that have arrived, and its total as far as known."""
        arrived = total = 0
        for path in self.paths(source):
            with contextlib.suppress(OSError, ValueError):
                if path.exists():
                    arrived += path.stat().st_size
                    total += path.stat().st_size
                else:
                    arrival = ArrivalMap.open(map_path(path))
                    arrived += arrival.arrived_bytes
                    total += arrival.size
        return arrived, total

    def _pinned(self, paths: Sequence[Path]) -> str | None:
        """The commit of the files of a source that have arrived, complete or not."""
        records = self.records()
        for path in paths:
            record = records.get(self._key(path))
            if record is not None and record.revision is not None:
                return record.revision
            with contextlib.suppress(OSError, ValueError):
                revision = ArrivalMap.open(map_path(path)).facts.get("revision")
                if isinstance(revision, str):
                    return revision
        return None

    def _check_record(self, fetched: Fetched) -> None:
        """Compare the digest of a file with its record, and record it."""
        file = fetched.file
        key = self._key(file.path)
        known = self.records().get(key)
        if file.sha256 is None and known is not None and known.sha256 != fetched.sha256:
            raise DigestMismatchError(
                f"{file.url} has other content than when it was first fetched: its SHA-256 is "
                f"{fetched.sha256}, and was {known.sha256}; if that is right, remove the record "
                "with 'orion-oie models rm' and fetch it again",
                url=file.url,
                sha256=fetched.sha256,
                expected=known.sha256,
            )
        self._write_record(key, _record_of(fetched))

    # -- records

    def records(self) -> dict[str, FileRecord]:
        """The records of files, by path under the cache's root. Raises `DownloadError` when the
        file that holds them is damaged."""
        try:
            raw = json.loads(self._records.read_text(encoding="utf-8"))
            return {key: FileRecord(**record) for key, record in raw.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DownloadError(
                f"{self._records} cannot be read ({error}): repair or remove it; without it, "
                "files are taken as they come"
            ) from error

    def _known(self) -> dict[str, FileRecord]:
        """The same as `records`, but read again only after a change."""
        try:
            facts = self._records.stat()
        except OSError:
            return {}
        version = facts.st_mtime_ns, facts.st_ino  # two changes may have the same time
        if self._read_records[0] != version:
            self._read_records = version, self.records()
        return self._read_records[1]

    def _write_record(self, key: str, record: FileRecord | None) -> None:
        with locked(self._records, CancelScope(), lambda: None):
            records = self.records()
            records.pop(key, None)
            if record is not None:
                records[key] = record
            text = json.dumps({k: asdict(r) for k, r in sorted(records.items())}, indent=2) + "\n"
            atomic_write(self._records, text)

    def _key(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    # -- housekeeping

    def files(self) -> list[CachedFile]:
        """All files that were fetched, whole or in part."""
        records = self.records()
        found = []
        for path in sorted(self._models.rglob("*")):
            is_partial = path.name.endswith(".part")
            if path.is_dir() or path.name.endswith(_HELPERS):
                continue
            own = path.with_name(path.name.removesuffix(".part")) if is_partial else path
            with contextlib.suppress(OSError):  # it may go at any moment
                facts = path.stat()
                found.append(
                    CachedFile(
                        own,
                        "partial" if is_partial else "linked" if path.is_symlink() else "complete",
                        facts.st_size,
                        _arrived_bytes(own) if is_partial else facts.st_size,
                        facts.st_mtime if is_partial else facts.st_atime,
                        records.get(self._key(own)),
                    )
                )
        return found

    def remove(self, source: SourceSpec) -> int:
        """Remove the files of a source and their records; return the number of freed bytes.

        Raises `DownloadError` while they are being fetched.
        """
        return self.remove_files(self.paths(source))

    def remove_files(self, paths: Sequence[Path]) -> int:
        """Remove files of the cache and their records, like `remove`; no source is needed."""
        freed = 0
        for path in paths:
            freed += self._remove(path)
            self._write_record(self._key(path), None)
        return freed

    def verify(self, paths: Sequence[Path] | None = None) -> Iterator[Verified]:
        """Hash complete files again, by default all, and compare with their records."""
        records = self.records()
        if paths is None:
            paths = [file.path for file in self.files() if file.state != "partial"]
        for path in paths:
            record = records.get(self._key(path))
            yield Verified(path, _sha256(path), record.sha256 if record is not None else None)

    def prune(self, keep_bytes: int | None = None) -> list[CachedFile]:
        """Remove partial files, then the longest unused files until at most `keep_bytes` are left.

        Files that are being fetched stay. Returns the removed files.
        """
        files = self.files()
        removed = []
        for file in [file for file in files if file.state == "partial"]:
            with contextlib.suppress(DownloadError):  # it is being fetched
                self._remove(file.path, only_part=True)
                removed.append(file)
        whole = sorted((f for f in files if f.state == "complete"), key=lambda f: f.last_used)
        left = sum(file.size for file in whole)
        for file in whole:
            if keep_bytes is None or left <= keep_bytes:
                break
            with contextlib.suppress(DownloadError):  # other files of its source are being fetched
                self._remove(file.path)
                removed.append(file)
                left -= file.size
        return removed

    def _remove(self, path: Path, *, only_part: bool = False) -> int:
        lock = try_lock(path) if path.parent.is_dir() else None
        if lock is None:
            if path.parent.is_dir():
                raise DownloadError(f"{path.name} is being fetched by another process")
            return 0
        with lock:
            freed = 0
            with contextlib.suppress(OSError):
                freed += part_path(path).stat().st_blocks * 512
            remove_part(path)
            if not only_part:
                with contextlib.suppress(OSError):
                    freed += 0 if path.is_symlink() else path.stat().st_blocks * 512
                path.unlink(missing_ok=True)
            lock_path(path).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others lie in the folder
                path.parent.rmdir()
        return freed


def _folder_name(source: SourceSpec) -> str:
    if source.hub is not None:
        revision = source.revision or "main"
        return _UNSAFE.sub("-", f"hub--{source.hub.replace('/', '--')}--{revision}")
    if source.url is None:
        raise ValueError(f"a '{source.kind}' source has no folder in the cache")
    lasting = source.lasting_query  # a signature changes, but the file is the same
    identity = f"{source.url}?{lasting}" if lasting else source.url
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    host = None
    with contextlib.suppress(ValueError):  # fetching reports what is wrong with the address
        host = urlsplit(source.url).hostname
    return _UNSAFE.sub("-", f"url--{host or 'unknown'}--{digest}")


def _link(path: Path, there: Path) -> None:
    """Make a file of the cache a link to one that lies elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as fresh:
        fresh.symlink_to(there.resolve())


def _record_of(fetched: Fetched) -> FileRecord:
    file: RemoteFile = fetched.file
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return FileRecord(
        fetched.sha256, fetched.size, file.url, file.revision, file.sha256 is not None, now
    )


def _arrived_bytes(path: Path) -> int:
    """The number of bytes of a file that have arrived; 0 without a map."""
    try:
        return ArrivalMap.open(map_path(path)).arrived_bytes
    except (OSError, ValueError):
        return 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()
