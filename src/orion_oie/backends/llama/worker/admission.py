"""Who gets cells, and what makes way for them: the policy of the cache's room.

A task is admitted when there is room for its prompt and the beginning of its answer. What is
silent leaves the cache while others run, because every taken cell slows every step down.
Knows the slots and changes what they hold, through `kvcache.py`; knows no batches.
"""

from collections.abc import Sequence

from orion_oie.backends.llama.worker.kv_cache import KVCache
from orion_oie.backends.llama.worker.native import NativeModel
from orion_oie.backends.llama.worker.prefix_match import (
    best_awaited,
    reusable,
)
from orion_oie.backends.llama.worker.tasks import (
    Slot,
    Task,
)

# Room for this much of an answer is kept free when a task is admitted. Most answers are far
# shorter than what they may take; one that outgrows the room parks the youngest of its neighbours.
GROWTH = 64

# llama.cpp looks at the cells in use in runs of this many: silent cells that make no run more cost
# nothing.
CELL_RUN = 256

# Of a lone row, and from this many cells on, llama.cpp computes attention in two parts, which it
# rounds otherwise.
SPLIT_CELLS = 512 - CELL_RUN + 1

# Cells that were given up are left alone until they are this part of the others: freeing them makes
# it necessary to move sequences.
MOST_RETIRED = 1 / 8


class Room:
    """The room of one model's KV cache, shared out among its slots."""

    def __init__(self, model: NativeModel, slots: Sequence[Slot], kv: KVCache) -> None:
        self._model = model
        self._slots = slots
        self._kv = kv

    def silent(self) -> list[Slot]:
        """The slots that hold state for nobody, the longest unused first."""
        silent = [slot for slot in self._slots if slot.task is None and slot.tokens]
        return sorted(silent, key=lambda slot: slot.last_used)

    # -- for a new task

    def reserve(self, chosen: Slot, task: Task, busy: Sequence[Slot]) -> bool:
        """Make sure that there are cells for the task, parking silent sequences if that helps."""
        wanted = _promised(task) - self._shareable(chosen, task)
        for slot in busy:
            assert slot.task is not None
            expected = slot.awaited.length if slot.awaited is not None else 0
            wanted += max(0, _promised(slot.task) - max(len(slot.tokens), expected))
        if wanted <= self._kv.cells.free:
            return True
        others = [slot for slot in self.silent() if slot is not chosen]
        kept = {cell for slot in busy for cell in slot.cells}
        kept.update(chosen.cells[: reusable(chosen.tokens, task, is_rewindable=True)])
        # Alone, a task can always start.
        if wanted > self._kv.cells.capacity - len(kept) and busy:
            return False
        for slot in others:
            if wanted <= self._kv.cells.free:
                break
            self._kv.park(slot)
        return True

    def _shareable(self, chosen: Slot, task: Task) -> int:
        """How many cells the task will not need, because others hold or compute them."""
        if not self._model.is_rewindable:
            return reusable(chosen.tokens, task, is_rewindable=False)
        held = max(
            reusable(slot.tokens, task, is_rewindable=True)
            for slot in self._slots
            if slot.task or slot is chosen
        )
        awaited = best_awaited(chosen, task, self._slots, is_rewindable=True)
        return max(held, awaited.length if awaited else 0)

    # -- for those who run

    def tidy(self, busy: Sequence[Slot]) -> None:
        """Take what nobody uses out of the way of the running sequences: silent ones, one for each
        step, then the cells that were given up. Not before the first token of a lone request, which
        has waited long enough."""
        if not busy:
            self._kv.sweep()
            return
        cells = self._kv.cells
        silent = self.silent()
        is_running = any(slot.pending == 1 for slot in busy)
        if not is_running or not (silent or cells.retired):
            return
        needed = cells.used - sum(len(slot.cells) for slot in silent)
        if _runs(needed) >= _runs(cells.top):
            return
        if silent:
            self._kv.park(silent[0])
        elif len(cells.retired) >= MOST_RETIRED * needed:
            self._kv.sweep()

    @property
    def is_split(self) -> bool:
        """True when a batch of one row would be rounded otherwise than one of several."""
        return self._model.can_move and self._kv.cells.top >= SPLIT_CELLS

    def tidy_for_one(self) -> None:
        """Take all that is silent out of the way of a lone row, if that keeps its rounding."""
        silent = self.silent()
        needed = self._kv.cells.used - sum(len(slot.cells) for slot in silent)
        if needed < SPLIT_CELLS:
            for slot in silent:
                self._kv.park(slot)
            self._kv.sweep()


def _promised(task: Task) -> int:
    """Cells that a task is sure to get once it runs."""
    if task.is_preempted:
        return task.most_tokens
    return min(task.most_tokens, len(task.tokens) + GROWTH)


def _runs(cells: int) -> int:
    return -(-cells // CELL_RUN)
