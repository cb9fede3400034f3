"""Which cells of the KV cache are held: the books of it, kept beside llama.cpp's own.

A cell that several sequences look at counts once. Nothing native here, and no decisions.
"""


class Cells:
    """Counts the cells in use. A sequence's cells are a list of numbers, in token order; only
    the methods here change such a list."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._next = 0
        self._more_holders: dict[int, int] = {}  # for cells with more than one

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def grow(self, held: list[int], count: int) -> None:
        """New cells at the end of a sequence."""
        held.extend(range(self._next, self._next + count))
        self._next += count
        self.used += count

    def share(self, source: list[int], target: list[int], count: int) -> None:
        """The empty `target` takes the first `count` cells of `source` too."""
        target[:] = source[:count]
        for cell in target:
            self._more_holders[cell] = self._more_holders.get(cell, 0) + 1

    def cut(self, held: list[int], keep: int) -> None:
        """A sequence gives up all but its first `keep` cells."""
        for cell in held[keep:]:
            others = self._more_holders.get(cell, 0)
            if others == 0:
                self.used -= 1
            elif others == 1:
                del self._more_holders[cell]
            else:
                self._more_holders[cell] = others - 1
        del held[keep:]
