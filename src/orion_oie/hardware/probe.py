"""Measurements of the memory of the system and of processes, and of the size of folders. The only
importer of psutil.

Of psutil's figures `available` is used, never `free`: the kernel fills free memory with file pages
and drops them on demand. `available` is the kernel's estimate of the memory that can be allocated
without swapping. So weights mapped from a file count as available as far as they can be dropped,
although dropping them makes answers slow.

Keeps no history, and makes no judgement except `has_spare_memory`.
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
    """The memory that this process and its children may use: the machine's, or less in a container.

    available_bytes: can be allocated now without swapping. limited_by: whether the machine or a
    limit on the control group determines `available_bytes`.
    """

    total_bytes: int
    available_bytes: int
    limited_by: Literal["system", "cgroup"] = "system"


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """The memory of a process.

    private_bytes: freed when the process ends. shared_bytes: shared memory, possibly used by other
    processes. file_bytes: pages of mapped files, which the kernel can drop, and which every process
    that maps the same file counts.
    """

    private_bytes: int
    shared_bytes: int
    file_bytes: int

    @property
    def resident_bytes(self) -> int:
        """The resident set size: the sum of all."""
        return self.private_bytes + self.shared_bytes + self.file_bytes


def system_memory(proc: Path = cgroup.PROC_SELF) -> SystemMemory:
    """The memory that may be used now. `proc`: folder of the process whose control groups apply."""
    import psutil  # slow to import, so not imported with the library

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
    """The memory of a process; None if it is gone or a zombie.

    On Linux these are counters that the kernel keeps anyway, exact to a few pages for each core.
    Other systems can distinguish the kinds only by walking the process's pages, so on those all
    memory is reported as private.
    """
    if sys.platform == "linux":
        return _from_status(pid)
    return _from_psutil(pid)


def available_bytes() -> int:
    """The bytes that can be allocated now without swapping and within the container's limit."""
    return system_memory().available_bytes


def has_spare_memory() -> bool:
    """True if more than 2 GiB are available."""
    return available_bytes() > _SPARE_BYTES


def resident_bytes(pid: int) -> int | None:
    """The resident set size of a process in bytes; None if it is gone."""
    memory = process_memory(pid)
    return None if memory is None else memory.resident_bytes


def folder_bytes(path: Path) -> int:
    """The bytes that the files in a folder and its subfolders take on the disk; 0 if there is no
    such folder.

    Blocks that were never written do not count, and a file with several names counts once. Links
    are not followed. Files may be created and removed meanwhile. Raises `PermissionError` if a
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
                    total_bytes += stat.st_blocks * 512  # the unit on any file system
        except (FileNotFoundError, NotADirectoryError):
            continue  # removed meanwhile, or replaced by a file
    return total_bytes


def _from_status(pid: int) -> ProcessMemory | None:
    try:
        text = Path(f"/proc/{pid}/status").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = dict(re.findall(rb"^Rss(Anon|Shmem|File):\s+(\d+) kB$", text, re.MULTILINE))
    if len(found) < 3:  # a zombie: ended, but its parent has not waited for it yet
        return None
    anon, shmem, file = (int(found[kind]) * 1024 for kind in (b"Anon", b"Shmem", b"File"))
    return ProcessMemory(private_bytes=anon, shared_bytes=shmem, file_bytes=file)


def _from_psutil(pid: int) -> ProcessMemory | None:
    import psutil  # slow to import, so not imported with the library

    try:
        resident = int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return None
    return ProcessMemory(private_bytes=resident, shared_bytes=0, file_bytes=0)
