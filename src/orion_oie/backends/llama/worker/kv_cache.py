"""What the slots hold: sequences in the KV cache, and beside it those that left it.

Keeps llama.cpp's memory, the books of its cells and the slots in step. Decides nothing: what to
park and where to start is the batcher's choice.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from orion_oie.backends.llama.worker.host_cache import (
    ParkedState,
    ParkingLot,
)
from orion_oie.backends.llama.worker.kv_cells import Cells
from orion_oie.backends.llama.worker.native import NativeModel
from orion_oie.backends.llama.worker.prefix_match import (
    MIN_GAIN,
    Start,
    common_length,
)
from orion_oie.backends.llama.worker.prefix_store import Snapshots
from orion_oie.backends.llama.worker.tasks import (
    Slot,
    Task,
)

# Shorter states are computed again sooner than they are looked after.
MIN_PARKED = 32
MIN_PREFIX = MIN_GAIN

# Tokens that are moved at once: what is copied of them lies in memory twice for a moment.
MOVED_TOKENS = 128


class KVCache:
    """The sequences of a model, none at first. `parked_bytes` None: as much as the cache itself
    has. `snapshots` keep prefixes beyond the life of the process."""

    def __init__(
        self, model: NativeModel, parked_bytes: int | None, snapshots: Snapshots | None = None
    ) -> None:
        self._model = model
        self._model.clear()
        self._parked_bytes = parked_bytes
        self._snapshots = snapshots
        self.cells = Cells(model.context_length)
        self.lot = ParkingLot(parked_bytes or 0)

    def move_to(self, model: NativeModel, snapshots: Snapshots | None) -> None:
        """Go on with the empty cache of another context; the slots must hold nothing. What is
        parked stays: states fit any context of the same model."""
        self._model = model
        self._model.clear()
        self._snapshots = snapshots
        self.cells = Cells(model.context_length)

    def append(self, slot: Slot, tokens: Sequence[int]) -> None:
        """Note that the model computed more tokens of a slot."""
        slot.tokens += tokens
        self.cells.grow(slot.cells, len(tokens))

    def take(self, slot: Slot, start: Start) -> None:
        """Give a slot the state that its task starts from; nothing if that cannot be had."""
        if start.slot is slot:
            self.rewind(slot, start.length)
            return
        if start.parked is not None:
            with self.lot.pinned(start.parked):
                self.park(slot)
            self._restore(slot, start.parked)
            self.rewind(slot, start.length)
            return
        self.park(slot)
        if start.slot is not None and self._model.share(start.slot.index, slot.index, start.length):
            self.cells.share(start.slot.cells, slot.cells, start.length)
            slot.tokens[:] = start.slot.tokens[: start.length]
            slot.rough_tokens = min(start.slot.rough_tokens, start.length)

    def _restore(self, slot: Slot, state: ParkedState) -> None:
        if len(state.tokens) > self.cells.free - len(self.cells.retired):
            self.sweep()
        if not self._model.restore(slot.index, state.data):
            return
        self.append(slot, state.tokens)
        slot.rough_tokens = state.rough_tokens
        self.lot.touch(state)
        if state.is_preempted:
            self.lot.remove(state)

    def rewind(self, slot: Slot, length: int) -> None:
        """Cut a slot's state back; nothing is left of it when the model cannot."""
        if length >= len(slot.tokens):
            return
        if not self._model.can_move and not (length and self._model.rewind(slot.index, length)):
            length = 0
        self._give_up(slot, length)

    def clear(self, slot: Slot) -> None:
        """Forget what a slot holds."""
        self._give_up(slot, 0)

    def _give_up(self, slot: Slot, length: int) -> None:
        if self._model.can_move:
            self._model.retire(slot.index, length)
        elif length == 0:
            self._model.forget(slot.index)
        self.cells.retire(slot.cells, length)
        del slot.tokens[length:]
        slot.rough_tokens = min(slot.rough_tokens, length)
        if not self._model.can_move:
            self.cells.sweep()

    # -- the order of cells

    def sweep(self) -> None:
        """Free the cells that were given up."""
        if self.cells.retired:
            self._model.sweep()
            self.cells.sweep()

    def make_way(self, shares: Sequence[tuple[Slot, int]], slots: Iterable[Slot]) -> None:
        """Let the next cells of each sequence lie above those that it has: attention adds up in
        the order of the cells, and comes out otherwise in any other. `shares` is how many tokens
        which slots get, in the order of the batch; `slots` are all there are."""
        if not self._model.can_move:
            return
        wanted = sum(share for _, share in shares)
        if wanted > self.cells.free - len(self.cells.retired):
            self.sweep()
        new = iter(self.cells.next(wanted))
        for slot, share in shares:
            first = [next(new) for _ in range(share)][0]  # noqa: RUF015 (all are taken)
            if slot.cells and slot.cells[-1] > first:
                self._compact(list(slots))
                return

    def _compact(self, slots: Sequence[Slot]) -> None:
        """Move the sequences of all tasks to the lowest cells; silent ones stay where they are,
        but for what they have in common with others."""
        self.sweep()
        done = dict.fromkeys(slots, 0)
        for slot in slots:
            while slot.task is not None and done[slot] < len(slot.cells):
                start = done[slot]
                holders = [s for s in slots if s.cells[start : start + 1] == [slot.cells[start]]]
                limit = start + MOVED_TOKENS
                end = min(common_length(slot.cells, s.cells, limit) for s in holders)
                if slot.cells[end - 1] > self.cells.lowest_free:
                    self._model.move([s.index for s in holders], start, end)
                    self.cells.move([s.cells for s in holders], start, end)
                done.update(dict.fromkeys(holders, end))

    # -- states that leave and come back

    def is_new_prefix(self, task: Task) -> bool:
        """True when the state at the end of a task's prefix should be kept, and is not."""
        length = task.prefix_tokens
        return length >= MIN_PREFIX and not self.lot.has_prefix(task.tokens[:length])

    def recall_prefix(self, task: Task) -> None:
        """Read the state of a task's prefix from the disk, if it is neither here nor new."""
        if self._snapshots is None or not self.is_new_prefix(task):
            return
        tokens = task.tokens[: task.prefix_tokens]
        state = self._snapshots.find(tokens)
        if state is None:
            return
        buffer = self._buffer_for(len(state), len(tokens))
        if buffer is not None:
            buffer[:] = state
            self.lot.add(ParkedState(tokens, buffer, is_prefix=True))

    def keep_prefix(self, slot: Slot, task: Task) -> None:
        """Copy the state of a task's prefix, which the slot holds, for the agent's other
        requests."""
        length = task.prefix_tokens
        tokens = slot.tokens[:length]
        with self._model.beginning(slot.index, length, len(slot.tokens)) as sequence:
            state = self._keep(sequence, ParkedState(tokens, is_prefix=True))
        if state is not None and self._snapshots is not None and task.is_prefix_public:
            self._snapshots.save(tokens, state.data)

    def can_keep_prefix(self, slot: Slot, task: Task) -> bool:
        """True when the slot's state shows that of the task's prefix, which is not kept yet. What
        was computed roughly is kept for nobody else."""
        held, length = len(slot.tokens), task.prefix_tokens
        is_shown = held == length or (held > length and self._model.can_move)
        return is_shown and not slot.rough_tokens and self.is_new_prefix(task)

    def park(self, slot: Slot, *, is_preempted: bool = False) -> ParkedState | None:
        """Move a slot's state to the host's memory; None when it is not kept there, or was
        already."""
        is_kept = self.lot.has_state(slot.tokens, or_longer=self._model.saves_whole_states)
        state = None
        if len(slot.tokens) >= MIN_PARKED and not is_kept:
            state = ParkedState(
                list(slot.tokens),
                session_id=slot.session_id,
                is_preempted=is_preempted,
                rough_tokens=slot.rough_tokens,
            )
            state = self._keep(slot.index, state)
        self.clear(slot)
        return state

    def unpin(self, task: Task) -> None:
        """A task that was preempted goes on, or never will: its state is like any other."""
        if task.parked is not None:
            task.parked.is_preempted = False
            task.parked = None

    def _keep(self, sequence: int, state: ParkedState) -> ParkedState | None:
        """Fill a state with that of a sequence, and keep it; None without room for it."""
        size = self._model.state_bytes(sequence)
        buffer = self._buffer_for(size, len(state.tokens), is_preempted=state.is_preempted)
        if buffer is None:
            return None
        state.data = buffer
        self._model.save(sequence, buffer)
        if not state.is_prefix and self._model.saves_whole_states:
            self.lot.drop_beginnings_of(state.tokens)  # the longer one can be cut back to them
        self.lot.add(state)
        return state

    def _buffer_for(
        self, size: int, tokens: int, *, is_preempted: bool = False
    ) -> NDArray[np.uint8] | None:
        if self._parked_bytes is None:
            self._parked_bytes = size * self.cells.capacity // tokens
            self.lot = ParkingLot(self._parked_bytes)
        return self.lot.room_for(size, is_preempted=is_preempted)
