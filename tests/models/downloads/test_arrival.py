"""The map of what has arrived: the same for whoever wrote it and whoever looks, and never believed
when it is damaged."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orion_oie.models.downloads.arrival import (
    BLOCK_BYTES,
    ArrivalMap,
    ArrivalState,
)

BLOCK = 10
FACTS = {"etag": '"é"', "sha256": None, "revision": "abc"}
HEADER_BYTES = 4096
STATE_AT = 24
SAME_FOLDER = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def new_map(folder: Path, size: int, **kwargs: Any) -> ArrivalMap:
    return ArrivalMap.create(folder / "map", size, FACTS, **{"block_bytes": BLOCK, **kwargs})


# -- what it says


def test_a_new_map(tmp_path: Path) -> None:
    """Nothing has arrived; it says what is fetched, of what size, and leaves one file."""
    arrival = ArrivalMap.create(tmp_path / "map", 3 * BLOCK_BYTES + 1, FACTS)
    assert (arrival.size, arrival.block_bytes, arrival.blocks) == (
        3 * BLOCK_BYTES + 1,
        BLOCK_BYTES,
        4,
    )
    assert arrival.facts == FACTS
    assert arrival.state is ArrivalState.ARRIVING
    assert arrival.arrived_bytes == 0
    assert arrival.contiguous(0) == 0
    assert not any(arrival.has_block(block) for block in range(4))
    assert list(tmp_path.iterdir()) == [tmp_path / "map"]


def test_a_new_map_replaces_an_old_one(tmp_path: Path) -> None:
    """Marks of another file are gone; who still has the old map open keeps it."""
    old = new_map(tmp_path, 25)
    old.mark(0)
    new = new_map(tmp_path, 45)
    assert (new.size, new.arrived_bytes) == (45, 0)
    assert (old.size, old.arrived_bytes) == (25, 10)


def test_it_survives_its_writer(tmp_path: Path) -> None:
    """Opened again it has the same marks, facts and state."""
    arrival = new_map(tmp_path, 25)
    arrival.mark(2)
    arrival.state = ArrivalState.FAILED
    del arrival
    again = ArrivalMap.open(tmp_path / "map", is_writable=True)
    assert (again.size, again.facts, again.state) == (25, FACTS, ArrivalState.FAILED)
    assert [again.has_block(block) for block in range(3)] == [False, False, True]
    again.state = ArrivalState.COMPLETE
    assert again.state is ArrivalState.COMPLETE


@pytest.mark.parametrize(("size", "last"), [(1, 1), (19, 9), (20, 10), (21, 1)])
def test_the_last_block_may_be_short(tmp_path: Path, size: int, last: int) -> None:
    """It ends with the file, and counts for as many bytes as it has."""
    arrival = new_map(tmp_path, size)
    block = arrival.blocks - 1
    assert arrival.bounds(block) == (size - last, size)
    arrival.mark(block)
    assert arrival.arrived_bytes == last
    assert arrival.has(size - last, size)
    assert arrival.contiguous(size - last) == size


def test_an_empty_file(tmp_path: Path) -> None:
    """It is all here."""
    arrival = new_map(tmp_path, 0)
    assert (arrival.blocks, arrival.arrived_bytes, arrival.contiguous(0)) == (0, 0, 0)
    assert arrival.has(0, 0)


@SAME_FOLDER
@given(data=st.data(), size=st.integers(1, 95), block_bytes=st.integers(1, 12))
def test_as_a_set_of_bytes(
    tmp_path: Path, data: st.DataObject, size: int, block_bytes: int
) -> None:
    """Whatever is marked in whatever order: every question has the answer that a set of bytes
    gives, for the writer and for another handle."""
    writer = new_map(tmp_path, size, block_bytes=block_bytes)
    reader = ArrivalMap.open(tmp_path / "map")
    here: set[int] = set()
    for block in data.draw(st.lists(st.integers(0, writer.blocks - 1), max_size=12)):
        writer.mark(block)
        here |= set(range(*writer.bounds(block)))
        start = data.draw(st.integers(0, size - 1))
        end = data.draw(st.integers(0, size))
        for arrival in (writer, reader):
            assert arrival.arrived_bytes == len(here)
            assert arrival.has(start, end) == here.issuperset(range(start, end))
            gap = next((at for at in range(start, size) if at not in here), size)
            assert arrival.contiguous(start) == gap
            for each in range(arrival.blocks):
                assert arrival.has_block(each) == (each * block_bytes in here)
    assert set().union(*(range(*writer.bounds(b)) for b in range(writer.blocks))) == set(
        range(size)
    )


def test_another_process_sees_a_mark_at_once(tmp_path: Path) -> None:
    """Both ways: what this one marks, and what that one marks before it is killed."""
    arrival = new_map(tmp_path, 25)
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path\n"
            "from orion_oie.models.downloads.arrival import ArrivalMap\n"
            "arrival = ArrivalMap.open(Path(sys.argv[1]), is_writable=True)\n"
            "for line in sys.stdin:\n"
            "    print(arrival.arrived_bytes, flush=True)\n"
            "    arrival.mark(int(line))\n"
            "    print('marked', flush=True)\n",
            str(tmp_path / "map"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        for ours, theirs, before in [(2, 0, 5), (1, 1, 25)]:
            arrival.mark(ours)
            child.stdin.write(f"{theirs}\n")
            child.stdin.flush()
            assert child.stdout.readline() == f"{before}\n"
            assert child.stdout.readline() == "marked\n"
            assert arrival.has_block(theirs)
    finally:
        child.kill()
        child.communicate()
    assert ArrivalMap.open(tmp_path / "map").arrived_bytes == 25


# -- what it refuses


def test_who_only_looks_cannot_mark(tmp_path: Path) -> None:
    """A map is opened for looking unless told otherwise."""
    new_map(tmp_path, 25)
    with pytest.raises(TypeError):
        ArrivalMap.open(tmp_path / "map").mark(0)


def test_there_is_none(tmp_path: Path) -> None:
    """That is an error of the system, not one of the map."""
    with pytest.raises(FileNotFoundError):
        ArrivalMap.open(tmp_path / "map")


def test_facts_that_do_not_fit(tmp_path: Path) -> None:
    """They are refused before anything is written."""
    with pytest.raises(ValueError, match="do not fit"):
        ArrivalMap.create(tmp_path / "map", 25, {"url": "x" * HEADER_BYTES})
    assert list(tmp_path.iterdir()) == []


def at(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:offset] + value + content[offset + len(value) :]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:10], id="shorter than its numbers"),
        pytest.param(lambda content: content[:100], id="shorter than its header"),
        pytest.param(lambda content: content[:-1], id="a mark too few"),
        pytest.param(lambda content: content + b"\0", id="a mark too many"),
        pytest.param(lambda content: bytes(len(content)), id="zeros"),
        pytest.param(at(0, b"x"), id="no map"),
        pytest.param(at(8, b"\2"), id="another version"),
        pytest.param(at(12, bytes(4)), id="blocks of no size"),
        pytest.param(at(16, b"\xff" * 8), id="another size"),
        pytest.param(at(STATE_AT, b"\7"), id="no state"),
        pytest.param(at(32, b"}"), id="facts that are no JSON"),
        pytest.param(at(32, b"\xff"), id="facts that are no text"),
        pytest.param(at(32, b"[1]\0"), id="facts without names"),
        pytest.param(at(HEADER_BYTES + 1, b"\x55"), id="a mark that is none"),
    ],
)
def test_a_damaged_map(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """It is refused as a whole."""
    new_map(tmp_path, 25).mark(0)
    path = tmp_path / "map"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError):  # noqa: PT011 (whatever it says)
        ArrivalMap.open(path)


@SAME_FOLDER
@given(
    start=st.integers(0, HEADER_BYTES + 3),
    noise=st.binary(min_size=1, max_size=40),
    cut=st.integers(0, HEADER_BYTES + 43),
)
def test_any_damage_is_survived(tmp_path: Path, start: int, noise: bytes, cut: int) -> None:
    """A map with any bytes in it opens, or raises `ValueError`; no question crashes it then."""
    new_map(tmp_path, 25).mark(0)
    path = tmp_path / "map"
    path.write_bytes(at(start, noise)(path.read_bytes())[:cut])
    try:
        arrival = ArrivalMap.open(path)
    except ValueError:
        return
    assert 0 <= arrival.arrived_bytes <= arrival.size
    assert arrival.contiguous(0) <= arrival.size
    assert arrival.state in ArrivalState
    assert all(arrival.has_block(block) in (True, False) for block in range(arrival.blocks))
