"""The limits that a container sets for this process: control groups v1, v2, or both at once.

The location of the groups is read from /proc, not assumed. A file that is absent, unreadable or
says "max" sets no limit, and neither does a system without /proc. This module changes no limit and
does not consider the machine's own memory and cores.
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
    """The memory limit of nested control groups, all of which apply.

    limit_bytes: the smallest limit. used_bytes: the working set of the group that has it, which is
    its memory without file pages that were not touched lately (`inactive_file`), since the kernel
    drops those before it ends a process. available_bytes: the least that any of the groups has
    left; that may be an outer group, filled by other processes.
    """

    limit_bytes: int
    used_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class Cgroup:
    """The limits of a process; None stands for no limit. `cpu_quota_cores` is in CPU seconds per
    second, in the tightest of the groups."""

    memory: MemoryLimit | None = None
    cpu_quota_cores: float | None = None

    @property
    def memory_limit_bytes(self) -> int | None:
        """The smallest limit on memory."""
        return None if self.memory is None else self.memory.limit_bytes


def read(proc: Path = PROC_SELF) -> Cgroup:
    """The limits of the process that the folder `proc` describes."""
    return Cgroup(memory_limit(proc), cpu_quota_cores(proc))


def memory_limit(proc: Path = PROC_SELF) -> MemoryLimit | None:
    """The memory limit of the groups of a process; None without a limit."""
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
    """The folders of the process's own group and of the enclosing ones for a controller, and True
    if they are of v2."""
    return _find_groups(proc, _text(proc / "cgroup"), controller)


@lru_cache(maxsize=16)  # mounts do not change, and reading all of them every second costs too much
def _find_groups(proc: Path, memberships: str, controller: str) -> tuple[list[Path], bool]:
    mounts = list(_mounts(proc))
    unified = None
    for line in memberships.splitlines():  # "4:cpu,cpuacct:/path", or "0::/path" for v2
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            unified = PurePosixPath(path)
        elif controller in controllers.split(","):  # then v2 does not manage it
            fitting = [mount for mount in mounts if controller in mount.controllers]
            return _upwards(PurePosixPath(path), fitting), False
    if unified is None:
        return [], False
    return _upwards(unified, [mount for mount in mounts if mount.is_v2]), True


@dataclass(frozen=True, slots=True)
class _Mount:
    """A mounted hierarchy of groups: the group `root` and its children are at `point`."""

    root: PurePosixPath
    point: Path
    is_v2: bool
    controllers: frozenset[str]

    def shows(self, path: PurePosixPath) -> bool:
        return ".." not in path.parts and path.is_relative_to(self.root)


def _upwards(path: PurePosixPath, mounts: list[_Mount]) -> list[Path]:
    """The folders of a group and of all enclosing ones, up to the mount point of the hierarchy."""
    if not mounts:
        return []
    showing = [mount for mount in mounts if mount.shows(path)]
    if not showing:
        # In a container the path may be the host's, outside of the mounted hierarchy. Then the
        # mount is the container's own group.
        return [mounts[0].point]
    # The mount with the shortest root shows the most enclosing groups.
    best = min(showing, key=lambda mount: len(mount.root.parts))
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
    """The path without mountinfo's octal escapes, such as \\040 for a blank."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", or if there is none."""
    text = _text(path).strip()
    return int(text) if text.removeprefix("-").isdecimal() else None


def _text(path: Path) -> str:
    """The text of a file; empty if it does not exist or may not be read."""
    try:
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""
