"""Limits of control groups are found wherever they are, and no limit is not taken for one."""

import tempfile
from pathlib import Path

import pytest
from cgroups import V1_NO_LIMIT, FakeProc, memory_v1, memory_v2, put
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_oie.hardware import cgroup
from orion_oie.hardware.cgroup import (
    Cgroup,
    MemoryLimit,
)

MIB = 2**20


@pytest.fixture
def fake(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path)


def limit_of(fake: FakeProc) -> int | None:
    return cgroup.read(fake.proc).memory_limit_bytes


def test_the_real_machine_can_be_read() -> None:
    """Whatever this machine has, limits are positive, and no more is left than is allowed."""
    found = cgroup.read()
    if found.memory is not None:
        assert 0 <= found.memory.available_bytes <= found.memory.limit_bytes
    assert found.cpu_quota_cores is None or found.cpu_quota_cores > 0
    assert found.cpu_quota_cores == cgroup.cpu_quota_cores()


def test_a_system_without_groups_sets_no_limit(tmp_path: Path, fake: FakeProc) -> None:
    """No /proc, as on macOS, and a /proc without groups both say: no limit."""
    assert cgroup.read(tmp_path / "nothing") == Cgroup()
    assert cgroup.cpu_quota_cores(tmp_path / "nothing") is None
    assert cgroup.read(fake.proc) == Cgroup()


def test_a_v2_group_is_read(fake: FakeProc) -> None:
    """Limit, working set (without inactive file pages), what is left, and the quota."""
    top = fake.v2("/work")
    put(top / "work", memory_v2(300 * MIB, used=200 * MIB, inactive=50 * MIB))
    put(top / "work", {"cpu.max": "150000 100000"})
    assert cgroup.read(fake.proc) == Cgroup(MemoryLimit(300 * MIB, 150 * MIB, 150 * MIB), 1.5)


def test_a_v1_group_is_read(fake: FakeProc) -> None:
    """The same from the files of v1, whose controllers are mounted apart or together."""
    put(fake.v1("memory", "/a") / "a", memory_v1(300 * MIB, used=200 * MIB, inactive=50 * MIB))
    quota = {"cpu.cfs_quota_us": 50000, "cpu.cfs_period_us": 100000}
    put(fake.v1("cpu,cpuacct", "/b") / "b", quota)
    assert cgroup.read(fake.proc) == Cgroup(MemoryLimit(300 * MIB, 150 * MIB, 150 * MIB), 0.5)


def test_no_limit_is_no_number(fake: FakeProc) -> None:
    """ "max" in v2 is no limit."""
    put(fake.v2("/a") / "a", {**memory_v2("max", used=MIB), "cpu.max": "max 100000"})
    assert cgroup.read(fake.proc) == Cgroup()


@pytest.mark.parametrize("limit", [-1, V1_NO_LIMIT, 2**63 - 65536])
def test_no_limit_in_v1(fake: FakeProc, limit: int) -> None:
    """-1 and the largest number, which depends on the size of a page, are no limit."""
    put(fake.v1("memory", "/"), memory_v1(limit, used=MIB))
    put(fake.v1("cpu", "/"), {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000})
    assert cgroup.read(fake.proc) == Cgroup()


def test_v1_controllers_beside_a_v2_mount(fake: FakeProc) -> None:
    """In a hybrid setup each limit is read where its controller is."""
    memory = fake.v1("memory", "/box/a")
    put(memory / "box/a", memory_v1(V1_NO_LIMIT))
    put(memory / "box", memory_v1(100 * MIB, used=30 * MIB))
    put(memory, memory_v1(V1_NO_LIMIT))
    put(fake.v1("name=systemd", "/user") / "user", memory_v1(MIB))
    unified = fake.v2("/box")
    put(unified / "box", {**memory_v2(MIB), "cpu.max": "200000 100000"})
    assert cgroup.read(fake.proc) == Cgroup(MemoryLimit(100 * MIB, 30 * MIB, 70 * MIB), 2.0)


def test_an_outer_group_may_have_less_left(fake: FakeProc) -> None:
    """Other processes fill an outer group: its free memory counts although its limit is larger."""
    top = fake.v2("/pod/me")
    put(top / "pod", memory_v2(1000 * MIB, used=990 * MIB))
    put(top / "pod/me", memory_v2(500 * MIB, used=100 * MIB))
    assert cgroup.memory_limit(fake.proc) == MemoryLimit(500 * MIB, 100 * MIB, 10 * MIB)


def test_use_above_a_limit_leaves_nothing(fake: FakeProc) -> None:
    """A limit that was lowered under what is used leaves 0, not less."""
    put(fake.v2("/"), memory_v2(10 * MIB, used=12 * MIB))
    assert cgroup.memory_limit(fake.proc) == MemoryLimit(10 * MIB, 12 * MIB, 0)


def test_the_path_of_the_host_is_not_followed_in_a_container(fake: FakeProc) -> None:
    """Without a namespace the path is the host's, and the container's group is the mount itself."""
    put(fake.v1("memory", "/docker/abc", root="/docker/abc"), memory_v1(64 * MIB))
    assert limit_of(fake) == 64 * MIB


