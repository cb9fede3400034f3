"""The books of the KV cache: whatever sequences do, what is used is what somebody holds."""

from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from orion_oie.backends.llama.cells import Cells

CAPACITY = 1000
SEQUENCES = 4

sequences = st.integers(0, SEQUENCES - 1)
counts = st.integers(0, 6)


class CellsBooks(RuleBasedStateMachine):
    """Sequences in any order, beside a model that numbers cells in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = Cells(CAPACITY)
        self.held: list[list[int]] = [[] for _ in range(SEQUENCES)]
        self.expected: list[list[str]] = [[] for _ in range(SEQUENCES)]
        self.made = 0

    @rule(sequence=sequences, count=counts)
    def grow(self, sequence: int, count: int) -> None:
        self.cells.grow(self.held[sequence], count)
        for _ in range(count):
            self.made += 1
            self.expected[sequence].append(f"cell {self.made}")

    @rule(sequence=sequences, keep=st.integers(0, 12))
    def cut(self, sequence: int, keep: int) -> None:
        self.cells.cut(self.held[sequence], keep)
        del self.expected[sequence][keep:]

    @rule(source=sequences, taker=sequences, count=st.integers(0, 12))
    def share(self, source: int, taker: int, count: int) -> None:
        """A sequence gives up what it has and begins like another one."""
        if source == taker:
            return
        self.cells.cut(self.held[taker], 0)
        self.cells.share(self.held[source], self.held[taker], count)
        self.expected[taker] = self.expected[source][:count]

    @invariant()
    def used_is_what_somebody_holds(self) -> None:
        union = set().union(*self.expected)
        assert self.cells.used == len(union)
        assert self.cells.free == CAPACITY - len(union)

    @invariant()
    def sequences_hold_the_right_cells(self) -> None:
        """Two sequences have a cell at the same place in common where the model says so."""
        assert [len(cells) for cells in self.held] == [len(cells) for cells in self.expected]
        names = {
            (cell, name)
            for cells, model in zip(self.held, self.expected, strict=True)
            for cell, name in zip(cells, model, strict=True)
        }
        assert len(names) == len({cell for cell, _ in names}) == len({name for _, name in names})

    def teardown(self) -> None:
        for held in self.held:
            self.cells.cut(held, 0)
        assert self.cells.used == 0
        assert self.cells.free == CAPACITY


TestCellsBooks = CellsBooks.TestCase
TestCellsBooks.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def one_sequence_of(count: int) -> tuple[Cells, list[int]]:
    """Books with one sequence in them."""
    cells, held = Cells(CAPACITY), []
    cells.grow(held, count)
    return cells, held


def ends_of(cells: Cells, *sequences: list[int]) -> list[Callable[[], None]]:
    """Calls that end each of the sequences."""
    return [lambda held=held: cells.cut(held, 0) for held in sequences]


def test_shared_cells_count_once_and_go_with_their_last_holder() -> None:
    """Three holders of one beginning cost one; it is free again only when the third lets go."""
    cells, first = one_sequence_of(10)
    second: list[int] = []
    third: list[int] = []
    cells.share(first, second, 6)
    cells.share(second, third, 4)
    assert cells.used == 10
    used_after = []
    for end in ends_of(cells, first, third, second):
        end()
        used_after.append(cells.used)
    assert used_after == [6, 6, 0]


def test_a_copy_goes_its_own_way() -> None:
    """What a sequence adds or gives up after it was copied does not change the other one."""
    cells, first = one_sequence_of(5)
    second: list[int] = []
    cells.share(first, second, 5)
    cells.cut(second, 3)
    cells.grow(second, 4)
    cells.grow(first, 1)
    assert first[:3] == second[:3]
    assert not set(first[3:]) & set(second[3:])
    assert (len(first), len(second), cells.used) == (6, 7, 10)


def test_cutting_nothing_changes_nothing() -> None:
    """To keep all, or more than there is, costs nothing, also where cells are shared."""
    cells, first = one_sequence_of(5)
    second: list[int] = []
    cells.share(first, second, 5)
    for keep in (5, 6, 100):
        cells.cut(second, keep)
    assert first == second
    assert cells.used == 5
