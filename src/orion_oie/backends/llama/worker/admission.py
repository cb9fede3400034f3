"""Admission to the KV cache: which task gets cells, and which states make way for it.

A task is admitted when there are cells for its prompt and the beginning of its answer. Idle states
leave the cache while tasks run, because every taken cell slows every step down. This module changes
what slots hold, through `kv_cache.py`; it does not know about batches.
"""

from collections.abc import Sequence

from orion_oie.backends.llama.worker.kv_cache import KVCache
from orion_oie.backends.llama.worker.native import NativeModel
from orion_oie.backends.llama.worker.prefix_match import (
    best_awaited,
    reusable,
)
from orion_oie.backends.llama.worker.tasks import (
    Running,
    Slot,
    Task,
)

# Cells for this many tokens of an answer are reserved when a task is admitted. Most answers are far
# shorter than their limit; one that outgrows its cells preempts the youngest task beside it.
GROWTH = 64

# llama.cpp reads the used part of the cache in runs of this many cells: idle cells that do not add
# a run cost nothing.
CELL_RUN = 256

# From this many cells on, llama.cpp computes the attention of a single row in two parts, which
# rounds differently.
SPLIT_CELLS = 512 - CELL_RUN + 1

# Retired cells are freed when they are this part of the others: freeing them makes it necessary to
# move sequences.
MOST_RETIRED = 1 / 8


class Admission:
    """Shares the cells of one model's KV cache among its slots."""

    def __init__(self, model: NativeModel, slots: Sequence[Slot], kv: KVCache) -> None:
        self._model = model
        self._slots = slots
        self._kv = kv

    def idle_slots(self) -> list[Slot]:
        """The slots that hold a state but no task, least recently used first."""
        idle = [slot for slot in self._slots if slot.task is None and slot.tokens]
        return sorted(idle, key=lambda slot: slot.last_used)

    # -- for a new task

    def reserve(self, chosen: Slot, task: Task, running: Sequence[Running]) -> bool:
        """Make sure that a task can run in the free slot `chosen`; False if it has to wait.

        1. The cells that all running tasks and this one are promised, less those that they hold,
           share or await, are free: admit it.
        2. They would not be free even if all idle states left, and others run: let it wait. A
           task that would run alone is always admitted.
        3. Otherwise offload idle states, least recently used first, until there are enough cells.
        """
        wanted = _promised(task) - self._shareable(chosen, task)
        for run in running:
            expected = run.slot.awaited.length if run.slot.awaited is not None else 0
            wanted += max(0, _promised(run.task) - max(len(run.slot.tokens), expected))
        if wanted <= self._kv.cells.free:
            return True
        kept = {cell for run in running for cell in run.slot.cells}
        kept.update(chosen.cells[: reusable(chosen.tokens, task, is_rewindable=True)])
        if wanted > self._kv.cells.capacity - len(kept) and running:
            return False
        for slot in self.idle_slots():
            if wanted <= self._kv.cells.free:
                break
            if slot is not chosen:
                self._kv.offload(slot)
        return True

    def _shareable(self, chosen: Slot, task: Task) -> int:
        """The number of cells the task will not need, because other slots hold or compute them."""
        if not self._model.is_rewindable:
            return reusable(chosen.tokens, task, is_rewindable=False)
        held = max(
            reusable(slot.tokens, task, is_rewindable=True)
            for slot in self._slots
            if slot.task or slot is chosen
        )
        awaited = best_awaited(chosen, task, self._slots, is_rewindable=True)
        return max(held, awaited.length if awaited else 0)

    # -- for the running tasks

    def reclaim(self, running: Sequence[Running]) -> None:
        """Move unused cells out of the way of the running tasks, a little in each step.

        1. Nothing runs: free the retired cells.
        2. No task decodes yet (the request waits for its first token), there is nothing to
           reclaim, or reclaiming would not save a run of cells: do nothing.
        3. There are idle slots: offload the least recently used one.
        4. Many cells are retired: free them.
        """
        if not running:
            self._kv.free_retired()
            return
        cells = self._kv.cells
        idle = self.idle_slots()
        is_decoding = any(run.pending == 1 for run in running)
        if not is_decoding or not (idle or cells.retired):
            return
        needed = cells.used - sum(len(slot.cells) for slot in idle)
        if _runs(needed) >= _runs(cells.top):
            return
        if idle:
            self._kv.offload(idle[0])
        elif len(cells.retired) >= MOST_RETIRED * needed:
            self._kv.free_retired()

    @property
    def splits_lone_row(self) -> bool:
        """True when a batch of one row would be rounded differently from a batch of several."""
        return self._model.can_move and self._kv.cells.top >= SPLIT_CELLS

    def reclaim_for_lone_row(self) -> None:
        """Offload all idle slots if that keeps llama.cpp from splitting a lone row."""
        idle = self.idle_slots()
        needed = self._kv.cells.used - sum(len(slot.cells) for slot in idle)
        if needed < SPLIT_CELLS:
            for slot in idle:
                self._kv.offload(slot)
            self._kv.free_retired()


def _promised(task: Task) -> int:
    """The cells that a task is sure to get once it runs."""
    if task.is_preempted:
        return task.max_length
    return min(task.max_length, len(task.tokens) + GROWTH)


def _runs(cells: int) -> int:
    return -(-cells // CELL_RUN)
