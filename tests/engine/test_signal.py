"""A signal calls what was connected to it."""

import pytest

from orion_oie.engine.signal import Signal


def test_a_signal_calls_everything_in_order() -> None:
    """With the arguments that it got; without a connection it calls nothing."""
    signal: Signal[[str, int]] = Signal()
    signal("nobody", 0)
    seen: list[object] = []
    signal.connect(lambda name, number: seen.append((name, number)))
    signal.connect(lambda name, number: seen.append(name * number))
    signal("ab", 2)
    assert seen == [("ab", 2), "abab"]


def test_what_a_callback_raises_comes_out() -> None:
    """A bug of one part is not hidden from the other."""
    signal: Signal[[]] = Signal()
    signal.connect(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        signal()
