"""The allocation of KV cache cells, mirrored from llama.cpp.

llama.cpp gives a token the lowest free cell. So this module knows, without asking, which cells a
sequence has and which it will get next. A cell that several sequences share counts once. A retired
cell is held by no sequence, but stays taken until the next `free_retired`. This
module calls nothing native and decides nothing.
"""


class Cells:
    """The cells of one cache. A sequence's cells are a list of numbers, in token order; only the
    methods of this class change such a list."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.retired: set[int] = set()
        self._taken = bytearray(capacity)
        self._more_holders: dict[int, int] = {}  # for cells with more than one

    @property
    def free(self) -> int:
        """The number of cells that no sequence holds, retired ones included."""
        return self.capacity - self.used

    @property
    def top(self) -> int:
        """One more than the highest cell that is taken."""
        return self._taken.rfind(1) + 1

    @property
    def lowest_free(self) -> int:
        """The cell that the next token gets; the capacity when all are taken."""
        found = self._taken.find(0)
        return self.capacity if found < 0 else found

    def next(self, count: int) -> list[int]:
        """The cells that the next tokens get, in their order; fewer when fewer are free."""
        cells: list[int] = []
        cell = -1
        while len(cells) < count and (cell := self._taken.find(0, cell + 1)) >= 0:
            cells.append(cell)
        return cells

    def grow(self, held: list[int], count: int) -> None:
        """Add cells to the end of a sequence. Raises `ValueError` when there are too few."""
        new = self.next(count)
        if len(new) != count:
            raise ValueError(f"{count} cells are needed, but only {len(new)} can be taken")
        for cell in new:
            self._taken[cell] = 1
        held += new
        self.used += count

    def share(self, source: list[int], target: list[int], count: int) -> None:
        """Let the empty sequence `target` hold the first `count` cells of `source`, too."""
        target[:] = source[:count]
        for cell in target:
            self._more_holders[cell] = self._more_holders.get(cell, 0) + 1

    def retire(self, held: list[int], keep: int) -> int:
        """Take all but the first `keep` cells from a sequence. Returns the position from which on
        they are retired: those before it have other holders, who share a beginning."""
        retired_from = keep
        for cell in held[keep:]:
            others = self._more_holders.get(cell, 0)
            if others == 0:
                self.used -= 1
                self.retired.add(cell)
                continue
            retired_from += 1
            if others == 1:
                del self._more_holders[cell]
            else:
                self._more_holders[cell] = others - 1
        del held[keep:]
        return retired_from

    def free_retired(self) -> None:
        """Free the retired cells."""
        for cell in self.retired:
            self._taken[cell] = 0
        self.retired.clear()

    def move(self, holders: list[list[int]], start: int, end: int) -> None:
        """Move a range of tokens to the lowest free cells. The sequences in `holders` share all
        cells from `start` to `end`, and no other sequence holds them."""
        old = holders[0][start:end]
        for cell in old:
            self._taken[cell] = 0
            self._more_holders.pop(cell, None)
        new = self.next(len(old))
        for cell in new:
            self._taken[cell] = 1
            if len(holders) > 1:
                self._more_holders[cell] = len(holders) - 1
        for held in holders:
            held[start:end] = new
