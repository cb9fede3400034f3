"""The budget is what was said, or what the machine can spare without the models."""

from hypothesis import given
from hypothesis import strategies as st

from orion_oie.hardware.probe import SystemMemory
from orion_oie.pool.budget import (
    MemoryBudget,
    spared_bytes,
)

GIB = 1 << 30


def system(total: int, available: int) -> SystemMemory:
    return SystemMemory(total_bytes=total, available_bytes=available, limited_by="system")


def test_a_number_is_the_budget() -> None:
    """A fixed budget never looks at the machine."""

    def look() -> SystemMemory:
        raise AssertionError("nobody asked for that")

    budget = MemoryBudget(5 * GIB, read_system=look)
    budget.refresh()
    assert budget.bytes() == 5 * GIB


def test_auto_leaves_a_tenth_to_the_others() -> None:
    """Of 100 GiB, 10 stay free; what the models hold themselves is not lost to them."""
    assert spared_bytes(system(100 * GIB, 80 * GIB), 0) == 70 * GIB
    assert spared_bytes(system(100 * GIB, 50 * GIB), 30 * GIB) == 70 * GIB


def test_a_small_machine_keeps_half_a_gibibyte() -> None:
    """At least 512 MiB are left, but never more than half of all there is."""
    assert spared_bytes(system(2 * GIB, 2 * GIB), 0) == 2 * GIB - GIB // 2
    assert spared_bytes(system(GIB // 2, GIB // 2), 0) == GIB // 4


@given(st.integers(1, 1 << 45), st.floats(0, 1), st.integers(0, 1 << 40))
def test_loading_does_not_change_the_budget(total: int, share: float, held: int) -> None:
    """Memory that moves from available to the models leaves the budget as it was."""
    available = int(total * share)
    moved = min(held, available)
    before = spared_bytes(system(total, available), 0)
    after = spared_bytes(system(total, available - moved), moved)
    assert before == after
    assert 0 <= before <= available


def test_auto_looks_again_after_a_second() -> None:
    """It is asked often, and looks at the machine once a second at most, or is told."""
    now, looks = 0.0, []

    def look() -> SystemMemory:
        looks.append(now)
        return system(100 * GIB, (80 - len(looks)) * GIB)

    budget = MemoryBudget("auto", lambda: 0, read_system=look, clock=lambda: now)
    assert budget.bytes() == 69 * GIB
    budget.refresh()
    assert len(looks) == 1
    now = 1.5
    assert budget.bytes() == 69 * GIB
    budget.refresh()
    assert budget.bytes() == 68 * GIB
    budget.note(system(100 * GIB, 20 * GIB), 4 * GIB)
    assert budget.bytes() == 14 * GIB
