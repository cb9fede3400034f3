"""Figures of memory agree with what real processes, folders and control groups really do."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from cgroups import FakeProc, memory_v2, put, real_memory_group
from helpers import wait_until

from orion_oie.hardware import probe
from orion_oie.hardware.pressure import PressureLevel
from orion_oie.hardware.probe import (
    ProcessMemory,
    SystemMemory,
)

MIB = 2**20
linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells the kinds of memory apart cheaply"
)

# Takes memory of the kind it is told, and says when it has it.
TAKER = """
import mmap, sys

kept = []
print("ready", flush=True)
for line in sys.stdin:
    kind, count, path = line.rstrip("\\n").split(" ", 2)
    size = int(count)
    if kind == "private":
        taken = bytearray(b"x") * size
    elif kind == "shared":
        taken = mmap.mmap(-1, size)
        for offset in range(0, size, 4096):
            taken[offset] = 1
    else:
        with open(path, "rb") as file:
            taken = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        for offset in range(0, size, 4096):
            taken[offset]
    kept.append(taken)
    print("taken", flush=True)
"""

# Says what it finds, and takes as many bytes as it is told.
REPORTER = """
import sys

sys.stdin.readline()  # imports only when it is where it should be
import json
from dataclasses import asdict
from orion_oie.hardware import probe
from orion_oie.hardware.pressure import PressureGauge

kept, gauge = [], PressureGauge()
while True:
    found = probe.system_memory()
    print(json.dumps(asdict(found) | {"level": gauge.update(found)}), flush=True)
    line = sys.stdin.readline()
    if not line:
        break
    kept.append(bytearray(b"x") * int(line))
"""


class Child:
    """A Python process that answers each line with a line."""

    def __init__(self, program: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.pid = self._process.pid

    def hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the child ended with {self._process.wait()}"
        return line.strip()

    def say(self, line: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")

    def ask(self, line: object) -> str:
        self.say(line)
        return self.hear()

    def kill(self) -> None:
        """End it, but leave its end to be waited for."""
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def child(program: str) -> Iterator[Child]:
    it = Child(program)
    try:
        yield it
    finally:
        it.close()


def memory_of(pid: int) -> ProcessMemory:
    memory = probe.process_memory(pid)
    assert memory is not None
    return memory


# -- processes


@linux_only
def test_kinds_of_memory_are_told_apart(tmp_path: Path) -> None:
    """64 MiB of its own, 16 MiB shared and a file of 32 MiB are counted as what they are."""
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(MIB) * 32)
    with child(TAKER) as taker:
        taker.hear()
        start = memory_of(taker.pid)
        taker.ask(f"private {64 * MIB} -")
        private = memory_of(taker.pid)
        taker.ask(f"shared {16 * MIB} -")
        shared = memory_of(taker.pid)
        taker.ask(f"file {32 * MIB} {path}")
        end = memory_of(taker.pid)
        resident = psutil.Process(taker.pid).memory_info().rss
    assert private.private_bytes - start.private_bytes == pytest.approx(64 * MIB, rel=0.03)
    assert shared.shared_bytes - private.shared_bytes == pytest.approx(16 * MIB, rel=0.03)
    assert end.private_bytes - private.private_bytes == pytest.approx(0, abs=2 * MIB)
    # Where the folder for tests lies in memory, its files are shared memory.
    mapped = end.file_bytes + end.shared_bytes - shared.file_bytes - shared.shared_bytes
    assert mapped == pytest.approx(32 * MIB, rel=0.03)
    assert end.resident_bytes == end.private_bytes + end.shared_bytes + end.file_bytes
    assert end.resident_bytes == pytest.approx(resident, rel=0.03)


def test_a_process_that_is_gone_has_no_memory() -> None:
    """Also one that has ended and that nobody has waited for yet."""
    with child(TAKER) as taker:
        taker.hear()
        assert probe.resident_bytes(taker.pid) == memory_of(taker.pid).resident_bytes > MIB
        taker.kill()
        wait_until(lambda: psutil.Process(taker.pid).status() == psutil.STATUS_ZOMBIE)
        if sys.platform == "linux":
            assert probe.process_memory(taker.pid) is None
    assert probe.process_memory(taker.pid) is None
    assert probe.resident_bytes(taker.pid) is None


def test_other_systems_count_all_as_private(monkeypatch: pytest.MonkeyPatch) -> None:
    """There psutil's figure is the sum, and a process that is gone is None as well."""
    here = memory_of(os.getpid())
    monkeypatch.setattr(sys, "platform", "darwin")
    there = memory_of(os.getpid())
    assert (there.shared_bytes, there.file_bytes) == (0, 0)
    assert there.resident_bytes == pytest.approx(here.resident_bytes, rel=0.05)
    with child(TAKER) as taker:
        taker.hear()
    assert probe.process_memory(taker.pid) is None


# -- the machine and its groups


def test_the_machine_is_seen(tmp_path: Path) -> None:
    """Without a limit the figures are the machine's own."""
    found = probe.system_memory(tmp_path)
    machine = psutil.virtual_memory()
    assert found.total_bytes == machine.total
    assert found.available_bytes == pytest.approx(machine.available, rel=0.1)
    assert found.limited_by == "system"


def test_the_limit_of_a_group_counts(tmp_path: Path) -> None:
    """In a container the limit is all there is, and what its processes use is gone from it."""
    fake = FakeProc(tmp_path)
    put(fake.v2("/"), memory_v2(100 * MIB, used=60 * MIB, inactive=10 * MIB))
    assert probe.system_memory(fake.proc) == SystemMemory(100 * MIB, 50 * MIB, "cgroup")


