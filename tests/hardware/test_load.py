"""How busy the cores are, from files as Linux writes them."""

import os
from pathlib import Path

import pytest

from orion_oie.hardware.load import CoreLoad, CoreLoadMeter

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(not CORES, reason="needs Linux")


class Stat:
    """A machine with the cores of this process and one that it may not use."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "stat"
        self.now = self.own = self.idle = 0.0
        self.meter = CoreLoadMeter(self.file, lambda: self.now, lambda: self.own)
        self.write()

    def write(self) -> None:
        other = max(CORES) + 1
        ticks = round(self.idle * os.sysconf("SC_CLK_TCK") / len(CORES) / 2)
        lines = [f"cpu{core} 1 2 3 {ticks} {ticks} 0 0 0 0 0" for core in CORES]
        # Some kernels leave columns out; a core that this process may not use is always idle.
        foreign = f"cpu{other} 1 2 3 999999 5"
        self.file.write_text("\n".join(["cpu 9 9 9 9 9", *lines, foreign, "intr 12 3", "ctxt 1"]))

    def after(self, seconds: float, *, idle: float, own: float) -> CoreLoad | None:
        self.now += seconds
        self.idle += idle * seconds
        self.own += own * seconds
        self.write()
        return self.meter.read()


@pytest.fixture
def stat(tmp_path: Path) -> Stat:
    return Stat(tmp_path)


def test_others_use_what_is_neither_idle_nor_used_by_this_process(stat: Stat) -> None:
    assert stat.meter.read() is None
    cores = len(CORES)
    load = stat.after(0.5, idle=0.0, own=cores - 1)
    assert load is not None
    assert load.cores == cores
    assert load.others == pytest.approx(1.0, abs=0.05)


def test_a_lone_process_has_no_others(stat: Stat) -> None:
    stat.meter.read()
    load = stat.after(0.5, idle=0.0, own=len(CORES))
    assert load is not None
    assert load.others == pytest.approx(0.0, abs=0.05)


def test_an_idle_machine_has_no_others(stat: Stat) -> None:
    stat.meter.read()
    load = stat.after(0.5, idle=len(CORES), own=0.0)
    assert load is not None
    assert load.others == pytest.approx(0.0, abs=0.05)


def test_a_short_time_is_added_to_the_next(stat: Stat) -> None:
    """The counters are too coarse for it."""
    stat.meter.read()
    assert stat.after(0.01, idle=0.0, own=0.0) is None
    load = stat.after(0.5, idle=len(CORES), own=0.0)
    assert load is not None
    assert load.others < 0.1


def test_a_long_time_says_nothing_of_now(stat: Stat) -> None:
    stat.meter.read()
    assert stat.after(60, idle=0.0, own=0.0) is None
    assert stat.after(0.5, idle=0.0, own=0.0) is not None


@pytest.mark.parametrize("content", ["", "cpu 1 2 3 4 5", "cpu 1\ncpu0 x y", "cpu 1\ncpu0 1", "\0"])
def test_a_file_of_another_kind_is_not_understood(tmp_path: Path, content: str) -> None:
    (tmp_path / "stat").write_text(content)
    meter = CoreLoadMeter(tmp_path / "stat")
    assert not meter.is_supported
    assert meter.read() is None


def test_a_system_without_the_file_tells_nothing(tmp_path: Path) -> None:
    meter = CoreLoadMeter(tmp_path / "none")
    assert not meter.is_supported
    assert meter.read() is None


def test_this_system_tells(tmp_path: Path) -> None:
    assert CoreLoadMeter().is_supported
