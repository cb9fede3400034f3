"""Files while they arrive: `NAME.part` at its full size, and its map beside it.

Resumes and removes them; fetches nothing.
"""

import errno
from dataclasses import dataclass
from pathlib import Path

from orion_oie.errors import DownloadError, OrionError
from orion_oie.models.downloads.arrival import ArrivalMap
from orion_oie.models.downloads.ranges import RemoteFile

Run = tuple[int, int, int]
"""Bytes of one file among several: the file's number, the first byte, the one after the last."""


@dataclass(eq=False)
class Part:
    """A file that is being fetched, and its open descriptor."""

    file: RemoteFile
    size: int
    etag: str | None
    arrival: ArrivalMap
    descriptor: int

    @property
    def path(self) -> Path:
        return part_path(self.file.path)


def part_path(path: Path) -> Path:
    """The path of a file while it arrives."""
    return path.with_name(path.name + ".part")


def map_path(path: Path) -> Path:
    """The path of a file's map while it arrives."""
    return path.with_name(path.name + ".part.map")


def remove_part(path: Path) -> None:
    """Remove the bytes of a file that have arrived, and its map."""
    map_path(path).unlink(missing_ok=True)
    part_path(path).unlink(missing_ok=True)


def resumed(file: RemoteFile, size: int, etag: str | None) -> ArrivalMap | None:
    """The map of an earlier download of the same content. Without one, remove what an earlier
    download left, and return None."""
    facts = facts_of(file, etag)
    names = ("etag", "sha256", "revision")
    try:
        arrival = ArrivalMap.open(map_path(file.path), is_writable=True)
        is_same = arrival.size == size == part_path(file.path).stat().st_size
        is_same = is_same and all(arrival.facts[name] == facts[name] for name in names)
        # Without any of these facts, other content of the same size would pass for this one.
        if is_same and any(facts[name] for name in names):
            return arrival
    except (OSError, ValueError, KeyError):
        pass  # there is no map, or it cannot be read
    file.path.parent.mkdir(parents=True, exist_ok=True)
    remove_part(file.path)
    return None


def facts_of(file: RemoteFile, etag: str | None) -> dict[str, str | None]:
    """The facts in a map that identify the content of its file."""
    return {"url": file.url, "etag": etag, "sha256": file.sha256, "revision": file.revision}


def disk_error(error: OSError, path: Path) -> OrionError:
    """An error of the system about a file that arrives, as an error of this library."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if is_full else (error.strerror or str(error))
    return DownloadError(
        f"{path.parent} cannot be written to ({what}); what arrived is kept", path=str(path)
    )
