"""Control groups for tests: made-up ones in a folder, and a real one where one can be made."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import wait_until

V1_NO_LIMIT = 2**63 - 4096


class FakeProc:
    """A folder like /proc/self, whose mounts lie beside it."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.proc.mkdir(parents=True)
        self._folder = folder
        self._mounts = ["22 27 0:21 / /proc rw,relatime - proc proc rw"]
        self._memberships: list[str] = []
        self._write()

    def v1(self, controllers: str, path: str, root: str = "/", name: str = "") -> Path:
        """Put the process into the group `path`; returns where `root` is mounted."""
        number = len(self._memberships) + 1
        self._memberships.append(f"{number}:{controllers}:{path}")
        return self._mount(name or controllers, root, f"cgroup cgroup rw,{controllers}")

    def v2(self, path: str, root: str = "/", name: str = "unified") -> Path:
        """The same in the hierarchy of v2."""
        self._memberships.append(f"0::{path}")
        return self._mount(name, root, "cgroup2 cgroup2 rw,nsdelegate")

    def mount_again(self, name: str, root: str, kind: str) -> Path:
        """Another mount of a hierarchy."""
        return self._mount(name, root, kind)

    def _mount(self, name: str, root: str, kind: str) -> Path:
        point = self._folder / "mounts" / name
        point.mkdir(parents=True)
        escaped = str(point).replace("\\", "\\134").replace(" ", "\\040")
        self._mounts.append(f"3{len(self._mounts)} 31 0:29 {root} {escaped} rw shared:9 - {kind}")
        self._write()
        return point

    def _write(self) -> None:
        (self.proc / "mountinfo").write_text("".join(f"{line}\n" for line in self._mounts))
        (self.proc / "cgroup").write_text("".join(f"{line}\n" for line in self._memberships))


def put(group: Path, files: Mapping[str, object]) -> None:
    """Make a group's folder with its files."""
    group.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (group / name).write_text(f"{content}\n")


def memory_v2(limit: object, used: int = 0, inactive: int = 0) -> dict[str, object]:
    """The files of a v2 group; sizes in bytes."""
    return {
        "memory.max": limit,
        "memory.current": used,
        "memory.stat": f"anon 1\nfile 2\ninactive_file {inactive}\nactive_file 3",
    }


def memory_v1(limit: object, used: int = 0, inactive: int = 0) -> dict[str, object]:
    """The files of a v1 group; sizes in bytes."""
    return {
        "memory.limit_in_bytes": limit,
        "memory.usage_in_bytes": used,
        "memory.stat": f"cache 1\ninactive_file 7\ntotal_inactive_file {inactive}",
    }


@contextmanager
def real_memory_group(limit_bytes: int) -> Iterator[Callable[[int], None]]:
    """A real group with a limit, inside the one of this process; gives what moves a pid into it.

    Skips the test where none can be made. Whoever is moved in must have ended before it closes.
    """
    group, limit_file = _place_for_group()
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs the right to make a control group: {error}")
    try:
        try:
            (group / limit_file).write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"needs the right to limit a control group: {error}")

        def move(pid: int) -> None:
            try:
                (group / "cgroup.procs").write_text(str(pid))
            except OSError as error:
                pytest.skip(f"needs the right to move processes into a control group: {error}")

        yield move
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def _place_for_group() -> tuple[Path, str]:
    """Where a group can be made, and the name of the file that limits it."""
    name = f"orion-test-{os.getpid()}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        memberships = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        pytest.skip("needs the control groups of Linux")
    paths = {parts[1]: parts[2] for parts in (line.split(":", 2) for line in memberships)}
    for line in mounts:
        point, kind = Path(line.split(" ")[4]), line.partition(" - ")[2]
        if kind.startswith("cgroup ") and "memory" in kind.rpartition(" ")[2].split(","):
            inside = point / paths["memory"].lstrip("/")
            return (inside if inside.is_dir() else point) / name, "memory.limit_in_bytes"
        if kind.startswith("cgroup2 ") and (point / "cgroup.subtree_control").is_file():
            own = point / paths[""].lstrip("/")
            for parent in (own, *own.parents):
                # A v2 group that holds processes itself cannot limit groups in it.
                control = parent / "cgroup.subtree_control"
                if control.is_file() and "memory" in control.read_text().split():
                    return parent / name, "memory.max"
    pytest.skip("needs a mounted hierarchy of control groups that limits memory")
