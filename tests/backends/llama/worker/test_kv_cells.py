"""The books of the KV cache: whatever sequences do, what is used is what somebody holds."""

from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from orion_oie.backends.llama.worker.kv_cells import Cells

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
    def retire(self, sequence: int, keep: int) -> None:
        given_up = self.held[sequence][keep:]
        retired_from = self.cells.retire(self.held[sequence], keep)
        del self.expected[sequence][keep:]
        left = set().union(*self.held)
        shared = given_up[: retired_from - keep]
        assert set(shared) <= left
        assert set(given_up[len(shared) :]) <= self.cells.retired

    @rule()
    def free_retired(self) -> None:
        self.cells.free_retired()
        assert self.cells.top == max((max(cells) + 1 for cells in self.held if cells), default=0)

    @rule(sequence=sequences, data=st.data())
    def move(self, sequence: int, data: st.DataObject) -> None:
        """The end of a sequence that nobody else has moves down, past what is free."""
        held = self.held[sequence]
        others = {cell for cells in self.held if cells is not held for cell in cells}
        shared = sum(cell in others for cell in held)
        start = data.draw(st.integers(shared, len(held)))
        before = held[start:]
        self.cells.move([held], start, len(held))
        assert all(new <= old for new, old in zip(held[start:], sorted(before), strict=True))

    @rule(source=sequences, taker=sequences, count=st.integers(0, 12))
    def share(self, source: int, taker: int, count: int) -> None:
        """A sequence gives up what it has and begins like another one."""
        if source == taker:
            return
        self.cells.retire(self.held[taker], 0)
        self.cells.share(self.held[source], self.held[taker], count)
        self.expected[taker] = self.expected[source][:count]

    @invariant()
    def used_is_what_somebody_holds(self) -> None:
        union = set().union(*self.expected)
        assert self.cells.used == len(union)
        assert self.cells.free == CAPACITY - len(union)
        taken = {cell for cells in self.held for cell in cells}
        assert not taken & self.cells.retired

    @invariant()
    def the_next_cells_are_the_lowest_that_are_not_taken(self) -> None:
        taken = self.cells.retired.union(*self.held)
        free = [cell for cell in range(CAPACITY) if cell not in taken]
        assert self.cells.next(5) == free[:5]
        assert self.cells.lowest_free == free[0]

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
            self.cells.retire(held, 0)
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
    return [lambda held=held: cells.retire(held, 0) for held in sequences]


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
    cells.retire(second, 3)
    cells.grow(second, 4)
    cells.grow(first, 1)
    assert first[:3] == second[:3]
    assert not set(first[3:]) & set(second[3:])
    assert (len(first), len(second), cells.used) == (6, 7, 10)


def test_retired_cells_are_given_to_nobody_before_a_sweep() -> None:
    """They count as free, and the next tokens still get others."""
    cells, first = one_sequence_of(10)
    cells.retire(first, 4)
    assert (cells.used, cells.free, cells.top) == (4, CAPACITY - 4, 10)
    assert cells.next(2) == [10, 11]
    cells.free_retired()
    assert (cells.used, cells.free, cells.top) == (4, CAPACITY - 4, 4)
    assert cells.next(2) == [4, 5]


def test_a_full_cache_has_no_next_cell() -> None:
    """Fewer cells than asked for, and the capacity in place of a lowest free one."""
    cells, _ = one_sequence_of(CAPACITY - 1)
    assert cells.next(3) == [CAPACITY - 1]
    cells.grow([], 1)
    assert cells.next(1) == []
    assert cells.lowest_free == CAPACITY


def test_shared_cells_move_for_all_who_share_them() -> None:
    """Two sequences have one beginning before a move, and after it."""
    cells, lead = one_sequence_of(5)
    first: list[int] = []
    second: list[int] = []
    cells.grow(first, 8)
    cells.share(first, second, 6)
    cells.grow(second, 1)
    cells.retire(lead, 0)
    cells.free_retired()
    cells.move([first, second], 0, 6)
    assert first[:6] == second[:6] == [0, 1, 2, 3, 4, 5]
    cells.retire(first, 0)
    assert cells.used == 7
    cells.retire(second, 0)
    assert cells.used == 0


def test_cutting_nothing_changes_nothing() -> None:
    """To keep all, or more than there is, costs nothing, also where cells are shared."""
    cells, first = one_sequence_of(5)
    second: list[int] = []
    cells.share(first, second, 5)
    for keep in (5, 6, 100):
        cells.retire(second, keep)
    assert first == second
    assert cells.used == 5
