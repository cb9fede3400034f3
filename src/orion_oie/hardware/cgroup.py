"""What the container leaves this process: limits of its control groups, v1, v2, or both at once.

Where the groups lie is read from /proc, not assumed. A file that is absent, unreadable or says
"max" sets no limit, and neither does a system without /proc. It changes no limit, and knows nothing
of the machine's own memory and cores.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

PROC_SELF = Path("/proc/self")

# v1 writes "no limit" as the largest multiple of a page in 63 bits, which depends on the page.
_NO_LIMIT_BYTES = 2**60


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """What groups allow of memory. They lie in each other, and the limits of all of them count.

    limit_bytes: the smallest limit. used_bytes: the working set of the group that has it: all of
    its memory but the file pages that were not touched lately (`inactive_file`), which the kernel
    drops before it ends a process. available_bytes: the least that any of the groups has left,
    which may be an outer one that others fill.
    """

    limit_bytes: int
    used_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class Cgroup:
    """What may be used; None where there is no limit. `cpu_quota_cores` is CPU seconds per second,
    in the tightest of the groups."""

    memory: MemoryLimit | None = None
    cpu_quota_cores: float | None = None

    @property
    def memory_limit_bytes(self) -> int | None:
        """The smallest limit on memory."""
        return None if self.memory is None else self.memory.limit_bytes


def read(proc: Path = PROC_SELF) -> Cgroup:
    """The limits of the process that the folder `proc` is about."""
    return Cgroup(memory_limit(proc), cpu_quota_cores(proc))


def memory_limit(proc: Path = PROC_SELF) -> MemoryLimit | None:
    """What the groups of a process allow of memory; None without a limit."""
    groups, is_v2 = _groups(proc, "memory")
    limits = [limit for group in groups if (limit := _memory_limit(group, is_v2)) is not None]
    if not limits:
        return None
    limit_bytes, used_bytes = min(limits, key=lambda limit: (limit[0], -limit[1]))
    available_bytes = min(max(0, limit - used) for limit, used in limits)
    return MemoryLimit(limit_bytes, used_bytes, available_bytes)


def cpu_quota_cores(proc: Path = PROC_SELF) -> float | None:
    """CPU seconds that a process may use per second; None without a quota."""
    groups, is_v2 = _groups(proc, "cpu")
    quotas = (_cpu_quota_v2(group) if is_v2 else _cpu_quota_v1(group) for group in groups)
    return min((quota for quota in quotas if quota is not None), default=None)


def _memory_limit(group: Path, is_v2: bool) -> tuple[int, int] | None:
    """(limit, working set) of one group in bytes; None without a limit."""
    limit_bytes = _number(group / ("memory.max" if is_v2 else "memory.limit_in_bytes"))
    if limit_bytes is None or not 0 <= limit_bytes < _NO_LIMIT_BYTES:
        return None
    usage_bytes = _number(group / ("memory.current" if is_v2 else "memory.usage_in_bytes")) or 0
    inactive = "inactive_file" if is_v2 else "total_inactive_file"  # of inner groups, too
    found = re.search(rf"^{inactive} (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
    return limit_bytes, max(0, usage_bytes - (int(found[1]) if found else 0))


def _cpu_quota_v2(group: Path) -> float | None:
    words = _text(group / "cpu.max").split()  # "200000 100000" or "max 100000", microseconds
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        return None
    return int(words[0]) / int(words[1])


def _cpu_quota_v1(group: Path) -> float | None:
    quota_us = _number(group / "cpu.cfs_quota_us")
    period_us = _number(group / "cpu.cfs_period_us")
    if quota_us is None or quota_us < 0 or not period_us:
        return None
    return quota_us / period_us


def _groups(proc: Path, controller: str) -> tuple[list[Path], bool]:
    """The folders of the process's own group and of those around it, for a controller; and whether
    they are of v2."""
    return _find_groups(proc, _text(proc / "cgroup"), controller)


@lru_cache(maxsize=16)  # once a second is too often for reading all mounts; they do not change
def _find_groups(proc: Path, memberships: str, controller: str) -> tuple[list[Path], bool]:
    mounts = list(_mounts(proc))
    unified = None
    for line in memberships.splitlines():  # "4:cpu,cpuacct:/path", or "0::/path" for v2
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            unified = PurePosixPath(path)
        elif controller in controllers.split(","):  # then it is not in v2
            fitting = [mount for mount in mounts if controller in mount.controllers]
            return _upwards(PurePosixPath(path), fitting), False
    if unified is None:
        return [], False
    return _upwards(unified, [mount for mount in mounts if mount.is_v2]), True


@dataclass(frozen=True, slots=True)
class _Mount:
    """A hierarchy of groups in the file system: those below the group `root` lie at `point`."""

    root: PurePosixPath
    point: Path
    is_v2: bool
    controllers: frozenset[str]

    def shows(self, path: PurePosixPath) -> bool:
        return ".." not in path.parts and path.is_relative_to(self.root)


def _upwards(path: PurePosixPath, mounts: list[_Mount]) -> list[Path]:
    """The folders of a group and of all around it, up to where the hierarchy is mounted."""
    if not mounts:
        return []
    showing = [mount for mount in mounts if mount.shows(path)]
    if not showing:
        # In a container the path may be that of the host, outside of what is mounted here: then
        # what is mounted is the container's own group.
        return [mounts[0].point]
    best = min(showing, key=lambda mount: len(mount.root.parts))  # it has the most groups around
    inner = path.relative_to(best.root)
    own = best.point / inner
    return [own, *list(own.parents)[: len(inner.parts)]]


def _mounts(proc: Path) -> Iterator[_Mount]:
    for line in _text(proc / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        if kind not in ("cgroup", "cgroup2"):
            continue
        _, _, _, root, point, *_ = before.split(" ")
        controllers = options.rpartition(" ")[2].split(",") if kind == "cgroup" else ()
        yield _Mount(
            root=PurePosixPath(_unescaped(root)),
            point=Path(_unescaped(point)),
            is_v2=kind == "cgroup2",
            controllers=frozenset(controllers),
        )


def _unescaped(path: str) -> str:
    """mountinfo writes a blank as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _number(path: Path) -> int | None:
    """The number that a file holds; None for "max", and when there is none."""
    text = _text(path).strip()
    return int(text) if text.removeprefix("-").isdecimal() else None


def _text(path: Path) -> str:
    """What a file says; nothing when it is not there or not for us to read."""
    try:
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""