def test_a_limit_above_what_the_machine_has_is_none(tmp_path: Path) -> None:
    """A generous limit gives nothing that is not there."""
    fake = FakeProc(tmp_path)
    put(fake.v2("/"), memory_v2(2**55))
    found = probe.system_memory(fake.proc)
    assert found.total_bytes == psutil.virtual_memory().total
    assert found.available_bytes < found.total_bytes
    assert found.limited_by == "system"


def test_memory_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is to spare if more than 2 GiB are available."""
    for available, has_spare in ((2 * 2**30, False), (2 * 2**30 + 1, True)):
        found = SystemMemory(2**40, available)
        monkeypatch.setattr(probe, "system_memory", lambda found=found: found)
        assert probe.available_bytes() == available
        assert probe.has_spare_memory() is has_spare


def test_a_real_group_is_seen_from_inside() -> None:
    """A process in a group of 300 MiB sees that limit, sees its own use shrink what is left, and
    is told of the pressure before the kernel would end it."""
    limit_bytes, step_bytes = 300 * MIB, 5 * MIB
    with real_memory_group(limit_bytes) as move, child(REPORTER) as reporter:
        move(reporter.pid)
        start = json.loads(reporter.ask("begin"))
        assert start["total_bytes"] == limit_bytes
        assert start["limited_by"] == "cgroup"
        assert start["level"] == PressureLevel.LOW
        assert limit_bytes / 2 < start["available_bytes"] < limit_bytes

        half = json.loads(reporter.ask(100 * MIB))
        shrunk_bytes = start["available_bytes"] - half["available_bytes"]
        assert shrunk_bytes == pytest.approx(100 * MIB, rel=0.05)

        levels = [half["level"]]
        left_bytes = half["available_bytes"]
        while levels[-1] != PressureLevel.CRITICAL:
            assert left_bytes > 2 * step_bytes, f"no warning before the limit: {levels}"
            report = json.loads(reporter.ask(step_bytes))
            left_bytes = report["available_bytes"]
            levels.append(report["level"])
        assert list(dict.fromkeys(levels)) == [*PressureLevel]
        assert memory_of(reporter.pid).private_bytes > 200 * MIB


# -- folders


def test_folders_are_measured_in_blocks(tmp_path: Path) -> None:
    """Written blocks count at any depth; holes do not, nor does the second name of a file."""
    assert probe.folder_bytes(tmp_path) == 0
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/model").write_bytes(os.urandom(4 * MIB))
    with (tmp_path / "a/arriving").open("wb") as file:
        file.truncate(512 * MIB)
        file.seek(100 * MIB)
        file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())
    whole = probe.folder_bytes(tmp_path)
    assert whole == pytest.approx(5 * MIB, rel=0.02)
    (tmp_path / "again").hardlink_to(tmp_path / "a/b/model")
    (tmp_path / "link").symlink_to(sys.executable)
    (tmp_path / "round").symlink_to(tmp_path)
    assert probe.folder_bytes(tmp_path) == pytest.approx(whole, abs=16384)
    assert probe.folder_bytes(tmp_path / "nothing") == 0
    assert probe.folder_bytes(tmp_path / "again") == 0


def test_files_may_vanish_while_they_are_counted(tmp_path: Path) -> None:
    """Nothing fails when others add and remove files and folders all the time."""
    kept = tmp_path / "kept"
    kept.write_bytes(os.urandom(MIB))
    base = probe.folder_bytes(tmp_path)
    stopping = threading.Event()
    rounds = 0

    def stir() -> None:
        nonlocal rounds
        while not stopping.is_set():
            folder = tmp_path / f"folder-{rounds % 7}"
            folder.mkdir()
            for number in range(5):
                (folder / str(number)).touch()
            for number in range(5):
                (folder / str(number)).unlink()
            folder.rmdir()
            rounds += 1

    thread = threading.Thread(target=stir)
    thread.start()
    try:
        measured = 0

        def measure() -> bool:
            nonlocal measured
            assert probe.folder_bytes(tmp_path) >= base
            measured += 1
            return rounds > 300 and measured > 300

        wait_until(measure)
    finally:
        stopping.set()
        thread.join()


def test_a_file_that_went_after_it_was_listed_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the list of a folder and the look at a file, or into a folder, it may go; what is
    listed after it counts."""
    (tmp_path / "kept").write_bytes(os.urandom(MIB))
    base = probe.folder_bytes(tmp_path)
    (tmp_path / "file").write_bytes(os.urandom(MIB))
    (tmp_path / "folder").mkdir()
    scan = os.scandir

    def scan_late(path: str) -> object:
        listed = scan(path)
        if path == str(tmp_path):
            entries = sorted(listed, key=lambda entry: entry.name)
            (tmp_path / "file").unlink()
            (tmp_path / "folder").rmdir()
            return _Listed(entries)
        return listed

    monkeypatch.setattr(os, "scandir", scan_late)
    assert probe.folder_bytes(tmp_path) == base >= MIB


class _Listed:
    """Entries as scandir yields them, from a list that may be out of date."""

    def __init__(self, entries: list[os.DirEntry[str]]) -> None:
        self._entries = entries

    def __enter__(self) -> list[os.DirEntry[str]]:
        return self._entries

    def __exit__(self, *_: object) -> None:
        pass


def test_a_folder_that_may_not_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size is not known, and no smaller one is told instead."""
    closed = tmp_path / "closed"
    closed.mkdir()
    scan = os.scandir

    def refuse(path: str) -> object:  # root, who runs many tests, may read every folder
        if path == str(closed):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        probe.folder_bytes(tmp_path)
