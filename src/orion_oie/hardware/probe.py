"""What there is of memory, and what processes and folders take of it. The only importer of psutil.

Of psutil's figures `available` counts, and never `free`: the kernel fills free memory with files
that it drops when somebody needs the room. `available` is its own estimate of what can be had
without swapping. So weights that are mapped from a file count as available as far as they can be
dropped, although dropping them makes answers slow.

It keeps no history and judges nothing but `has_spare_memory`.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orion_oie.hardware import cgroup

_SPARE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class SystemMemory:
    """What this process and its children may use: the machine's memory, or less in a container.

    `available_bytes` can be had now without swapping; `limited_by` says whose room that is: the
    machine's, or what a limit on the control group leaves.
    """

    total_bytes: int
    available_bytes: int
    limited_by: Literal["system", "cgroup"] = "system"


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """What a process has in memory. It alone can give `private_bytes` back; `shared_bytes` are
    shared memory, maybe with others; `file_bytes` are pages of mapped files, which others that map
    the same file count too, and which the kernel can drop."""

    private_bytes: int
    shared_bytes: int
    file_bytes: int

    @property
    def resident_bytes(self) -> int:
        """All of it: the resident set size."""
        return self.private_bytes + self.shared_bytes + self.file_bytes


def system_memory(proc: Path = cgroup.PROC_SELF) -> SystemMemory:
    """What may be used now. `proc` is the folder of the process whose control groups count."""
    import psutil  # not needed by a mere import of the library

    machine = psutil.virtual_memory()
    total_bytes, available_bytes = int(machine.total), int(machine.available)
    limit = cgroup.memory_limit(proc)
    if limit is None:
        return SystemMemory(total_bytes, available_bytes)
    return SystemMemory(
        total_bytes=min(total_bytes, limit.limit_bytes),
        available_bytes=min(available_bytes, limit.available_bytes),
        limited_by="cgroup" if limit.available_bytes < available_bytes else "system",
    )


def process_memory(pid: int) -> ProcessMemory | None:
    """The memory of a process; None when it is gone, or ended and not yet waited for.

    On Linux these are counters the kernel keeps anyway, exact to some pages for each core. Other
    systems tell the kinds apart only by walking the process's pages, so there all is private.
    """
    if sys.platform == "linux":
        return _from_status(pid)
    return _from_psutil(pid)


def available_bytes() -> int:
    """Memory that could be used now without swapping and within the container's limit, in bytes."""
    return system_memory().available_bytes


def has_spare_memory() -> bool:
    """True while there is memory to spare."""
    return available_bytes() > _SPARE_BYTES


def resident_bytes(pid: int) -> int | None:
    """Resident set size of a process in bytes; None when it is gone."""
    memory = process_memory(pid)
    return None if memory is None else memory.resident_bytes


def folder_bytes(path: Path) -> int:
    """What the files in a folder and below it take on the disk, in bytes: blocks that were never
    written are not counted, and a file with several names once. 0 when there is no such folder.

    Links are not followed. Files may come and go meanwhile. Raises `PermissionError` where a
    folder may not be read.
    """
    total_bytes = 0
    seen: set[tuple[int, int]] = set()
    folders = [os.fspath(path)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                        continue
                    try:
                        stat = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if stat.st_nlink > 1:
                        if (stat.st_dev, stat.st_ino) in seen:
                            continue
                        seen.add((stat.st_dev, stat.st_ino))
                    total_bytes += stat.st_blocks * 512  # whatever the file system's own block is
        except (FileNotFoundError, NotADirectoryError):
            continue  # it went, or became a file
    return total_bytes


def _from_status(pid: int) -> ProcessMemory | None:
    try:
        text = Path(f"/proc/{pid}/status").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = dict(re.findall(rb"^Rss(Anon|Shmem|File):\s+(\d+) kB$", text, re.MULTILINE))
    if len(found) < 3:  # it has ended, and its parent has not waited for it yet
        return None
    anon, shmem, file = (int(found[kind]) * 1024 for kind in (b"Anon", b"Shmem", b"File"))
    return ProcessMemory(private_bytes=anon, shared_bytes=shmem, file_bytes=file)


def _from_psutil(pid: int) -> ProcessMemory | None:
    import psutil  # not needed until somebody asks

    try:
        resident = int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return None
    return ProcessMemory(private_bytes=resident, shared_bytes=0, file_bytes=0)
