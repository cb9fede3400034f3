"""Probes: two models are one if they compute the same, whatever they are called."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_oie.routing.linear.probes import LEAST_COSINE, NO_PROBES, PROBE_TEXTS, Probes

WIDTH = 64


def probes(seed: int, texts: tuple[str, ...] = PROBE_TEXTS) -> Probes:
    rows = np.random.default_rng(seed).normal(size=(len(texts), WIDTH)).astype(np.float32)
    return Probes(texts, rows / np.linalg.norm(rows, axis=1, keepdims=True))


def turned(one: Probes, row: int, cosine: float) -> Probes:
    """The same with one vector turned away."""
    rows, other = one.vectors.copy(), np.zeros(WIDTH, np.float32)
    other[0] = 1
    other -= (other @ rows[row]) * rows[row]
    other /= np.linalg.norm(other)
    rows[row] = cosine * rows[row] + np.sqrt(1 - cosine**2) * other
    return Probes(one.texts, rows)


@given(st.integers(0, 9), st.integers(0, len(PROBE_TEXTS) - 1), st.floats(-1, 1))
@settings(deadline=None)
def test_every_text_has_to_agree(seed: int, row: int, cosine: float) -> None:
    """One vector that is turned too far is enough, whichever it is."""
    one = probes(seed)
    assert one.agree_with(one)
    if abs(cosine - LEAST_COSINE) > 1e-4:
        expected = cosine > LEAST_COSINE
        assert one.agree_with(turned(one, row, cosine)) is expected
        assert turned(one, row, cosine).agree_with(one) is expected


def test_what_cannot_be_compared_does_not_agree() -> None:
    """Other texts, another length, and none at all."""
    one = probes(1)
    assert not one.agree_with(probes(2))
    assert not one.agree_with(Probes(PROBE_TEXTS[::-1], one.vectors))
    assert not one.agree_with(Probes(PROBE_TEXTS, one.vectors[:, :-1]))
    assert not NO_PROBES.agree_with(NO_PROBES)


@pytest.mark.parametrize("sixteen_bits", [np.float16])
def test_rounding_is_no_difference(sixteen_bits: type) -> None:
    """The vectors are kept in 16 bits."""
    one = probes(3)
    assert one.agree_with(Probes(one.texts, one.vectors.astype(sixteen_bits).astype(np.float32)))