@pytest.mark.parametrize(("path", "root"), [("/../other", "/"), ("/elsewhere", "/docker")])
def test_a_group_that_is_not_mounted(fake: FakeProc, path: str, root: str) -> None:
    """Of a group outside of what is mounted, no folder above the mount is looked at."""
    point = fake.v2(path, root=root)
    put(point, memory_v2(64 * MIB))
    put(point.parent, memory_v2(1 * MIB))
    put(point.parent / "other", memory_v2(2 * MIB))
    assert limit_of(fake) == 64 * MIB


def test_of_two_mounts_the_one_that_shows_more_counts(fake: FakeProc) -> None:
    """A mount of a part and one of the whole: limits of outer groups are in the whole only."""
    part = fake.v2("/outer/inner", root="/outer/inner", name="part")
    whole = fake.mount_again("whole", "/", "cgroup2 cgroup2 rw")
    put(part, memory_v2("max"))
    put(whole / "outer/inner", memory_v2("max"))
    put(whole / "outer", memory_v2(64 * MIB))
    assert limit_of(fake) == 64 * MIB


def test_blanks_in_the_name_of_a_mount(fake: FakeProc) -> None:
    """The kernel writes a blank as \\040, and the folder is found all the same."""
    put(fake.v1("memory", "/a b", name="with a blank") / "a b", memory_v1(64 * MIB))
    assert limit_of(fake) == 64 * MIB


def test_a_group_that_is_gone_sets_no_limit(fake: FakeProc) -> None:
    """A group may be removed, or hidden, while it is looked at."""
    fake.v1("memory", "/gone (deleted)")
    fake.v2("/gone/too")
    assert cgroup.read(fake.proc) == Cgroup()


def test_files_that_cannot_be_read_or_understood_set_no_limit(fake: FakeProc) -> None:
    """Some sandboxes imitate these files badly; that is no reason to fail."""
    point = fake.v2("/a")
    (point / "a/memory.max").mkdir(parents=True)
    put(point / "a", {"cpu.max": "much"})
    put(point, {"memory.max": "some", "cpu.max": ""})
    assert cgroup.read(fake.proc) == Cgroup()


LEVELS = st.lists(
    st.tuples(
        st.none() | st.integers(0, 2**40),  # limit
        st.integers(0, 2**40),  # used
        st.integers(0, 2**40),  # of it inactive
        st.none() | st.tuples(st.integers(1000, 10**7), st.integers(1000, 10**6)),  # CPU quota
    ),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=50)  # each makes a tree of files
@given(levels=LEVELS, is_v2=st.booleans())
def test_the_smallest_of_nested_limits_counts(
    levels: list[tuple[int | None, int, int, tuple[int, int] | None]], is_v2: bool
) -> None:
    """However deep, and in both versions: each figure is the smallest of all levels."""
    with tempfile.TemporaryDirectory() as folder:
        fake = FakeProc(Path(folder))
        path = "".join(f"/{depth}" for depth in range(len(levels)))
        tops = [fake.v2(path)] * 2 if is_v2 else [fake.v1("memory", path), fake.v1("cpu", path)]
        memory_group, cpu_group = tops
        for depth, (limit, used, inactive, quota) in enumerate(levels):
            memory_group, cpu_group = memory_group / str(depth), cpu_group / str(depth)
            quota_us, period_us = quota or ("max" if is_v2 else -1, 100000)
            if is_v2:
                put(memory_group, memory_v2("max" if limit is None else limit, used, inactive))
                put(cpu_group, {"cpu.max": f"{quota_us} {period_us}"})
            else:
                no_limit = V1_NO_LIMIT if depth % 2 else -1
                put(memory_group, memory_v1(no_limit if limit is None else limit, used, inactive))
                put(cpu_group, {"cpu.cfs_quota_us": quota_us, "cpu.cfs_period_us": period_us})
        found = cgroup.read(fake.proc)
    limited = [
        (limit, max(0, used - inactive)) for limit, used, inactive, _ in levels if limit is not None
    ]
    quotas = [quota[0] / quota[1] for *_, quota in levels if quota is not None]
    assert found.cpu_quota_cores == min(quotas, default=None)
    if not limited:
        assert found.memory is None
        return
    assert found.memory is not None
    assert found.memory.limit_bytes == min(limit for limit, _ in limited)
    assert (found.memory.limit_bytes, found.memory.used_bytes) in limited
    assert found.memory.available_bytes == min(max(0, limit - used) for limit, used in limited)


def test_a_process_that_is_moved_is_found_again(fake: FakeProc) -> None:
    """The location of groups is cached, but neither the group of the process nor the limits."""
    top = fake.v2("/a")
    for name, limit in (("a", 64 * MIB), ("b", 32 * MIB)):
        put(top / name, memory_v2(limit))
    assert limit_of(fake) == 64 * MIB
    (fake.proc / "cgroup").write_text("0::/b\n")
    assert limit_of(fake) == 32 * MIB
    put(top / "b", memory_v2(16 * MIB))
    assert limit_of(fake) == 16 * MIB
