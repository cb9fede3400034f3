"""Pressure rises at once, falls when it is sure, and does not waver."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_oie.errors import InvalidRequestError
from orion_oie.hardware.pressure import (
    DEFAULT_THRESHOLDS,
    PressureGauge,
    PressureLevel,
    Threshold,
    level_of,
)
from orion_oie.hardware.probe import SystemMemory

GIB = 2**30
MARGIN = 0.2
CALM_SAMPLES = 5
LOW, MEDIUM, HIGH, CRITICAL = PressureLevel

TOTALS = st.integers(GIB // 4, 4096 * GIB)


def have(available_gib: float, total_gib: float = 16) -> SystemMemory:
    return SystemMemory(int(total_gib * GIB), int(available_gib * GIB))


def test_levels_are_ordered() -> None:
    """From low to critical, although the words themselves sort otherwise."""
    assert sorted(["medium", "low", "critical", "high"]) != [*PressureLevel]
    assert (
        sorted([MEDIUM, LOW, CRITICAL, HIGH]) == [*PressureLevel] == [LOW, MEDIUM, HIGH, CRITICAL]
    )
    for a, b in itertools.product(PressureLevel, repeat=2):
        assert (a < b, a <= b, a > b, a >= b) == (
            a.rank < b.rank,
            a.rank <= b.rank,
            a.rank > b.rank,
            a.rank >= b.rank,
        )
    assert f"{HIGH}" == "high"


@pytest.mark.parametrize(
    ("available_gib", "total_gib", "level"),
    [
        (4, 16, LOW),
        (3.9, 16, MEDIUM),
        (1.7, 16, MEDIUM),
        (1.5, 16, HIGH),
        (0.7, 16, CRITICAL),
        (0, 16, CRITICAL),
        (40, 512, LOW),  # 8 %, but 40 GiB
        (31, 512, MEDIUM),
        (7.9, 512, HIGH),
        (3.9, 512, CRITICAL),
        (0.06, 0.3, MEDIUM),
        (0.02, 0.3, HIGH),
        (0.01, 0.3, CRITICAL),
    ],
)
def test_shares_of_the_total_and_caps(
    available_gib: float, total_gib: float, level: PressureLevel
) -> None:
    """25, 10 and 5 percent, but never with 32, 8 and 4 GiB left."""
    assert level_of(have(available_gib, total_gib)) is level


def test_a_gauge_begins_low() -> None:
    """Before the first sample nothing is known to be short, and the first one counts at once."""
    gauge = PressureGauge()
    assert gauge.level is LOW
    assert gauge.update(have(0.1)) is gauge.level is CRITICAL


def test_a_level_falls_after_some_calm_samples() -> None:
    """Not before the fifth calm sample in a row, and then as far as they all allow."""
    gauge = PressureGauge(calm_samples=CALM_SAMPLES)
    gauge.update(have(0.1))
    calm = [gauge.update(have(10)) for _ in range(CALM_SAMPLES)]
    assert calm == [CRITICAL] * (CALM_SAMPLES - 1) + [LOW]


def test_calm_must_be_uninterrupted() -> None:
    """One sample within the margin, and the count begins anew."""
    gauge = PressureGauge(margin=MARGIN, calm_samples=CALM_SAMPLES)
    threshold = 0.05 * 16
    gauge.update(have(threshold * 0.99))
    for _ in range(3):
        assert all(gauge.update(have(10)) is CRITICAL for _ in range(CALM_SAMPLES - 1))
        assert gauge.update(have(threshold * 1.19)) is CRITICAL


def test_a_level_falls_to_the_worst_of_the_calm_samples() -> None:
    """Among samples that allow more, one that allows MEDIUM decides, until it is old."""
    gauge = PressureGauge(calm_samples=CALM_SAMPLES)
    gauge.update(have(0.1))
    gauge.update(have(3))
    levels = [gauge.update(have(10)) for _ in range(CALM_SAMPLES)]
    assert levels == [CRITICAL] * (CALM_SAMPLES - 2) + [MEDIUM, LOW]


@given(
    total=TOTALS,
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=60),
    calm_samples=st.integers(1, 6),
)
def test_a_level_never_lags_upward(total: int, shares: list[float], calm_samples: int) -> None:
    """It is never below what the sample says, and falls only after calm samples in a row."""
    gauge = PressureGauge(margin=MARGIN, calm_samples=calm_samples)
    samples = [SystemMemory(total, int(share**3 * total)) for share in shares]
    for number, sample in enumerate(samples, start=1):
        old = gauge.level
        new = gauge.update(sample)
        assert new >= level_of(sample)
        assert new <= max(old, level_of(sample)), "it rose without a reason"
        if new < old:
            recent = samples[max(0, number - calm_samples) : number]
            assert len(recent) == calm_samples
            worst = max(level_of(one, margin=MARGIN) for one in recent)
            assert worst < old
            assert new is max(worst, level_of(sample))


@given(
    total=TOTALS,
    level=st.sampled_from([MEDIUM, HIGH, CRITICAL]),
    before=st.lists(st.floats(0, 1), max_size=12),
    wavering=st.lists(st.floats(-0.99, 0.99), min_size=2, max_size=40),
)
def test_a_wavering_figure_changes_the_level_once_at_most(
    total: int, level: PressureLevel, before: list[float], wavering: list[float]
) -> None:
    """Within the margin of a threshold, on either side: it rises once at most, or it falls while
    what came before is forgotten, and then never moves again."""
    gauge = PressureGauge(margin=MARGIN, calm_samples=CALM_SAMPLES)
    for share in before:
        gauge.update(SystemMemory(total, int(share**3 * total)))
    threshold = DEFAULT_THRESHOLDS[level].of(total)
    levels = [
        gauge.update(SystemMemory(total, int(threshold * (1 + MARGIN * offset))))
        for offset in wavering
    ]
    settled = levels[CALM_SAMPLES - 1 :]
    if levels == sorted(levels, reverse=True):
        assert len(set(settled)) <= 1
    else:
        assert levels == sorted(levels)
        assert len(set(levels)) == 2
    assert level_of(SystemMemory(total, threshold)) < level


def test_without_a_margin_it_would_waver() -> None:
    """The property above can fail: without margin and patience the same signal flaps."""
    gauge = PressureGauge(margin=0, calm_samples=1)
    levels = [gauge.update(have(4 + offset)) for offset in (0.1, -0.1) * 5]
    assert levels == [LOW, MEDIUM] * 5


@pytest.mark.parametrize(
    ("thresholds", "margin", "calm_samples", "problem"),
    [
        ({}, -0.1, 5, "margin must not be negative"),
        ({}, 0.1, 0, "calm_samples must be at least 1"),
        ({LOW: Threshold(0.5, GIB)}, 0.1, 5, "LOW"),
        (
            {HIGH: Threshold(0.1, 2 * GIB), CRITICAL: Threshold(0.09, GIB)},
            0.2,
            5,
            "share of high must be more than that of critical",
        ),
        (
            {CRITICAL: Threshold(0.1, 2 * GIB), MEDIUM: Threshold(0.2, 2 * GIB)},
            0.2,
            5,
            "cap_bytes of medium must be more than that of critical",
        ),
    ],
)
def test_thresholds_that_cannot_work_are_refused(
    thresholds: dict[PressureLevel, Threshold], margin: float, calm_samples: int, problem: str
) -> None:
    """The error names what is wrong."""
    with pytest.raises(InvalidRequestError, match=problem):
        PressureGauge(thresholds, margin=margin, calm_samples=calm_samples)


@pytest.mark.parametrize(("share", "cap_bytes"), [(0, 1), (1, 1), (-0.1, 1), (0.5, 0)])
def test_a_threshold_has_a_share_and_a_cap(share: float, cap_bytes: int) -> None:
    """Shares are between nothing and everything, caps are positive."""
    with pytest.raises(InvalidRequestError, match="threshold needs"):
        Threshold(share, cap_bytes)
