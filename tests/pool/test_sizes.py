"""Estimates are corrected by what was measured, and the measurements outlive the process."""

from pathlib import Path

import pytest
from contracts import INFO
from hypothesis import given
from hypothesis import strategies as st

from orion_oie.backends.base import Footprint, LoadSpec
from orion_oie.pool.footprint_ledger import (
    FILE_NAME,
    FootprintLedger,
    Record,
)
from orion_oie.pool.sizes import (
    ModelSizes,
    corrected,
)

SPEC = LoadSpec(INFO, ())
sizes = st.integers(0, 1 << 40)
footprints = st.builds(Footprint, sizes, sizes, sizes, sizes, sizes)


def sizes_of(ledger: FootprintLedger, estimate: Footprint) -> ModelSizes:
    return ModelSizes(lambda _spec: estimate, ledger)


@given(footprints, st.integers(1, 1 << 42))
def test_a_correction_says_what_was_seen(estimate: Footprint, peak: int) -> None:
    """The total becomes what was measured; what may come later never shrinks below what was
    promised before, and no part is negative."""
    new = corrected(estimate, peak)
    assert new.total_bytes == peak
    assert new.is_measured
    parts = (new.weights_bytes, new.kv_bytes, new.compute_bytes, new.process_bytes)
    assert min(*parts, new.growth_bytes) >= 0
    if peak >= estimate.total_bytes:
        assert new.max_bytes == max(peak, estimate.max_bytes)
    else:
        assert new.growth_bytes == estimate.growth_bytes


def test_what_was_measured_goes_over_the_estimate() -> None:
    """The next load of the same variant is reserved for what the last one took."""
    ledger = FootprintLedger()
    sizes = sizes_of(ledger, Footprint(100, 50, 30, 20, growth_bytes=10))
    assert sizes.max_bytes(SPEC) == 210
    sizes.note_peak(SPEC, 150)
    sizes.note_peak(SPEC, 140)
    assert sizes.footprint(SPEC).total_bytes == 150
    assert sizes.max_bytes(SPEC) == 160


def test_other_settings_are_another_thing() -> None:
    """What was measured with one context says nothing of another, nor of changed weights."""
    ledger = FootprintLedger()
    sizes = sizes_of(ledger, Footprint(100, 50, 30, 20))
    sizes.note_peak(LoadSpec(INFO, (), context_length=64), 500)
    assert not sizes.footprint(SPEC).is_measured
    sizes.note_peak(SPEC, 500)
    assert not sizes_of(ledger, Footprint(101, 50, 30, 20)).footprint(SPEC).is_measured


def test_measurements_outlive_the_process(tmp_path: Path) -> None:
    """What one ledger saved, another reads, and two that write do not lose each other's."""
    one, other = FootprintLedger(tmp_path / FILE_NAME), FootprintLedger(tmp_path / FILE_NAME)
    other.note_peak("b", 7)
    one.note_peak("a", 5)
    one.note_load("a", 1.5)
    one.save()
    other.save()
    assert FootprintLedger(tmp_path / FILE_NAME).get("a") == Record(5, 1.5)
    assert FootprintLedger(tmp_path / FILE_NAME).get("b") == Record(7, 0.0)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_small_changes_are_not_written(tmp_path: Path) -> None:
    """A file is written when something is new, not with each byte."""
    path = tmp_path / FILE_NAME
    ledger = FootprintLedger(path)
    ledger.note_peak("a", 1000)
    ledger.save()
    path.unlink()
    ledger.note_peak("a", 1010)
    ledger.save()
    assert not path.exists()
    ledger.note_peak("a", 1100)
    ledger.save()
    assert path.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 3}', '{"a": {"peak_bytes": "x"}}'])
def test_a_damaged_file_is_told_and_forgotten(tmp_path: Path, text: str) -> None:
    """What cannot be read costs what it said, and nothing else."""
    (tmp_path / FILE_NAME).write_text(text)
    told: list[str] = []
    ledger = FootprintLedger(tmp_path / FILE_NAME, told.append)
    assert ledger.get("a") == Record()
    assert len(told) == 1
    ledger.note_peak("a", 3)
    ledger.save()
    assert FootprintLedger(tmp_path / FILE_NAME).get("a") == Record(3, 0.0)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """No folder for the file: the engine goes on, and says so."""
    (tmp_path / "file").write_text("")
    told: list[str] = []
    ledger = FootprintLedger(tmp_path / "file" / FILE_NAME, told.append)
    ledger.note_peak("a", 3)
    ledger.save()
    assert len(told) == 1
    assert "cannot be kept" in told[0]
