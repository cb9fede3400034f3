"""Files while they arrive: `NAME.part` at its full size, and its map beside it.

Begins, resumes and removes them; fetches nothing.
"""

import errno
from dataclasses import dataclass
from pathlib import Path

from orion_oie.errors import DownloadError, OrionError
from orion_oie.models.downloads.arrival import ArrivalMap
from orion_oie.models.downloads.ranges import RemoteFile

Run = tuple[int, int, int]
"""Bytes of one of several files: its number, the first byte, the one after the last."""


@dataclass(eq=False)
class Part:
    """One file on its way."""

    file: RemoteFile
    size: int
    etag: str | None
    arrival: ArrivalMap
    descriptor: int

    @property
    def path(self) -> Path:
        return part_path(self.file.path)


def part_path(path: Path) -> Path:
    """Where a file lies while it arrives."""
    return path.with_name(path.name + ".part")


def map_path(path: Path) -> Path:
    """Where the map of a file lies while it arrives."""
    return path.with_name(path.name + ".part.map")


def remove_part(path: Path) -> None:
    """Throw away what arrived of a file."""
    map_path(path).unlink(missing_ok=True)
    part_path(path).unlink(missing_ok=True)


def resumed(file: RemoteFile, size: int, etag: str | None) -> ArrivalMap | None:
    """The map of what arrived before; None, and nothing of it left, if it is of no use."""
    facts = facts_of(file, etag)
    names = ("etag", "sha256", "revision")
    try:
        arrival = ArrivalMap.open(map_path(file.path), is_writable=True)
        is_same = arrival.size == size == part_path(file.path).stat().st_size
        is_same = is_same and all(arrival.facts[name] == facts[name] for name in names)
        # Without any of them, other content of the same size would pass for this one.
        if is_same and any(facts[name] for name in names):
            return arrival
    except (OSError, ValueError, KeyError):
        pass  # there is none, or it cannot be read
    file.path.parent.mkdir(parents=True, exist_ok=True)
    remove_part(file.path)
    return None


def facts_of(file: RemoteFile, etag: str | None) -> dict[str, str | None]:
    """What the map says of what was being fetched."""
    return {"url": file.url, "etag": etag, "sha256": file.sha256, "revision": file.revision}


def disk_error(error: OSError, path: Path) -> OrionError:
    """What the system says of a file that arrives, as an error of this library."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if is_full else (error.strerror or str(error))
    return DownloadError(
        f"{path.parent} cannot be written to ({what}); what arrived is kept", path=str(path)
    )
